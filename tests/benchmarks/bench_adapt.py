"""The residual's update of stage 2, against the same update that backpropagates through f and time,
and against one that encodes its images anew: python tests/benchmarks/bench_adapt.py [laptop |
paper]

The gradient stops at f and the belief, so delta is one batched call, and f's recurrence runs
without a graph. The encoder is frozen, so redraw_adapt.py encodes each frame once, before training.
"""

import dataclasses
import statistics
import sys

import numpy as np
import torch
from measure import REPEATS, in_turns, machine, matmuls_of, ratio, sizes_of, table, update_table

import draw_pretrain
from common import DRAW, Rectified, kl_categorical, prepare, sample_onehot
from redraw_adapt import PRESETS, encode, residual_loss


def loss_through_time(draw, rectified, log_q, z, action, is_first):
    """The same loss, unrolled in the graph: its gradient goes through f and the belief too."""
    _, _, first = draw.previous(z, action, is_first)
    u = draw.observe(z, action, is_first, rectified)
    return kl_categorical(log_q, rectified.log_prior(u)) * ~first, ~first


def random_dataset(N, L):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (N, L, L, 3), np.uint8),
        "vector": rng.normal(size=(N, 1)).astype(np.float32),
        "action": rng.uniform(-1, 1, (N, 1)).astype(np.float32),
        "is_first": np.arange(N) % 500 == 0,
        "is_last": np.arange(N) % 500 == 499,
        "is_terminal": np.zeros(N, bool),
    }


def main(rates, preset="paper", repeats=REPEATS):
    """Returns {"update": median seconds, "encoding a frame": seconds}."""
    args = dataclasses.replace(PRESETS[preset][1], checkpoint="", device="cpu")
    device = prepare(args)
    sizes = sizes_of(draw_pretrain.PRESETS[preset][1])
    draw = DRAW(sizes).to(memory_format=torch.channels_last).requires_grad_(False).eval()
    shape = (args.hidden, args.layers, args.inputs, args.members, args.rank)
    rectified = Rectified(draw, args.method, *shape)
    optimizer = torch.optim.Adam(rectified.parameters(), lr=args.lr, eps=1e-8, fused=True)
    N, L = 2 * args.batch * args.length, sizes.image_size
    dataset = random_dataset(N, L)
    encoded = encode(draw, dataset, device)["log_q"]  # (N, S, K)
    data = {name: torch.from_numpy(value) for name, value in dataset.items()}

    def update(loss_of=residual_loss, anew=False):
        starts = torch.randint(0, N - args.length + 1, (args.batch, 1))
        t = starts + torch.arange(args.length)  # (B, T)
        log_q = encoded[t]  # (B, T, S, K)
        if anew:
            with torch.no_grad():
                log_q = draw.posterior(draw.encoder(data["image"][t], data["vector"][t]))
        z = sample_onehot(log_q.exp())
        kl, mask = loss_of(draw, rectified, log_q, z, data["action"][t], data["is_first"][t])
        optimizer.zero_grad()
        (kl.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(rectified.parameters(), 1000.0)
        optimizer.step()

    updates = {
        "residual update": update,
        "through f and time": lambda: update(loss_through_time),
        "its images encoded anew": lambda: update(anew=True),
    }
    seconds = in_turns(updates, repeats)
    title = f"Stage 2, preset {preset}: {args.batch} x {args.length} frames of {L}x{L}"
    matmuls = {name: matmuls_of(function) for name, function in updates.items()}
    flops = [row[0] for row in update_table(title, matmuls, seconds, rates, repeats).values()]
    fast, *slow = seconds.values()
    rows = [
        [name, ratio(times, fast), f"{many / flops[0]:.1f}"]
        for name, times, many in zip(list(updates)[1:], slow, flops[1:], strict=True)
    ]
    table("The residual update against", ["", "times as fast", "times fewer FLOPs"], rows)
    update_seconds = statistics.median(fast)
    encoding = (statistics.median(slow[1]) - update_seconds) / (args.batch * args.length)
    return {"update": update_seconds, "encoding a frame": encoding}


if __name__ == "__main__":
    main(machine(), *sys.argv[1:2])
