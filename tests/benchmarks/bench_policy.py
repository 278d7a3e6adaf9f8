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
from measure import REPEATS, WARMUP, Matmuls, machine, update_table

import draw_pretrain
import train_policy
from common import DRAW, Sizes, save_checkpoint, save_dataset


def main(rates, preset="laptop", repeats=REPEATS):
    """Returns the median seconds of an update."""
    source, ticks, matmuls, rng, N = draw_pretrain.PRESETS[preset][1], [], Matmuls(), np.random.default_rng(0), 2000
    fields = "image_size S K cnn_depth vector_units vector_layers units actor_units".split()
    sizes = Sizes(vector_size=1, action_size=1, **{name: getattr(source, name) for name in fields})
    L, row = sizes.image_size, np.arange(N)
    dataset = {"image": rng.integers(0, 256, (N, L, L, 3), np.uint8), "vector": rng.normal(size=(N, 1)).astype(np.float32),
               "action": rng.uniform(-1, 1, (N, 1)).astype(np.float32), "is_first": row % 500 == 0, "is_last": row % 500 == 499,
               "is_terminal": np.zeros(N, bool)}  # fmt: skip

    def tick(*_, **__):  # in the place of the DivergenceCheck, which every update calls once
        ticks.append(time.perf_counter())
        if len(ticks) == 1 + WARMUP + repeats:
            matmuls.__enter__()  # the next update is not timed, its matmuls are counted
        elif len(ticks) == 2 + WARMUP + repeats:
            matmuls.__exit__(None, None, None)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        draw, data, run = Path(folder) / "draw.pt", Path(folder) / "data.npz", Path(folder) / "run"
        save_checkpoint(draw, stage="draw_pretrain", args={}, sizes=dataclasses.asdict(sizes), draw=DRAW(sizes).state_dict())
        save_dataset(data, dataset)
        args = dataclasses.replace(train_policy.PRESETS[preset][1], checkpoint=str(draw), dataset=str(data), run_dir=str(run), device="cpu",
                                   eval_env_ids=(), updates=2 + WARMUP + repeats)  # fmt: skip
        tick.look = lambda: None
        checked, train_policy.DivergenceCheck = train_policy.DivergenceCheck, lambda *_, **__: tick
        try:
            train_policy.main(args)
        finally:
            train_policy.DivergenceCheck = checked
    seconds = np.diff(ticks)[WARMUP : WARMUP + repeats].tolist()
    title = f"Stage 3, preset {preset}: {args.batch * args.length} trajectories of {args.horizon} imagined steps"
    update_table(title, {"actor-critic update": matmuls}, {"actor-critic update": seconds}, rates, repeats)
    return statistics.median(seconds)


if __name__ == "__main__":
    main(machine(), *sys.argv[1:2])
