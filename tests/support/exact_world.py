"""A world small enough to be solved exactly: the cells of a 3 x 4 torus, on which one always moves.

The signs of the two action numbers choose one of four moves, and the target has the moves permuted.
Arriving at the goal pays 1, arriving in the pit ends the episode, else it ends after 12 steps.
Dynamics, predictions and the best return are all known.

    python tests/support/exact_world.py        # prints the figures of five seeds;
    test_exact_world.py asserts what holds in all of them
"""

import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import draw_pretrain  # noqa: E402  (after the path)
import redraw_adapt  # noqa: E402
import train_policy  # noqa: E402
from common import load_checkpoint, load_draw, load_policy, load_rectified, make_envs, save_dataset  # noqa: E402
from redraw_adapt import encode  # noqa: E402

ROWS, COLUMNS, STEPS = 3, 4, 12
CELLS = ROWS * COLUMNS
GOAL, PIT = 5, 10
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west
SOURCE, TARGET = "exact_world:ExactSource-v0", "exact_world:ExactTarget-v0"
ORDER = {
    SOURCE: (0, 1, 2, 3),
    TARGET: (1, 0, 2, 3),
}  # the move of each of the four actions; the target swaps two


def next_cell(cell, action, order):
    """Where action 0..3 leads to from a cell"""
    row, column = divmod(cell, COLUMNS)
    down, right = MOVES[order[action]]
    return (row + down) % ROWS * COLUMNS + (column + right) % COLUMNS


def which_action(action):
    """(..., 2) numbers -> action 0..3 (...)"""
    return 2 * (action[..., 0] > 0) + (action[..., 1] > 0)


class ExactWorld(gym.Env):
    observation_space = gym.spaces.Dict(
        image=gym.spaces.Box(0, 255, (16, 16, 3), np.uint8),
        vector=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    )
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, order):
        self.order = order

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = int(self.np_random.choice([c for c in range(CELLS) if c != PIT]))
        return observation(self.cell), {}

    def step(self, action):
        self.cell = next_cell(self.cell, int(which_action(action)), self.order)
        return observation(self.cell), float(self.cell == GOAL), self.cell == PIT, False, {}


def observation(cell):
    """A white square shows the cell, and the vector holds its row and column."""
    row, column = divmod(cell, COLUMNS)
    image = np.zeros((16, 16, 3), np.uint8)
    image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
    return {"image": image, "vector": np.array([row - 1.0, column - 1.5], np.float32)}


for env_id in ORDER:
    if (
        env_id.split(":")[1] not in gym.registry
    ):  # run as a script, this file is imported once more under its name
        gym.register(
            env_id.split(":")[1],
            ExactWorld,
            kwargs={"order": ORDER[env_id]},
            max_episode_steps=STEPS,
            disable_env_checker=True,
        )


def best_returns(order):
    """Value iteration: the best return of an episode of STEPS steps from each cell"""
    values = [0.0] * CELLS
    for _ in range(STEPS):
        arrived = [(c == GOAL) + (0.0 if c == PIT else values[c]) for c in range(CELLS)]
        values = [max(arrived[next_cell(c, a, order)] for a in range(4)) for c in range(CELLS)]
    return values


def record(env_id, n, seed, margin=0.0):
    """n rows of whole episodes (the last may be cut) of random actions, none of them closer to the
    sign's border than the margin; and the cell of each row"""
    rng = np.random.default_rng(seed)
    env, rows, cells, last = gym.make(env_id), [], [], True
    for i in range(n):
        first = last
        if first:
            (obs, _), terminal, last = env.reset(seed=seed if i == 0 else None), False, False
        else:
            obs, _, terminal, truncated, _ = env.step(rows[-1]["action"])
            last = terminal or truncated
        cells.append(env.unwrapped.cell)
        action = (rng.choice([-1, 1], 2) * rng.uniform(margin, 1.0, 2)).astype(np.float32)
        rows.append(
            obs | {"action": action, "is_first": first, "is_last": last, "is_terminal": terminal}
        )
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}, np.array(cells)


def all_cells():
    """A dataset of one row for each cell"""
    seen = [observation(cell) for cell in range(CELLS)]
    rows = {key: np.stack([obs[key] for obs in seen]) for key in ("image", "vector")}
    return rows | {"action": np.zeros((CELLS, 2), np.float32), "is_first": np.ones(CELLS, bool)}


def learn_source(folder, seed):
    """Stage 1 on random actions: DRAW alone, no policy"""
    draw_pretrain.main(
        draw_pretrain.Args(
            env_id=SOURCE,
            run_dir=f"{folder}/source",
            seed=seed,
            device="cpu",
            steps=4000 + 4 * 900,
            prefill=4000,
            train_every=4.0,
            collect="random",
            S=8,
            K=4,
            cnn_depth=4,
            vector_units=32,
            vector_layers=1,
            units=64,
            actor_units=32,
            batch=16,
            length=8,
            lr=3e-3,
            warmup=50,
            decay=True,
            reward_scale=5.0,
            vector_scale=10.0,
            soft_updates=100,
            ensemble=2,
            ensemble_target=2,
            policy_start=10**9,
            starts=1,
            log_every=300,
        )
    )
    return f"{folder}/source/draw.pt"


