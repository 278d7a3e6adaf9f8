"""Figure 4: what the residual sees: z, a; the belief sigma too; or f's prediction softmax(f) too.

    python docs/figures/inputs.py --pair pendulum --seeds 1 2 3

writes inputs.csv and inputs.png beside this file; --draw draws from the csv alone.
"""

from pathlib import Path
from typing import Literal

import tyro
from jobs import (
    COLOURS,
    HERE,
    PAIRS,
    PRETRAINED,
    Job,
    adapt,
    draw_yardsticks,
    mean_and_range,
    measured,
    new_figure,
    read,
    record_expert,
    run_all,
    train,
)

INPUTS = ("za", "za+sigma", "za+base")
CSV = HERE / "inputs.csv"


def job(pair, inputs, seed, runs):
    _, target = PAIRS[pair]
    folder = runs / "inputs" / pair
    data = folder / f"expert-{seed}.npz"
    adapted = folder / f"{inputs}-{seed}-adapted"
    policy = folder / f"{inputs}-{seed}-policy"
    given = ("--dataset", data, "--inputs", inputs, "--seed", seed)
    stages = [
        record_expert(data, target, 10_000, "--seed", 1000 * seed),
        adapt(adapted, PRETRAINED / f"{pair}.pt", *given),
        train(policy, adapted / "best.pt", data, target, "--seed", seed),
    ]
    key = {"pair": pair, "inputs": inputs, "seed": seed}
    return Job(key, stages, lambda: measured(policy, target, adapted))


def picture(pair):
    """A bar for the mean over seeds, a point for each seed"""
    figure, axes = new_figure(2)
    for ax, quantity in zip(axes[0], ("return", "kl"), strict=True):
        for x, (inputs, colour) in enumerate(zip(INPUTS, COLOURS, strict=False)):
            rows = [r for r in read(CSV) if r["pair"] == pair and r["inputs"] == inputs]
            if rows:
                ax.bar(x, mean_and_range(rows, quantity)[0], color=colour, alpha=0.5)
                ax.plot([x] * len(rows), [float(r[quantity]) for r in rows], "o", color=colour)
        ax.set(xticks=range(len(INPUTS)), xticklabels=INPUTS)
    draw_yardsticks(axes[0, 0], PAIRS[pair][1])
    axes[0, 0].set(title=pair, ylabel="return in the target")
    axes[0, 1].set(ylabel="held-out KL, nats")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(HERE / "inputs.png", dpi=110)


def main(
    pair: Literal["pendulum", "cup", "finger", "reacher"] = "pendulum",
    seeds: tuple[int, ...] = (1, 2, 3),
    runs: Path = Path("runs"),
    draw: bool = False,
):
    """Runs what is missing, then draws.

    Args:
        pair: whose shipped model is adapted
        seeds: of data, residual and policy
        runs: folder of the runs
        draw: run nothing, draw from the csv
    """
    if not draw:
        run_all(CSV, [job(pair, i, seed, runs.resolve()) for seed in seeds for i in INPUTS])
    picture(pair)


if __name__ == "__main__":
    tyro.cli(main)
