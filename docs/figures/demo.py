"""What `make demo` shows at its end: a table and a film, from the files of its stages.

    python docs/figures/demo.py --runs runs/pendulum-1 --source ENV_ID --target ENV_ID

prints the table, which it also writes to RUNS/table.md, and writes RUNS/zero_shot_and_adapted.gif:
the same evaluation episode in the target, under the source's policy, under the adapted one, and
under one that learned from the target's rows alone, without a dynamics (--learn recorded).
Random actions and the best known controller are not run here but read from experts.csv beside this
file.
"""

import csv
import json
import sys
from pathlib import Path

import imageio.v3
import numpy as np
import tyro
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from common import write_atomically  # noqa: E402


def measured(runs, policy, env_id):
    """Mean and half-width of the 95 % interval from the eval.json of a policy, as text"""
    result = json.loads((runs / policy / "eval.json").read_text())[env_id]
    return f"{result['mean']:.1f} ± {result['ci95']:.1f}"


def yardstick(env_id, best):
    """The same of random actions or, if `best`, of the best known controller, with its name."""
    with open(HERE / "experts.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["env_id"] == env_id and (row["controller"] != "random") == best:
                figure = f"{float(row['mean']):.1f} ± {float(row['ci95']):.1f}"
                return f"{figure} ({row['controller']})" if best else figure
    return "not measured"


def side_by_side(films, titles):
    """Films of shape (T, height, width, 3) below their titles, the shorter one stands still at its
    end; (T, height + 20, sum of widths, 3)"""
    n = max(map(len, films))
    height, width = films[0].shape[1:3]
    canvas = Image.new("RGB", (width * len(films), height + 20), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(canvas).text((i * width + 6, 4), title, "black")
    frames = np.repeat(np.asarray(canvas)[None], n, 0)
    for i, film in enumerate(films):
        still = np.repeat(film[-1:], n - len(film), 0)
        frames[:, 20:, i * width : (i + 1) * width] = np.concatenate([film, still])
    return frames


def main(runs: Path, source: str, target: str):
    """Writes the table and the film.

    Args:
        runs: folder with source-policy, adapted-policy and recorded-policy
        source: source environment id
        target: target environment id
    """
    rows = (
        ("random actions in the target", yardstick(target, best=False)),
        ("source policy at home", measured(runs, "source-policy", source)),
        ("source policy in the target (zero-shot)", measured(runs, "source-policy", target)),
        ("**adapted policy in the target**", measured(runs, "adapted-policy", target)),
        ("from the same rows alone, no dynamics", measured(runs, "recorded-policy", target)),
        ("best known in the target", yardstick(target, best=True)),
    )
    lines = [f"{source} -> {target}", "", "| | return, 95 % interval |", "|---|---|"]
    lines += [f"| {name} | {figure} |" for name, figure in rows]
    text = "\n".join(lines) + "\n"
    write_atomically(runs / "table.md", lambda file: file.write(text.encode()))

    name = target.split("/")[-1] + ".gif"
    policies = ("source-policy", "adapted-policy", "recorded-policy")
    films = [imageio.v3.imread(runs / policy / name) for policy in policies]
    frames = side_by_side(films, ("zero-shot", "adapted", "rows alone"))
    gif = imageio.v3.imwrite("<bytes>", frames, extension=".gif", duration=1000 / 12, loop=0)
    write_atomically(runs / "zero_shot_and_adapted.gif", lambda file: file.write(gif))
    print(f"{text}\nwrote {runs}/table.md and {runs}/zero_shot_and_adapted.gif")


if __name__ == "__main__":
    tyro.cli(main)
