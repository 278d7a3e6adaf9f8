"""Stage 3: train a policy in imagination, under the source's or the rectified dynamics.

No environment is needed to train. Trajectories start from posterior states of a dataset and follow

    a_t ~ pi(z_t)                                     the actor
    u_{t+1} = f(z_t, sigma_t, a_t) + e_{t+1}          the rectified dynamics
    sigma_{t+1} = softmax(u_{t+1}),   z_{t+1} ~ p     the next belief and state

for H steps. There are two ways to learn from them. --learn reinforce is the paper's:

    R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),   R_H = v_H
    w_t = prod_{1 <= k <= t} gamma c_k
    actor:   -w_t (log pi(a_t | z_t) sg((R_t - v_t) / scale) + entropy_weight * entropy)
    critic:  -w_t (log p(R_t) + log p(mean of the slow critic))

r and c: predicted reward and continue of ARRIVING at a state; v: critic's mean; sg: stop-gradient;
the slow critic follows the critic by 2 % an update; scale = max(return_floor, range of the returns
from the 5th to the 95th percentile, averaged over some 100 updates). --learn lookahead is this
project's, for laptops: in imagined states several actions are compared; see `lookahead`. A
baseline imagines nothing: --learn recorded learns from the dataset's own rows; see
`recorded_lessons`. All other symbols: common.py.

    python train_policy.py laptop --checkpoint runs/adapted/best.pt \
        --dataset runs/adapted/dataset.npz --eval-env-ids redraw/PendulumSwingupReversed-v0 \
        --run-dir runs/policy

writes runs/policy/policy.pt (encoder, posterior, actor and, with --act-noise, the reward head: all
that deployment needs), eval.json, curves.png and a film of one episode in each environment. The
actor that acts may be an average of the last updates' weights (--ema-decay), which is not in the
paper.
"""

import copy
import dataclasses
import json
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from scipy import stats
from torch import nn
from tqdm import tqdm

from common import (
    ActorCritic,
    Policy,
    Run,
    UserError,
    check_range,
    check_sizes,
    explained,
    follow,
    load_checkpoint,
    load_dataset,
    load_draw,
    load_rectified,
    make_envs,
    prepare,
    sample_onehot,
    softmax,
    twohot_log_prob,
    twohot_mean,
    write_atomically,
)


@dataclass
class Args:
    checkpoint: str  # draw.pt of stage 1, or best.pt or last.pt of stage 2
    dataset: str | None = None  # where trajectories start: a .npz file or a folder of them
    dataset_rows: int | None = None  # use the newest so many rows; the rest is not read
    actions_lead: bool = False  # row t holds the action that LED to it (DreamerV2, V-D4RL)
    run_dir: str | None = None  # folder for all that the run writes (default: runs/policy-SEED)
    overwrite: bool = False  # start anew in a folder that holds a run already
    resume: bool = False  # go on from the last save in run_dir with the same flags; if none, start
    save_every: int = 1000  # updates between saves; a kill loses at most so many
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16, but in lookahead not; losses stay float32
    log_every: int = 100  # updates between two lines in the logs

    # Evaluation, in environments of these Gymnasium ids (or module:id)
    eval_env_ids: tuple[str, ...] = ()
    eval_every: int = 100_000  # updates between evaluations, 0: only at the end
    eval_episodes: int = 100
    n_envs: int = 20  # episodes side by side; 1 for what can exist only once
    look: Literal["fast", "stock"] = "fast"  # as in stage 1

    # Imagination
    updates: int = 3_000_000  # 0 with --warm-start both: evaluates stage 1's policy, untrained
    batch: int = 16  # B, sequences of the dataset an update
    length: int = 64  # T, steps of a sequence
    starts: int = 341  # imagined trajectories an update, from states of these sequences
    rewarded: float = 0.0  # share of the sequences that begin where unusual reward is predicted
    restart: float = 1.0  # share of trajectories that start anew; others go on from the last update
    horizon: int = 40  # H
    least_reward: float = 0.0  # predicted rewards nearer to 0 count as 0: their sum can mislead
    gamma: float = 1 - 1 / 333  # larger: rewards farther away count
    actor_lr: float = 3e-5
    critic_lr: float = 3e-5
    decay: bool = False  # the learning rate falls to zero along a cosine: a run ends settled
    ema_decay: float = 0.0  # the actor that acts averages some 1 / (1 - ema_decay) last updates
    return_floor: float = 1.0  # least scale of returns; smaller: small rewards count more
    # Begin with the networks of stage 1's task policy: none, its critic, or critic and actor.
    warm_start: Literal["none", "critic", "both"] = "none"

    # The saved policy adds noise of this deviation where it predicts no reward, and none from 0.5 a
    # step on. Larger: frees what rests in a wrong place, harms where a steady hand is needed.
    act_noise: float = 0.0

    # How actor and critic learn
    learn: Literal["reinforce", "lookahead", "recorded"] = "reinforce"
    lam: float = 0.95  # lambda; larger: returns rest on rewards, smaller: on the critic
    entropy: float = 3e-4  # reinforce: weight of the entropy; larger: more random for longer
    states: int = 256  # lookahead: states an update in which actions are compared; more: slower
    candidates: int = 12  # lookahead: actions compared in each; more: better teachers, slower
    lesson_steps: int = 6  # lookahead, recorded: gradient steps an update
    # lookahead, recorded: steps until the critic judges; larger: more rests on model or rows
    ahead: int = 2


