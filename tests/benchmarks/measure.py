"""What the benchmarks share: timing in turns, counted FLOPs, the matmuls of an update by
themselves, tables."""

import os
import platform
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from common import Sizes  # noqa: E402

REPEATS, WARMUP = 10, 2


def in_turns(functions, repeats=REPEATS, warmup=WARMUP):
    """Seconds of each of `functions` (dict of name -> function), dict of name -> list of `repeats`.
    They take turns, so that a slow moment of the machine meets all of them."""
    seconds = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def matmul_rate(dtype, n=1024, repeats=REPEATS):
    """FLOP/s of an n x n x n matmul, the median"""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / statistics.median(in_turns({"": lambda: a @ b}, repeats)[""])


class Matmuls(TorchDispatchMode):
    """Counts the matmuls and convolutions, forward and backward, of what runs inside it, by their
    arguments: tensors by shape, strides and type."""

    names = "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.names:
            self.calls[func, tuple(map(self.key, args)), tuple((kwargs or {}).items())] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def key(arg):
        if torch.is_tensor(arg):
            return "tensor", tuple(arg.shape), arg.stride(), arg.dtype
        return ("list", *arg) if isinstance(arg, (list, tuple)) else arg

    @staticmethod
    def argument(key):
        """What `key` stands for, a tensor with random numbers"""
        if isinstance(key, tuple) and key[0] == "tensor":
            _, shape, stride, dtype = key
            return (
                torch.randn(1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
                .to(dtype)
                .as_strided(shape, stride)
            )
        return list(key[1:]) if isinstance(key, tuple) else key

    @torch.no_grad()
    def alone(self, share=0.99, repeats=REPEATS):
        """(FLOPs, seconds): of all calls, and of the largest ones, that hold `share` of the FLOPs,
        each distinct one timed by itself."""
        timed = []
        for (func, keys, kwargs), n in self.calls.items():
            inputs = [self.argument(key) for key in keys]
            call = partial(func, *inputs, **dict(kwargs))
            with FlopCounterMode(display=False) as counter:
                call()
            timed.append((n * counter.get_total_flops(), n, call))
        timed.sort(key=lambda row: -row[0])
        total, held, seconds = sum(row[0] for row in timed), 0, 0.0
        for flops, n, call in timed:
            if held >= share * total:
                break
            held += flops
            seconds += n * statistics.median(in_turns({"": call}, repeats)[""])
        return total, seconds


def machine():
    """Prints what the figures were measured on; returns the matmul rates in FLOP/s, {"fp32": ...,
    "bf16": ...}"""
    torch.set_flush_denormal(True)
    rates = {"fp32": matmul_rate(torch.float32), "bf16": matmul_rate(torch.bfloat16)}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    cores, threads = os.cpu_count(), torch.get_num_threads()
    print(f"{model}, {cores} cores, {threads} threads, torch {torch.__version__}")
    fp32, bf16 = rates["fp32"] / 1e9, rates["bf16"] / 1e9
    print(f"1024 x 1024 matmul: fp32 {fp32:.0f} GFLOP/s, bf16 {bf16:.0f} GFLOP/s")
    return rates


def sizes_of(args):
    """The Sizes of a preset of stage 1, for a vector and actions of one number"""
    names = set(vars(Sizes())) & set(vars(args))
    return Sizes(vector_size=1, action_size=1, **{name: getattr(args, name) for name in names})


def table(title, head, rows):
    """Prints rows of text as a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def ms(seconds):
    """'median (min - max)' of a list of seconds, in ms"""
    digits = 0 if min(seconds) > 0.1 else 2
    median, least, most = (f"{1e3 * f(seconds):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({least} - {most})"


def ratio(slow, fast):
    """'median (min - max)' of the ratios of two lists of seconds, measured in turns"""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} - {ratios[-1]:.1f})"


def matmuls_of(function):
    """The Matmuls of one call"""
    with Matmuls() as matmuls:
        function()
    return matmuls


def update_table(title, updates, seconds, rates, repeats=REPEATS):
    """Prints, for each of `updates` (dict of name -> Matmuls) its time, FLOPs, rate, share of the
    fp32 matmul rate, and how many times longer it takes than its largest matmuls and convolutions
    alone. Returns {name: (FLOPs, share of the rate, times its matmuls)}."""
    rows, figures = [], {}
    for name, matmuls in updates.items():
        median, (flops, alone) = statistics.median(seconds[name]), matmuls.alone(repeats=repeats)
        figures[name] = flops, flops / median / rates["fp32"], median / alone
        rows.append(
            [
                name,
                ms(seconds[name]),
                f"{flops / 1e9:.2f}",
                f"{flops / median / 1e9:.0f}",
                f"{100 * figures[name][1]:.0f} %",
                f"{1e3 * alone:.2f}",
                f"{figures[name][2]:.2f}",
            ]
        )
    table(
        title,
        [
            "",
            "ms, median (min - max)",
            "GFLOP",
            "GFLOP/s",
            "of the fp32 matmul rate",
            "its matmuls alone, ms",
            "times its matmuls",
        ],
        rows,
    )
    return figures
