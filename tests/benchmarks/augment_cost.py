"""What the random changes of the encoder's images (--augment) cost beside a world-model update:
python tests/benchmarks/augment_cost.py

In processor time on one thread, with the sizes of the `duckietown` preset. The bar: less than a
fifth of an update.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from common import DRAW, Sizes, prepare  # noqa: E402
from draw_pretrain import PRESETS, augment, world_model_loss  # noqa: E402


def median_time(function, n=15):
    """s of processor time, the median of n calls after three"""
    times = []
    for _ in range(n + 3):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return sorted(times[3:])[n // 2]


def main(bar=0.2):
    torch.set_num_threads(1)
    args = dataclasses.replace(PRESETS["duckietown"][1], device="cpu")
    prepare(args)
    names = set(vars(Sizes())) & set(vars(args))
    sizes = Sizes(vector_size=2, action_size=2, **{name: getattr(args, name) for name in names})
    draw = DRAW(sizes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(draw.parameters(), lr=1e-4, fused=True)
    B, T, L = args.batch, args.length, args.image_size
    data = {
        "image": torch.randint(0, 256, (B, T, L, L, 3), dtype=torch.uint8),
        "vector": torch.rand(B, T, 2),
        "action": torch.rand(B, T, 2),
        "reward": torch.rand(B, T),
        "is_first": torch.zeros(B, T, dtype=torch.bool),
        "is_terminal": torch.zeros(B, T, dtype=torch.bool),
    }

    def update():
        optimizer.zero_grad()
        world_model_loss(draw, data, args, 0.0)[0].backward()
        optimizer.step()

    with_it, alone = median_time(update), median_time(lambda: augment(data["image"], args.augment))
    share = alone / (with_it - alone)
    rest = 1e3 * (with_it - alone)
    print(
        f"augmentation {alone * 1e3:.1f} ms, the rest of an update of {B} x {T} images of {L}x{L} "
        f"{rest:.1f} ms: a share of {share:.2f}"
    )
    print("within the bar" if share < bar else f"NOT within the bar of {bar}")
    return 0 if share < bar else 1


if __name__ == "__main__":
    sys.exit(main())
