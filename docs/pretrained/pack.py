"""Packs a world model and the policy that stage 3 trained in it into one small checkpoint.

    python docs/pretrained/pack.py --draw runs/source/draw.pt --policy runs/source-policy \
        --out docs/pretrained/pendulum.pt

The result is a draw.pt whose task actor and critic are those of stage 3, in half precision; without
--policy they stay those of stage 1. With --finetuned best.pt the weights are those of stage 2,
--method finetune, run in the source: f learns on. Stages 2 and 3 take it as --checkpoint;
`train_policy.py --updates 0 --warm-start both` evaluates it.
"""

import json
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import UserError, explained, load_checkpoint, save_checkpoint  # noqa: E402


def half(weights):
    """A state dict with its float32 tensors in half precision"""
    return {name: w.half() if w.dtype == torch.float32 else w for name, w in weights.items()}


def main(draw: Path, out: Path, policy: Path | None = None, finetuned: Path | None = None):
    """Writes the checkpoint.

    Args:
        draw: draw.pt of stage 1
        out: the checkpoint to write
        policy: run folder of stage 3, trained in that model
        finetuned: best.pt of stage 2, `--method finetune`, of that model in the source
    """
    checkpoint = load_checkpoint(draw, ("draw_pretrain",))
    del checkpoint["file"]
    checkpoint["args"]["run_dir"] = None  # a path of the machine that made it
    if finetuned is not None:
        further = load_checkpoint(finetuned, ("redraw_adapt",))
        if further["rectified_options"]["method"] != "finetune":
            raise UserError(f"{finetuned} is not of --method finetune")
        if further["sizes"] != checkpoint["sizes"]:
            raise UserError(f"{finetuned} has other sizes than {draw}")
        checkpoint["draw"] = further["draw"]
        if checkpoint.get("source_range"):
            # Its own KL, which stage 2 compares a target's with.
            result = finetuned.parent / "result.json"
            with explained(f"{result} is missing or damaged; it is written beside best.pt"):
                kl = json.loads(result.read_text())["KL held-out"]["rectified"]
            checkpoint["source_range"]["kl"] = kl
    if policy is not None:
        # The actor that acts, and the critic, which only the last save holds.
        deployed = load_checkpoint(policy / "policy.pt", ("train_policy",))
        acts = deployed["policy"]
        # Its noise is not kept: who evaluates it gives --act-noise again.
        checkpoint["args"]["learn"] = deployed["args"]["learn"]  # says whether it acts by its mean
        trained = load_checkpoint(policy / "state.pt", ("state",))["policy"]
        for part, found in (("actor", acts), ("critic", trained)):
            prefix = f"{part}."
            weights = {k[len(prefix) :]: w for k, w in found.items() if k.startswith(prefix)}
            checkpoint[f"task_{part}"] = weights
    for name in ("draw", "task_actor", "task_critic", "explore_actor"):
        checkpoint[name] = half(checkpoint[name])
    save_checkpoint(out, **checkpoint)
    print(f"wrote {out}, {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    tyro.cli(main)
