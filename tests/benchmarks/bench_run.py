"""All benchmarks, and from their parts what a whole laptop run takes: python
tests/benchmarks/bench_run.py (make bench)

With --real also runs the laptop preset of all three stages (pendulum, target with reversed
actions), and compares.
"""

import subprocess
import sys
import tempfile
import time

import bench_adapt
import bench_environments
import bench_policy
import bench_pretrain
from measure import ROOT, machine, table

import draw_pretrain
import redraw_adapt
import train_policy

SOURCE, TARGET = "redraw/PendulumSwingup-v0", "redraw/PendulumSwingupReversed-v0"


def real_run():
    """Seconds of each stage"""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        source, adapted = f"{folder}/source", f"{folder}/adapted"
        given = f"--checkpoint {adapted}/best.pt --dataset {adapted}/dataset.npz"
        for stage, command in {
            "stage 1": f"draw_pretrain.py laptop --env-id {SOURCE} --run-dir {source}",
            "stage 2": f"redraw_adapt.py laptop --checkpoint {source}/draw.pt "
            f"--target-env-id {TARGET} --run-dir {adapted}",
            "stage 3": f"train_policy.py laptop {given} --eval-env-ids {TARGET} "
            f"--run-dir {folder}/policy",
        }.items():
            script, *flags = command.split()
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, str(ROOT / script), *flags],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"error: {script} failed: {done.stderr[-500:]}")
            seconds[stage] = time.perf_counter() - start
    return seconds


def main(real=False):
    start, rates = time.perf_counter(), machine()
    step = bench_environments.main()["PendulumSwingup"]
    part = bench_pretrain.main(rates, "laptop")
    bench_adapt.main(rates, "paper")
    residual = bench_adapt.main(rates, "laptop")
    policy = bench_policy.main(rates, "laptop")

    one, two, three = (
        stage.PRESETS["laptop"][1] for stage in (draw_pretrain, redraw_adapt, train_policy)
    )
    updates = (one.steps - one.prefill) / one.train_every
    awake = updates - one.policy_start  # with actor-critic updates
    counts = {  # stage, what, how many, seconds of one
        ("stage 1", "environment steps"): (one.steps, step),
        ("stage 1", "batches drawn"): (updates, part["replay sampling"]),
        ("stage 1", "world-model updates"): (updates, part["world model"]),
        ("stage 1", "ensemble updates"): (updates, part["ensemble"]),
        ("stage 1", "actor-critic updates"): (awake / one.policy_every, part["actor-critic"]),
        ("stage 1", "exploration actor-critic updates"): (
            awake / one.explore_every,
            part["exploration actor-critic"],
        ),
        ("stage 2", "environment steps"): (two.collect_steps, step),
        ("stage 2", "frames encoded"): (two.collect_steps, residual["encoding a frame"]),
        ("stage 2", "residual updates"): (two.updates, residual["update"]),
        ("stage 3", "frames encoded"): (two.collect_steps, residual["encoding a frame"]),
        ("stage 3", "actor-critic updates"): (three.updates, policy),
        ("stage 3", "environment steps of the evaluation"): (three.eval_episodes * 500, step),
    }
    total = sum(n * seconds for n, seconds in counts.values())
    rows = [
        [*key, f"{n:.0f}", f"{n * seconds:.0f}", f"{100 * n * seconds / total:.0f} %"]
        for key, (n, seconds) in counts.items()
    ]
    table(
        "A whole laptop run, one stage after the other, from the parts above (without saving, "
        "logging, pictures, evaluations on the way)",
        ["", "", "how many", "s", "share"],
        [*rows, ["all", "", "", f"{total:.0f}", "100 %"]],
    )
    print(f"\nthe benchmarks took {time.perf_counter() - start:.0f} s")
    if real:
        stages = real_run()
        estimates = {
            stage: sum(n * s for key, (n, s) in counts.items() if key[0] == stage)
            for stage in stages
        }
        table(
            "The same run, timed",
            ["", "s", "s from the parts"],
            [[k, f"{s:.0f}", f"{estimates[k]:.0f}"] for k, s in stages.items()],
        )
        print(f"\nall: {sum(stages.values()):.0f} s, from the parts {total:.0f} s")


if __name__ == "__main__":
    main("--real" in sys.argv)
