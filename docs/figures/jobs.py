"""What the figures' scripts share: runs of the stages, two at a time, a line of a csv for each.

A figure is a list of jobs. A job is done if the csv holds its line, so a figure grows over days and
survives interruptions; an interrupted stage goes on from its last save.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PRETRAINED = ROOT / "docs" / "pretrained"
PAIRS = {
    "pendulum": ("redraw/PendulumSwingup-v0", "redraw/PendulumSwingupReversed-v0"),
    "cup": ("redraw/BallInCupCatch-v0", "redraw/BallInCupCatchWindy-v0"),
    "finger": ("redraw/FingerTurnHard-v0", "redraw/FingerTurnHardTorque-v0"),
    "reacher": ("redraw/ReacherEasy-v0", "redraw/ReacherEasyReversed-v0"),
}
# What stage 3 needs on the other pairs, as in the Makefile.
POLICIES = {
    "cup": "--gamma 0.98 --ahead 8 --states 160 --warm-start both",
    "finger": "--gamma 0.98 --ahead 8 --states 160 --act-noise 1",
    "reacher": "--gamma 0.97 --ahead 8 --states 160 --act-noise 1 --warm-start critic",
}
# Okabe and Ito's colours, which the colour-blind can tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass
class Stage:
    """A script to run: `command` are its name and flags; `finished` a file that is there when it
    has succeeded, its own or an empty one; `before`, if there is one, a finished stage, which it
    goes on from in a copy of the folder."""

    command: list
    finished: Path
    before: "Stage | None" = None


@dataclass
class Job:
    """One line of a csv: `key`, its first columns; `stages` in order; result() -> further columns,
    from what they wrote."""

    key: dict
    stages: list
    result: Callable


def adapt(folder, checkpoint, *flags):
    """Stage 2 with the laptop preset into `folder`"""
    command = ["redraw_adapt.py", "laptop", "--checkpoint", checkpoint, "--run-dir", folder]
    return Stage([*command, "--resume", *flags], Path(folder) / "done")


def train(folder, checkpoint, dataset, env_id, *flags):
    """Stage 3 with the laptop preset and the pair's own flags into `folder`, evaluated in `env_id`;
    300 updates, half of the preset's, because a figure has dozens of these runs."""
    command = ["train_policy.py", "laptop", "--checkpoint", checkpoint, "--dataset", dataset]
    command += ["--run-dir", folder, "--eval-env-ids", env_id, "--resume", "--updates", 300]
    for pair, (_, target) in PAIRS.items():
        command += POLICIES.get(pair, "").split() if target == env_id else []
    return Stage([*command, *flags], Path(folder) / "done")


def record_expert(out, env_id, rows, *flags):
    """Records the best known controller, half of the time disturbed, in the pixels of its model"""
    side = 32 if "Pendulum" in env_id else 64
    command = ["docs/figures/experts.py", "record", "--env-id", env_id, "--out", out]
    command += ["--rows", rows, "--noise", 0.5, "--image-size", side]
    return Stage([*command, *flags], Path(out))


def run_stage(stage, locks, guard):
    """Runs a stage that is not finished; jobs may share it. Raises RuntimeError if it fails."""
    with guard:
        lock = locks.setdefault(stage.finished, Lock())
    with lock:
        if stage.finished.exists():
            return
        folder = stage.finished.parent
        folder.parent.mkdir(parents=True, exist_ok=True)
        if stage.before and not folder.exists():
            part = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            unfinished = shutil.ignore_patterns(stage.finished.name)
            shutil.copytree(stage.before.finished.parent, part, ignore=unfinished)
            part.rename(folder)
        log = folder.with_name(folder.name + ".log")
        command = [sys.executable, *map(str, stage.command)]
        with open(log, "a") as file:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            env["PYTHONPATH"] = f"{HERE}:{env.get('PYTHONPATH', '')}"
            done = subprocess.run(command, stdout=file, stderr=file, env=env, cwd=ROOT)
        if done.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{stage.command[0]} failed: {' '.join(last)}; see {log}")
        stage.finished.touch()


def run_all(path, jobs, at_once=2):
    """Runs the jobs that `path`, a csv, has no line of, `at_once` side by side. Says how long is
    left."""
    done = [tuple(row.values())[: len(jobs[0].key)] for row in read(path)]
    todo = [job for job in jobs if tuple(map(str, job.key.values())) not in done]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done, {len(todo)} to go", flush=True)
    guard = Lock()
    locks = {}
    begun = time.time()
    finished = []

    def run(job):
        for stage in job.stages:
            run_stage(stage, locks, guard)
        with guard:
            append(path, job.key | job.result())
            finished.append(job)
            left = (time.time() - begun) / len(finished) * (len(todo) - len(finished)) / 60
            name = " ".join(map(str, job.key.values()))
            print(f"{len(finished)} of {len(todo)}: {name}; some {left:.0f} min left", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(run, job) for job in todo]:
            future.result()


def read(path):
    """The lines of a csv as dicts, none if there is no such file"""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path, row):
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def measured(policy, env_id, adapted=None):
    """{"return", "ci95"} of a finished stage 3, and of stage 2 the held-out KL at its end"""
    result = json.loads((Path(policy) / "eval.json").read_text())[env_id]
    row = {"return": round(result["mean"], 1), "ci95": round(result["ci95"], 1)}
    if adapted is not None:
        lines = read(Path(adapted) / "metrics.csv")
        kl = [line["value"] for line in lines if line["metric"] == "adapt/kl_held-out"]
        row["kl"] = round(float(kl[-1]), 3)
    return row


def yardstick(env_id, best):
    """Mean return of the best known controller or, unless `best`, of random actions"""
    for row in read(HERE / "experts.csv"):
        if row["env_id"] == env_id and (row["controller"] != "random") == best:
            return float(row["mean"])
    return None


def mean_and_range(rows, column):
    """Mean, least and largest value of a column over rows (of several seeds)"""
    values = np.array([float(row[column]) for row in rows])
    return values.mean(), values.min(), values.max()


def new_figure(columns, rows=1):
    """A light figure, readable at half its size, and its axes, (rows, columns)"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def draw_yardsticks(ax, env_id):
    for best, name in ((True, "best known"), (False, "random actions")):
        value = yardstick(env_id, best)
        if value is not None:
            ax.axhline(value, color="#555555", linestyle="--" if best else ":", label=name)
