"""Stage 3: train a policy in imagination, under the source's or the rectified dynamics; evaluate it.

No environment is needed to train. Trajectories start from posterior states of a dataset and follow

    a_t ~ pi(z_t)                                           the actor
    u_{t+1} = f(z_t, sigma_t, a_t) + e_{t+1}                the rectified dynamics
    sigma_{t+1} = softmax(u_{t+1}),   z_{t+1} ~ p

for H steps. Then, as in stage 1,

    R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),   R_H = v_H
    w_t = prod_{1 <= k <= t} gamma c_k
    actor:   -w_t (log pi(a_t | z_t) sg((R_t - v_t) / scale) + entropy_weight * entropy)
    critic:  -w_t (log p(R_t) + log p(mean of the slow critic))

r and c: predicted reward and continue of ARRIVING at a state; v: the critic's mean; the slow critic
follows the critic by 2 % an update; scale = max(return_floor, range of the returns from the 5th to
the 95th percentile, averaged over some 100 updates); sg: stop-gradient. Other symbols: common.py.

    python train_policy.py laptop --checkpoint runs/adapted/best.pt \
        --dataset runs/adapted/dataset.npz --eval-env-ids redraw/PendulumSwingupReversed-v0 \
        --run-dir runs/policy

writes runs/policy/policy.pt (encoder, posterior and actor: all that deployment needs), eval.json,
curves.png and a film of one episode in each environment.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from scipy import stats
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from common import (
    ActorCritic,
    Policy,
    Run,
    UserError,
    check_range,
    check_sizes,
    explained,
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
    dataset: str  # where trajectories start: a .npz file or a folder of them; no rewards are read
    dataset_rows: int | None = None  # use the newest so many rows; the rest is not read
    actions_lead: bool = False  # row t holds the action that LED to it (DreamerV2, V-D4RL)
    run_dir: str | None = None  # folder for all that the run writes (default: runs/policy-SEED)
    overwrite: bool = False  # start anew in a folder that holds a run already
    resume: bool = False  # go on from the last save in run_dir with the same flags; if none, start
    save_every: int = 1000  # updates between saves; a kill loses at most so many
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16; losses and weights stay float32
    compile: bool = False  # torch.compile of the losses; the first update then takes minutes
    log_every: int = 100  # updates between two lines in the logs

    # Evaluation, in environments of these Gymnasium ids (or module:id)
    eval_env_ids: tuple[str, ...] = ()
    eval_every: int = 100_000  # updates between evaluations, 0: only at the end
    eval_episodes: int = 100
    n_envs: int = 20  # episodes side by side; 1 for what can exist only once
    look: Literal["fast", "stock"] = "fast"  # as in stage 1

    # Imagination
    updates: int = 3_000_000
    batch: int = 16  # B, sequences of the dataset an update
    length: int = 64  # T, steps of a sequence
    starts: int = 341  # imagined trajectories an update, from states of these sequences
    rewarded: float = 0.0  # share of the sequences that begin where unusual reward is predicted
    horizon: int = 40  # H
    gamma: float = 1 - 1 / 333  # larger: rewards farther away count
    lam: float = 0.95  # lambda; larger: returns rest on imagined rewards, smaller: on the critic
    entropy: float = 3e-4  # weight of the policy's entropy; larger: more random for longer
    lr: float = 3e-5
    decay: bool = False  # the learning rate falls to zero along a cosine: a run ends settled
    return_floor: float = 1.0  # least scale of returns; smaller: small rewards count more
    actor_grad: Literal["reinforce", "dynamics"] = "reinforce"  # dynamics: through the world model
    pessimism: float = 0.0  # imagined reward less so many times the disagreement of the members
    warm_start: Literal["none", "critic", "both"] = "none"  # begin with stage 1's critic and actor


LAPTOP = Args(
    checkpoint=tyro.MISSING,
    dataset=tyro.MISSING,
    eval_every=0,
    eval_episodes=40,
    updates=3000,
    batch=64,
    length=2,
    starts=128,
    rewarded=0.1,
    horizon=15,
    gamma=0.99,
    lr=5e-4,
    decay=True,
    return_floor=0.01,
)
DUCKIETOWN = dataclasses.replace(
    LAPTOP,
    eval_episodes=10,
    updates=2000,
    rewarded=0.0,
    gamma=0.95,
    return_floor=0.1,
)
PRESETS = {
    "laptop": ("minutes on two CPU cores", LAPTOP),
    "duckietown": ("minutes on one CPU core: lane following", DUCKIETOWN),
    "paper": ("the paper's sizes", Args(checkpoint=tyro.MISSING, dataset=tyro.MISSING)),
}


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


# ---- The loop ------------------------------------------------------------------------------------


def main(args):
    check(args)
    device = prepare(args)
    checkpoint = load_checkpoint(args.checkpoint, ("draw_pretrain", "redraw_adapt"), device)
    draw = load_draw(checkpoint, device)
    rectified = load_rectified(checkpoint, draw, device)
    dataset = load_dataset(args.dataset, draw.sizes, args.dataset_rows, args.actions_lead)
    if len(dataset["is_first"]) < args.length:
        raise UserError(f"{args.dataset} holds fewer rows than --length {args.length}")
    for env_id in args.eval_env_ids:  # a typo must not cost a training
        evaluation_envs(args, env_id, draw.sizes).close()
    data = encode(draw, dataset, device)
    del dataset

    policy = start_of(args, checkpoint, draw.sizes).to(device)
    groups = [{"params": list(net.parameters())} for net in (policy.actor, policy.critic)]
    adam = torch.optim.Adam(groups, args.lr, eps=1e-5, fused=True)
    deployed = Policy(draw.sizes, draw, policy.actor)
    run = Run(args.run_dir or f"runs/policy-{args.seed}", args, [args.checkpoint, args.dataset])
    modules = {"policy": policy, "adam": adam}
    saved = run.resume(modules)
    begin = saved.get("update", 0)
    losses = torch.compile(actor_critic_losses) if args.compile else actor_critic_losses
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    def reward_of(z, sigma, action, z_next):
        return draw.reward(z_next)

    start_time = time.time()
    bar = tqdm(
        range(begin + 1, args.updates + 1), initial=begin, total=args.updates, unit="update",
        mininterval=1.0,
    )  # fmt: skip
    for update in bar:
        set_learning_rate(args, adam, update)
        z, sigma, alive = start_states(args, draw, rectified, data)
        with autocast:
            loss, metrics, policy.range = losses(
                args, draw, rectified, policy, z, sigma, alive, reward_of
            )
        adam.zero_grad()
        loss.backward()
        norms = [nn.utils.clip_grad_norm_(group["params"], 100.0) for group in groups]
        adam.step()
        policy.update_slow_critic()

        if update % args.log_every == 0:
            metrics = {f"policy/{name}": value for name, value in metrics.items()}
            shown = run.log(update, metrics | {"policy/grad_norm": sum(norms)})
            warn(run, args, shown, draw.sizes)
            bar.set_postfix_str(
                f"imagined return {shown['policy/return']:.3g} reward {shown['policy/reward']:.3g} "
                f"entropy {shown['policy/entropy']:.2f}"
            )
        if args.eval_every and update % args.eval_every == 0 and update < args.updates:
            for env_id in args.eval_env_ids:
                returns, frames = evaluate(args, env_id, deployed)
                run.log(update, {f"eval/{env_id}": returns.mean()})
                film(run, update, env_id, frames)
                bar.write(f"update {update}: {env_id} return {returns.mean():.4g}")
        if run.interrupted or update % args.save_every == 0 or update == args.updates:
            run.save(update, modules, update=update)

    run.write(
        "policy.pt",
        stage="train_policy",
        args=dataclasses.asdict(args),
        sizes=checkpoint["sizes"],
        policy=deployed.state_dict(),
    )
    print(f"wrote {run.dir}/policy.pt after {time.time() - start_time:.0f} s")
    results = {}
    films = {}
    for env_id in args.eval_env_ids:
        returns, films[env_id] = evaluate(args, env_id, deployed)
        mean, half = mean_and_interval(returns)
        results[env_id] = {"mean": mean, "ci95": half, "returns": returns.tolist()}
        text = json.dumps(results, indent=1).encode()
        write_atomically(run.dir / "eval.json", lambda file, text=text: file.write(text))
        run.log(args.updates, {f"eval/{env_id}": mean})
        print(f"{env_id}: return {mean:.4g} +- {half:.2g} (95 % interval, {len(returns)} episodes)")
    for env_id, frames in films.items():
        film(run, args.updates, env_id, frames)
    run.close()


# ---- What serves the loop ------------------------------------------------------------------------


def check(args):
    """Raises UserError for a flag that makes no sense."""
    check_range(args, 1, 10**12, "updates", "log_every", "save_every", "n_envs")
    check_range(args, 1e-9, 10**9, "return_floor")
    check_range(args, 1, 65536, "batch", "length", "horizon")
    check_range(args, 1, args.batch * args.length, "starts")
    check_range(args, 2, 65536, "eval_episodes")  # an interval needs two
    check_range(args, 2, 10**12, "dataset_rows")
    check_range(args, 0, 10**9, "entropy", "eval_every", "pessimism")
    check_range(args, 0, 1, "lr", "rewarded", "gamma", "lam")


@torch.no_grad()
def encode(draw, dataset, device, chunk=1024):
    """What training needs of a dataset, on `device`: log_q, log q(z_t | x_t) of every row
    (N, S, K), action (N, A), is_first and is_terminal (N,), and odd (N,): how far the predicted
    reward is from the usual one."""
    log_q = []
    for i in tqdm(range(0, len(dataset["is_first"]), chunk), "encoding", unit="chunk"):
        image = torch.from_numpy(dataset["image"][i : i + chunk]).to(device)
        vector = torch.from_numpy(dataset["vector"][i : i + chunk]).to(device)
        log_q.append(draw.posterior(draw.encoder(image, vector)))
    reward = torch.cat([draw.reward(part.exp()) for part in log_q])
    keys = ("action", "is_first", "is_terminal")
    data = {key: torch.from_numpy(dataset[key]).to(device) for key in keys}
    return {"log_q": torch.cat(log_q), "odd": (reward - reward.median()).abs() + 1e-6, **data}


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
    alive = 1.0 - data["is_terminal"][t].float()  # (B, T)
    pick = torch.randperm(args.batch * args.length, device=device)[: args.starts]
    return z.flatten(0, 1)[pick], sigma.flatten(0, 1)[pick], alive.flatten()[pick]


def start_of(args, checkpoint, sizes):
    """A new ActorCritic, or with --warm-start one with the source's critic, or critic and actor"""
    policy = ActorCritic(sizes)
    prefix = "task" if checkpoint["stage"] == "draw_pretrain" else "source"
    for name in {"none": (), "critic": ("critic",), "both": ("critic", "actor")}[args.warm_start]:
        with explained(f"{args.checkpoint} holds no {name} for --warm-start"):
            getattr(policy, name).load_state_dict(checkpoint[f"{prefix}_{name}"])
    policy.slow_critic.load_state_dict(policy.critic.state_dict())
    return policy


