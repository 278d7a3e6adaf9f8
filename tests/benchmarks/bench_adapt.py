"""The residual's update of stage 2, against the same update with its images encoded anew: python tests/benchmarks/bench_adapt.py [laptop | paper]

The encoder is frozen, so redraw_adapt.py encodes each frame once, before training. The bar, at the paper's sizes (16 sequences of 64, so 1024
images): 30 times as fast as encoding the batch's images in every update.
"""

import statistics
import sys

import numpy as np
import torch
from measure import REPEATS, in_turns, machine, matmuls_of, ratio, table, update_table
from torch import nn

import draw_pretrain
from common import DRAW, Sizes, pick_device, sample_onehot, seed_everything
from redraw_adapt import PRESETS, Rectified, adaptation_loss, encode_dataset


def main(rates, preset="paper", repeats=REPEATS):
    """Returns {"update": median seconds, "encoding a frame": seconds}."""
    seed_everything(1)
    device, args, source = pick_device("cpu"), PRESETS[preset][1], draw_pretrain.PRESETS[preset][1]
    fields = "image_size S K cnn_depth vector_units vector_layers units actor_units".split()
    draw = DRAW(Sizes(vector_size=1, action_size=1, **{name: getattr(source, name) for name in fields}))
    draw = draw.to(memory_format=torch.channels_last).requires_grad_(False).eval()
    rectified = Rectified(draw, args.method, args.hidden, args.layers, args.use_sigma, args.members)
    optimizer = torch.optim.Adam(rectified.parameters(), lr=args.lr, eps=1e-8, fused=True)
    rng, N, L = np.random.default_rng(0), 2 * args.batch * args.length, source.image_size
    dataset = {"image": rng.integers(0, 256, (N, L, L, 3), np.uint8), "vector": rng.normal(size=(N, 1)).astype(np.float32),
               "action": rng.uniform(-1, 1, (N, 1)).astype(np.float32), "is_first": np.arange(N) % 500 == 0}  # fmt: skip
    posterior = encode_dataset(draw, dataset, device)  # (N, S, K)
    data = {name: torch.from_numpy(value) for name, value in dataset.items()}

    def update(reencode=False):
        t = torch.randint(0, N - args.length + 1, (args.batch, 1)) + torch.arange(args.length)  # (B, T)
        with torch.no_grad():
            q = draw.posterior(draw.encoder(data["image"][t], data["vector"][t])) if reencode else posterior[t]  # (B, T, S, K)
        kl, mask = adaptation_loss(draw, rectified, q, sample_onehot(q.exp()), data["action"][t], data["is_first"][t])
        optimizer.zero_grad()
        (kl.sum() / mask.sum()).backward()
        nn.utils.clip_grad_norm_(rectified.parameters(), 1000.0)
        optimizer.step()

    updates = {"residual update": update, "the same, its images encoded anew": lambda: update(reencode=True)}
    seconds = in_turns(updates, repeats)
    title, matmuls = f"Stage 2, preset {preset}: {args.batch} x {args.length} frames of {L}x{L}", {k: matmuls_of(f) for k, f in updates.items()}
    few, many = (figures[0] for figures in update_table(title, matmuls, seconds, rates, repeats).values())
    fast, slow = seconds.values()
    table("Encoding once", ["", "times as fast (bar at the paper's sizes: 30)", "times fewer FLOPs"],
          [["residual update", ratio(slow, fast), f"{many / few:.1f}"]])  # fmt: skip
    update_seconds = statistics.median(fast)
    return {"update": update_seconds, "encoding a frame": (statistics.median(slow) - update_seconds) / (args.batch * args.length)}


if __name__ == "__main__":
    main(machine(), *sys.argv[1:2])
