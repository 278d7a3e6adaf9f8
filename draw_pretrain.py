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
    2. world model:  image_scale |image_t - decoder(z_t)|^2                     world_model_loss
                     + vector_scale |symlog(vector_t) - head(z_t)|^2
                     - reward_scale log p(r_t | z_t) - log p(c_t | z_t)
                     + 1.5 max(1, KL(sg q_t || p_t)) + 0.5 max(1, KL(q_t || sg p_t))
    3. ensemble:     each member predicts embed_{t+1} from (sigma_t, z_t, a_t)  Ensemble
    4. explore and task policy, from imagined trajectories                      improve

        R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),   R_H = v_H
        w_t = prod_{1 <= k <= t} gamma c_k
        actor:   -w_t (log pi(a_t | z_t) sg((R_t - v_t) / scale) + entropy_weight * entropy)
        critic:  -w_t (log p(R_t) + log p(mean of the slow critic))

sg: stop-gradient. r and c: reward and continue of ARRIVING at a state, in R_t and w_t predicted
ones; v: the critic's mean; the slow critic follows the critic by 2 % an update; scale =
max(return_floor, range of the returns from the 5th to the 95th percentile, averaged over some 100
updates). All other symbols: common.py. A KL below one nat is not reduced further ("free nat"). That
is --learn reinforce, the paper's; --learn lookahead is this project's: see `lookahead`.

    python draw_pretrain.py laptop --env-id redraw/PendulumSwingup-v0 --run-dir runs/source

