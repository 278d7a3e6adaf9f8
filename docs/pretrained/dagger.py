"""A source policy by an expert's corrections, on the latents of a frozen world model; then f learns
from the rows.

    python docs/pretrained/dagger.py --model runs/finger-gpu/draw.pt \\
        --env-id redraw/FingerTurnHard-v0 --out runs/finger-dagger/draw.pt

DAgger (arXiv 1011.0686): the model's actor acts, with noise. In each state an expert that sees the
true state (docs/figures/experts.py) says what it would do, and the actor learns to do the same from
q(z | x). So it learns where it errs, which the expert's own rows do not show. In 0.4 of the
episodes the expert itself acts in half of the steps, so that more of them reach the goal. This
differs from the paper, whose source policy learns in imagination. A target has no such expert.

1. The rows and the actor, in eight environments at once.
2. The critic learns from the rows and their rewards.
3. f and the reward head learn from the rows, as in sac.py. The encoder stays as it is.

When the first part has finished, its rows are kept beside `out`; the same command goes on from
them. For environments that end by their time limit alone.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))

import experts  # noqa: E402
from sac import (  # noqa: E402
    beliefs,
    check_finite,
    interrupted,
    learn_dynamics,
    load_rows,
    write_model,
)

import train_policy  # noqa: E402
from common import (  # noqa: E402
    Actor,
    ActorCritic,
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
    save_checkpoint,
    seed_everything,
    twohot_log_prob,
)


@dataclass
class Args:
    model: Path  # draw.pt of stage 1 or of at_scale.py, or a packed one
    env_id: str  # the source
    out: Path  # the checkpoint to write; the rows lie beside it
    steps: int = 96_000  # of the environments together
    updates: float = 0.25  # of the actor, a step
    n_envs: int = 8
    episode_steps: int = 150  # shorter than the environment's episodes: more start states
    start_speed: float = 6.0  # redraw/ ones: half of the episodes start moving, up to this fast
    gamma: float = 0.98
    critic_updates: int = 3000
    f_updates: int = 4000
    seed: int = 1
    device: tyro.conf.Suppress[str] = "cpu"


LATER = ("out", "gamma", "critic_updates", "f_updates", "device")  # the rows do not depend on them


def learn_from_expert(args, draw, actor, envs, teachers):
    """The actor learns from `teachers`, one for each environment. Returns the rows, one environment
    after the other: log_q (N, S, K) in half precision, action (N, A), reward of arriving at the row
    (N,), is_first (N,)."""
    n = args.n_envs
    rounds = args.steps // n
    observations = [env.reset(seed=args.seed * 1000 + i)[0] for i, env in enumerate(envs)]
    first = np.ones(n, bool)
    arrived = np.zeros(n, np.float32)  # the reward of arriving
    noise = held_noise(np.zeros((n, draw.sizes.action_size), np.float32), 1.0, 1.5)
    deviation = np.linspace(0.0, 0.8, n)[:, None] ** 2  # most environments: hardly any noise
    asked = np.zeros(n, bool)  # in these episodes the expert acts in half of the steps
    log_qs = torch.zeros(rounds, n, draw.sizes.S, draw.sizes.K, dtype=torch.float16)
    actions, advice = torch.zeros(2, rounds, n, draw.sizes.action_size)
    rewards = torch.zeros(rounds, n)
    firsts = torch.zeros(rounds, n, dtype=torch.bool)
    adam = torch.optim.Adam(actor.parameters(), 1e-3)
    owed = 0.0  # updates
    bar = tqdm(total=args.steps, unit="step", mininterval=1.0)
    for i in range(rounds):
        log_q = beliefs(draw, observations)
        with torch.no_grad():
            mean = actor(log_q.exp()).mean.numpy()
        states = [experts.true_state(env) for env in envs]
        right = np.stack([each(state) for each, state in zip(teachers, states, strict=True)])
        takes = asked & (np.random.rand(n) < 0.5)
        noise = held_noise(noise, 4.0, 1.5)
        action = np.where(takes[:, None], right, mean) + deviation * noise
        action = action.clip(-1.0, 1.0).astype(np.float32)
        log_qs[i] = log_q.half()
        actions[i] = torch.from_numpy(action)
        advice[i] = torch.from_numpy(np.float32(right))
        rewards[i] = torch.from_numpy(arrived)
        firsts[i] = torch.from_numpy(first)
        results = [env.step(a) for env, a in zip(envs, action, strict=True)]
        observations, reward, terminal, truncated, _ = map(list, zip(*results, strict=True))
        if any(terminal):
            raise UserError(
                f"{args.env_id} ends before its time limit; the critic can't learn that"
            )
        first = np.array(truncated)
        arrived = np.where(first, 0.0, reward).astype(np.float32)
        for k in np.flatnonzero(first):
            observations[k], _ = envs[k].reset()
            asked[k] = np.random.rand() < 0.4
        owed += args.updates * n
        while owed >= 1.0 and i >= 32:
            fall = 0.5 + 0.5 * math.cos(math.pi * i / rounds)
            adam.param_groups[0]["lr"] = 1e-3 * max(0.05, fall)
            row, env = torch.randint(i + 1, (512,)), torch.randint(n, (512,))
            z = log_qs[row, env].float().exp()
            loss = (actor(z).mean - advice[row, env]).square().sum(-1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            owed -= 1.0
        bar.update(n)
        if i % 100 == 0 and i > 32:
            paid = rewards[max(0, i - 500) : i].mean()
            bar.set_postfix_str(f"reward {paid:.3f} squared error of an action {loss:.3g}")
    bar.close()
    data = {"log_q": log_qs, "action": actions, "reward": rewards, "is_first": firsts}
    return {name: x.transpose(0, 1).flatten(0, 1) for name, x in data.items()}


def learn_values(args, policy, data):
    """The critic learns what five recorded steps are paid, and what it says itself behind them."""
    flags = train_policy.Args("", gamma=args.gamma, ahead=5)
    data = data | {"cont": torch.ones(len(data["reward"]))}
    adam = torch.optim.Adam(policy.critic.parameters(), 1e-3)
    bar = tqdm(range(args.critic_updates), "critic", unit="update", mininterval=1.0)
    for update in bar:
        adam.param_groups[0]["lr"] = 1e-3 * (1.0 - update / args.critic_updates)
        lessons, metrics = train_policy.recorded_lessons(flags, policy, data)
        loss = -twohot_log_prob(policy.critic(lessons["z"]), lessons["R"]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        policy.update_slow_critic()
        if update % 100 == 0:
            bar.set_postfix_str(f"value {metrics['return']:.3g} loss {loss:.3g}")


def main(args: Args):
    check(args)
    prepare(args)
    on_interrupt(interrupted)
    checkpoint = load_checkpoint(args.model, ("draw_pretrain",))
    draw = load_draw(checkpoint)
    actor = load_module(checkpoint, "task_actor", lambda: Actor(draw.sizes)).requires_grad_(True)
    options = {"episode_steps": args.episode_steps, "start_speed": args.start_speed}
    envs = make_envs(args.env_id, args.n_envs, draw.sizes.image_size, **options)
    check_sizes(args.env_id, envs, draw.sizes)
    teachers = [experts.load_teacher(args.env_id) for _ in range(args.n_envs)]

    rows_file = args.out.with_suffix(".rows.pt")
    of_rows = {name: str(value) for name, value in vars(args).items() if name not in LATER}
    of_rows["model"] = checksum(args.model)
    if not rows_file.exists():
        data = learn_from_expert(args, draw, actor, envs.envs, teachers)
        check_finite("the actor", actor.state_dict())
        learned = actor.state_dict()
        save_checkpoint(rows_file, stage="dagger", flags=of_rows, data=data, actor=learned)
    envs.close()
    data, learned = load_rows(rows_file, "dagger", of_rows, "actor")
    seed_everything(args.seed)  # so that a run that goes on ends as one in a piece
    data["log_q"] = data["log_q"].float()
    policy = ActorCritic(draw.sizes)
    policy.actor.load_state_dict(learned)
    learn_values(args, policy, data)
    kl = learn_dynamics(args, draw, data)
    check_finite("the critic", policy.state_dict())
    check_finite("f", draw.state_dict())
    write_model(args.out, checkpoint, draw, policy, kl)


def check(args):
    """Raises UserError for a flag that makes no sense."""
    check_range(args, 2, 1000, "n_envs")
    check_range(args, 2, 10**6, "episode_steps")
    # Every 20th episode is held out: two at least.
    check_range(args, 40 * max(args.episode_steps, 8), 10**8, "steps")
    check_range(args, 0.01, 100, "updates")
    check_range(args, 0, 10**6, "start_speed")
    check_range(args, 0, 1, "gamma")
    check_range(args, 1, 10**9, "critic_updates", "f_updates")
    if args.out.is_dir() or args.out.resolve() == args.model.resolve():
        raise UserError(f"--out {args.out} must be a new file")
    with explained(f"can't write beside --out {args.out}", OSError):
        args.out.parent.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
