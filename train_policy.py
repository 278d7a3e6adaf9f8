"""Stage 3: train a policy in imagination, under the source's or the rectified dynamics, and evaluate it.

No environment is needed to train: trajectories start from posterior states of a dataset and follow

    a_t ~ pi(z_t),   u_{t+1} = f(z_t, sigma_t, a_t) + e_{t+1},   sigma_{t+1} = softmax(u_{t+1}),   z_{t+1} ~ p

for H steps; a share of them (--rewarded) starts where the model predicts reward. With r_{t+1} and c_{t+1} the predicted
reward and continue of ARRIVING at step t+1:

    R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),   R_H = v_H,   v = critic mean
    w_0 = 1,   w_t = prod_{1 <= k <= t} gamma c_k
    scale = max(return_floor, EMA_0.99 of [percentile_95(R) - percentile_5(R)])
    actor:  -w_t (log pi(a_t) sg((R_t - v_t) / scale) + 3e-4 entropy)
    critic: -w_t (log p(R_t) + log p(mean of the slow critic)),   slow = 2 % EMA each update

--actor-grad dynamics is another actor's loss, -w_t (R_t / scale + 3e-4 entropy), whose gradient goes through the imagined dynamics.

    python train_policy.py laptop --checkpoint runs/adapted/best.pt --dataset runs/adapted/dataset.npz \
        --eval-env-ids redraw/PendulumSwingupReversed-v0 --run-dir runs/policy

writes runs/policy/policy.pt (encoder, posterior and actor: all that deployment needs), eval.json and
a video of one episode per environment.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Tuple

import numpy as np
import torch
import tyro
from scipy import stats
from torch import nn
from tqdm import tqdm

from common import (Actor, Critic, DivergenceCheck, Interrupt, Logger, Policy, UserError, check_range, check_sizes, load_checkpoint, load_dataset,
                    load_draw, load_state, make_envs, pick_device, restore, sample_onehot, save_checkpoint, save_state, seed_everything, softmax,
                    twohot_log_prob, twohot_mean, write_atomically)  # fmt: skip
from redraw_adapt import encode_dataset, load_rectified


@dataclass
class Args:
    checkpoint: str  # draw.pt of stage 1, or best.pt / last.pt of stage 2
    dataset: str  # start states: a .npz file or a folder of them, e.g. runs/source/replay; its rewards are not used
    eval_env_ids: Tuple[str, ...] = ()  # environments to evaluate in, Gymnasium ids, also as module:id
    run_dir: Optional[str] = None  # folder for everything this run writes (default: runs/policy-SEED)
    overwrite: bool = False  # start anew in a folder that holds a run already
    resume: bool = False  # go on from the last save of the run in run_dir, given the same flags; without one, start
    save_every: int = 1000  # updates between two saves
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16; distributions, losses and weights stay float32
    compile: bool = False  # torch.compile of the losses and the imagination (REINFORCE only); the first update then takes minutes

    updates: int = 100_000
    batch: int = 16  # B, sequences of start states per update
    length: int = 64  # T, steps of each, so B * T imagined trajectories
    rewarded: float = 0.0  # share of the sequences that begin where the model predicts reward; if that is rare, few updates see any
    horizon: int = 40  # H
    gamma: float = 1 - 1 / 333
    lam: float = 0.95
    entropy: float = 3e-4
    lr: float = 3e-5
    decay: bool = False  # let the learning rate fall to zero over the run, along a cosine, so that a short run ends settled
    return_floor: float = 1.0  # least scale that advantages are divided by; sparse rewards and short runs want less
    # how the actor learns: REINFORCE, or the return's gradient through the dynamics (straight-through)
    actor_grad: Literal["reinforce", "dynamics"] = "reinforce"
    eval_every: int = 10_000  # updates between evaluations, 0: only at the end
    eval_episodes: int = 10
    log_every: int = 100  # updates between two lines in the logs


PRESETS = {
    "laptop": (
        "minutes on two CPU cores",
        Args(checkpoint=tyro.MISSING, dataset=tyro.MISSING, updates=3000, batch=64, length=2, rewarded=0.1, horizon=15, gamma=0.99, lr=5e-4, decay=True,
             return_floor=0.01, eval_every=0, eval_episodes=40),
    ),  # fmt: skip
    "duckietown": (
        "minutes on one CPU core: lane following",
        Args(checkpoint=tyro.MISSING, dataset=tyro.MISSING, updates=2000, batch=64, length=2, horizon=15, gamma=0.95, lr=5e-4, decay=True,
             return_floor=0.1, eval_every=0, eval_episodes=10),
    ),  # fmt: skip
    "paper": ("the paper's sizes", Args(checkpoint=tyro.MISSING, dataset=tyro.MISSING)),
}


def losses(args, draw, rectified, actor, critic, slow_critic, range_ema, z, sigma, alive):
    """The two losses of trajectories imagined under the rectified dynamics (equations: above).

    Args:
        rectified: the dynamics (z, sigma, a) -> u.   range_ema: (), of the returns' 5 to 95 % range.
        z, sigma: (B*T, S, K), where they start.   alive: (B*T,), 0 where a start is terminal, else 1.
    Returns: actor_loss (), critic_loss (), rewards (H, B*T), values (H+1, B*T), returns and entropy (H, B*T), the new range_ema ().
    """
    # Imagination. REINFORCE needs no gradient through it.
    H = args.horizon
    with torch.set_grad_enabled(args.actor_grad == "dynamics"):
        zs, actions = [z], []
        for _ in range(H):
            action = actor(z.detach()).rsample()  # (B*T, A)
            sigma = softmax(rectified(z, sigma, action))  # (B*T, S, K)
            z = sample_onehot(rectified.prior(sigma))
            zs.append(z)
            actions.append(action)
        zs, actions = torch.stack(zs), torch.stack(actions)  # (H+1, B*T, S, K): z_0 .. z_H; (H, B*T, A): a_0 .. a_{H-1}
        reward = draw.reward(zs[1:])  # (H, B*T): r_1 .. r_H
        discount = args.gamma * draw.cont(zs[1:])  # (H, B*T): gamma c_1 .. gamma c_H
    weight = torch.cat([alive[None], alive * discount[:-1].detach().cumprod(0)])  # (H, B*T): w_0 .. w_{H-1}

    # Returns, from the last step backwards.
    logits = critic(zs)  # (H+1, B*T, BINS)
    value = twohot_mean(logits)  # (H+1, B*T)
    if args.actor_grad == "reinforce":
        value = value.detach()
    R, returns = value[-1], []
    for k in reversed(range(H)):
        R = reward[k] + discount[k] * ((1 - args.lam) * value[k + 1] + args.lam * R)
        returns.insert(0, R)
    returns = torch.stack(returns)  # (H, B*T): R_0 .. R_{H-1}
    p5, p95 = torch.quantile(returns.detach().flatten(), torch.linspace(0.05, 0.95, 2, device=returns.device))
    new_range = 0.99 * range_ema + 0.01 * (p95 - p5)
    scale = new_range.clamp(min=args.return_floor)

    # Actor.
    pi = actor(zs[:-1].detach())
    entropy = pi.entropy().sum(-1)  # (H, B*T)
    if args.actor_grad == "reinforce":
        objective = pi.log_prob(actions).sum(-1) * (returns - value[:-1]) / scale
    else:
        objective = returns / scale
    actor_loss = -(weight * (objective + args.entropy * entropy)).mean()

    # Critic.
    with torch.no_grad():
        slow_value = twohot_mean(slow_critic(zs[:-1]))  # (H, B*T)
    critic_loss = -(weight * (twohot_log_prob(logits[:-1], returns.detach()) + twohot_log_prob(logits[:-1], slow_value))).mean()
    return actor_loss, critic_loss, reward, value, returns, entropy, new_range


def evaluate(env_id, policy, episodes, seed, image_size=None):
    """Runs whole episodes and returns what they paid.

    Args:
        policy: function (image uint8 (n, L, L, 3), vector float32 (n, V)) -> actions float32 (n, A)
    Returns:
        (returns float64 (episodes,), frames uint8 (T, L, L, 3) of the first episode)
    """
    n = min(episodes, 20)  # side by side; each environment has a renderer of some 60 MB
    envs, returns, frames = make_envs(env_id, n, image_size), [], []
    while len(returns) < episodes:
        obs, _ = envs.reset(seed=seed + len(returns))
        total, running, first = np.zeros(n), np.ones(n, bool), not returns
        if first:
            frames.append(obs["image"][0].copy())
        while running.any():
            obs, reward, terminated, truncated, _ = envs.step(np.clip(policy(obs["image"], obs["vector"]), -1, 1))
            total += reward * running
            if first and running[0]:
                frames.append(obs["image"][0].copy())
            running &= ~(terminated | truncated)
        returns += total.tolist()
    envs.close()
    return np.array(returns[:episodes]), np.stack(frames)


def mean_and_interval(returns):
    """Mean and half-width of the 95 % confidence interval (Student's t) of `returns` (n,), n >= 2."""
    n = len(returns)
    return float(np.mean(returns)), float(stats.t.ppf(0.975, n - 1) * np.std(returns, ddof=1) / np.sqrt(n))


def main(args):
    check_range(args, 1, 10**12, "updates", "log_every", "save_every")
    check_range(args, 1e-9, 10**9, "return_floor")
    check_range(args, 1, 65536, "batch", "length", "horizon")
    check_range(args, 2, 65536, "eval_episodes")  # an interval needs two
    check_range(args, 0, 10**9, "entropy", "eval_every")
    check_range(args, 0, 1, "lr", "rewarded", "gamma", "lam")
    interrupt = Interrupt()
    seed_everything(args.seed)
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint, ("draw_pretrain", "redraw_adapt"), device)
    draw = load_draw(checkpoint, device)
    rectified = load_rectified(checkpoint, draw, device)
    sizes = draw.sizes
    dataset = load_dataset(args.dataset, sizes.image_size, sizes.vector_size, sizes.action_size)
    if len(dataset["is_first"]) < args.length:
        raise UserError(f"{args.dataset} holds {len(dataset['is_first'])} rows, fewer than --length {args.length}")
    for env_id in args.eval_env_ids:  # a typo must not cost a training
        envs = make_envs(env_id, 1, sizes.image_size)
        check_sizes(env_id, envs, sizes)
        if envs.envs[0].spec.max_episode_steps is None:
            raise UserError(f"{env_id} has no time limit, an evaluation might not end; register it with max_episode_steps")
        envs.close()
    run_dir = Path(args.run_dir or f"runs/policy-{args.seed}")
    saved = load_state(run_dir, args, device)
    logger = Logger(run_dir, args, saved)

    # The encoder is frozen: each frame is encoded once, and no update touches an image.
    posterior = encode_dataset(draw, dataset, device)  # log q(z_t | x_t), (N, S, K)
    data_action = torch.from_numpy(dataset["action"]).to(device)  # (N, A)
    is_first = torch.from_numpy(dataset["is_first"]).to(device)  # (N,)
    is_terminal = torch.from_numpy(dataset["is_terminal"]).to(device)  # (N,)
    del dataset
    n_rewarded = round(args.rewarded * args.batch)  # sequences that begin where reward is predicted
    if n_rewarded:
        predicted = torch.cat([draw.reward(part.exp()) for part in posterior.split(1024)]).clamp(min=0.0) + 1e-6  # (N,), reward from z's mean

    # Actor and critic start from scratch.
    actor, critic, slow_critic = Actor(sizes).to(device), Critic(sizes).to(device), Critic(sizes).to(device)
    slow_critic.load_state_dict(critic.state_dict())
    policy = Policy(sizes, draw, actor)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.lr, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.lr, eps=1e-5, fused=True)
    range_ema = torch.zeros((), device=device)

    modules = {"actor": actor, "critic": critic, "slow_critic": slow_critic, "actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    check = DivergenceCheck(run_dir, modules, lag=4 if device.type == "cuda" else 0)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    # Two backward passes, as with "dynamics", can't go through one compiled graph.
    losses_of = torch.compile(losses) if args.compile and args.actor_grad == "reinforce" else losses

    def film(update, env_id, frames):
        logger.video(update, env_id.split("/")[-1].split(":")[-1], frames[::2].repeat(4, 1).repeat(4, 2))

    begin, most, start_time = 0, 0.0, time.time()
    if saved:
        range_ema, begin, most = saved["range_ema"], saved["update"], saved["most"]
        restore(saved, modules)
    interrupt.waits = True
    bar = tqdm(range(begin + 1, args.updates + 1), initial=begin, total=args.updates, unit="update", mininterval=1.0)
    for update in bar:
        lr = args.lr * (0.5 + 0.5 * math.cos(math.pi * (update - 1) / args.updates)) if args.decay else args.lr
        for opt in (actor_optimizer, critic_optimizer):
            opt.param_groups[0]["lr"] = lr
        # Starts: posterior states (z, sigma) of replayed sequences; sigma is the rectified belief.
        with torch.no_grad():
            start = torch.randint(0, len(is_first) - args.length + 1, (args.batch,), device=device)
            if n_rewarded:
                start[:n_rewarded] = torch.multinomial(predicted, n_rewarded, replacement=True).clamp(max=len(is_first) - args.length)
            t = start[:, None] + torch.arange(args.length, device=device)  # (B, T)
            z = sample_onehot(posterior[t].exp())  # (B, T, S, K)
            sigma = softmax(draw.observe(z, data_action[t], is_first[t], dynamics=rectified))
            z, sigma = z.flatten(0, 1), sigma.flatten(0, 1)  # (B*T, S, K)
            alive = 1.0 - is_terminal[t].flatten().float()  # (B*T,), nothing follows a terminal state

        with autocast:
            actor_loss, critic_loss, reward, value, returns, entropy, new_range = losses_of(
                args, draw, rectified, actor, critic, slow_critic, range_ema, z, sigma, alive
            )
        for opt in (actor_optimizer, critic_optimizer):
            opt.zero_grad()
        if args.actor_grad == "reinforce":  # neither loss depends on the other's parameters
            (actor_loss + critic_loss).backward(inputs=[*actor.parameters(), *critic.parameters()])
        else:
            actor_loss.backward(inputs=list(actor.parameters()), retain_graph=True)
            critic_loss.backward(inputs=list(critic.parameters()))
        actor_norm = nn.utils.clip_grad_norm_(actor.parameters(), 100.0)
        critic_norm = nn.utils.clip_grad_norm_(critic.parameters(), 100.0)

        # Step, unless something is NaN or infinite.
        terms = {"reward": reward, "critic": value, "actor_loss": actor_loss, "critic_loss": critic_loss, "gradient": actor_norm + critic_norm}
        check(update - 1, terms, rows=t, z=z, range_ema=range_ema)
        actor_optimizer.step()
        critic_optimizer.step()
        range_ema = torch.where(new_range.isfinite(), new_range, range_ema)
        with torch.no_grad():
            for slow, fast in zip(slow_critic.parameters(), critic.parameters()):
                slow.lerp_(fast, 0.02)

        if update % args.log_every == 0:
            metrics = {
                "policy/imagined_return": returns.mean(), "policy/imagined_reward": reward.mean(), "policy/entropy": entropy.mean(),
                "policy/scale": range_ema.clamp(min=args.return_floor), "policy/actor_loss": actor_loss, "policy/critic_loss": critic_loss,
            }  # fmt: skip
            shown = logger.log(update, metrics)
            logger.warn(shown["policy/entropy"] < -0.8 * sizes.action_size, "the policy's entropy is at its floor: it has stopped exploring; try a larger "
                        "--entropy or --return-floor, or a smaller --lr")  # the actor's smallest deviation, 0.1, has an entropy of -0.88 per action
            most = max(most, float(reward.abs().max()) / (1 - args.gamma))  # no return is larger
            logger.warn(shown["policy/scale"] > max(args.return_floor, 4 * most), "the returns spread wider than the "
                        "rewards allow: the critic is running away; try a smaller --lr")  # fmt: skip
            bar.set_postfix_str(
                f"imagined return {shown['policy/imagined_return']:.1f} reward {shown['policy/imagined_reward']:.3f} "
                f"entropy {shown['policy/entropy']:.2f}"
            )
        if args.eval_every and update % args.eval_every == 0 and update < args.updates:
            for env_id in args.eval_env_ids:
                returns, frames = evaluate(env_id, policy, args.eval_episodes, args.seed + 20_000, sizes.image_size)
                film(update, env_id, frames)
                logger.log(update, {f"eval/{env_id}": returns.mean()})
                bar.write(f"update {update}: {env_id} return {returns.mean():.1f}")

        if update % args.save_every == 0 or update == args.updates or interrupt.asked:
            check.look()
            save_state(logger, modules, update=update, purge_step=update + 1, most=most, range_ema=range_ema)
            if interrupt.asked:
                logger.close()
                interrupt.stop(f"saved after {update} updates")

    interrupt.waits = False
    save_checkpoint(run_dir / "policy.pt", stage="train_policy", args=dataclasses.asdict(args), sizes=checkpoint["sizes"], policy=policy.state_dict())
    print(f"wrote {run_dir}/policy.pt after {time.time() - start_time:.0f} s")
    results = {}
    for env_id in args.eval_env_ids:
        returns, frames = evaluate(env_id, policy, args.eval_episodes, args.seed + 20_000, sizes.image_size)
        mean, half = mean_and_interval(returns)
        results[env_id] = {"mean": mean, "ci95": half, "returns": returns.tolist()}
        logger.log(args.updates, {f"eval/{env_id}": mean})
        film(args.updates, env_id, frames)
        print(f"{env_id}: return {mean:.1f} +- {half:.1f} (95 % interval, {args.eval_episodes} episodes)")
    write_atomically(run_dir / "eval.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    logger.close()


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
