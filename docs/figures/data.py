"""Figure 2: how much target data, and whose; and how the source's data was gathered.

    python docs/figures/data.py --pair pendulum --seeds 1 2 3

adapts the shipped world model to the newest 500 to 40,000 rows of the best known controller with
noise, of random actions, and of the source's policy (zero-shot), and trains a policy in each. The
baseline is a policy that learns from the same rows alone, without a dynamics (--learn recorded).
Then it trains four source models, whose data is collected in four ways, and adapts each to 10,000
rows of the controller. Writes data.csv and data.png beside this file.
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
    Stage,
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

KINDS = ("expert", "random", "zero-shot")
COLLECTED = ("explore", "task", "random", "mixed")
ALONE = "shipped, rows alone"  # what `source` is in a line of the baseline
CSV = HERE / "data.csv"


def recorded(pair, kind, seed, folder):
    """The stage that records 40,000 rows of the target, and its dataset"""
    _, target = PAIRS[pair]
    if kind == "expert":
        data = folder / f"expert-{seed}.npz"
        return record_expert(data, target, 40_000, "--seed", 1000 * seed), data
    flags = ("--target-env-id", target, "--collect-policy", kind, "--method", "none")
    run_dir = folder / f"{kind}-{seed}"
    stage = adapt(run_dir, PRETRAINED / f"{pair}.pt", *flags, "--seed", seed)
    return stage, run_dir / "dataset.npz"


def job(pair, kind, rows, seed, runs):
    _, target = PAIRS[pair]
    folder = runs / "data" / pair
    stage, data = recorded(pair, kind, seed, folder)
    adapted = folder / f"{kind}-{rows}-{seed}-adapted"
    policy = folder / f"{kind}-{rows}-{seed}-policy"
    newest = ("--dataset-rows", rows, "--seed", seed)
    stages = [
        stage,
        adapt(adapted, PRETRAINED / f"{pair}.pt", "--dataset", data, *newest),
        train(policy, adapted / "best.pt", data, target, *newest),
    ]
    key = {"pair": pair, "source": "shipped", "kind": kind, "rows": rows, "seed": seed}
    return Job(key, stages, lambda: measured(policy, target, adapted))


def alone_job(pair, kind, rows, seed, runs):
    _, target = PAIRS[pair]
    folder = runs / "data" / pair
    stage, data = recorded(pair, kind, seed, folder)
    policy = folder / f"{kind}-{rows}-{seed}-alone"
    flags = ("--learn", "recorded", "--ahead", 5, "--warm-start", "both")
    flags += ("--dataset-rows", rows, "--seed", seed)
    stages = [stage, train(policy, PRETRAINED / f"{pair}.pt", data, target, *flags)]
    key = {"pair": pair, "source": ALONE, "kind": kind, "rows": rows, "seed": seed}
    return Job(key, stages, lambda: measured(policy, target) | {"kl": ""})


def source_job(pair, collect, seed, runs):
    source, target = PAIRS[pair]
    folder = runs / "data" / pair
    stage, data = recorded(pair, "expert", 1, folder)
    model = folder / f"source-{collect}-{seed}"
    command = ["draw_pretrain.py", "laptop", "--env-id", source, "--collect", collect]
    side = 32 if pair == "pendulum" else 64  # as the shipped models and the recorded data
    command += ["--run-dir", model, "--seed", seed, "--resume", "--image-size", side]
    adapted = folder / f"source-{collect}-{seed}-adapted"
    policy = folder / f"source-{collect}-{seed}-policy"
    newest = ("--dataset-rows", 10_000, "--seed", seed)
    stages = [
        Stage(command, model / "done"),
        stage,
        adapt(adapted, model / "draw.pt", "--dataset", data, *newest),
        train(policy, adapted / "best.pt", data, target, *newest),
    ]
    key = {"pair": pair, "source": collect, "kind": "expert", "rows": 10_000, "seed": seed}
    return Job(key, stages, lambda: measured(policy, target, adapted))


def picture(pair):
    """Left: return over rows, for each kind of data a line, and a broken one for the rows alone.
    Right: over the source's data collection, if one was run."""
    rows = [r for r in read(CSV) if r["pair"] == pair]
    collected = [r for r in rows if r["source"] in COLLECTED]
    figure, axes = new_figure(2 if collected else 1)
    for kind, colour in zip(KINDS, COLOURS, strict=False):
        for source, style, label in (("shipped", "-", kind), (ALONE, "--", f"{kind}, rows alone")):
            mine = [r for r in rows if r["kind"] == kind and r["source"] == source]
            sizes = sorted({int(r["rows"]) for r in mine})
            of_size = [[r for r in mine if int(r["rows"]) == n] for n in sizes]
            found = [mean_and_range(of_one, "return") for of_one in of_size]
            if found:
                mean, low, high = zip(*found, strict=True)
                axes[0, 0].plot(sizes, mean, style, color=colour, marker="o", label=label)
                axes[0, 0].fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
    for x, (collect, colour) in enumerate(zip(COLLECTED, COLOURS, strict=False)):
        mine = [r for r in collected if r["source"] == collect]
        if mine:
            axes[0, 1].bar(x, mean_and_range(mine, "return")[0], color=colour, alpha=0.5)
            axes[0, 1].plot([x] * len(mine), [float(r["return"]) for r in mine], "o", color=colour)
    for ax in axes[0]:
        draw_yardsticks(ax, PAIRS[pair][1])
    axes[0, 0].set(title=pair, xscale="log", xlabel="rows of the target", ylabel="return")
    if collected:
        axes[0, 1].set(xticks=range(len(COLLECTED)), xticklabels=COLLECTED, xlabel="source's data")
    names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(HERE / "data.png", dpi=110)


def main(
    pair: Literal["pendulum", "cup", "finger", "reacher"] = "pendulum",
    seeds: tuple[int, ...] = (1, 2, 3),
    rows: tuple[int, ...] = (500, 2000, 10_000, 40_000),
    collected: tuple[Literal["explore", "task", "random", "mixed"], ...] = COLLECTED,
    runs: Path = Path("runs"),
    draw: bool = False,
):
    """Runs what is missing, then draws.

    Args:
        pair: whose shipped model is adapted
        seeds: of data, residual and policy
        rows: sizes of the target's dataset
        collected: how the source's data is gathered, one model each (seed 1)
        runs: folder of the runs
        draw: run nothing, draw from the csv
    """
    runs = runs.resolve()
    jobs = [job(pair, kind, n, s, runs) for s in seeds for n in rows for kind in KINDS]
    jobs += [alone_job(pair, kind, n, s, runs) for s in seeds for n in rows for kind in KINDS]
    jobs += [source_job(pair, collect, 1, runs) for collect in collected]
    if not draw:
        run_all(CSV, jobs)
    picture(pair)


if __name__ == "__main__":
    tyro.cli(main)
