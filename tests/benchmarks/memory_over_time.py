"""Does stage 1 grow after its replay is full? python tests/benchmarks/memory_over_time.py [minutes]

Trains small networks (with all that a run does: saves, and pictures every 40,000 steps) on the
pendulum with a replay of 4,000 rows, full within a minute, and reads the resident memory of the
process every 10 seconds. Prints the mean of each tenth of the time after the replay was full, and
the last tenth's growth over the first: the bar is 5 %.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = shlex.split(
    """laptop --steps 400000 --replay-size 4000 --prefill 4000 --soft-updates 0 --policy-start 100
    --train-every 20 --policy-every 1 --explore-every 2 --save-every 4000"""
)


def resident(pid):
    """MiB"""
    return next(
        int(line.split()[1]) / 1024
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )


def main(minutes=30.0):
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w") as log:
        command = [sys.executable, ROOT / "draw_pretrain.py", *FLAGS, "--run-dir", f"{folder}/run"]
        run = subprocess.Popen(command, stdout=log, stderr=log)
        # The first save: the replay is full.
        while not Path(f"{folder}/run/state.pt").exists():
            if run.poll() is not None:
                sys.exit(Path(log.name).read_text()[-300:])
            time.sleep(1)
        readings, end = [], time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            time.sleep(min(10, 60 * minutes / 30))
            readings.append(resident(run.pid))
        lines = Path(f"{folder}/run/metrics.csv").read_text().splitlines()
        saved = lines[-1].split(",")[0]
        run.kill()
        run.wait()
    tenth = len(readings) // 10
    means = [sum(readings[i * tenth : (i + 1) * tenth]) / tenth for i in range(10)]
    print(
        f"{minutes:g} minutes with a full replay, {saved} updates; resident memory (MiB), mean of "
        "each tenth:"
    )
    print("  " + "  ".join(f"{m:.0f}" for m in means))
    growth = means[-1] / means[0] - 1
    print(f"growth, last tenth over the first: {100 * growth:+.1f} % (bar: 5 %)")
    sys.exit(growth > 0.05)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
