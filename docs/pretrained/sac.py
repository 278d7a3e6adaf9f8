"""A source policy by SAC on the latents of a frozen world model; then f learns from SAC's rows.

    python docs/pretrained/sac.py --model runs/cup-gpu/draw.pt --env-id redraw/BallInCupCatch-v0 \\
        --out runs/cup-sac/draw.pt

A policy that learns in imagination finds the places where f promises rewards that never come. SAC
(soft actor-critic) learns from real rows and their rewards, which the source has, and which a
target does not have. So this differs from the paper, whose source policy learns in imagination.

1. SAC (sbx-rl, stable-baselines3 in JAX) reads q(z | x), as probabilities. At first the model's own
   policy acts, with noise.
2. The model's actor and critic learn to say what SAC's say.
3. f and the reward head learn from all these rows. They hold failures, near misses and successes,
   so f learns where its promises were wrong. The encoder stays as it is.

When SAC has finished, its rows and networks are kept beside `out`; the same command goes on from
them. For environments that end by their time limit alone. It needs sbx-rl:
docs/figures/requirements.txt.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from at_scale import latent_loss  # noqa: E402

from common import (  # noqa: E402
    Actor,
    ActorCritic,
    Rectified,
    UserError,
    check_range,
    check_sizes,
    checksum,
    explained,
    held_noise,
    load_checkpoint,
    load_draw,
    load_module,
    make_envs,
    on_interrupt,
    prepare,
    sample_onehot,
    save_checkpoint,
    seed_everything,
    twohot_log_prob,
)
from redraw_adapt import mean_kl  # noqa: E402


@dataclass
class Args:
    model: Path  # draw.pt of stage 1 or of at_scale.py, or a packed one
    env_id: str  # the source
    out: Path  # the checkpoint to write; SAC's rows and networks lie beside it
    steps: int = 160_000  # of SAC, in all environments together
    prefill: int = 24_000  # of these, the first ones, in which the model's own policy acts
    updates: float = 0.5  # of SAC a step
    n_envs: int = 8
    episode_steps: int = 150  # shorter than the environment's episodes: more start states
    start_speed: float = 4.0  # redraw/ ones: half of the episodes start moving, up to this fast
    gamma: float = 0.98
    copy_updates: int = 6000
    f_updates: int = 12_000
    seed: int = 1
    device: tyro.conf.Suppress[str] = "cpu"


LATER = ("out", "copy_updates", "f_updates", "device")  # flags that do not matter to SAC


# ---- 1. SAC on latents ---------------------------------------------------------------------------


def beliefs(draw, observations):
    """log q(z | x) (n, S, K) of a list of observations"""
    image = torch.from_numpy(np.stack([each["image"] for each in observations]))
    vector = torch.from_numpy(np.stack([each["vector"] for each in observations]))
    with torch.no_grad():
        return draw.posterior(draw.encoder(image, vector))


def flat(log_q):
    """What SAC reads: the probabilities, float32 (n, S K)"""
    return log_q.exp().flatten(-2).numpy()


def new_sac(args, sizes):
    """SAC of sbx, with a replay for all steps; it never sees the environment itself."""
    with explained("needs sbx-rl: pip install -r docs/figures/requirements.txt", ImportError):
        import sbx
        from stable_baselines3.common.logger import configure
        from stable_baselines3.common.vec_env import DummyVecEnv

    class Spaces(gym.Env):
        observation_space = gym.spaces.Box(0.0, 1.0, (sizes.S * sizes.K,), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (sizes.action_size,), np.float32)

    model = sbx.SAC(
        "MlpPolicy",
        DummyVecEnv([Spaces] * args.n_envs),
        learning_rate=4e-4,
        buffer_size=args.steps + args.n_envs,
        gamma=args.gamma,
        n_steps=3,  # a rare reward reaches the states before it sooner
        ent_coef="auto_0.1",
        policy_kwargs={"net_arch": [256, 256], "layer_norm": True},
        seed=args.seed,
    )
    model.set_logger(configure(None, []))
    return model


def own_actions(actor, log_q, noise):
    """The model's own actor: in the first environment alone, in each further one with more noise,
    in the last one random."""
    with torch.no_grad():
        mean = actor(log_q.exp()).mean.numpy()
    action = mean + np.linspace(0.0, 0.8, len(mean))[:, None] * noise
    action[-1] = noise[-1]
    return action.clip(-1.0, 1.0).astype(np.float32)


def learn_from_rewards(args, draw, actor, envs):
    """Runs SAC. Returns the rows, one environment after the other: log_q (N, S, K) in half
    precision, action (N, A), reward of arriving at the row (N,), is_first (N,); and SAC's networks,
    a dict of arrays."""
    n = args.n_envs
    sac = new_sac(args, draw.sizes)
    observations = [env.reset(seed=args.seed * 1000 + i)[0] for i, env in enumerate(envs)]
    log_q = beliefs(draw, observations)
    first = np.ones(n, bool)
    arrived = np.zeros(n, np.float32)  # the reward of arriving
    noise = held_noise(np.zeros((n, draw.sizes.action_size), np.float32), 1.0, 1.5)
    rows = []
    owed = 0.0  # updates
    bar = tqdm(total=args.steps, unit="step", mininterval=1.0)
    for step in range(0, args.steps, n):
        noise = held_noise(noise, 4.0, 1.5)
        if step < args.prefill:
            action = own_actions(actor, log_q, noise)
        else:
            action = np.asarray(sac.policy.predict(flat(log_q))[0], np.float32)
        rows.append((log_q.half(), torch.from_numpy(action), arrived, first))
        results = [env.step(a) for env, a in zip(envs, action, strict=True)]
        observations, reward, terminal, truncated, _ = map(list, zip(*results, strict=True))
        reached = beliefs(draw, observations)
        if any(terminal):
            raise UserError(f"{args.env_id} ends before its time limit; SAC here can't learn that")
        first = np.array(truncated)
        # SAC goes on from the last state of a cut episode as if there were further ones.
        cut = [{"TimeLimit.truncated": bool(late)} for late in truncated]
        given = (flat(log_q), flat(reached), action, np.float32(reward), np.float32(first))
        sac.replay_buffer.add(*given, cut)
        arrived = np.where(first, 0.0, reward).astype(np.float32)
        for i in np.flatnonzero(first):
            observations[i], _ = envs[i].reset()
        log_q = beliefs(draw, observations) if first.any() else reached
        if step >= args.prefill:
            owed += args.updates * n
        while owed >= 8:  # always 8: JAX compiles each number anew
            sac.train(gradient_steps=8, batch_size=256)
            owed -= 8
        bar.update(n)
        if len(rows) % 500 == 0:
            bar.set_postfix_str(f"reward {np.mean([row[2] for row in rows[-500:]]):.3f}")
    bar.close()
    parts = zip(*rows, strict=True)
    log_q, action, reward, first = (torch.stack([*map(torch.as_tensor, part)], 1) for part in parts)
    data = {"log_q": log_q, "action": action, "reward": reward, "is_first": first}
    return {name: x.flatten(0, 1) for name, x in data.items()}, networks_of(sac)


def networks_of(sac):
    """SAC's actor and its two Q-networks, as a dict of tensors: "actor.Dense_0.kernel", ..."""
    found = {"actor": sac.policy.actor_state.params["params"]}
    (found["q"],) = sac.policy.qf_state.params["params"].values()
    return {
        f"{network}.{layer}.{name}": torch.tensor(np.asarray(weights))
        for network, layers in found.items()
        for layer, parts in layers.items()
        for name, weights in parts.items()
    }


