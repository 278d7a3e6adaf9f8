"""Stage 1: train DRAW, a world model with a discrete latent state, in the source simulator.

DRAW encodes each observation x_t by itself, without recurrence, as S categorical variables z_t,
and learns dynamics f that predict them one step ahead. Its data comes from Plan2Explore
(arXiv 2005.05960): an exploration policy, trained in imagination, seeks states where an ensemble
disagrees about the next embedding. A task policy trains beside it on the predicted reward.

    embed_t = encoder(x_t)                           q_t = q(z_t | x_t), categorical, with unimix
    z_t ~ q_t                                        one-hot, straight-through gradient
    u_t = f(z_{t-1}, sigma_{t-1}, a_{t-1})           prior logits,   sigma_t = softmax(u_t)
    p_t = Categorical(unimix(u_t))                   the prior,      unimix: 1 % uniform mixed in

One iteration of the loop in `main`:

    1. act in the environments and store x_t, a_t, reward, flags in the replay
    2. world model:  -log p(x_t, r_t, c_t | z_t)                                world_model_loss
                     + 1.5 max(1, KL(sg q_t || p_t)) + 0.5 max(1, KL(q_t || sg p_t))
    3. ensemble:     each member predicts embed_{t+1} from (sigma_t, z_t, a_t)  Ensemble
    4. explore and task policy, from imagined trajectories                      actor_critic_losses

        R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),   R_H = v_H
        w_t = prod_{1 <= k <= t} gamma c_k
        actor:   -w_t (log pi(a_t | z_t) sg((R_t - v_t) / scale) + entropy_weight * entropy)
        critic:  -w_t (log p(R_t) + log p(mean of the slow critic))

sg: stop-gradient. r and c: predicted reward and continue of ARRIVING at a state; v: the critic's
mean; the slow critic follows the critic by 2 % an update; scale = max(return_floor, range of the
returns from the 5th to the 95th percentile, averaged over some 100 updates). All other symbols:
common.py. A KL below one nat is not reduced further ("free nat").

    python draw_pretrain.py laptop --env-id redraw/PendulumSwingup-v0 --run-dir runs/source

writes runs/source/draw.pt (weights, sizes, arguments), runs/source/replay/*.npz (a dataset for the
later stages), metrics.csv, curves.png and prediction.gif. Next: redraw_adapt.py.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from common import (
    DRAW,
    ActorCritic,
    Policy,
    Rectified,
    Replay,
    Run,
    UserError,
    check_range,
    held_noise,
    kl_categorical,
    make_envs,
    mlp,
    prepare,
    sample_onehot,
    sizes_of,
    softmax,
    symlog,
    twohot_log_prob,
    twohot_mean,
    unimix,
)


@dataclass
class Args:
    env_id: str = "redraw/PendulumSwingup-v0"  # source environment, a Gymnasium id or module:id
    run_dir: str | None = (
        None  # folder for all that the run writes (default: runs/pretrain-ENV-SEED)
    )
    overwrite: bool = False  # start anew in a folder that holds a run already
    resume: bool = False  # go on from the last save in run_dir with the same flags; if none, start
    save_every: int = 20_000  # agent steps between saves; a kill loses at most so many
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16; losses and weights stay float32
    compile: bool = False  # torch.compile; the first update then takes minutes
    log_every: int = 100  # updates between two lines in the logs

    # Data. Under torchrun each process has its own environments, replay and batch.
    steps: int = 4_500_000  # agent steps, over all environments
    n_envs: int = 4
    parallel_envs: bool = False  # each environment in a process, stepping while the models learn
    episode_steps: int | None = None  # shorter episodes than the environment's: more start states
    image_size: int = 64  # pixels of a side, for this project's environments
    look: Literal["fast", "stock"] = "fast"  # of this project's; stock is dm_control's own, slower
    augment: float = 0.0  # 0 to 1: changes of looks that the encoder sees; larger: more robust
    collect: Literal["explore", "task", "random", "mixed"] = "explore"  # mixed: by episode
    prefill: int = 1024  # random steps before the first update
    hold: float = 1.0  # a random action lasts so many steps on average; larger: farther swings
    gain: float = (
        1.0  # random actions are uniform in [-gain, gain], clipped; larger: more full force
    )
    replay_size: int | None = None  # rows kept (default: all, as far as half of the memory allows)

    # World model
    S: int = 256  # categorical variables in the latent
    K: int = 4  # classes of each
    cnn_depth: int = 32  # channels of the first convolution; each further one doubles them
    vector_units: int = 1024  # of the networks that read and predict the vector
    vector_layers: int = 5
    units: int = 512  # of posterior, dynamics, heads and ensemble
    actor_units: int = 512  # of actors and critics
    batch: int = 16  # B, sequences an update
    length: int = 64  # T, steps of a sequence
    rewarded: float = 0.0  # share of the sequences that hold an unusual reward, where it is rare
    train_every: float = 2.0  # agent steps an update; larger: fewer updates
    lr: float = 1e-4
    warmup: int = 0  # updates over which the learning rate rises from 0
    decay: bool = False  # the learning rate falls to a tenth along a cosine
    image_scale: float = 1.0  # weight of the image loss, a sum over pixels: small images want more
    vector_scale: float = 1.0  # weight of the vector loss
    reward_scale: float = 1.0  # weight of the reward loss
    soft_updates: int = 0  # updates over which z fades from probabilities to samples: less blur

    # Imagination
    horizon: int = 40  # H
    starts: int = 1024  # imagined trajectories an update, at most batch * length
    policy_start: int = 0  # updates before policies learn and act: a blurred model misleads them
    policy_every: int = 1  # world-model updates for one of the task policy
    explore_every: int = 1  # world-model updates for one of the exploration policy
    gamma: float = 1 - 1 / 333  # larger: rewards farther away count
    lam: float = 0.95  # lambda; larger: returns rest on imagined rewards, smaller: on the critic
    entropy: float = 3e-4  # weight of the policies' entropy; larger: more random for longer
    actor_lr: float = 3e-5
    return_floor: float = 0.01  # least scale of returns; smaller: small rewards count more
    actor_grad: Literal["reinforce", "dynamics"] = "reinforce"  # dynamics: through the world model
    ensemble: int = 8  # members
    ensemble_target: int = 0  # members predict so many random projections of the embedding (0: all)


LAPTOP = Args(
    # data
    steps=40_000,
    save_every=4_000,
    episode_steps=60,
    image_size=32,
    collect="mixed",
    prefill=16_000,
    hold=16.0,  # the pendulum swings far only if a torque lasts
    gain=2.0,  # half of the random actions have full force: it comes through the top with speed
    replay_size=200_000,
    # world model
    S=64,
    cnn_depth=8,
    vector_units=128,
    vector_layers=2,
    units=128,
    actor_units=128,
    batch=32,
    length=8,
    rewarded=0.25,
    train_every=3.0,
    lr=3e-3,
    warmup=100,
    decay=True,
    image_scale=300.0,  # with 1, a small image loses against the KL's free nat and stays blurred
    vector_scale=400.0,
    reward_scale=50.0,
    soft_updates=500,
    # imagination
    horizon=15,
    starts=128,
    policy_start=2500,
    policy_every=2,
    explore_every=8,
    gamma=0.99,
    actor_lr=5e-4,
    ensemble=5,
    ensemble_target=64,
)
DUCKIETOWN = dataclasses.replace(
    LAPTOP,
    env_id="deploy_duckiebot:redraw/Duckietown-v0",
    steps=72_000,
    save_every=12_000,
    episode_steps=30,
    augment=0.5,  # a real camera looks a little different
    prefill=12_000,
    hold=5.0,
    gain=1.0,
    units=256,
    rewarded=0.0,  # the reward is dense
    train_every=5.0,
    image_scale=50.0,
    vector_scale=5000.0,  # velocities are shares of the fastest
    reward_scale=100.0,
    soft_updates=300,
    policy_start=500,
    explore_every=10,
    gamma=0.95,
    return_floor=0.1,
    ensemble=3,
)
PRESETS = {
    "laptop": ("minutes on two CPU cores: 32x32 images, small networks, short episodes", LAPTOP),
    "duckietown": ("an hour on one CPU core: lane following, 32x32 images", DUCKIETOWN),
    "paper": ("the paper's sizes: one CUDA GPU, days", Args()),
}


# ---- The world model -----------------------------------------------------------------------------


def world_model_loss(draw, data, args, soft):
    """The loss of DRAW on replayed sequences.

    Args: data: sequences of Replay.sample, (B, T, ...); soft: share of the probabilities in z, 0
        but early in training, so that z is one-hot.
    Returns: loss (), metrics, and without gradients (embed (B, T, E), z, sigma (B, T, S, K)).
    """
    seen = augment(data["image"], args.augment) if args.augment else data["image"]
    embed = draw.encoder(seen, data["vector"])  # (B, T, E)
    log_q = draw.posterior(embed)  # (B, T, S, K), log q(z_t | x_t)
    z = sample_onehot(log_q.exp())  # (B, T, S, K)
    z = z + soft * (log_q.exp() - z)
    u = draw.observe(z, data["action"], data["is_first"])  # (B, T, S, K)
    log_p = unimix(u)  # (B, T, S, K), log p(z_t | z_{t-1}, sigma_{t-1}, a_{t-1})

    # Reconstructions from z_t alone; reward and continue are those of arriving at x_t.
    image_loss, vector_loss = reconstruction_errors(draw, z, data["image"], data["vector"])
    flat = z.flatten(-2)  # (B, T, Z)
    reward_loss = -twohot_log_prob(draw.reward_head(flat), data["reward"])  # (B, T)
    cont = draw.continue_head(flat).squeeze(-1)  # (B, T), logit
    goes_on = 1.0 - data["is_terminal"].float()
    cont_loss = F.binary_cross_entropy_with_logits(cont, goes_on, reduction="none")  # (B, T)

    # KL with free nats. The first step of a sequence has no cause to be predicted from.
    follows = ~data["is_first"]
    follows = torch.cat([torch.zeros_like(follows[:, :1]), follows[:, 1:]], 1)  # (B, T)
    kl_dyn = kl_categorical(log_q.detach(), log_p)  # (B, T), teaches the dynamics
    kl_rep = kl_categorical(log_q, log_p.detach())  # (B, T), makes the latent predictable
    kl = (1.5 * kl_dyn.clamp(min=1.0) + 0.5 * kl_rep.clamp(min=1.0)) * follows

    loss = (
        args.image_scale * image_loss
        + args.vector_scale * vector_loss
        + args.reward_scale * reward_loss
        + cont_loss
        + kl
    ).mean()
    metrics = {
        "world_model/loss": loss,
        "world_model/image": image_loss.mean(),
        "world_model/vector": vector_loss.mean(),
        "world_model/reward": reward_loss.mean(),
        "world_model/continue": cont_loss.mean(),
        "world_model/kl": (kl_dyn * follows).sum() / follows.sum(),
        "world_model/posterior_entropy": -(log_q.exp() * log_q).sum((-2, -1)).mean(),
    }
    return loss, metrics, (embed.detach(), z.detach(), softmax(u).detach())


def reconstruction_errors(draw, z, image, vector):
    """Squared errors of image, summed over pixels and channels, and of symlog(vector), summed over
    V, as predicted from z (..., S, K) alone; (...) each."""
    flat = z.flatten(-2)
    image_error = ((draw.decoder(flat) - image.float() / 255.0) ** 2).sum((-3, -2, -1))
    if draw.vector_head is None:
        return image_error, torch.zeros_like(image_error)
    return image_error, ((draw.vector_head(flat) - symlog(vector)) ** 2).sum(-1)


class Ensemble(nn.Module):
    """Plan2Explore: members that predict embed_{t+1} from (sigma_t, z_t, a_t)."""

    def __init__(self, sizes, embed_size, members, target):
        super().__init__()
        Z = sizes.S * sizes.K
        # A random projection keeps distances and costs less than all of E.
        projection = torch.randn(embed_size, target) / embed_size**0.5 if target else None
        self.register_buffer("projection", projection)
        nets = [
            mlp(2 * Z + sizes.action_size, sizes.units, 2, target or embed_size)
            for _ in range(members)
        ]
        self.members = nn.ModuleList(nets)

    def forward(self, sigma, z, action):
        """Predictions (members, ..., E) from sigma, z (..., S, K) and action (..., A)"""
        action = action / action.abs().clamp(min=1.0)
        x = torch.cat([sigma.flatten(-2), z.flatten(-2), action], -1)
        return torch.stack([member(x) for member in self.members])

    def loss(self, sigma, z, action, embed, is_first):
        """Squared error of the next embedding, summed over E; () from (B, T, ...)."""
        target = embed[:, 1:]  # (B, T-1, E)
        if self.projection is not None:
            with torch.autocast(embed.device.type, enabled=False):
                target = target @ self.projection
        error = (self(sigma[:, :-1], z[:, :-1], action[:, :-1]) - target) ** 2
        return (error.sum(-1).mean(0) * ~is_first[:, 1:]).mean()

    def disagreement(self, sigma, z, action):
        """The intrinsic reward (...): standard deviation over members, averaged over E"""
        return self(sigma, z, action).std(0, correction=0).mean(-1)


# ---- Policies in imagination ---------------------------------------------------------------------


def imagine(actor, dynamics, z, sigma, horizon):
    """Trajectories that follow the actor and the dynamics from z, sigma (B, S, K).

    Returns: z_0 .. z_H and sigma_0 .. sigma_H (H+1, B, S, K), a_0 .. a_{H-1} (H, B, A).
    """
    zs, sigmas, actions = [z], [sigma], []
    for _ in range(horizon):
        action = actor(z.detach()).rsample()  # (B, A)
        sigma = softmax(dynamics(z, sigma, action))  # (B, S, K)
        z = sample_onehot(dynamics.prior(sigma))
        zs.append(z)
        sigmas.append(sigma)
        actions.append(action)
    return torch.stack(zs), torch.stack(sigmas), torch.stack(actions)


def lambda_returns(reward, discount, value, lam):
    """R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),   R_H = v_H

    reward, discount (H, B): r_1 .. r_H and gamma c_1 .. gamma c_H; value (H+1, B): v_0 .. v_H.
    Returns R_0 .. R_{H-1}, (H, B).
    """
    R = value[-1]
    returns = []
    for t in reversed(range(len(reward))):
        R = reward[t] + discount[t] * ((1 - lam) * value[t + 1] + lam * R)
        returns.append(R)
    return torch.stack(returns[::-1])


def actor_loss(args, pi, action, weight, returns, value, scale):
    """-w_t (log pi(a_t | z_t) sg((R_t - v_t) / scale) + entropy_weight * entropy), a mean over all;
    with actor_grad "dynamics" -w_t (R_t / scale + entropy_weight * entropy). All (H, B, ...)."""
    if args.actor_grad == "reinforce":
        log_pi = pi.log_prob(action.detach()).sum(-1)  # (H, B)
        objective = log_pi * ((returns - value) / scale).detach()
    else:
        objective = returns / scale
    entropy = pi.entropy().sum(-1)  # (H, B)
    return -(weight * (objective + args.entropy * entropy)).mean()


def critic_loss(logits, slow_logits, weight, returns):
    """-w_t (log p(R_t) + log p(mean of the slow critic)), a mean over all (H, B, ...)"""
    log_p = twohot_log_prob(logits, returns.detach())
    log_p_slow = twohot_log_prob(logits, twohot_mean(slow_logits).detach())
    return -(weight * (log_p + log_p_slow)).mean()


def actor_critic_losses(args, draw, dynamics, policy, z, sigma, alive, reward_of):
    """The two losses of imagined trajectories.

    Args: dynamics: a Rectified; policy: an ActorCritic; z, sigma (B, S, K), where to start;
        alive (B,), 0 where a start is terminal, else 1; reward_of(z_t, sigma_t, a_t, z_{t+1}).
    Returns: loss (), the sum of the actor's and the critic's; metrics; the new range of returns ().
    """
    # REINFORCE needs no gradient through the imagination.
    with torch.set_grad_enabled(args.actor_grad == "dynamics"):
        zs, sigmas, action = imagine(policy.actor, dynamics, z, sigma, args.horizon)
        reward = reward_of(zs[:-1], sigmas[:-1], action, zs[1:])  # (H, B)
        discount = args.gamma * draw.cont(zs[1:])  # (H, B)
    weight = torch.cat([alive[None], alive * discount[:-1].detach().cumprod(0)])  # (H, B)

    logits = policy.critic(zs.detach())  # (H+1, B, BINS)
    value = twohot_mean(logits).detach()  # (H+1, B)
    if args.actor_grad == "dynamics":
        # The same values, with a gradient to the states, but none to the critic's weights.
        weights = {name: weight.detach() for name, weight in policy.critic.named_parameters()}
        value = twohot_mean(functional_call(policy.critic, weights, zs))
    returns = lambda_returns(reward, discount, value, args.lam)  # (H, B)
    percentiles = torch.tensor([0.05, 0.95], device=z.device)
    low, high = torch.quantile(returns.detach(), percentiles)
    new_range = 0.99 * policy.range + 0.01 * (high - low)
    scale = new_range.clamp(min=args.return_floor)

    pi = policy.actor(zs[:-1].detach())
    loss_actor = actor_loss(args, pi, action, weight, returns, value[:-1], scale)
    with torch.no_grad():
        slow_logits = policy.slow_critic(zs[:-1])
    loss_critic = critic_loss(logits[:-1], slow_logits, weight, returns)
    metrics = {
        "return": returns.mean(),
        "reward": reward.mean(),
        "entropy": pi.entropy().sum(-1).mean(),
        "scale": scale,
        "critic_loss": loss_critic,
    }
    return loss_actor + loss_critic, metrics, new_range


def gradient_step(optimizer, loss, clip):
    """One step down the gradient, whose norm is cut at `clip` for each parameter group.

    Returns: the norms' sum before the cut. Under torchrun the processes' gradients are averaged.
    """
    optimizer.zero_grad()
    loss.backward()
    groups = [group["params"] for group in optimizer.param_groups]
    for parameter in sum(groups, []) if dist.is_initialized() else []:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    norm = sum(nn.utils.clip_grad_norm_(group, clip) for group in groups)
    optimizer.step()
    return norm


# ---- The loop ------------------------------------------------------------------------------------


def main(args):
    check(args)
    device = prepare(args)
    join_processes(device)
    envs = make_envs(
        args.env_id, args.n_envs, args.image_size, args.episode_steps, args.parallel_envs, args.look
    )
    networks = ("S", "K", "cnn_depth", "vector_units", "vector_layers", "units", "actor_units")
    sizes = sizes_of(envs, **{name: getattr(args, name) for name in networks})
    draw = DRAW(sizes).to(device, memory_format=torch.channels_last)
    dynamics = Rectified(draw)  # f itself
    ensemble = Ensemble(sizes, draw.encoder.embed_size, args.ensemble, args.ensemble_target)
    ensemble = ensemble.to(device)
    task = ActorCritic(sizes).to(device)
    explore = ActorCritic(sizes).to(device)
    draw_adam = torch.optim.Adam(draw.parameters(), args.lr, eps=1e-8, fused=True)
    ensemble_adam = torch.optim.Adam(ensemble.parameters(), args.lr, eps=1e-5, fused=True)
    task_adam = policy_adam(task, args.actor_lr)
    explore_adam = policy_adam(explore, args.actor_lr)
    replay = Replay(replay_rows(args, sizes), args.n_envs, sizes)

    name = args.env_id.replace("/", "-").replace(":", "-")
    run = Run(args.run_dir or f"runs/pretrain-{name}-{args.seed}", args)
    modules = {
        "draw": draw, "ensemble": ensemble, "task": task, "explore": explore,
        "draw_adam": draw_adam, "ensemble_adam": ensemble_adam,
        "task_adam": task_adam, "explore_adam": explore_adam,
    }  # fmt: skip
    saved = run.resume(modules)
    replay_dir = run.dir / ("replay" if run.rank == 0 else f"replay-rank{run.rank}")
    if saved:
        replay.load(replay_dir, saved["rows"])
    begin = saved.get("step", 0)
    updates = saved.get("updates", 0)
    total = int((args.steps - args.prefill) / args.train_every)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    model_loss, policy_losses = world_model_loss, actor_critic_losses
    if args.compile:
        model_loss = torch.compile(world_model_loss)
        policy_losses = torch.compile(actor_critic_losses)

    def task_reward(z, sigma, action, z_next):
        return draw.reward(z_next)

    def explore_reward(z, sigma, action, z_next):
        return ensemble.disagreement(sigma, z, action)

    learners = (
        ("task", task, task_adam, task_reward, args.policy_every),
        ("explore", explore, explore_adam, explore_reward, args.explore_every),
    )
    actors = {name: Policy(sizes, draw, policy.actor) for name, policy, *_ in learners[::-1]}
    policy_metrics = {}
    start_time = time.time()
    bar = tqdm(total=args.steps, initial=begin, unit="step", mininterval=1, disable=run.rank > 0)
    obs, _ = envs.reset(seed=np.random.randint(2**31))
    action = np.zeros((args.n_envs, sizes.action_size), np.float32)
    reward = np.zeros(args.n_envs)
    first = np.ones(args.n_envs, bool)
    last = terminal = np.zeros(args.n_envs, bool)
    collectors = np.full(args.n_envs, "random", "<U7")
    episodes = EpisodeReturns(args.n_envs)
    for step in range(begin + args.n_envs, args.steps + args.n_envs, args.n_envs):
        # 1. Act and store. Row t holds x_t, the reward of arriving there, and a_t, taken there.
        collectors[first] = draw_collectors(args, first.sum())
        action = held_noise(action, args.hold, args.gain)
        if step > args.prefill and updates >= args.policy_start:
            action = act(collectors, actors, obs, action)
        replay.add(
            **obs, action=action, reward=reward, is_first=first, is_last=last, is_terminal=terminal
        )
        if args.parallel_envs:
            envs.step_async(action)  # they step while the models learn

        while updates < min(total, (step - args.prefill) / args.train_every):
            set_learning_rate(args, (draw_adam, ensemble_adam), updates, total)
            data = replay.sample(args.batch, args.length, device, args.rewarded)

            # 2. World model.
            soft = max(0.0, 1.0 - updates / args.soft_updates) if args.soft_updates else 0.0
            with autocast:
                loss, metrics, (embed, z, sigma) = model_loss(draw, data, args, soft)
            metrics["world_model/grad_norm"] = gradient_step(draw_adam, loss, 1000.0)

            # 3. Ensemble, on what the world model just saw.
            with autocast:
                loss = ensemble.loss(sigma, z, data["action"], embed, data["is_first"])
            metrics["explore/ensemble_loss"] = loss
            metrics["explore/ensemble_grad_norm"] = gradient_step(ensemble_adam, loss, 100.0)

            # 4. Policies, imagined from some of the same posterior states.
            pick = torch.randperm(args.batch * args.length, device=device)[: args.starts]
            start = (z.flatten(0, 1)[pick], sigma.flatten(0, 1)[pick])  # (starts, S, K) each
            alive = 1.0 - data["is_terminal"].flatten()[pick].float()  # (starts,)
            for name, policy, adam, reward_of, every in learners:
                if updates >= args.policy_start and updates % every == 0:
                    with autocast:
                        loss, found, policy.range = policy_losses(
                            args, draw, dynamics, policy, *start, alive, reward_of
                        )
                    found["grad_norm"] = gradient_step(adam, loss, 100.0)
                    policy.update_slow_critic()
                    policy_metrics |= {f"{name}/{k}": v.detach() for k, v in found.items()}

            updates += 1
            if updates % args.log_every == 0 or updates == total:
                shown = run.log(updates, metrics | policy_metrics | episodes.metrics())
                warn(run, args, shown, updates, total, replay)
                bar.set_postfix_str(progress(shown, updates, total))

        outcome = envs.step_wait() if args.parallel_envs else envs.step(action)
        obs, reward, terminal, truncated, _ = outcome
        first = last  # the step after an episode's end resets
        last = terminal | truncated
        episodes.add(reward, last)
        bar.update(args.n_envs)
        if run.due(step, max(args.steps // 10, 1), args.n_envs):
            pictures(run, draw, ensemble, replay, updates, device)
        if run.interrupted or run.due(step, args.save_every, args.n_envs):
            save(run, step, args, sizes, modules, replay, replay_dir, updates)
    bar.close()
    envs.close()
    yardsticks = source_range(draw, replay, args, device)
    save(run, args.steps, args, sizes, modules, replay, replay_dir, updates, yardsticks)
    run.close()
    print(f"wrote {run.dir}/draw.pt and {replay_dir} after {time.time() - start_time:.0f} s")


# ---- What serves the loop ------------------------------------------------------------------------


def check(args):
    """Raises UserError for a flag that makes no sense."""
    check_range(args, 1, 10**12, "steps", "episode_steps", "image_size", "log_every")
    check_range(args, 1, 10**12, "policy_every", "explore_every", "save_every", "replay_size")
    check_range(args, 1e-9, 10**9, "hold", "gain", "train_every", "return_floor")
    check_range(args, 1e-9, 1, "lr", "actor_lr")
    check_range(args, 1, 65536, "n_envs", "batch", "horizon", "S", "cnn_depth", "units")
    check_range(args, 1, 65536, "actor_units", "vector_units", "vector_layers")
    check_range(args, 2, 65536, "length", "ensemble", "K")  # a variable of one class says nothing
    check_range(args, 0, 10**9, "soft_updates", "ensemble_target", "policy_start", "warmup")
    check_range(args, 0, 10**9, "entropy", "image_scale", "vector_scale", "reward_scale")
    check_range(args, 0, 1, "rewarded", "gamma", "lam", "augment")
    check_range(args, 1, args.batch * args.length, "starts")  # no more than states of a batch
    least = args.n_envs * args.length
    if min(args.prefill, args.replay_size or least) < least or args.prefill >= args.steps:
        raise UserError(
            f"--prefill and --replay-size must be at least n_envs x length = {least} rows, and "
            "--prefill less than --steps"
        )
    updates = int((args.steps - args.prefill) / args.train_every)
    if args.collect != "random" and args.policy_start >= updates:
        print(
            f"warning: no policy is trained: --policy-start {args.policy_start}, but these --steps "
            f"make {updates} updates; random actions collect"
        )


def join_processes(device):
    """Under torchrun: from here on gradients are averaged over the processes."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def replay_rows(args, sizes):
    """--replay-size, or all rows of the run as far as half of the machine's memory allows"""
    row = sizes.image_size**2 * sizes.channels + 4 * (sizes.vector_size + sizes.action_size) + 7
    fits = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (2 * row)
    wanted = args.replay_size or args.steps
    if wanted > fits:
        print(f"the replay keeps the newest {fits} rows, half of this machine's memory")
    return min(wanted, fits)


