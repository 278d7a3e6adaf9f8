"""The table at the end of `make demo`: reads the eval.json files of a run folder, measures a random policy.

    python docs/demo_table.py --runs runs/pendulum-1 --source ENV_ID --target ENV_ID

prints the table and writes it to RUNS/table.md.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro

from common import make_envs
from train_policy import evaluate, mean_and_interval


def main(runs: Path, source: str, target: str, seed: int = 1, episodes: int = 40):
    """Args:
    runs: folder with source-policy, adapted-policy and target-policy
    source: source environment id
    target: target environment id
    seed: of the runs; the random policy starts where theirs do
    episodes: of the random policy
    """

    def result(policy, env_id):
        r = json.loads((runs / policy / "eval.json").read_text())[env_id]
        return r["mean"], r["ci95"], len(r["returns"])

    envs = make_envs(target, 1)
    A = envs.single_action_space.shape[0]
    envs.close()
    rng = np.random.default_rng(seed)
    random_returns, _ = evaluate(target, lambda image, vector: rng.uniform(-1, 1, (len(image), A)).astype(np.float32), episodes, seed=seed + 20_000, image_size=32)
    rows = [
        ("source policy in the source", result("source-policy", source)),
        ("source policy in the target (zero-shot)", result("source-policy", target)),
        ("**adapted policy in the target (residual)**", result("adapted-policy", target)),
        ("policy trained in the target itself (ceiling)", result("target-policy", target)),
        ("random actions in the target", (*mean_and_interval(random_returns), episodes)),
    ]
    lines = [f"source {source}, target {target}", "", "| policy | return | 95 % interval | episodes |", "|---|---|---|---|"]
    lines += [f"| {name} | {mean:.1f} | ± {half:.1f} | {n} |" for name, (mean, half, n) in rows]
    zero_shot, adapted, ceiling = rows[1][1][0], rows[2][1][0], rows[3][1][0]
    lines += ["", f"adapted / ceiling = {adapted / max(ceiling, 1e-9):.2f}, zero-shot / adapted = {zero_shot / max(adapted, 1e-9):.2f}"]
    (runs / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nvideos: {', '.join(str(p) for p in sorted(runs.glob('*/*.gif')))}\ntable: {runs}/table.md")


if __name__ == "__main__":
    tyro.cli(main)
