"""Figure 1: the residual against its baselines, over the updates of stage 2.

    python docs/figures/methods.py --pairs pendulum --seeds 1 2 3

adapts the shipped world model of each pair to 10,000 rows of the target with each method and budget
of updates, trains a policy in the result, always with the same budget, and evaluates it in the
target. Writes methods.csv and methods.png beside this file; --draw draws from the csv alone.
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

METHODS = ("residual", "replace", "finetune", "none")
CSV = HERE / "methods.csv"


def job(pair, method, updates, seed, runs):
    """updates: budgets of stage 2; the job is of the last one, which goes on from those before."""
    _, target = PAIRS[pair]
    folder = runs / "methods" / pair
    data = folder / f"expert-{seed}.npz"
    stages = [record_expert(data, target, 10_000, "--seed", 1000 * seed)]
    given = ("--dataset", data, "--method", method, "--seed", seed)
    before = None
    for n in updates:
        adapted = folder / f"{method}-{n}-{seed}-adapted"
        stage = adapt(adapted, PRETRAINED / f"{pair}.pt", *given, "--updates", n)
        stage.before = before
        stages.append(stage)
        before = stage
    # A baseline as its authors have it: a finetuned model's policy starts from the source's.
    warm = ("--warm-start", "both") if method == "finetune" else ()
    policy = folder / f"{method}-{updates[-1]}-{seed}-policy"
    stages.append(train(policy, adapted / "last.pt", data, target, *warm, "--seed", seed))
    key = {"pair": pair, "method": method, "updates": updates[-1], "seed": seed}
    return Job(key, stages, lambda: measured(policy, target, adapted))


def picture(pairs):
    """Above returns, below the KL; a line a method, the range over seeds as its band"""
    figure, axes = new_figure(len(pairs), rows=2)
    for column, pair in enumerate(pairs):
        of_pair = [row for row in read(CSV) if row["pair"] == pair]
        budgets = sorted({int(row["updates"]) for row in of_pair if row["method"] != "none"})
        for method, colour in zip(METHODS, COLOURS, strict=False):
            rows = [row for row in of_pair if row["method"] == method]
            for ax, quantity in zip(axes[:, column], ("return", "kl"), strict=True):
                own = sorted({int(row["updates"]) for row in rows})
                found = [
                    mean_and_range([row for row in rows if int(row["updates"]) == n], quantity)
                    for n in own
                ]
                if not found:
                    continue
                mean, low, high = zip(*found, strict=True)
                if method == "none":  # the same whatever the budget
                    ax.axhline(mean[0], color=colour, label=method)
                    continue
                ax.plot(own, mean, color=colour, marker="o", label=method)
                ax.fill_between(own, low, high, color=colour, alpha=0.15, linewidth=0)
        draw_yardsticks(axes[0, column], PAIRS[pair][1])
        axes[0, column].set(title=pair, ylabel="return in the target", xscale="log")
        axes[1, column].set(ylabel="held-out KL, nats", xlabel="updates of stage 2", xscale="log")
        for ax in axes[:, column]:
            ax.set_xticks(budgets, [f"{n:,}" for n in budgets])
            ax.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(HERE / "methods.png", dpi=110)


def table(pair):
    """Prints the mean return of each method at its best budget and at its last one."""
    print(f"{pair}: mean return over seeds, and their range")
    for method in METHODS[:3]:
        rows = [row for row in read(CSV) if row["pair"] == pair and row["method"] == method]
        found = {
            n: mean_and_range([row for row in rows if int(row["updates"]) == n], "return")
            for n in sorted({int(row["updates"]) for row in rows})
        }
        if not found:
            continue
        for name, n in (("best", max(found, key=found.get)), ("last", max(found))):
            mean, low, high = found[n]
            print(f"{method}, {name}: {mean:.0f} ({low:.0f} to {high:.0f}), {n} updates")


def main(
    pairs: tuple[Literal["pendulum", "cup", "finger", "reacher"], ...] = ("pendulum",),
    seeds: tuple[int, ...] = (1, 2, 3),
    updates: tuple[int, ...] = (500, 2000, 6000, 20_000, 60_000),
    runs: Path = Path("runs"),
    draw: bool = False,
):
    """Runs what is missing, then draws.

    Args:
        pairs: whose shipped models are adapted
        seeds: of data, residual and policy
        updates: budgets of stage 2
        runs: folder of the runs
        draw: run nothing, draw from the csv
    """
    runs = runs.resolve()
    jobs = [job(pair, "none", (0,), seed, runs) for pair in pairs for seed in seeds]
    # Short budgets first: the figure soon shows something.
    updates = sorted(updates)
    jobs += [
        job(pair, method, updates[: i + 1], seed, runs)
        for i in range(len(updates))
        for seed in seeds
        for pair in pairs
        for method in METHODS[:3]
    ]
    if not draw:
        run_all(CSV, jobs)
    picture(pairs)
    for pair in pairs:
        table(pair)


if __name__ == "__main__":
    tyro.cli(main)