# ---- 2. The model's actor and critic copy it -----------------------------------------------------


def dense(weights, name, x):
    """A layer of Flax; of the two Q-networks both at once"""
    bias = weights[f"{name}.bias"]
    return x @ weights[f"{name}.kernel"] + (bias if bias.ndim == 1 else bias[:, None])


def sac_action(weights, x):
    """The mean of SAC's actor, x (n, S K) -> (n, A)"""
    for i in range(2):
        x = F.relu(dense(weights, f"actor.Dense_{i}", x))
    return torch.tanh(dense(weights, "actor.Dense_2", x))


def sac_value(weights, x, action):
    """Q of x (n, S K) and action (n, A), the mean of both networks, (n,)"""
    x = torch.cat([x, action], -1)
    for i in range(2):
        x = dense(weights, f"q.Dense_{i}", x)  # (2, n, 256)
        scale, bias = (weights[f"q.LayerNorm_{i}.{name}"][:, None] for name in ("scale", "bias"))
        x = F.relu(F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + bias)
    return dense(weights, "q.Dense_2", x)[..., 0].mean(0)


def copied(args, draw, data, weights):
    """An ActorCritic that says what SAC says in the states of the rows; in some of its lessons z is
    a sample."""
    policy = ActorCritic(draw.sizes)
    adam = torch.optim.Adam(policy.parameters(), 1e-3)
    bar = tqdm(range(args.copy_updates), "copying", unit="update", mininterval=1.0)
    for update in bar:
        adam.param_groups[0]["lr"] = 1e-3 * (1.0 - update / args.copy_updates)
        z = data["log_q"][torch.randint(len(data["log_q"]), (512,))].float().exp()
        z[:64] = sample_onehot(z[:64])
        action = sac_action(weights, z.flatten(-2))
        value = sac_value(weights, z.flatten(-2), action)
        actor_error = (policy.actor(z).mean - action).square().mean()
        critic_error = -twohot_log_prob(policy.critic(z), value).mean()
        adam.zero_grad()
        (10.0 * actor_error + critic_error).backward()
        adam.step()
        if update % 200 == 0:
            bar.set_postfix_str(f"squared error of an action {actor_error:.3g}")
    return policy


