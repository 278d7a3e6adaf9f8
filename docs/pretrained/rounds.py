"""Rounds that are meant to make a source model and its policy better, with the encoder as it is.

    python docs/pretrained/rounds.py --model runs/reacher-1/model.pt --rounds 4 \\
        --env-id redraw/ReacherEasy-v0 --out runs/reacher-1/better.pt

A policy goes where the dynamics promise reward, and there they were hardly trained. So each round
records what the policy does, lets f learn from all that was recorded (stage 2, --method finetune,
in the source itself) and improves the policy in the result (stage 3). A finished step is not made
again, also if other flags are given now; an interrupted one goes on. Look at each round's
policy/eval.json: a round may also make the policy worse.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
STAGES = HERE.parents[1]


def run(done, script, *flags):
    """Runs a script unless `done`, a file that it writes, is there; ends if it fails."""
    if done.exists():
        return
    process = subprocess.Popen([sys.executable, script, *map(str, flags)])
    status = None
    while status is None:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            continue  # the stage got it too, and saves first
    if status:
        sys.exit(status)  # the script has said why


def main(
    model: Path,
    env_id: str,
    out: Path,
    rounds: int = 4,
    rows: int = 60_000,
    updates: int = 4000,
    policy_updates: int = 300,
    gamma: float = 0.97,
    episode_steps: int = 50,
    act_noise: float = 0.0,
    dataset: Path | None = None,
    seed: int = 1,
):
    """Writes the checkpoint `out`, and of each round a folder beside it.

    Args:
        model: draw.pt of stage 1, or a packed one
        env_id: the source
        out: the checkpoint to write; beside it are the rounds' folders
        rounds: how many
        rows: recorded in a round, and added to those of the rounds before
        updates: of f in a round
        policy_updates: of stage 3 in a round
        gamma: of stage 3
        episode_steps: of the recorded episodes
        act_noise: of stage 3's policy where it predicts no reward
        dataset: rows to begin with, such as stage 1's replay
        seed: of all rounds; each adds its number
    """
    for number in range(1, rounds + 1):
        folder = out.parent / f"{out.stem}-round-{number}"
        further, policy = folder / "f", folder / "policy"
        packed = folder / "model.pt"
        common = ("--seed", seed + number, "--resume")
        flags = ["laptop", "--checkpoint", model, "--run-dir", further, *common]
        flags += ["--method", "finetune", "--finetune-lr", 8e-4, "--updates", updates]
        flags += ["--target-env-id", env_id, "--collect-steps", rows, "--collect-policy"]
        flags += ["zero-shot", "--collect-noise", 0.3, "--hold", 6]
        flags += ["--episode-steps", episode_steps]
        flags += ["--dataset", dataset] if dataset else []
        run(further / "result.json", STAGES / "redraw_adapt.py", *flags)
        dataset = further / "dataset.npz"
        flags = ["laptop", "--checkpoint", further / "best.pt", "--dataset", dataset, *common]
        flags += ["--run-dir", policy, "--warm-start", "both", "--updates", policy_updates]
        flags += ["--gamma", gamma, "--ahead", 8, "--states", 160, "--act-noise", act_noise]
        flags += ["--eval-env-ids", env_id]
        run(policy / "eval.json", STAGES / "train_policy.py", *flags)
        made_of = ["--draw", model, "--finetuned", further / "best.pt", "--policy", policy]
        run(packed, HERE / "pack.py", *made_of, "--out", packed)
        model = packed
    part = out.with_name(out.name + ".part")
    shutil.copyfile(model, part)
    part.replace(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