def policy_adam(policy, lr):
    """Actor and critic are two groups, because their gradients are cut separately."""
    groups = [{"params": list(net.parameters())} for net in (policy.actor, policy.critic)]
    return torch.optim.Adam(groups, lr, eps=1e-5, fused=True)


def set_learning_rate(args, optimizers, update, total):
    """It rises from 0 over `warmup` updates; with `decay` it falls to a tenth along a cosine."""
    lr = args.lr * min(1.0, (update + 1) / max(args.warmup, 1))
    if args.decay:
        lr *= 0.55 + 0.45 * math.cos(math.pi * update / total)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr


def draw_collectors(args, n):
    """Who acts in n new episodes: "explore", "task" or "random", (n,) names."""
    drawn = np.array(["explore", "task", "random"])[np.random.randint(0, 3, n)]
    return drawn if args.collect == "mixed" else np.full(n, args.collect)


def act(collectors, actors, obs, noise):
    """Actions (n_envs, A) of the collectors; those of "random" are `noise`."""
    action = noise.copy()
    for name, policy in actors.items():
        mine = collectors == name
        if mine.any():
            action[mine] = policy(obs["image"][mine], obs["vector"][mine])
    return action


class EpisodeReturns:
    """Sums rewards to the returns of the episodes that ended since the last metrics()."""

    def __init__(self, n_envs):
        self.running = np.zeros(n_envs)
        self.finished = []

    def add(self, reward, last):
        self.running += reward
        self.finished += self.running[last].tolist()
        self.running[last] = 0.0

    def metrics(self):
        finished = self.finished
        self.finished = []
        return {"collect/episode_return": np.mean(finished)} if finished else {}


