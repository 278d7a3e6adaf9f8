"""Updates a second and memory of the presets on a GPU: python tests/benchmarks/bench_gpu.py

On random data; the paper's preset in float32 and bfloat16, with --compile compiled too. Each figure
is the median of ten updates, after three that do not count.
"""

import dataclasses
import statistics
import subprocess
import sys
import time

import torch
from bench_adapt import random_dataset
from bench_pretrain import Stage1
from measure import sizes_of, table

import draw_pretrain
import redraw_adapt
from common import DRAW, Rectified, follow, prepare
from redraw_adapt import encode, sequences, what_learns


def measured(function, repeats=10, warmup=3):
    """Median seconds of a call, and the GiB that the GPU held at most"""
    seconds = []
    for i in range(warmup + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30


def stage_1(preset, **changes):
    """Rows of the table: the parts of an update of stage 1, and all that one loop of it does"""
    args = dataclasses.replace(draw_pretrain.PRESETS[preset][1], **changes)
    torch.cuda.reset_peak_memory_stats()
    stage = Stage1(args, "cuda")
    parts = {
        "drawing a batch": stage.sample,
        "world model": stage.world_model,
        "ensemble": stage.train_ensemble,
        "task policy": stage.actor_critic,
        "exploration policy": stage.explore_actor_critic,
    }
    found = {name: measured(function) for name, function in parts.items()}
    seconds = {name: s for name, (s, _) in found.items()}
    per_update = sum(seconds.values())
    per_update -= seconds["task policy"] * (1 - 1 / args.policy_every)
    per_update -= seconds["exploration policy"] * (1 - 1 / args.explore_every)
    memory = max(gib for _, gib in found.values())
    return [*seconds.items(), ("stage 1, all", per_update)], memory


def stage_2(preset, **changes):
    """Row of the table: an update of the residual"""
    change = {"checkpoint": "", "device": "cuda", **changes}
    args = dataclasses.replace(redraw_adapt.PRESETS[preset][1], **change)
    device = prepare(args)
    torch.cuda.reset_peak_memory_stats()
    draw = DRAW(sizes_of(draw_pretrain.PRESETS[preset][1])).to(device).requires_grad_(False)
    rectified = Rectified(draw, args.method, args.hidden, args.layers).to(device)
    mean = Rectified(draw, args.method, args.hidden, args.layers).to(device)
    loss_of, trained, lr = what_learns(args, draw, rectified)
    if args.compile:
        loss_of = torch.compile(loss_of)
    adam = torch.optim.Adam(trained, lr, eps=1e-8, fused=True)
    dataset = random_dataset(4000, draw.sizes.image_size)
    data = encode(draw, dataset, device)
    rows = torch.arange(4000).numpy()

    def update():
        starts = torch.randint(0, 4000 - args.length + 1, (args.batch,)).numpy()
        batch = sequences(data, rows, starts, args.length, args.soft)
        with torch.autocast("cuda", torch.bfloat16, enabled=args.bf16):
            losses, mask = loss_of(draw, rectified, *batch)
        adam.zero_grad()
        (losses.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1000.0)
        adam.step()
        follow(mean, rectified, 0.1)

    seconds, memory = measured(update)
    return [("stage 2, all", seconds)], memory


def main():
    name = torch.cuda.get_device_name()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    print(f"{name}, driver {driver}, torch {torch.__version__}")
    variants = {"fp32": {}, "bf16": {"bf16": True}}
    if "--compile" in sys.argv:
        variants["bf16, compile"] = {"bf16": True, "compile": True}
    for preset in ("paper", "laptop"):
        columns = {}
        for variant, changes in variants.items():
            if preset == "laptop" and variant != "fp32":
                continue
            one, memory_one = stage_1(preset, **changes)
            two, memory_two = stage_2(preset, **changes)
            columns[variant] = dict(one + two)
            print(
                f"{preset}, {variant}: stage 1 {memory_one:.2f} GiB, stage 2 {memory_two:.2f} GiB"
            )
        parts = next(iter(columns.values()))
        rows = [
            [part, *(f"{1e3 * columns[v][part]:.1f} ({1 / columns[v][part]:.0f})" for v in columns)]
            for part in parts
        ]
        table(f"Preset {preset}: ms an update (updates a second)", ["", *columns], rows)


if __name__ == "__main__":
    main()
