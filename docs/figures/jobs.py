"""What the figures' scripts share: runs of the stages, two at a time, a line of a csv for each.

A figure is a list of jobs. A job is done if the csv holds its line, so a figure grows over days and
survives interruptions; an interrupted stage goes on from its last save.
"""

import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Okabe and Ito's colours, which the colour-blind can tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass
class Job:
    """One line of the csv.

    key: its first columns; folder: of its runs; stages: [script, flag, ...] in order, a stage is
    skipped whose "--run-dir" holds the file that says it is finished; result() -> its other columns
    """

    key: dict
    stages: list
    result: object


def stage(script, *flags, **options):
    """[script, flags], e.g. stage("train_policy.py", "laptop", seed=1) -> ... --seed 1"""
    given = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        given += ["--" + name.replace("_", "-"), *map(str, values)]
    return [script, *flags, *given]


FINISHED = {
    "draw_pretrain.py": "curves.png",
    "redraw_adapt.py": "curves.png",
    "train_policy.py": "curves.png",
}


def run_stage(command):
    """Runs a stage, unless it is finished; its words go to RUN_DIR.log. Raises RuntimeError."""
    folder = Path(command[command.index("--run-dir") + 1])
    if (folder / FINISHED[command[0]]).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "w") as log:
        full = [sys.executable, str(ROOT / command[0]), *command[1:], "--resume"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(full, stdout=log, stderr=log, env=env, cwd=ROOT).returncode
    if code:
        last = Path(f"{folder}.log").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"{command[0]} ended with {code}: {' '.join(last)}; see {folder}.log")


def run_all(path, jobs, at_once=2):
    """Runs the jobs that `path`, a csv, has no line of. Says how long is left."""
    done = [tuple(row.values())[: len(jobs[0].key)] for row in read(path)]
    todo = [job for job in jobs if tuple(map(str, job.key.values())) not in done]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done, {len(todo)} to go", flush=True)
    lock = Lock()
    begun = time.time()
    finished = 0

    def run(job):
        nonlocal finished
        for command in job.stages:
            run_stage(command)
        with lock:
            append(path, job.key | job.result())
            finished += 1
            left = (time.time() - begun) / finished * (len(todo) - finished) / 60
            name = " ".join(map(str, job.key.values()))
            print(f"{finished} of {len(todo)}: {name}; about {left:.0f} min left", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(run, job) for job in todo]:
            future.result()


def read(path):
    """The lines of a csv, as dicts"""
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


def returns(run_dir, env_id):
    """{"return", "ci95"} of a finished train_policy.py"""
    figures = json.loads((Path(run_dir) / "eval.json").read_text())[env_id]
    return {"return": round(figures["mean"], 1), "ci95": round(figures["ci95"], 1)}


def yardstick(env_id, best):
    """Mean return of the best known controller or of random actions, from experts.csv"""
    for row in read(HERE / "experts.csv"):
        if row["env_id"] == env_id and (row["controller"] != "random") == best:
            return float(row["mean"])
    return None