LAPTOP = Args(
    checkpoint=tyro.MISSING,
    save_every=100,
    log_every=20,
    eval_every=0,
    eval_episodes=40,
    n_envs=2,  # each holds a renderer, some 80 MB
    # imagination
    updates=600,
    batch=64,
    length=2,
    starts=64,
    rewarded=0.1,  # rewards are rare
    restart=0.3,  # states farther from the data are seen too
    horizon=15,
    least_reward=0.02,
    gamma=0.99,
    actor_lr=1e-3,
    critic_lr=3e-3,
    decay=True,
    ema_decay=0.97,  # single updates may fall from 385 to 41 of 500
    return_floor=0.1,
    learn="lookahead",
    lesson_steps=10,
)
DUCKIETOWN = dataclasses.replace(
    LAPTOP,
    eval_episodes=10,
    starts=128,
    rewarded=0.0,  # the reward is dense
    restart=1.0,
    least_reward=0.0,
    gamma=0.95,
    warm_start="critic",  # a state's value hardly changes with the dynamics
)
PRESETS = {
    "laptop": ("minutes on two CPU cores", LAPTOP),
    "duckietown": ("minutes on one CPU core: lane following", DUCKIETOWN),
    "paper": ("the paper's sizes", Args(checkpoint=tyro.MISSING)),
}


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
    """One step down the gradient, whose norm is cut at `clip` for each parameter group; returns the
    sum of the norms before the cut."""
    optimizer.zero_grad()
    loss.backward()
    groups = [group["params"] for group in optimizer.param_groups]
    norm = sum(nn.utils.clip_grad_norm_(group, clip) for group in groups)
    optimizer.step()
    return norm


# ---- A baseline without imagination --------------------------------------------------------------


@torch.no_grad()
def recorded_lessons(args, policy, data, n=512):
    """Lessons from n recorded rows and their own actions; no dynamics has a part in them.

        R  = r_1 + gamma c_1 r_2 + ... + gamma^k c_1 .. c_k v_k of the slow critic
        w  = (R - v_0) / (d + 0.03 return_floor), cut to 0 .. 1;   d: deviation of R - v_0
        w' = 0.7 where R > v_0, else 0.3

    k = `ahead`, fewer where the episode ends before. r and c: predicted in the recorded states. So
    an action is imitated if what followed it was better than usual. w' weighs the critic's lesson:
    v is more than the mean of what the recorded actions led to, because the policy takes the better
    ones. After implicit Q-learning (arXiv 2110.06169), but without Q, and with several steps, as if
    the environment were deterministic.

    Args: data: of `encode`.
    Returns: lessons z, a, R, w, w', (n or fewer, ...); metrics.
    """
    last = len(data["is_first"]) - 1
    t = torch.randint(last, (n,), device=data["is_first"].device)
    t = t[~data["is_first"][t + 1]]  # (n,) or fewer: the next row is what its action led to
    R = 0.0
    discount = torch.ones(len(t), device=t.device)
    end = t
    goes_on = True
    for k in range(1, args.ahead + 1):
        row = (t + k).clamp(max=last)
        goes_on = goes_on & ~data["is_first"][row] & (t + k <= last)
        reward = data["reward"][row]
        reward = torch.where(reward.abs() < args.least_reward, 0.0, reward)
        R = R + goes_on * discount * reward
        discount = torch.where(goes_on, args.gamma * discount * data["cont"][row], discount)
        end = torch.where(goes_on, row, end)
    R = R + discount * twohot_mean(policy.slow_critic(data["log_q"][end].exp()))
    z = data["log_q"][t].exp()  # (n, S, K)
    better = R - twohot_mean(policy.critic(z))  # (n,)
    w = (better / (better.std() + 0.03 * args.return_floor)).clamp(0.0, 1.0)
    w_critic = torch.where(better > 0.0, 0.7, 0.3)
    metrics = {"return": R.mean(), "reward": data["reward"][t + 1].mean(), "weight": w.mean()}
    return {"z": z, "a": data["action"][t], "R": R, "w": w, "w_critic": w_critic}, metrics


