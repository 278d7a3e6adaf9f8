"""Figure 3: how large a change of dynamics can a small residual carry? On the pendulum.

    python docs/figures/capacity.py --changes Reversed gravity delay --sizes 16 256 rank6

changes the target's physics in seven ways, each at up to three strengths, and fits residuals of
several sizes, and changes of low rank of f's weights, to 10,000 rows. Writes capacity.csv and
capacity.png beside this file; --draw draws from the csv alone.

This file is also the module of these environments, e.g. `capacity:redraw/Pendulum-gravity-1.3-v0`.
"""

import sys
from collections import deque
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experts import energy_shaping, true_state  # noqa: E402
from jobs import (  # noqa: E402
    HERE,
    PRETRAINED,
    Job,
    adapt,
    mean_and_range,
    measured,
    new_figure,
    read,
    record_expert,
    run_all,
    train,
)

from common import DMCEnv, load_checkpoint  # noqa: E402

# What is changed, and the strengths; "gain" multiplies torques, "push" is a constant one in N m.
CHANGES = {
    "Reversed": (-1.0,),
    "gravity": (0.7, 1.3, 1.6),
    "mass": (0.5, 1.25, 1.5),
    "damping": (0.2, 0.5, 1.5),  # with twice the damping energy shaping never comes up
    "gain": (0.8, 1.5, 2.0),
    "push": (0.1, 0.2, 0.3),
    "delay": (1.0, 2.0, 3.0),
}
SIZES = {
    "16": ("--hidden", 16),
    "64": ("--hidden", 64),
    "256": ("--hidden", 256),
    "1024": ("--hidden", 1024),
    "256x2": ("--hidden", 256, "--layers", 2),
    # A change of f's own weights with as many numbers as the residuals of 16, 64 and 256. (256 and
    # rank86 have as many as f itself: 132,224.)
    "rank6": ("--method", "lowrank", "--rank", 6),
    "rank22": ("--method", "lowrank", "--rank", 22),
    "rank86": ("--method", "lowrank", "--rank", 86),
}
CSV = HERE / "capacity.csv"


class ChangedPendulum(DMCEnv):
    """PendulumSwingup with other physics; see CHANGES."""

    def __init__(self, change, strength, **kwargs):
        super().__init__("pendulum", "swingup", **kwargs)
        model = self.physics.model
        self.gain = strength if change in ("gain", "Reversed") else 1.0
        self.push = strength if change == "push" else 0.0
        self.waiting = deque([np.zeros(1)] * (int(strength) if change == "delay" else 0))
        if change == "gravity":
            model.opt.gravity[:] *= strength
        if change == "mass":
            model.body_mass[:] *= strength
            model.body_inertia[:] *= strength
        if change == "damping":
            model.dof_damping[:] *= strength

        heavier = strength if change == "mass" else 1.0
        self.knows = (heavier * (strength if change == "gravity" else 1.0), heavier)

    def best_action(self, state):
        """True state -> action: energy shaping that knows all changes but delay and damping"""
        action = (energy_shaping(state, *self.knows) - self.push) / self.gain
        return action.clip(-1.0, 1.0)  # as it acts: it is recorded, and the residual learns from it

    def reset(self, **kwargs):
        self.waiting = deque([np.zeros(1)] * len(self.waiting))
        return super().reset(**kwargs)

    def step(self, action):
        self.waiting.append(np.clip(np.asarray(action, np.float64), -1.0, 1.0))
        self.physics.named.data.xfrc_applied["pole", 4] = self.push
        return super().step(self.gain * self.waiting.popleft())


def env_id_of(change, strength):
    return f"capacity:redraw/Pendulum-{change}-{abs(strength):g}-v0"


if __name__ != "__main__":  # "capacity:" in an id imports this file a second time, by its name
    for change, strengths in CHANGES.items():
        for strength in strengths:
            gym.register(
                env_id_of(change, strength).removeprefix("capacity:"),
                "capacity:ChangedPendulum",
                kwargs={"change": change, "strength": strength},
                max_episode_steps=500,
                disable_env_checker=True,
            )