writes runs/source/draw.pt (weights, sizes, arguments), runs/source/replay/*.npz (a dataset for the
later stages), metrics.csv, curves.png, prediction.gif, disagreement.gif. Next: redraw_adapt.py.
"""

import dataclasses
import math
import os
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
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
    explained,
    held_noise,
    kl_categorical,
    make_envs,
    mlp,
    prepare,
    sample_onehot,
    sizes_of,
    softmax,
    twohot_log_prob,
    twohot_mean,
    unimix,
)


@dataclass
class Args:
    env_id: str = "redraw/PendulumSwingup-v0"  # source environment, a Gymnasium id or module:id
    run_dir: str | None = None  # folder for all that is written (default: runs/pretrain-ENV-SEED)
    overwrite: bool = False  # start anew in a folder that holds a run already
    resume: bool = False  # same flags as before: go on from run_dir's last save; if none, start
    save_every: int = 20_000  # agent steps between saves; a kill loses at most so many
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16, but in lookahead not; losses stay float32
    compile: bool = False  # torch.compile of the world model; the first update takes minutes
    log_every: int = 100  # updates between two lines in the logs

    # Data. Under torchrun each process has its own environments, replay and batch.
    steps: int = 4_500_000  # agent steps, over all environments
    n_envs: int = 4  # environments side by side
    parallel_envs: bool = False  # each environment in a process, stepping while the models learn
    episode_steps: int | None = None  # end episodes after so many steps: more start states
    image_size: int = 64  # pixels of a side, for this project's environments
    look: Literal["fast", "stock"] = "fast"  # of redraw/ environments; stock: dm_control's, slower
    start_speed: float = 0.0  # redraw/ ones: half of the episodes start with up to +-this velocity
    augment: float = 0.0  # 0 to 1: changes of looks (RGB only) that the encoder sees: more robust
    collect: Literal["explore", "task", "random", "mixed"] = "explore"  # mixed: 2 in 3 are task's
    prefill: int = 1024  # random steps before the first update
    hold: float = 1.0  # steps that a random action lasts on average; larger: farther swings
    gain: float = 1.0  # random actions lie in +-gain, then cut to +-1; larger: more at full force
    replay_size: int | None = None  # newest rows kept (default: all that half of the memory holds)

    # World model
    S: int = 256  # categorical variables in the latent
    K: int = 4  # classes of each
    cnn_depth: int = 32  # channels of the first convolution; each further one doubles them
    vector_units: int = 1024  # of the networks that read and predict the vector
    vector_layers: int = 5  # of the networks that read and predict the vector
    units: int = 512  # of posterior, dynamics, heads and ensemble
    actor_units: int = 512  # of actors and critics
    batch: int = 16  # B, sequences an update
    length: int = 64  # T, steps of a sequence
    rewarded: float = 0.0  # share of a batch drawn around unusual rewards; larger if they are rare
    train_every: float = 2.0  # agent steps for one update; larger: fewer updates
    lr: float = 1e-4  # of world model and ensemble
    warmup: int = 0  # updates over which the learning rate rises from 0
    decay: bool = False  # the learning rate falls to a tenth along a cosine
    image_scale: float = 1.0  # weight of the image loss, a sum over pixels: small images want more
    vector_scale: float = 1.0  # weight of the vector loss
    reward_scale: float = 1.0  # weight of the reward loss
    soft_updates: int = 0  # first updates, where z fades from probabilities to samples: less blur

    # Imagination
    horizon: int = 40  # H
    starts: int = 1024  # imagined trajectories an update, at most batch * length
    policy_start: int = 0  # updates before policies learn and act: a blurred model misleads them
    policy_every: int = 1  # world-model updates for one of the task policy
    explore_every: int = 1  # world-model updates for one of the exploration policy
    gamma: float = 1 - 1 / 333  # larger: rewards farther away count
    lam: float = 0.95  # lambda; larger: returns rest on rewards, smaller: on the critic
    entropy: float = 3e-4  # reinforce: weight of the entropy; larger: more random for longer
    actor_lr: float = 3e-5
    critic_lr: float = 3e-5
    return_floor: float = 0.01  # returns are divided by their range or, if larger, by this
    restart: float = 1.0  # share of trajectories that start anew; others go on from the last update
    # reinforce is the paper's; lookahead: in imagined states several actions are compared.
    learn: Literal["reinforce", "lookahead"] = "reinforce"
    states: int = 256  # lookahead: states an update in which actions are compared; more: slower
    candidates: int = 12  # lookahead: actions compared in each; more: better teachers, slower
    ahead: int = 2  # lookahead: steps until the critic judges; larger: rests more on the model
    lesson_steps: int = 6  # lookahead: gradient steps an update, from the last 20 updates' lessons
    least_reward: float = 0.0  # predicted rewards nearer to 0 count as 0: their sum can mislead
    ensemble: int = 8  # members
    ensemble_target: int = 0  # members predict so many random projections of embed; 0: all of it


# What the presets change; "paper" is Args as it stands.
CHANGES = {
    # flag            laptop    duckietown
    "env_id":         ("redraw/PendulumSwingup-v0", "deploy_duckiebot:redraw/Duckietown-v0"),
    # data
    "steps":          (64_000,   72_000),
    "save_every":     (8_000,    12_000),
    "episode_steps":  (100,      30),
    "image_size":     (32,       32),
    "start_speed":    (10.0,     0.0),      # at rest it hardly ever comes through the top fast
    "augment":        (0.0,      0.5),      # a real camera looks a little different
    "collect":        ("mixed",  "mixed"),
    "prefill":        (16_000,   12_000),
    "hold":           (16.0,     5.0),      # the pendulum swings far only if a torque lasts
    "gain":           (2.0,      1.0),      # half of them at full force
    "replay_size":    (200_000,  200_000),
    # world model
    "S":              (64,       64),
    "cnn_depth":      (8,        8),
    "vector_units":   (128,      128),
    "vector_layers":  (2,        2),
    "units":          (128,      256),
    "actor_units":    (128,      128),
    "batch":          (32,       32),
    "length":         (8,        8),
    "rewarded":       (0.25,     0.0),      # the pendulum is rarely up; in a lane every step pays
    "train_every":    (6.0,      5.0),
    "lr":             (3e-3,     3e-3),
    "warmup":         (100,      100),
    "decay":          (True,     True),
    "image_scale":    (300.0,    50.0),     # with 1 a small image loses against the KL: blur
    "vector_scale":   (400.0,    5000.0),   # a Duckiebot's are shares of its fastest, so smaller
    "reward_scale":   (50.0,     100.0),
    "soft_updates":   (500,      300),
    # imagination
    "horizon":        (15,       15),
    "starts":         (64,       128),
    "policy_start":   (1500,     500),
    "policy_every":   (8,        2),
    "explore_every":  (16,       10),
    "gamma":          (0.99,     0.95),
    "actor_lr":       (1e-3,     5e-4),
    "critic_lr":      (3e-3,     5e-4),
    "lesson_steps":   (10,       6),
    "return_floor":   (0.1,      0.1),
    "restart":        (0.3,      1.0),      # states farther from the data are seen too
    "learn":          ("lookahead", "reinforce"),
    "least_reward":   (0.02,     0.0),
    "ensemble":       (5,        3),
    "ensemble_target": (64,      64),
}  # fmt: skip
LAPTOP = Args(**{flag: laptop for flag, (laptop, _) in CHANGES.items()})
DUCKIETOWN = Args(**{flag: duckietown for flag, (_, duckietown) in CHANGES.items()})
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

    # Reconstructions from z_t alone; reward and continue are those of arriving at x_t. Nothing
    # arrives at a first x_t: the reward of its row, 0, says nothing of the state.
    image_loss, vector_loss = draw.reconstruction_errors(z, data["image"], data["vector"])
    flat = z.flatten(-2)  # (B, T, Z)
    reward_loss = -twohot_log_prob(draw.reward_head(flat), data["reward"])  # (B, T)
    reward_loss = reward_loss * ~data["is_first"]
    cont_logit = draw.continue_head(flat).squeeze(-1)  # (B, T)
    goes_on = 1.0 - data["is_terminal"].float()
    cont_loss = F.binary_cross_entropy_with_logits(cont_logit, goes_on, reduction="none")  # (B, T)

    # KL with free nats. The first step of a sequence has no cause to be predicted from.
    follows = F.pad(~data["is_first"][:, 1:], (1, 0))  # (B, T), False at t = 0
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
        "world_model/kl": (kl_dyn * follows).sum() / follows.sum().clamp(min=1),
        "world_model/posterior_entropy": -(log_q.exp() * log_q).sum((-2, -1)).mean(),
    }
    return loss, metrics, (embed.detach(), z.detach(), softmax(u).detach())


class Ensemble(nn.Module):
    """Plan2Explore: members that predict embed_{t+1} from (sigma_t, z_t, a_t)."""

    def __init__(self, sizes, embed_size, members, target):
        super().__init__()
        # A random projection keeps distances and costs less than all of E.
        projection = torch.randn(embed_size, target) / embed_size**0.5 if target else None
        self.register_buffer("projection", projection)
        n_in = 2 * sizes.S * sizes.K + sizes.action_size
        n_out = target or embed_size
        self.members = nn.ModuleList(mlp(n_in, sizes.units, 2, n_out) for _ in range(members))

    def forward(self, sigma, z, action):
        """Predictions (members, ..., E) from sigma, z (..., S, K) and action (..., A)"""
        action = action.clamp(-1.0, 1.0)
        x = torch.cat([sigma.flatten(-2), z.flatten(-2), action], -1)
        return torch.stack([member(x) for member in self.members])

    def loss(self, sigma, z, action, embed, is_first):
        """Squared error of the next embedding (or projection), summed; () from (B, T, ...)."""
        target = embed[:, 1:]  # (B, T-1, E)
        if self.projection is not None:
            with torch.autocast(embed.device.type, enabled=False):  # a target wants all digits
                target = target @ self.projection
        error = (self(sigma[:, :-1], z[:, :-1], action[:, :-1]) - target) ** 2
        return (error.sum(-1).mean(0) * ~is_first[:, 1:]).mean()

    def disagreement(self, sigma, z, action):
        """The intrinsic reward (...): standard deviation over members, averaged over E"""
        return self(sigma, z, action).std(0, correction=0).mean(-1)


# ---- Policies in imagination ---------------------------------------------------------------------


def imagine(actor, dynamics, z, sigma, horizon, noise=None):
    """Trajectories of the actor and the dynamics from z, sigma (B, S, K).

    Without noise a_t and z_t are samples. With noise (horizon, B, A) nothing is sampled: a_t is the
    actor's mean plus noise_t, and z_t is the prior p(z_t | ...) itself, probabilities.

    Returns: z_0 .. z_H and sigma_0 .. sigma_H (H+1, B, S, K), a_0 .. a_{H-1} (H, B, A).
    """
    zs = [z]
    sigmas = [sigma]
    actions = []
    for t in range(horizon):
        pi = actor(z)
        # Not sample(), which fails on NaN before a log line can name the cause.
        action = pi.rsample() if noise is None else (pi.mean + noise[t]).clamp(-1.0, 1.0)  # (B, A)
        sigma = softmax(dynamics(z, sigma, action))  # (B, S, K)
        prior = dynamics.prior(sigma)
        z = sample_onehot(prior) if noise is None else prior
        zs.append(z)
        sigmas.append(sigma)
        actions.append(action)
    return torch.stack(zs), torch.stack(sigmas), torch.stack(actions)


def lambda_returns(reward, discount, value, lam):
    """R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),   R_H = v_H

    Args: reward, discount (H, B): r_1 .. r_H, gamma c_1 .. gamma c_H; value (H+1, B): v_0 .. v_H.
    Returns: R_0 .. R_{H-1}, (H, B).
    """
    R = value[-1]
    returns = []
    for t in reversed(range(len(reward))):
        R = reward[t] + discount[t] * ((1 - lam) * value[t + 1] + lam * R)
        returns.append(R)
    return torch.stack(returns[::-1])


def actor_loss(pi, action, advantage, weight, entropy_weight):
    """-w_t (log pi(a_t | z_t) sg((R_t - v_t) / scale) + entropy_weight * entropy), mean of (H, B);
    advantage: (R_t - v_t) / scale"""
    log_pi = pi.log_prob(action).sum(-1)  # (H, B)
    entropy = pi.entropy().sum(-1)  # (H, B)
    return -(weight * (log_pi * advantage + entropy_weight * entropy)).mean()


def critic_loss(logits, slow_logits, returns, weight):
    """-w_t (log p(R_t) + log p(mean of the slow critic)), mean of (H, B)"""
    log_p = twohot_log_prob(logits, returns)
    log_p_slow = twohot_log_prob(logits, twohot_mean(slow_logits))
    return -(weight * (log_p + log_p_slow)).mean()


def reinforce(args, draw, dynamics, policy, z, sigma, alive, reward_of):
    """The two losses of sampled trajectories.

    Args: dynamics: a Rectified; policy: an ActorCritic; z, sigma (B, S, K), where to start;
        alive (B,), 0 where a start is terminal, else 1; reward_of(z_t, sigma_t, a_t, z_{t+1}).
    Returns: loss (), actor's and critic's; metrics; the new range of returns (); ends: z_H, sigma_H
        and (B,), whether the episode goes on there.
    """
    with torch.no_grad():
        zs, sigmas, action = imagine(policy.actor, dynamics, z, sigma, args.horizon)
        reward = reward_of(zs[:-1], sigmas[:-1], action, zs[1:])  # (H, B)
        cont = draw.cont(zs[1:])  # (H, B)
        discount = args.gamma * cont
        weight = torch.cat([alive[None], alive * discount[:-1].cumprod(0)])  # (H, B)
        value = twohot_mean(policy.critic(zs))  # (H+1, B)
        returns = lambda_returns(reward, discount, value, args.lam)  # (H, B)
        # linspace, made on the GPU: it need not wait for a copy.
        low, high = torch.quantile(returns, torch.linspace(0.05, 0.95, 2, device=z.device))
        # It starts at 0, so at first return_floor decides.
        new_range = 0.99 * policy.range + 0.01 * (high - low)
        scale = new_range.clamp(min=args.return_floor)
        advantage = (returns - value[:-1]) / scale
        slow_logits = policy.slow_critic(zs[:-1])

    pi = policy.actor(zs[:-1])
    loss_actor = actor_loss(pi, action, advantage, weight, args.entropy)
    loss_critic = critic_loss(policy.critic(zs[:-1]), slow_logits, returns, weight)
    metrics = {
        "return": returns.mean(),
        "reward": reward.mean(),
        "entropy": pi.entropy().sum(-1).mean(),
        "scale": scale,
        "critic_loss": loss_critic,
    }
    ends = (zs[-1], sigmas[-1], alive * cont.prod(0) > 0.5)
    return loss_actor + loss_critic, metrics, new_range, ends


def rollout(args, draw, dynamics, policy, z, sigma, alive, reward_of, noise, lam):
    """Trajectories without samples: the actor's mean plus noise (H, B, A), and z_t is the prior.

    Args: as of `reinforce`; lam: of their returns R_t, which end with the slow critic's v_H.
    Returns: zs and sigmas (H+1, B, S, K), actions (H, B, A), reward, continue and R_t (H, B).
    """
    zs, sigmas, actions = imagine(policy.actor, dynamics, z, sigma, len(noise), noise)
    reward = alive * reward_of(zs[:-1], sigmas[:-1], actions, zs[1:])  # (H, B)
    cont = draw.cont(zs[1:])  # (H, B)
    value = twohot_mean(policy.slow_critic(zs))  # (H+1, B)
    returns = lambda_returns(reward, alive * args.gamma * cont, value, lam)
    return zs, sigmas, actions, reward, cont, returns


def lasting_noise(horizon, batch, actions, device):
    """Noise (H, B, A) that lasts 4 steps on average. The first half of the batch has none, in the
    second half its deviation rises to 0.6."""
    noise = torch.randn(horizon, batch, actions, device=device)
    for t in range(1, horizon):
        lasts = torch.rand(batch, 1, device=device) >= 1 / 4
        noise[t] = torch.where(lasts, noise[t - 1], noise[t])
    deviation = torch.linspace(-0.6, 0.6, batch, device=device).clamp(min=0.0)
    return deviation[:, None] * noise


@torch.no_grad()
def lookahead(args, draw, dynamics, policy, z, sigma, alive, reward_of):
    """Compares actions in imagined states; actor and critic learn from the comparison.

    Half of the trajectories follow the actor's mean mu; the others add noise, of deviation up to
    0.6, that lasts 4 steps on average. In some of their states M = `candidates` actions are tried.
    Candidate 0 is mu. The next ones are mu + o, with o of deviation up to (M - 4) / (M - 1). The
    last three are uniform, o = a - mu. Later steps follow the actor's mean plus an offset; over the
    n steps it fades from o to o / 2. The slow critic follows the critic by 5 % a gradient step.

        Q_k  = r_1 + gamma c_1 r_2 + ... + gamma^n c_1 .. c_n v_n of the slow critic,   n = ahead
        p_k  = softmax over k of Q_k / (0.3 d + 0.03 return_floor),   d: deviation of Q over k
        a    = sum_k p_k a_k
        w    = (sum_k p_k Q_k - Q_0) / (0.5 d + 0.03 return_floor), cut to 0 .. 1; 0 in a state that
               is probably not reached, because the episode ends before
        R    = the lambda-return on a trajectory without noise, Q_0 on another

    Args: as of `reinforce`.
    Returns: lessons z, a, R, w, (states, ...); metrics; ends, as of `reinforce`.
    """
    B = len(z)
    M = args.candidates
    H = args.horizon
    A = draw.sizes.action_size
    given = (args, draw, dynamics, policy)
    noise = lasting_noise(H, B, A, z.device)
    quiet = (B + 1) // 2  # the first so many are without noise
    zs, sigmas, _, reward, cont, returns = rollout(
        *given, z, sigma, alive, reward_of, noise, args.lam
    )
    ends = (zs[-1], sigmas[-1], alive * cont.prod(0) > 0.5)
    metrics = {"return": returns[0, :quiet].mean(), "reward": reward[:, :quiet].mean()}

    pick = torch.randperm(H * B, device=z.device)[: args.states]  # t B + b
    n = len(pick)
    z = zs[:-1].flatten(0, 1)[pick]  # (n, S, K)
    mu = policy.actor(z).mean[:, None]  # (n, 1, A)
    deviation = torch.linspace(0.0, 1.0, M, device=z.device)[:, None]
    o = deviation * torch.randn(n, M, A, device=z.device)
    # Far ones too, or the actor might never leave a wrong extreme.
    o[:, -3:] = 2.0 * torch.rand(n, 3, A, device=z.device) - 1.0 - mu
    # An action tried for one step alone changes less than the critic's error.
    fade = 0.5 ** (torch.arange(args.ahead, device=z.device) / max(args.ahead - 1, 1))
    each = (z, sigmas[:-1].flatten(0, 1)[pick], alive.repeat(H)[pick])
    each = [x.repeat_interleave(M, 0) for x in each]  # (n M, ...)
    offsets = fade[:, None, None] * o.flatten(0, 1)  # (ahead, n M, A)
    _, _, actions, _, _, tried = rollout(*given, *each, reward_of, offsets, lam=1.0)

    Q = tried[0].view(n, M)
    d = Q.std(1)  # (n,)
    near = 0.03 * args.return_floor  # differences smaller than this do not count
    p = ((Q - Q.amax(1, keepdim=True)) / (0.3 * d + near)[:, None]).softmax(1)
    a = (p[..., None] * actions[0].view(n, M, A)).sum(1)  # (n, A)
    better = (p * Q).sum(1) - Q[:, 0]
    reached = torch.cat([alive[None], cont[:-1]]).cumprod(0) > 0.5  # (H, B)
    w = (better / (0.5 * d + near)).clamp(0.0, 1.0) * reached.flatten()[pick]
    # Noise on the way would lower the value of a state, so there only the mean's own steps count.
    R = torch.where(pick % B < quiet, returns.flatten()[pick], Q[:, 0])
    metrics |= {"lead": better.mean(), "weight": w.mean()}
    return {"z": z, "a": a, "R": R, "w": w}, metrics, ends


def lesson_loss(policy, z, a, R, w):
    """w_t (mean of pi(z_t) - a_t)^2 - log p(R_t), mean of (n,); the arguments are lessons."""
    error = ((policy.actor(z).mean - a) ** 2).sum(-1)
    return (w * error - twohot_log_prob(policy.critic(z), R)).mean()


def improve(args, draw, dynamics, policy, adam, memory, z, sigma, alive, reward_of):
    """One update of a policy in imagination, from z, sigma (B, S, K).

    Args: memory: a deque of the last lessons of `lookahead`; the others as of `reinforce`.
    Returns: metrics; ends, as of `reinforce`.
    """
    if args.learn == "reinforce":
        with torch.autocast(z.device.type, torch.bfloat16, enabled=args.bf16):
            loss, metrics, new_range, ends = reinforce(
                args, draw, dynamics, policy, z, sigma, alive, reward_of
            )
        policy.range = new_range
        metrics["grad_norm"] = gradient_step(adam, loss, 100.0)
        policy.update_slow_critic()
        return metrics, ends
    lessons, metrics, ends = lookahead(args, draw, dynamics, policy, z, sigma, alive, reward_of)
    memory.append(lessons)
    for _ in range(args.lesson_steps):
        lessons = memory[torch.randint(len(memory), ())]
        pick = torch.randperm(len(lessons["w"]), device=z.device)[:512]
        loss = lesson_loss(policy, **{name: value[pick] for name, value in lessons.items()})
        metrics["grad_norm"] = gradient_step(adam, loss, 100.0)
        policy.update_slow_critic(0.05)
    metrics["lesson_loss"] = loss
    return metrics, ends


def gradient_step(optimizer, loss, clip):
    """One step down the gradient, whose norm is cut at `clip` in each parameter group.

    Returns: the norms' sum before the cut. Under torchrun the processes' gradients are averaged.
    """
    optimizer.zero_grad()
    loss.backward()
    groups = [group["params"] for group in optimizer.param_groups]
    if dist.is_initialized():
        for parameter in sum(groups, []):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    norm = sum(nn.utils.clip_grad_norm_(group, clip) for group in groups)
    optimizer.step()
    return norm


# ---- The loop ------------------------------------------------------------------------------------


def main(args):
    check(args)
    device = prepare(args)
    if "WORLD_SIZE" in os.environ:  # torchrun: from here on gradients are averaged
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    options = {"look": args.look, "start_speed": args.start_speed}
    copies = (args.n_envs, args.image_size, args.episode_steps, args.parallel_envs)
    envs = make_envs(args.env_id, *copies, **options)
    networks = ("S", "K", "cnn_depth", "vector_units", "vector_layers", "units", "actor_units")
    sizes = sizes_of(envs, **{name: getattr(args, name) for name in networks})
    if args.augment and sizes.channels != 3:
        raise UserError(f"--augment needs RGB images, {args.env_id} has {sizes.channels} channels")
    with explained("the networks need more memory than there is", RuntimeError):
        draw = DRAW(sizes).to(device, memory_format=torch.channels_last)
    dynamics = Rectified(draw)  # f itself
    ensemble = Ensemble(sizes, draw.encoder.embed_size, args.ensemble, args.ensemble_target)
    ensemble.to(device)
    task = ActorCritic(sizes).to(device)
    explore = ActorCritic(sizes).to(device)
    modules = {"draw": draw, "ensemble": ensemble, "task": task, "explore": explore}
    optimizers = make_optimizers(args, **modules)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    model_loss = torch.compile(world_model_loss) if args.compile else world_model_loss
    every = {"task": args.policy_every, "explore": args.explore_every}

    def task_reward(z, sigma, action, z_next):
        reward = draw.reward(z_next)
        return torch.where(reward.abs() < args.least_reward, 0.0, reward)

    def explore_reward(z, sigma, action, z_next):
        return ensemble.disagreement(sigma, z, action)

    rewards = {"task": task_reward, "explore": explore_reward}
    memories = {"task": deque(maxlen=20), "explore": deque(maxlen=20)}
    ends = {}  # where each policy's last trajectories ended

    env_name = args.env_id.replace("/", "-").replace(":", "-")
    run = Run(args.run_dir or f"runs/pretrain-{env_name}-{args.seed}", args)
    saved = run.resume(modules | optimizers)
    begin = saved.get("step", 0)
    updates = saved.get("updates", 0)
    replay = Replay(replay_rows(args, sizes), args.n_envs, sizes)
    replay_dir = run.dir / (f"replay-rank{run.rank}" if run.rank else "replay")
    replay.load(replay_dir, saved.get("rows", 0))

    obs, _ = envs.reset(seed=np.random.randint(2**31))
    collector = Collector(args, sizes, draw, {"task": task, "explore": explore})
    reward = np.zeros(args.n_envs)
    first = np.ones(args.n_envs, bool)
    last = terminal = np.zeros(args.n_envs, bool)
    returns = np.zeros(args.n_envs)  # of the running episodes
    finished = []  # returns of the episodes that ended since the last log line
    metrics = {}  # the newest of each
    total = int((args.steps - args.prefill) / args.train_every)
    bar = tqdm(total=args.steps, initial=begin, unit="step", mininterval=1, disable=run.rank > 0)
    for step in range(begin + args.n_envs, args.steps + args.n_envs, args.n_envs):
        # 1. Act and store. Row t holds x_t, the reward of arriving there, and a_t, taken there.
        by_policies = step > args.prefill and updates >= args.policy_start
        action = collector.act(obs, first, by_policies)
        if not np.isfinite(action).all():
            run.log(updates, metrics)  # ends the run and names the term that diverged
        replay.add(
            **obs, action=action, reward=reward, is_first=first, is_last=last, is_terminal=terminal
        )
        if args.parallel_envs:
            envs.step_async(action)  # they step while the models learn

        wanted = min(total, (step - args.prefill) / args.train_every)
        while updates < wanted:
            set_learning_rate(args, optimizers, updates, total)
            data = replay.sample(args.batch, args.length, device, args.rewarded)

            # 2. World model.
            soft = max(0.0, 1.0 - updates / args.soft_updates) if args.soft_updates else 0.0
            with autocast:
                loss, found, (embed, z, sigma) = model_loss(draw, data, args, soft)
            metrics |= found
            metrics["world_model/grad_norm"] = gradient_step(optimizers["draw_adam"], loss, 1000.0)

            # 3. Ensemble, on what the world model just saw.
            with autocast:
                loss = ensemble.loss(sigma, z, data["action"], embed, data["is_first"])
            norm = gradient_step(optimizers["ensemble_adam"], loss, 100.0)
            metrics |= {"explore/ensemble_loss": loss, "explore/ensemble_grad_norm": norm}

            # 4. Policies, imagined from some of the same posterior states.
            pick = torch.randperm(args.batch * args.length, device=device)[: args.starts]
            alive = 1.0 - data["is_terminal"].flatten()[pick].float()  # (starts,)
            start = (z.flatten(0, 1)[pick], sigma.flatten(0, 1)[pick], alive)  # (starts, S, K)
            for name in every:
                if updates >= args.policy_start and updates % every[name] == 0:
                    begin_at = continued(args, ends.get(name), *start)
                    learner = (modules[name], optimizers[f"{name}_adam"], memories[name])
                    found, ends[name] = improve(
                        args, draw, dynamics, *learner, *begin_at, rewards[name]
                    )
                    metrics |= {f"{name}/{k}": v for k, v in found.items()}
            updates += 1
            if updates % args.log_every == 0 or updates == total:
                report(run, args, updates, total, metrics, finished, replay, bar)
        outcome = envs.step_wait() if args.parallel_envs else envs.step(action)
        obs, reward, terminal, truncated, _ = outcome
        first = last  # the step after an episode's end resets
        last = terminal | truncated
        returns += reward
        finished += returns[last].tolist()
        returns[last] = 0.0
        bar.update(args.n_envs)
        if run.due(step, max(args.steps // 10, 1), args.n_envs):
            pictures(run, draw, ensemble, replay, updates, device)
        if run.interrupted or run.due(step, args.save_every, args.n_envs) or step >= args.steps:
            if run.interrupted:
                envs.close()  # its processes end before this one does
            replay.save(replay_dir)
            save_draw(run, args, sizes, modules, updates, replay, device)
            run.save(step, modules | optimizers, rows=replay.added, updates=updates)
    bar.close()
    envs.close()
    run.close()
    print(f"wrote {run.dir}/draw.pt and {replay_dir}")


# ---- What serves the loop ------------------------------------------------------------------------


def check(args):
    """Raises UserError for a flag that makes no sense."""
    rows = args.n_envs * args.length  # from here on a sequence can be drawn
    ranges = (
        (1, 10**9, "steps episode_steps image_size log_every save_every"),
        (1, 10**9, "policy_every explore_every"),
        (1, 1000, "n_envs"),
        (1, 65536, "batch horizon S cnn_depth units actor_units vector_units vector_layers"),
        (2, 65536, "length ensemble K"),  # a variable of one class says nothing
        (0, 10**9, "soft_updates ensemble_target policy_start warmup"),
        (0, 10**9, "start_speed least_reward entropy image_scale vector_scale reward_scale"),
        (1e-9, 10**9, "hold gain train_every return_floor"),
        (0, 1, "lr actor_lr critic_lr rewarded gamma lam augment restart"),
        (5, 1000, "candidates"),
        (1, 65536, "states ahead"),
        (1, 1000, "lesson_steps"),
        (1, args.batch * args.length, "starts"),  # no more than states of a batch
        (rows, args.steps - 1, "prefill"),
        (rows, 10**9, "replay_size"),
    )
    for low, high, names in ranges:
        check_range(args, low, high, *names.split())


def replay_rows(args, sizes):
    """--replay-size, or all rows of the run; at most as many as half of the memory holds"""
    rows = args.replay_size or args.steps
    row_bytes = sizes.image_size**2 * sizes.channels + 4 * (sizes.vector_size + sizes.action_size)
    if not hasattr(os, "sysconf"):  # Windows
        return rows
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun
    fits = half // (row_bytes * processes)
    if rows > fits:
        print(f"the replay keeps the newest {fits} rows, a share of half of the machine's memory")
    return min(rows, fits)


def make_optimizers(args, draw, ensemble, task, explore):
    """An Adam for each, by the name under which it is saved"""
    return {
        "draw_adam": torch.optim.Adam(draw.parameters(), args.lr, eps=1e-8, fused=True),
        "ensemble_adam": torch.optim.Adam(ensemble.parameters(), args.lr, eps=1e-5, fused=True),
        "task_adam": policy_adam(args, task),
        "explore_adam": policy_adam(args, explore),
    }


def policy_adam(args, policy):
    """Actor and critic are two groups: their gradients are cut separately."""
    actor = {"params": list(policy.actor.parameters()), "lr": args.actor_lr}
    critic = {"params": list(policy.critic.parameters()), "lr": args.critic_lr}
    return torch.optim.Adam([actor, critic], eps=1e-5, fused=True)


def set_learning_rate(args, optimizers, update, total):
    """It rises from 0 over `warmup` updates; with `decay` it falls to a tenth along a cosine."""
    lr = args.lr * min(1.0, (update + 1) / max(args.warmup, 1))
    if args.decay:
        lr *= 0.55 + 0.45 * math.cos(math.pi * update / total)
    for name in ("draw_adam", "ensemble_adam"):
        optimizers[name].param_groups[0]["lr"] = lr


def continued(args, ends, z, sigma, alive):
    """Starts z, sigma (B, S, K) and alive (B,). A share 1 - restart of the last trajectories goes
    on where it ended (`ends`, of `reinforce`), so that states farther from the data are seen."""
    if ends is None or args.restart == 1.0:
        return z, sigma, alive
    on = (torch.rand(len(z), device=z.device) >= args.restart) & ends[2]
    z = torch.where(on[:, None, None], ends[0], z)
    sigma = torch.where(on[:, None, None], ends[1], sigma)
    return z, sigma, torch.where(on, 1.0, alive)


class Collector:
    """Who acts in which environment: random actions or, by episode, one of the policies.

    A policy that acts by its mean adds noise in half of its episodes. In the others, the quiet
    ones, it goes where it will go when it is deployed: there the world model must be right.
    """

    def __init__(self, args, sizes, draw, policies):
        self.hold = args.hold
        self.gain = args.gain
        nothing = np.zeros((args.n_envs, sizes.action_size), np.float32)
        self.noise = held_noise(nothing, 1.0, args.gain)
        self.by_mean = args.learn == "lookahead"
        self.actors = {k: Policy(sizes, draw, p.actor, self.by_mean) for k, p in policies.items()}
        self.names = ("explore", "task", "task") if args.collect == "mixed" else (args.collect,)
        self.who = np.full(args.n_envs, "random", "<U7")
        self.quiet = np.zeros(args.n_envs, bool)

    def act(self, obs, first, by_policies):
        """Actions (n_envs, A) for obs; first (n_envs,), whether an episode begins."""
        self.who[first] = np.random.choice(self.names, first.sum())
        if self.by_mean:
            self.quiet[first] = np.random.rand(first.sum()) < 0.5
        self.noise = held_noise(self.noise, self.hold, self.gain)
        action = self.noise.copy()
        added = 0.3 * self.noise * ~self.quiet[:, None]
        for name, policy in self.actors.items():
            mine = self.who == name
            if by_policies and mine.any():
                action[mine] = policy(obs["image"][mine], obs["vector"][mine])
                if self.by_mean:
                    action[mine] = np.clip(action[mine] + added[mine], -1.0, 1.0)
        return action


def report(run, args, updates, total, metrics, finished, replay, bar):
    """A log line, the figures on the bar, and warnings of what usually goes wrong."""
    if finished:
        metrics = metrics | {"collect/episode_return": np.mean(finished)}
        finished.clear()
    shown = run.log(updates, metrics)
    names = ("world_model/image", "world_model/kl", "collect/episode_return", "task/return")
    bar.set_postfix({name: shown[name] for name in names if name in shown})
    run.warn(
        args.policy_start >= total and args.collect != "random",
        f"no policy learns or acts: --policy-start is not below the run's {total} updates",
    )
    run.warn(
        updates > min(2000, total // 2) and shown["world_model/kl"] < 1.01,
        "the KL lies at its free nat: if prediction.gif is blurred, raise --image-scale",
    )
    # The actor's least deviation, 0.1, has an entropy of -0.88 per action.
    run.warn(
        shown.get("task/entropy", 0) < -0.8 * replay.data["action"].shape[-1],
        "the task policy is hardly random any more: raise --entropy or --return-floor",
    )
    largest = np.abs(replay.data["reward"][:, : len(replay)]).max() / max(1 - args.gamma, 1e-6)
    run.warn(
        shown.get("task/scale", 0) > max(args.return_floor, 4 * largest),
        "the task's imagined returns spread wider than real rewards allow: lower --actor-lr",
    )


def save_draw(run, args, sizes, modules, updates, replay, device):
    """draw.pt for the later stages"""
    run.write(
        "draw.pt",
        stage="draw_pretrain",
        args=dataclasses.asdict(args),
        sizes=dataclasses.asdict(sizes),
        updates=updates,
        draw=modules["draw"].state_dict(),
        task_actor=modules["task"].actor.state_dict(),
        task_critic=modules["task"].critic.state_dict(),
        explore_actor=modules["explore"].actor.state_dict(),
        source_range=source_range(modules["draw"], replay, args, device) if updates else None,
    )


@torch.no_grad()
def source_range(draw, replay, args, device):
    """How the world model does at home: stage 2 compares the target's data with it.

    Returns: "kl", KL(q || p) in nats a step, and the 1, 50 and 99 % quantiles over frames of
        "image error", "vector error" (of the reconstruction) and "posterior entropy" (nats).
    """
    data = replay.sample(4096 // args.length + 1, args.length, device)
    log_q = draw.posterior(draw.encoder(data["image"], data["vector"]))  # (B, T, S, K)
    z = sample_onehot(log_q.exp())
    kl = kl_categorical(log_q, unimix(draw.observe(z, data["action"], data["is_first"])))  # (B, T)
    errors = draw.reconstruction_errors(z, data["image"], data["vector"])
    frames = dict(zip(("image error", "vector error"), errors, strict=True))
    frames["posterior entropy"] = -(log_q.exp() * log_q).sum((-2, -1))
    levels = torch.tensor([0.01, 0.5, 0.99], device=device)
    figures = {name: torch.quantile(value, levels).tolist() for name, value in frames.items()}
    # First steps have no cause to be predicted from.
    figures["kl"] = kl[:, 1:][~data["is_first"][:, 1:]].mean().item()
    return figures


@torch.no_grad()
def pictures(run, draw, ensemble, replay, updates, device, T=40):
    """prediction.gif: four sequences, below each other reality, reconstruction, and the prediction
    from the first frame and the actions alone. disagreement.gif, which does not move: frames that
    the ensemble knows best, above, and least, below."""

    def show(name, frames):
        frames = (frames.clamp(0.0, 1.0) * 255.0).byte().cpu().numpy()  # (T, height, width, C)
        run.video(updates, name, frames.repeat(2, 1).repeat(2, 2), fps=8)

    data = replay.sample(64, min(T, len(replay)), device)
    image = data["image"] / 255.0
    z = sample_onehot(draw.posterior(draw.encoder(data["image"], data["vector"])).exp())
    # The four that go on longest without a reset, cut to equal length.
    steps, pick = (~data["is_first"][:, 1:]).int().cumprod(1).sum(1).topk(4)
    T = steps.min() + 1
    foreseen = draw.open_loop(Rectified(draw), z[pick, 0], data["action"][pick, : T - 1])
    latents = torch.stack([z[pick, :T], foreseen])  # (2, 4, T, S, K)
    films = torch.cat([image[None, pick, :T], draw.decoder(latents.flatten(-2))])
    films = films.permute(2, 0, 3, 1, 4, 5)  # (T, 3, L, 4, L, C)
    show("prediction", films.flatten(1, 2).flatten(2, 3))

    sigma = softmax(draw.observe(z, data["action"], data["is_first"]))
    order = ensemble.disagreement(sigma, z, data["action"]).flatten().argsort()
    frames = image.flatten(0, 1)[torch.stack([order[:8], order[-8:]])]  # (2, 8, L, L, C)
    show("disagreement", frames.transpose(1, 2).flatten(0, 1).flatten(1, 2)[None])


def augment(image, strength):
    """Random changes of looks, other ones for each image: what differs between a simulator's camera
    and a real one. The encoder sees the changed image, the decoder is to give the clean one, so the
    latent leaves them out. A list like the authors', without superpixels and dropped channels.

    Args: image: uint8 (..., L, L, 3); strength: 0 changes nothing, 1 is the most.
    Returns: the changed images, of the same shape.
    """
    x = image.flatten(0, -4).permute(0, 3, 1, 2).contiguous() / 255.0  # (B, 3, L, L)
    B, _, L, _ = x.shape

    def vary(low, high, n=1, share=1.0):
        """Uniform in [low, high] times strength for a share of the images, else 0; (B, n, 1, 1)"""
        chosen = torch.rand(B, 1, 1, 1, device=x.device) < share
        return strength * torch.empty(B, n, 1, 1, device=x.device).uniform_(low, high) * chosen

    # Where the camera looks: turned by up to 3 degrees, 5 % nearer or farther, with a pincushion or
    # barrel, shifted by 3 % of the picture.
    axis = (2 * torch.arange(L, device=x.device) + 1) / L - 1
    place = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))  # (2, L, L), right and down
    across = torch.stack([-place[1], place[0]])  # turned by 90 degrees
    zoom = 1 + vary(-0.05, 0.05) + vary(-0.1, 0.1, share=0.5) * (place**2).sum(0)
    view = zoom * place + vary(-0.05, 0.05) * across + vary(-0.06, 0.06, n=2)  # (B, 2, L, L)
    x = F.grid_sample(x, view.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    # Smeared to a side, or with the opposite sign sharpened.
    x = x + vary(-0.3, 0.5, share=0.7) * (x.roll(1, -1) - x)
    # Hue, turned by up to 52 degrees around the axis of greys, and saturation.
    grey = x.mean(1, keepdim=True)
    across = (x.roll(1, 1) - x.roll(-1, 1)) / 3**0.5  # the colours turned by 90 degrees
    hue = vary(-0.9, 0.9, share=0.8)
    x = grey + (1 + vary(-0.5, 0.5)) * (hue.cos() * (x - grey) + hue.sin() * across)
    # Contrast, of all channels and of each; fog; brightness; tone.
    contrast = (1 + vary(-0.3, 0.3)) * (1 + vary(-0.2, 0.2, n=3))
    fog = vary(0.0, 0.5, share=0.3)
    x = (contrast * (1 - fog) * x + fog + vary(-0.2, 0.2)).clamp(0.0, 1.0)
    x = x + vary(-0.5, 0.5, share=0.2) * x * (1 - x)
    # Noise, pixels that fail, and a rectangle that hides what is behind it.
    noise = torch.rand_like(x)
    x = x + vary(0.0, 0.3) * (noise - 0.5)
    x = x * (noise[:, :1] >= 0.005 * strength)
    centre = 2 * torch.rand(B, 2, 1, 1, device=x.device) - 1
    half = vary(0.0, 0.4, n=2, share=0.5)
    hidden = ((place - centre).abs() < half).all(1, keepdim=True)  # (B, 1, L, L)
    x = torch.where(hidden, torch.rand(B, 3, 1, 1, device=x.device), x)
    return (x.clamp(0.0, 1.0) * 255.0).round().byte().permute(0, 2, 3, 1).reshape(image.shape)


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