def adapt(folder, draw, n, seed, method="residual", updates=800, hidden=128):
    """Stage 2 on n target rows; returns its run folder"""
    name = f"{folder}/{method}-{n}"
    save_dataset(f"{name}.npz", record(TARGET, n, seed, margin=0.1)[0])
    redraw_adapt.main(
        redraw_adapt.Args(
            checkpoint=draw,
            dataset=f"{name}.npz",
            run_dir=name,
            seed=seed,
            device="cpu",
            method=method,
            hidden=hidden,
            lr=3e-3,
            updates=updates,
            batch=32,
            length=6,
            holdout=0.2,
            log_every=100,
        )
    )
    return name


@torch.no_grad()
def judge(checkpoint, env_id=TARGET, n=1500, seed=999):
    """On transitions that no training saw: the share whose next cell is the one that the model
    thinks likeliest, knowing all before it; and KL(posterior of the next cell || prediction), nats
    a step"""
    checkpoint = load_checkpoint(checkpoint, ("draw_pretrain", "redraw_adapt"))
    draw = load_draw(checkpoint, "cpu")
    rectified = load_rectified(checkpoint, draw, "cpu")
    rows, cells = record(env_id, n, seed, margin=0.3)  # where the border is no data tells exactly
    code = encode(draw, all_cells(), "cpu")["log_q"]  # log q of each cell, (12, S, K)
    q = code[torch.from_numpy(cells)]  # (n, S, K)
    first = torch.from_numpy(rows["is_first"])
    # The mode: a sample would err in 6 % of the rows, by unimix.
    z = torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1]).float()
    action = torch.from_numpy(rows["action"])
    u = draw.observe(z[None], action[None], first[None], rectified)[0]
    log_p = rectified.log_prior(u)
    # of each cell to the prediction, (n, 12)
    kl = (code.exp() * (code - log_p[:, None])).sum((-2, -1))
    right = kl.argmin(-1) == torch.from_numpy(cells)
    of_next = kl[torch.arange(n), torch.from_numpy(cells)]
    return right[~first].float().mean().item(), of_next[~first].mean().item()


def train(folder, checkpoint, dataset, seed, **changes):
    """Stage 3 without an environment; returns the policy"""
    flags = dict(
        run_dir=f"{folder}/policy-{changes.get('learn', 'reinforce')}",
        seed=seed,
        device="cpu",
        updates=600,
        batch=32,
        length=4,
        starts=128,
        horizon=8,
        gamma=0.9,
        actor_lr=3e-3,
        critic_lr=3e-3,
        entropy=1e-3,
        return_floor=0.1,
        log_every=100,
    )
    flags |= changes
    train_policy.main(train_policy.Args(str(checkpoint), str(dataset), **flags))
    return load_policy(f"{flags['run_dir']}/policy.pt")


def returns_and_best(policy, episodes=60, seed=5):
    """Returns (episodes,) in the target, and the best ones from the same starts"""
    args = train_policy.Args("", "", seed=seed, eval_episodes=episodes, n_envs=episodes)
    envs = make_envs(TARGET, episodes)
    envs.reset(seed=seed + 20_000)  # as `evaluate` has it
    starts = [env.unwrapped.cell for env in envs.envs]
    envs.close()
    best = best_returns(ORDER[TARGET])
    returns, _ = train_policy.evaluate(args, TARGET, policy)
    return returns, np.array([best[c] for c in starts])


def mode(policy):
    """The policy's mean action instead of a sample"""

    @torch.no_grad()
    def act(image, vector):
        q = policy.posterior(policy.encoder(torch.as_tensor(image), torch.as_tensor(vector)))
        z = torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1]).float()
        return policy.actor(z).mean.numpy()

    act.sizes = policy.sizes
    return act


def figures_of(folder, seed, many=800, few=200):
    """Everything that is measured, {name: figure}"""
    figures, start = {"seed": seed}, time.time()
    draw = learn_source(folder, seed)
    figures["stage 1, s"] = time.time() - start
    adapted = adapt(folder, draw, many, seed)
    figures["base accuracy"], figures["rectified accuracy"] = (
        judge(draw)[0],
        judge(f"{adapted}/best.pt")[0],
    )
    figures["adapted, s"] = time.time() - start
    policy = train(folder, f"{adapted}/best.pt", f"{adapted}.npz", seed)
    for name, act in (("sampled", policy), ("mode", mode(policy))):
        paid, best = returns_and_best(act)
        figures[f"return {name}"], figures["best return"] = paid.mean(), best.mean()
        figures[f"episodes at best {name}"] = (paid == best).mean()
    figures["policy, s"] = time.time() - start
    for method in ("residual", "replace"):
        figures[f"few {method} accuracy"], figures[f"few {method} KL"] = judge(
            f"{adapt(folder, draw, few, seed, method)}/last.pt"
        )
    figures["seconds"] = time.time() - start
    return figures


if __name__ == "__main__":
    import contextlib
    import io
    import tempfile

    for seed in map(int, sys.argv[1:] or "12345"):
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            figures = figures_of(folder, seed)
        print(
            "  ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()
            ),
            flush=True,
        )