# ---- 3. f learns from its rows -------------------------------------------------------------------


def learn_dynamics(args, draw, data):
    """f and the reward head go on; returns the held-out KL, nats a step."""
    draw.requires_grad_(True)
    dynamics = Rectified(draw)
    episode = data["is_first"].cumsum(0)
    train = torch.nonzero(episode % 20 > 0)[:, 0].numpy()  # row numbers
    held = torch.nonzero(episode % 20 == 0)[:, 0].numpy()
    learns = [*draw.dynamics_net.parameters(), draw.initial_logits, *draw.reward_head.parameters()]
    adam = torch.optim.Adam(learns, 1e-3)
    bar = tqdm(range(args.f_updates), "f", unit="update", mininterval=1.0)
    for update in bar:
        fall = 0.5 + 0.5 * math.cos(math.pi * update / args.f_updates)
        adam.param_groups[0]["lr"] = 1e-3 * max(0.03, fall) * min(1.0, (update + 1) / 100)
        start = np.random.randint(0, len(train) - 15, 64)
        rows = torch.from_numpy(train[start[:, None] + np.arange(16)])
        log_q = data["log_q"][rows].float()
        z = sample_onehot(log_q.exp())
        z[:32] = log_q[:32].exp()  # the own predictions begin with it, as imagination does
        chosen = {name: data[name][rows] for name in ("action", "reward", "is_first")}
        loss, kl, error = latent_loss(draw, dynamics, log_q, z, chosen, open_loop=32)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learns, 1000.0)
        adam.step()
        if update % 100 == 0:
            bar.set_postfix_str(f"KL {kl:.3g} reward {error:.3g}")
    draw.requires_grad_(False)
    # Sequences of 8 rows, as stage 1 measures it.
    return mean_kl(draw, dynamics, data | {"log_q": data["log_q"].float()}, held, 8)