def recorded_loss(policy, z, a, R, w, w_critic):
    """w_t (mean of pi(z_t) - a_t)^2 - w'_t log p(R_t), mean of (n,); the arguments are lessons."""
    error = ((policy.actor(z).mean - a) ** 2).sum(-1)
    return (w * error - w_critic * twohot_log_prob(policy.critic(z), R)).mean()


def improve_from_rows(args, policy, adam, data):
    """One update of a policy from recorded rows; data: of `encode`. Returns metrics."""
    for _ in range(args.lesson_steps):
        lessons, metrics = recorded_lessons(args, policy, data)
        loss = recorded_loss(policy, **lessons)
        metrics["grad_norm"] = gradient_step(adam, loss, 100.0)
        policy.update_slow_critic(0.05)
    return metrics | {"lesson_loss": loss}


# ---- The loop ------------------------------------------------------------------------------------


def main(args):
    check(args)
    device = prepare(args)
    checkpoint = load_checkpoint(args.checkpoint, ("draw_pretrain", "redraw_adapt"), device)
    draw = load_draw(checkpoint, device)
    rectified = load_rectified(checkpoint, draw, device)
    if args.updates:
        dataset = load_dataset(args.dataset, draw.sizes, args.dataset_rows, args.actions_lead)
        if len(dataset["is_first"]) < args.length:
            raise UserError(f"{args.dataset} holds fewer rows than --length {args.length}")
        if args.learn == "recorded" and dataset["is_first"][1:].all():
            raise UserError(f"{args.dataset} holds no row that an action led to")
    for env_id in args.eval_env_ids:  # a typo must not cost a training
        evaluation_envs(args, env_id, draw.sizes).close()

    policy = begin_policy(args, checkpoint, draw.sizes).to(device)
    adam = policy_adam(args, policy)
    mean_actor = copy.deepcopy(policy.actor)  # the average that acts; policy.actor learns
    by_mean = args.learn != "reinforce"
    deployed = Policy(draw.sizes, draw, mean_actor, by_mean, args.act_noise)
    inputs = [path for path in (args.checkpoint, args.dataset) if path]
    run = Run(args.run_dir or f"runs/policy-{args.seed}", args, inputs)
    if args.updates:  # slow, so it comes after all that can fail
        data = encode(draw, dataset, device)
        del dataset
    modules = {"policy": policy, "mean_actor": mean_actor, "adam": adam}
    saved = run.resume(modules)
    begin = saved.get("update", 0)
    memory = deque(maxlen=20)
    for lessons in saved.get("memory", []):
        memory.append({name: value.to(device) for name, value in lessons.items()})

    def reward_of(z, sigma, action, z_next):
        reward = draw.reward(z_next)
        return torch.where(reward.abs() < args.least_reward, 0.0, reward)

    start_time = time.time()
    ends = None  # where the last trajectories ended
    if saved.get("ends") is not None:
        ends = tuple(value.to(device) for value in saved["ends"])
    bar = tqdm(total=args.updates, initial=begin, unit="update", mininterval=1.0)
    for update in range(begin + 1, args.updates + 1):
        set_learning_rate(args, adam, update)
        if args.learn == "recorded":
            metrics = improve_from_rows(args, policy, adam, data)
        else:
            start = continued(args, ends, *start_states(args, draw, rectified, data))
            metrics, ends = improve(args, draw, rectified, policy, adam, memory, *start, reward_of)
        rate = max(1.0 / update, 1.0 - args.ema_decay)  # at first a plain mean
        follow(mean_actor, policy.actor, rate)
        bar.update()

        if update % args.log_every == 0:
            shown = run.log(update, {f"policy/{name}": value for name, value in metrics.items()})
            warn(run, shown, draw.sizes)
            what = "recorded" if args.learn == "recorded" else "imagined"
            figures = f"return {shown['policy/return']:.3g} reward {shown['policy/reward']:.3g}"
            bar.set_postfix_str(f"{what} {figures}")
        if args.eval_every and update % args.eval_every == 0 and update < args.updates:
            evaluate_all(args, run, update, deployed)
        if run.interrupted or update % args.save_every == 0 or update == args.updates:
            run.save(update, modules, update=update, ends=ends, memory=list(memory))
    bar.close()
    run.no_more_saves()

    contents = {"args": dataclasses.asdict(args), "sizes": checkpoint["sizes"]}
    contents |= {"by_mean": deployed.by_mean, "noise": deployed.noise}
    contents |= {"policy": deployed.state_dict()}
    run.write("policy.pt", stage="train_policy", **contents)
    print(f"wrote {run.dir}/policy.pt after {time.time() - start_time:.0f} s")
    evaluate_all(args, run, args.updates, deployed)
    run.close()


