"""Environment steps with rendering, this project's settings against dm_control's stock ones: python
tests/benchmarks/bench_environments.py

Same tasks, same random actions, two physics frames a step, one 64x64 picture of camera 0 a step,
software rendering.
The bar: at least 5 times the steps per second.
"""

import statistics

import gymnasium as gym
import numpy as np
from measure import REPEATS, in_turns, machine, ms, ratio, table

import common  # noqa: F401 - registers the environments

SOURCES = {
    "PendulumSwingup": ("pendulum", "swingup"),
    "BallInCupCatch": ("ball_in_cup", "catch"),
    "FingerTurnHard": ("finger", "turn_hard"),
    "ReacherEasy": ("reacher", "easy"),
}
STEPS = 10  # per reading


def main(repeats=REPEATS):
    """Returns {name: median seconds of one of our steps}."""
    rows, seconds_per_step = [], {}
    for name, (domain, task) in SOURCES.items():
        ours = gym.make(
            f"redraw/{name}-v0"
        )  # sets MUJOCO_GL, which dm_control reads when it is imported
        from dm_control import suite

        stock, rng = suite.load(domain, task), np.random.default_rng(0)
        action = rng.uniform(-1, 1, (STEPS, *ours.action_space.shape)).astype(np.float32)
        ours.reset(seed=0)

        def our_steps(action=action, ours=ours):
            for a in action:
                if any(ours.step(a)[2:4]):
                    ours.reset()

        def stock_steps(action=action, stock=stock):
            for a in action:
                stock.step(a)
                if stock.step(a).last():
                    stock.reset()
                stock.physics.render(64, 64, camera_id=0)
                stock.physics.velocity()

        seconds = in_turns({"stock": stock_steps, "ours": our_steps}, repeats)
        seconds = {k: [s / STEPS for s in v] for k, v in seconds.items()}
        rows.append(
            [
                name,
                ms(seconds["stock"]),
                ms(seconds["ours"]),
                ratio(seconds["stock"], seconds["ours"]),
            ]
        )
        seconds_per_step[name] = statistics.median(seconds["ours"])
        ours.close()
        stock.close()
    table(
        "Environment steps with a 64x64 picture, ms a step",
        ["", "dm_control, stock", "redraw", "times as fast (bar: 5)"],
        rows,
    )
    return seconds_per_step


if __name__ == "__main__":
    machine()
    main()
