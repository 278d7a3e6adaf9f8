"""An update of stage 3: python tests/benchmarks/bench_policy.py [laptop | paper]

Runs train_policy.py itself, on random data, for a few updates, and looks at the clock in each one.
"""

import contextlib
import dataclasses
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_adapt import random_dataset
from measure import REPEATS, WARMUP, Matmuls, machine, sizes_of, update_table

import draw_pretrain
import train_policy
from common import DRAW, save_checkpoint, save_dataset


def main(rates, preset="laptop", repeats=REPEATS):
    """Returns the median seconds of an update."""
    sizes = sizes_of(draw_pretrain.PRESETS[preset][1])
    ticks, matmuls = [], Matmuls()
    set_learning_rate = train_policy.set_learning_rate

    def tick(*args):  # an update begins
        ticks.append(time.perf_counter())
        if len(ticks) == 1 + WARMUP + repeats:
            matmuls.__enter__()  # this update is not timed, its matmuls are counted
        elif len(ticks) == 2 + WARMUP + repeats:
            matmuls.__exit__(None, None, None)
        set_learning_rate(*args)

    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet[0], quiet[1]:
        draw, data = Path(folder) / "draw.pt", Path(folder) / "data.npz"
        contents = {"args": {}, "sizes": dataclasses.asdict(sizes)}
        save_checkpoint(draw, stage="draw_pretrain", draw=DRAW(sizes).state_dict(), **contents)
        save_dataset(data, random_dataset(2000, sizes.image_size))
        args = dataclasses.replace(
            train_policy.PRESETS[preset][1],
            checkpoint=str(draw),
            dataset=str(data),
            run_dir=f"{folder}/run",
            device="cpu",
            eval_env_ids=(),
            updates=2 + WARMUP + repeats,
            save_every=10**6,
            log_every=10**6,
        )
        train_policy.set_learning_rate = tick
        try:
            train_policy.main(args)
        finally:
            train_policy.set_learning_rate = set_learning_rate
    seconds = np.diff(ticks)[WARMUP : WARMUP + repeats].tolist()
    title = f"Stage 3, preset {preset}, {args.learn}: {args.starts} starts, {args.horizon} steps"
    update_table(title, {"update": matmuls}, {"update": seconds}, rates, repeats)
    return statistics.median(seconds)


if __name__ == "__main__":
    main(machine(), *sys.argv[1:2])
