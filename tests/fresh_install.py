"""The repository on a machine that has never seen it: a clone in an empty folder, an empty HOME,
new virtual environments.

    python tests/fresh_install.py [python3.12 ...]     # which interpreters to make the virtual
    environments with (default: this one)

runs `make scratch` at its smallest size, checks the files that it leaves, and `make test`; it takes
some 15 minutes for each. Not part of `make test`, which it calls.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALLEST = (
    "STAGE1=--steps 3000 --prefill 2000 --soft-updates 10 --policy-start 20",
    "STAGE2=--collect-steps 2000 --updates 50 --log-every 50",
    "STAGE3=--updates 20 --eval-episodes 2",
)
FILES = (
    "source/draw.pt",
    "source/curves.png",
    "source/prediction.gif",
    "model.pt",
    "source-policy/policy.pt",
    "adapted/best.pt",
    "adapted/dataset.npz",
    "adapted-policy/policy.pt",
    "adapted-policy/eval.json",
    "recorded-policy/eval.json",
    "table.md",
    "zero_shot_and_adapted.gif",
)

for python in sys.argv[1:] or [sys.executable]:
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder) / "redraw", Path(folder) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        env = {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        env |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        for target in (["scratch", *SMALLEST], ["test"]):
            done = subprocess.run(["make", *target, f"PYTHON={python}"], cwd=clone, env=env)
            if done.returncode:
                sys.exit(f"{python}: make {target[0]} failed with {done.returncode}")
        missing = [f for f in FILES if not (clone / "runs/pendulum-1" / f).exists()]
        if missing:
            sys.exit(f"{python}: make scratch left no {', '.join(missing)}")
        print(f"{python}: make scratch and make test work")