def best_known(change, strength, episodes=40):
    """Mean return of the environment's `best_action`"""
    env = gym.make(env_id_of(change, strength), image_size=32)
    env.unwrapped.render = lambda: np.zeros((32, 32, 3), np.uint8)
    returns = []
    for episode in range(episodes):
        env.reset(seed=episode)
        total = 0.0
        last = False
        while not last:
            _, reward, _, last, _ = env.step(env.unwrapped.best_action(true_state(env)))
            total += reward
        returns.append(total)
    return round(float(np.mean(returns)), 1)


def job(change, strength, size, seed, runs):
    target = env_id_of(change, strength)
    folder = runs / "capacity" / f"{change}-{abs(strength):g}"
    data = folder / f"expert-{seed}.npz"
    adapted = folder / f"{size}-{seed}-adapted"
    policy = folder / f"{size}-{seed}-policy"
    model = PRETRAINED / "pendulum.pt"
    stages = [
        record_expert(data, target, 10_000, "--seed", 1000 * seed),
        adapt(adapted, model, "--dataset", data, *SIZES[size], "--seed", seed),
        train(policy, adapted / "best.pt", data, target, "--seed", seed),
    ]
    key = {"change": change, "strength": strength, "size": size, "seed": seed}

    def result():
        home = load_checkpoint(model, ("draw_pretrain",))["source_range"]["kl"]
        row = measured(policy, target, adapted)
        best = best_known(change, strength)
        return row | {"kl_over_home": round(row["kl"] / home, 3), "best_known": best}

    return Job(key, stages, result)


def draw_maps():
    """Two maps, changes downwards, sizes of what is trained to the right: return as a share of the
    best known, and held-out KL over the source's own"""
    rows = read(CSV)
    names = [f"{change} {s:g}" for change, strengths in CHANGES.items() for s in strengths]
    done = {f"{row['change']} {float(row['strength']):g}" for row in rows}
    names = [name for name in names if name in done] or names  # what was not run has no line
    maps = np.full((2, len(names), len(SIZES)), np.nan)
    for y, name in enumerate(names):
        for x, size in enumerate(SIZES):
            found = [r for r in rows if f"{r['change']} {float(r['strength']):g}" == name]
            found = [r for r in found if r["size"] == size]
            if found:
                share = [float(r["return"]) / float(r["best_known"]) for r in found]
                maps[:, y, x] = np.mean(share), mean_and_range(found, "kl_over_home")[0]
    figure, axes = new_figure(2)
    figure.set_size_inches(10.0, 2.4 + 0.45 * len(names))
    titles = ("return / best known", "held-out KL / the source's own")
    for ax, values, title in zip(axes[0], maps, titles, strict=True):
        ax.grid(False)
        picture = ax.imshow(values, aspect="auto", cmap="cividis")
        ax.set(title=title, xticks=range(len(SIZES)), xlabel="hidden units, or rank")
        ax.set_xticklabels(SIZES, rotation=45)
        ax.set(yticks=range(len(names)), yticklabels=names)
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if picture.norm(value) > 0.5 else "white"
                ax.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=10)
    figure.savefig(HERE / "capacity.png", dpi=110)


def main(
    changes: tuple[Literal[*CHANGES], ...] = tuple(CHANGES),
    sizes: tuple[Literal[*SIZES], ...] = tuple(SIZES),
    seeds: tuple[int, ...] = (1,),
    runs: Path = Path("runs"),
    draw: bool = False,
):
    """Runs what is missing, then draws.

    Args:
        changes: of the physics, each at its strengths
        sizes: of the residual, hidden units (x layers); or the rank of a change of f's weights
        seeds: of data, residual and policy
        runs: folder of the runs
        draw: run nothing, draw from the csv
    """
    jobs = [
        job(change, strength, size, seed, runs.resolve())
        for seed in seeds
        for size in sizes
        for change in changes
        for strength in CHANGES[change]
    ]
    if not draw:
        run_all(CSV, jobs)
    draw_maps()


if __name__ == "__main__":
    tyro.cli(main)
