"""How far random changes of looks (--augment) move a world model's latent: python
tests/benchmarks/augment_effect.py DATASET DRAW.PT [DRAW.PT ...]

Of 2,000 frames of the dataset, each changed once, for each checkpoint: KL(q(z | clean) || q(z |
changed)), nats; beside it the same between two frames that follow each other by chance, and the
error of the picture decoded from the latent of the clean and of the changed frame, both against the
clean one.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from common import (  # noqa: E402
    kl_categorical,
    load_checkpoint,
    load_dataset,
    load_draw,
    sample_onehot,
)
from draw_pretrain import augment  # noqa: E402


@torch.no_grad()
def posterior(draw, image, vector):
    """log q(z | x), (n, S, K), 250 frames at a time"""
    parts = zip(image.split(250), vector.split(250), strict=True)
    return torch.cat([draw.posterior(draw.encoder(*part)) for part in parts])


@torch.no_grad()
def picture_error(draw, log_q, image):
    """Squared error of the pictures decoded from samples of log q, summed over pixels"""
    errors = []
    for part, real in zip(log_q.split(250), image.split(250), strict=True):
        drawn = draw.decoder(sample_onehot(part.exp()).flatten(-2))
        errors.append(((drawn - real / 255.0) ** 2).sum((-3, -2, -1)))
    return torch.cat(errors).mean()


def main(dataset, *checkpoints, strength=0.5, most=2000):
    draws = [load_draw(load_checkpoint(path, ("draw_pretrain",))) for path in checkpoints]
    data = load_dataset(dataset, draws[0].sizes)
    rows = torch.randperm(len(data["is_first"]), generator=torch.Generator().manual_seed(0))[:most]
    image, vector = (torch.from_numpy(data[k])[rows] for k in ("image", "vector"))
    print(f"{'':40s} clean to changed   to another frame   picture: clean  changed")
    for path, draw in zip(checkpoints, draws, strict=True):
        torch.manual_seed(0)
        changes = torch.cat([augment(part, strength) for part in image.split(250)])
        clean, changed = posterior(draw, image, vector), posterior(draw, changes, vector)
        moved = kl_categorical(clean, changed).mean()
        other = kl_categorical(clean, clean.roll(1, 0)).mean()
        errors = [picture_error(draw, log_q, image) for log_q in (clean, changed)]
        print(f"{path:40s} {moved:16.2f} {other:18.2f} {errors[0]:16.2f} {errors[1]:8.2f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} DATASET DRAW.PT [DRAW.PT ...]")
    main(*sys.argv[1:])