# ---- What serves the loop ------------------------------------------------------------------------


def check(args):
    """Raises UserError for a flag that makes no sense."""
    if args.updates and not args.dataset:
        raise UserError("give --dataset, where trajectories start")
    if args.updates == 0 and args.warm_start != "both":
        raise UserError("--updates 0 evaluates stage 1's policy, so it needs --warm-start both")
    check_range(args, 0, 10**12, "updates")
    check_range(args, 1, 10**12, "log_every", "save_every", "n_envs")
    check_range(args, 1e-9, 10**9, "return_floor")
    check_range(args, 0, 10, "act_noise")
    check_range(args, 0, 1 - 1e-9, "ema_decay")
    check_range(args, 1, 65536, "batch", "length", "horizon")
    check_range(args, 1, args.batch * args.length, "starts")
    check_range(args, 2, 65536, "eval_episodes")  # an interval needs two
    check_range(args, 2, 10**12, "dataset_rows")
    check_range(args, 0, 10**9, "entropy", "eval_every", "least_reward")
    check_range(args, 5, 1000, "candidates")
    check_range(args, 1, 65536, "states", "ahead")
    check_range(args, 1, 1000, "lesson_steps")
    check_range(args, 0, 1, "actor_lr", "critic_lr", "rewarded", "restart", "gamma", "lam")


@torch.no_grad()
def encode(draw, dataset, device, chunk=1024):
    """What training needs of a dataset, on `device`: log_q, log q(z_t | x_t) of every row
    (N, S, K), action (N, A), is_first and is_terminal (N,), the predicted reward and cont (N,), and
    odd (N,): how far this reward is from the usual one."""
    log_q = []
    for i in tqdm(range(0, len(dataset["is_first"]), chunk), "encoding", unit="chunk"):
        image = torch.from_numpy(dataset["image"][i : i + chunk]).to(device)
        vector = torch.from_numpy(dataset["vector"][i : i + chunk]).to(device)
        log_q.append(draw.posterior(draw.encoder(image, vector)))
    reward = torch.cat([draw.reward(part.exp()) for part in log_q])
    cont = torch.cat([draw.cont(part.exp()) for part in log_q])
    keys = ("action", "is_first", "is_terminal")
    data = {key: torch.from_numpy(dataset[key]).to(device) for key in keys}
    odd = (reward - reward.median()).abs() + 1e-6
    return {"log_q": torch.cat(log_q), "reward": reward, "cont": cont, "odd": odd, **data}


@torch.no_grad()
def start_states(args, draw, rectified, data):
    """z and sigma (starts, S, K), states along replayed sequences, sigma the rectified belief; and
    alive (starts,), 0 where the state is terminal: nothing follows it."""
    device = data["log_q"].device
    last = len(data["is_first"]) - args.length
    begin = torch.randint(0, last + 1, (args.batch,), device=device)
    n = round(args.rewarded * args.batch)
    if n:
        begin[:n] = torch.multinomial(data["odd"], n, replacement=True).clamp(max=last)
    t = begin[:, None] + torch.arange(args.length, device=device)  # (B, T)
    z = sample_onehot(data["log_q"][t].exp())  # (B, T, S, K)
    sigma = softmax(draw.observe(z, data["action"][t], data["is_first"][t], rectified))
    if args.learn == "lookahead":  # starts from q itself; the belief above wants samples, as f does
        z = data["log_q"][t].exp()
    pick = torch.randperm(args.batch * args.length, device=device)[: args.starts]
    z = z.flatten(0, 1)[pick]
    sigma = sigma.flatten(0, 1)[pick]
    alive = 1.0 - data["is_terminal"][t].flatten()[pick].float()
    return z, sigma, alive


def continued(args, ends, z, sigma, alive):
    """Starts z, sigma (B, S, K) and alive (B,). A share 1 - restart of the last trajectories goes
    on where it ended (`ends`, of `reinforce`), so that states farther from the data are seen."""
    if ends is None or args.restart == 1.0:
        return z, sigma, alive
    on = (torch.rand(len(z), device=z.device) >= args.restart) & ends[2]
    z = torch.where(on[:, None, None], ends[0], z)
    sigma = torch.where(on[:, None, None], ends[1], sigma)
    return z, sigma, torch.where(on, 1.0, alive)