def set_learning_rate(args, optimizer, update):
    """Constant, or with `decay` falling to zero along a cosine."""
    fall = 0.5 + 0.5 * math.cos(math.pi * (update - 1) / args.updates) if args.decay else 1.0
    for group in optimizer.param_groups:
        group["lr"] = args.lr * fall


def warn(run, args, shown, sizes):
    """What usually goes wrong, in words, once each"""
    run.warn(
        # The actor's least deviation, 0.1, has an entropy of -0.88 per action.
        shown["policy/entropy"] < -0.8 * sizes.action_size,
        "the policy's entropy is at its floor: it has stopped exploring; try a larger --entropy or "
        "--return-floor, or a smaller --lr",
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
    returns, frames = [], []
    while len(returns) < args.eval_episodes:
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


def film(run, update, env_id, frames):
    """The frames, four times as large, as a film named after the environment"""
    name = env_id.split("/")[-1].split(":")[-1]
    run.video(update, name, frames.repeat(4, 1).repeat(4, 2))


def mean_and_interval(returns):
    """Mean and half-width of the 95 % confidence interval (Student's t) of returns (n,), n >= 2"""
    n = len(returns)
    half = stats.t.ppf(0.975, n - 1) * np.std(returns, ddof=1) / np.sqrt(n)
    return float(np.mean(returns)), float(half)


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