def main(args: Args):
    check(args)
    prepare(args)
    on_interrupt(interrupted)
    checkpoint = load_checkpoint(args.model, ("draw_pretrain",))
    draw = load_draw(checkpoint)
    actor = load_module(checkpoint, "task_actor", lambda: Actor(draw.sizes))
    options = {"episode_steps": args.episode_steps, "start_speed": args.start_speed}
    envs = make_envs(args.env_id, args.n_envs, draw.sizes.image_size, **options)
    check_sizes(args.env_id, envs, draw.sizes)

    rows_file = args.out.with_suffix(".rows.pt")
    of_sac = {name: str(value) for name, value in vars(args).items() if name not in LATER}
    of_sac["model"] = checksum(args.model)
    if not rows_file.exists():
        data, weights = learn_from_rewards(args, draw, actor, envs.envs)
        check_finite("SAC", weights)
        save_checkpoint(rows_file, stage="sac", flags=of_sac, data=data, weights=weights)
    envs.close()
    data, weights = load_rows(rows_file, "sac", of_sac, "weights")
    seed_everything(args.seed)  # so that a run that goes on ends as one in a piece
    policy = copied(args, draw, data, weights)
    kl = learn_dynamics(args, draw, data)
    check_finite("the copy of SAC", policy.state_dict())
    check_finite("f", draw.state_dict())
    write_model(args.out, checkpoint, draw, policy, kl)


def load_rows(path, stage, flags, networks):
    """What the first part kept in `path`: the rows and its `networks`. UserError if it is damaged,
    or was made with other flags (a dict)."""
    found = load_checkpoint(path, (stage,))
    with explained(f"{path} is damaged; delete it"):
        data, learned, before = found["data"], found[networks], found["flags"]
        other = ", ".join(name for name in flags if before[name] != flags[name])
    if other:
        raise UserError(f"{path} was made with another {other}; delete it, or change --out")
    return data, learned


def write_model(path, checkpoint, draw, policy, kl):
    """The checkpoint that was given, with this world model, policy and held-out KL"""
    del checkpoint["file"]
    checkpoint["draw"] = draw.state_dict()
    checkpoint["task_actor"] = policy.actor.state_dict()
    checkpoint["task_critic"] = policy.critic.state_dict()
    checkpoint["args"]["learn"] = "lookahead"  # its policies act by their mean
    if checkpoint.get("source_range"):
        checkpoint["source_range"]["kl"] = kl
    save_checkpoint(path, **checkpoint)
    print(f"wrote {path}; held-out KL {kl:.1f} nats a step")


def check(args):
    """Raises UserError for a flag that makes no sense."""
    check_range(args, 2, 1000, "n_envs")
    check_range(args, 2, 10**6, "episode_steps")
    # Every 20th episode is held out: two at least.
    check_range(args, 40 * max(args.episode_steps, 8), 10**8, "steps")
    check_range(args, 8 * args.n_envs, args.steps // 2, "prefill")
    check_range(args, 0.01, 100, "updates")
    check_range(args, 0, 10**6, "start_speed")
    check_range(args, 0, 1, "gamma")
    check_range(args, 1, 10**9, "copy_updates", "f_updates")
    if args.out.is_dir() or args.out.resolve() == args.model.resolve():
        raise UserError(f"--out {args.out} must be a new file")
    with explained(f"can't write beside --out {args.out}", OSError):
        args.out.parent.mkdir(parents=True, exist_ok=True)


def check_finite(what, weights):
    """Raises UserError if a network's weights, a dict of tensors, are not finite."""
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"{what} diverged: its weights are not finite; nothing of it was saved")


def interrupted(*_):
    """Ends the script from a signal handler, where print is not allowed."""
    os.write(
        2, b"\ninterrupted; if its rows are kept already, the same command goes on from them\n"
    )
    raise SystemExit(130)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