def progress(shown, updates, total):
    """The figures that matter, for the bar"""
    return (
        f"updates {updates}/{total} image {shown['world_model/image']:.2f} "
        f"kl {shown['world_model/kl']:.1f} return {shown.get('collect/episode_return', np.nan):.4g} "
        f"imagined {shown.get('task/return', np.nan):.3g}"
    )


def warn(run, args, shown, updates, total, replay):
    """What usually goes wrong, in words, once each"""
    run.warn(
        updates > min(2000, total // 2) and shown["world_model/kl"] < 1.01,
        "the KL lies at its free nat: if prediction.gif is blurred, the latent says nothing; then "
        "raise --image-scale and --vector-scale",
    )
    # The actor's least deviation, 0.1, has an entropy of -0.88 per action.
    run.warn(
        shown.get("task/entropy", 0) < -0.8 * replay.data["action"].shape[-1],
        "the task policy's entropy is at its floor: raise --entropy or --return-floor, or lower "
        "--actor-lr",
    )
    largest = np.abs(replay.data["reward"][:, : len(replay)]).max() / max(1 - args.gamma, 1e-6)
    run.warn(
        shown.get("task/scale", 0) > max(args.return_floor, 4 * largest),
        "the task's imagined returns spread wider than the rewards allow: the critic runs away, or "
        "rewards are predicted that were never seen; lower --actor-lr",
    )


def save(run, step, args, sizes, modules, replay, replay_dir, updates, yardsticks=None):
    """draw.pt and the replay for the later stages, state.pt for --resume."""
    replay.save(replay_dir)
    contents = {
        "args": dataclasses.asdict(args),
        "sizes": dataclasses.asdict(sizes),
        "updates": updates,
        "draw": modules["draw"].state_dict(),
        "task_actor": modules["task"].actor.state_dict(),
        "task_critic": modules["task"].critic.state_dict(),
        "explore_actor": modules["explore"].actor.state_dict(),
    }
    if yardsticks:
        contents["source_range"] = yardsticks
    run.write("draw.pt", stage="draw_pretrain", **contents)
    run.save(step, modules, rows=replay.added, updates=updates)


@torch.no_grad()
def source_range(draw, replay, args, device):
    """How the world model does at home: stage 2 compares the target's data with it.

    Returns: dict of plain numbers: "kl", KL(q || p) in nats a step, first steps left out; and the
        1, 50 and 99 % quantiles over frames of "image error", "vector error" (of the
        reconstruction) and "posterior entropy" (nats).
    """
    kls, frames = [], []
    for _ in range(min(4096, len(replay) * args.n_envs) // (args.batch * args.length) + 1):
        data = replay.sample(args.batch, args.length, device)
        log_q = draw.posterior(draw.encoder(data["image"], data["vector"]))
        z = sample_onehot(log_q.exp())
        u = draw.observe(z, data["action"], data["is_first"])
        kl = kl_categorical(log_q, unimix(u))  # (B, T)
        kls.append(kl[:, 1:][~data["is_first"][:, 1:]])
        errors = reconstruction_errors(draw, z, data["image"], data["vector"])
        entropy = -(log_q.exp() * log_q).sum((-2, -1))
        frames.append(torch.stack([*errors, entropy]).flatten(1))  # (3, B*T)
    levels = torch.tensor([0.01, 0.5, 0.99], device=device)
    quantiles = torch.quantile(torch.cat(frames, 1), levels, dim=1).T.tolist()  # 3 x 3
    names = ("image error", "vector error", "posterior entropy")
    return {"kl": torch.cat(kls).mean().item(), **dict(zip(names, quantiles, strict=True))}


@torch.random.fork_rng()  # so that the run does not depend on its pictures
@torch.no_grad()
def pictures(run, draw, ensemble, replay, updates, device, T=40, newest=512):
    """prediction.gif: four episodes, below each other reality, reconstruction, and the prediction
    from the first frame and the actions alone. disagreement.gif, which does not move: where the
    ensemble disagrees, and the frames that it knows least and best."""

    def rows_of(key, rows, env=slice(None)):
        return torch.from_numpy(replay.data[key][env, rows]).to(device)

    # Rows of the first environment, oldest first, in episodes of T steps.
    order = (replay.added - len(replay) + np.arange(len(replay))) % replay.length
    begins = np.union1d(0, np.flatnonzero(replay.data["is_first"][0, order]))
    lengths = np.diff(begins, append=len(order))
    T = min(T, lengths.max())
    rows = order[begins[lengths >= T][-4:, None] + np.arange(T)]  # (4, T)
    image = rows_of("image", rows, 0)
    seen = sample_onehot(draw.posterior(draw.encoder(image, rows_of("vector", rows, 0))).exp())
    foreseen = draw.open_loop(Rectified(draw), seen[:, 0], rows_of("action", rows, 0)[:, :-1])
    films = [image / 255.0, *(draw.decoder(z.flatten(-2)) for z in (seen, foreseen))]
    film = torch.cat(list(torch.cat(films, 2)), 2).clamp(0, 1) * 255.0  # (T, 3 L, 4 L, C)
    run.video(updates, "prediction", film.byte().cpu().numpy().repeat(2, 1).repeat(2, 2), fps=8)

    rows = order[-max(1, newest // len(replay.data["reward"])) :]
    image = rows_of("image", rows)  # (n_envs, n, L, L, C)
    action = rows_of("action", rows)
    z = sample_onehot(draw.posterior(draw.encoder(image, rows_of("vector", rows))).exp())
    sigma = softmax(draw.observe(z, action, rows_of("is_first", rows)))
    disagreement = ensemble.disagreement(sigma, z, action).flatten()
    image = image.flatten(0, 1)[disagreement.argsort()].float()
    strips = [torch.cat(list(image[:8]), 1), torch.cat(list(image[-8:]), 1)]
    frame = torch.cat(strips).byte().cpu().numpy()  # best known above, least below
    run.video(updates, "disagreement", frame[None].repeat(2, 1).repeat(2, 2))


def augment(image, strength):
    """Random changes of looks, other ones for each image: what differs between the camera of a
    simulator and a real one. The world model sees the changed image and reconstructs the clean one,
    so its latent leaves them out. A list like the authors', without superpixels and dropped
    channels.

    Args: image: uint8 (..., L, L, 3); strength: 0 changes nothing, 1 is the most.
    Returns: uint8 (..., L, L, 3)
    """
    x = image.flatten(0, -4).permute(0, 3, 1, 2).contiguous() / 255.0  # (B, 3, L, L)
    B, _, L, _ = x.shape
    device = x.device

    def vary(low, high, *shape, share=1.0):
        """Uniform over [low, high] times strength for a share of the images, else 0; (B, *shape)"""
        on = torch.rand(B, *[1] * len(shape), device=device) < share
        return strength * torch.empty(B, *shape, device=device).uniform_(low, high) * on

    # Where the camera looks: turned by up to 3 degrees, 5 % nearer or farther, shifted by 3 % of
    # the picture, with a pincushion or barrel.
    turn = vary(-0.05, 0.05, 1, 1)
    zoom = vary(-0.05, 0.05, 1, 1)
    shift = vary(-0.06, 0.06, 2, 1, 1)
    bend = vary(-0.1, 0.1, 1, 1, share=0.5)
    axis = (2 * torch.arange(L, device=device) + 1) / L - 1
    v = axis[:, None]  # (L, 1), down
    u = axis[None]  # (1, L), to the right
    grow = 1 + zoom + bend * (u**2 + v**2)
    right = grow * u - turn * v + shift[:, 0]
    down = grow * v + turn * u + shift[:, 1]
    grid = torch.stack([right, down], -1)  # (B, L, L, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    # Smeared to a side, or with the opposite sign sharpened.
    x = x + vary(-0.3, 0.5, 1, 1, 1, share=0.7) * (x.roll(1, -1) - x)
    # Colours: one matrix turns the hue by up to 52 degrees, changes saturation and channels.
    one = torch.eye(3, device=device)
    grey = torch.full((3, 3), 1 / 3, device=device)
    around = (one.roll(1, 0) - one.roll(1, 1)) / 3**0.5  # the turn around the axis of greys
    hue = vary(-0.9, 0.9, 1, 1, share=0.8)
    saturation = 1 + vary(-0.5, 0.5, 1, 1)
    colours = grey + saturation * (hue.cos() * (one - grey) + hue.sin() * around)  # (B, 3, 3)
    # Then contrast, fog and brightness; tone.
    contrast = (1 + vary(-0.2, 0.2, 3, 1)) * (1 + vary(-0.3, 0.3, 1, 1))
    fog = vary(0.0, 0.5, 1, 1, share=0.3)
    colours = colours * contrast * (1 - fog)
    brightness = vary(-0.2, 0.2, 1, 1) + fog
    x = torch.baddbmm(brightness, colours, x.flatten(2)).view_as(x).clamp(0.0, 1.0)
    x = x + vary(-0.5, 0.5, 1, 1, 1, share=0.2) * x * (1 - x)
    # Noise, pixels that fail, and a rectangle that hides what is behind it.
    noise = torch.rand_like(x)
    x = x + vary(0.0, 0.3, 1, 1, 1) * (noise - 0.5)
    x = x * (noise[:, :1] >= 0.005 * strength)
    centre = torch.rand(B, 2, 1, 1, device=device) * 2 - 1
    half = vary(0.0, 0.4, 2, 1, 1, share=0.5)
    hidden = (u - centre[:, 0]).abs() < half[:, 0]
    hidden = hidden & ((v - centre[:, 1]).abs() < half[:, 1])  # (B, L, L)
    x = torch.where(hidden[:, None], torch.rand(B, 3, 1, 1, device=device), x)
    return (x.clamp(0.0, 1.0) * 255.0).round().byte().permute(0, 2, 3, 1).reshape(image.shape)


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