def begin_policy(args, checkpoint, sizes):
    """A new ActorCritic, or with --warm-start one with the source's critic, or critic and actor"""
    policy = ActorCritic(sizes)
    prefix = "task" if checkpoint["stage"] == "draw_pretrain" else "source"
    for name in {"none": (), "critic": ("critic",), "both": ("critic", "actor")}[args.warm_start]:
        with explained(f"{args.checkpoint} holds no {name} for --warm-start"):
            getattr(policy, name).load_state_dict(checkpoint[f"{prefix}_{name}"])
    policy.slow_critic.load_state_dict(policy.critic.state_dict())
    return policy


def policy_adam(args, policy):
    """Actor and critic are two groups: their gradients are cut separately."""
    actor = {"params": list(policy.actor.parameters()), "lr": args.actor_lr}
    critic = {"params": list(policy.critic.parameters()), "lr": args.critic_lr}
    return torch.optim.Adam([actor, critic], eps=1e-5, fused=True)


def set_learning_rate(args, optimizer, update):
    """Constant, or with `decay` falling to zero along a cosine."""
    fall = 0.5 + 0.5 * math.cos(math.pi * (update - 1) / args.updates) if args.decay else 1.0
    actor, critic = optimizer.param_groups
    actor["lr"] = args.actor_lr * fall
    critic["lr"] = args.critic_lr * fall


def warn(run, shown, sizes):
    """What usually goes wrong, in words, once"""
    run.warn(
        # The actor's least deviation, 0.1, has an entropy of -0.88 per action.
        shown.get("policy/entropy", 0.0) < -0.8 * sizes.action_size,
        "the policy's entropy is at its floor: it has stopped exploring; try a larger --entropy or "
        "--return-floor, or a smaller --actor-lr",
    )


def evaluation_envs(args, env_id, sizes):
    """The environments of an evaluation; UserError if they don't suit the checkpoint."""
    envs = make_envs(env_id, min(args.n_envs, args.eval_episodes), sizes.image_size, look=args.look)
    check_sizes(env_id, envs, sizes)
    if envs.envs[0].spec.max_episode_steps is None:
        raise UserError(
            f"{env_id} has no time limit, an evaluation might not end; register it with "
            "max_episode_steps"
        )
    return envs


def evaluate(args, env_id, policy, most_frames=500):
    """Runs args.eval_episodes whole episodes: returns (episodes,), frames of the first one
    uint8 (T, L, L, C), every second step and at most `most_frames`."""
    envs = evaluation_envs(args, env_id, policy.sizes)
    returns = []
    frames = []
    while len(returns) < args.eval_episodes:
        # Other episodes than those of any training.
        obs, _ = envs.reset(seed=args.seed + 20_000 + len(returns))
        total = np.zeros(envs.num_envs)
        running = np.ones(envs.num_envs, bool)
        step = 0
        while running.any():
            if not returns and running[0] and step % 2 == 0 and len(frames) < most_frames:
                frames.append(obs["image"][0].copy())
            obs, reward, terminal, truncated, _ = envs.step(policy(obs["image"], obs["vector"]))
            total += reward * running
            running &= ~(terminal | truncated)
            step += 1
        returns += total.tolist()
    envs.close()
    return np.array(returns[: args.eval_episodes]), np.stack(frames)


def evaluate_all(args, run, update, policy):
    """Episodes in each environment: eval.json, the log, and then films"""
    results = {}
    films = {}
    for env_id in args.eval_env_ids:
        returns, films[env_id] = evaluate(args, env_id, policy)
        mean, half = mean_and_interval(returns)
        results[env_id] = {"mean": mean, "ci95": half, "returns": returns.tolist()}
        text = json.dumps(results, indent=1).encode()
        write_atomically(run.dir / "eval.json", lambda file, text=text: file.write(text))
        run.log(update, {f"eval/{env_id}": mean})
        tqdm.write(
            f"update {update}: {env_id}: return {mean:.4g} +- {half:.2g} "
            f"(95 % interval, {len(returns)} episodes)"
        )
    for env_id, frames in films.items():
        name = env_id.split("/")[-1].split(":")[-1]
        run.video(update, name, frames.repeat(4, 1).repeat(4, 2))


def mean_and_interval(returns):
    """Mean and half-width of the 95 % confidence interval (Student's t) of returns (n,), n >= 2"""
    n = len(returns)
    half = stats.t.ppf(0.975, n - 1) * np.std(returns, ddof=1) / np.sqrt(n)
    return float(np.mean(returns)), float(half)


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
