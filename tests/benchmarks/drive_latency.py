"""What the drive's clock does, against the tests' robot on loopback. On a quiet machine:

    python tests/benchmarks/drive_latency.py                     latency and jitter, two minutes
    python tests/benchmarks/drive_latency.py stops               from each fault to the first zero
    python tests/benchmarks/drive_latency.py outages 2 40 120    from the network's return to it

The bars for latency, at the paper's sizes, one core for the driver, 99th percentiles: 20 ms of
computing from a picture to its command (decoding, undistortion, network), and 5 ms between 0.1 s
and the time from one command to the next.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from fake_rosbridge import Air, FakeRobot  # noqa: E402

import deploy_duckiebot as deploy  # noqa: E402
from common import Policy, Sizes, save_checkpoint  # noqa: E402


def latency(seconds=120.0, computing_bar=20.0, jitter_bar=5.0):
    sizes = Sizes(vector_size=2, action_size=2)  # else the paper's
    with tempfile.TemporaryDirectory() as folder, FakeRobot() as robot:
        policy, record = Path(folder) / "policy.pt", Path(folder) / "out.npz"
        state = Policy(sizes).state_dict()
        save_checkpoint(policy, stage="train_policy", args={}, sizes=vars(sizes), policy=state)
        command = [sys.executable, str(ROOT / "deploy_duckiebot.py"), "--vehicle", "duckie"]
        command += ["--robot", f"127.0.0.1:{robot.port}", "--kinematics", "default"]
        command += ["--checkpoint", str(policy), "--record", str(record)]
        command += ["--max-seconds", str(seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        driver = subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if hasattr(os, "sched_setaffinity"):  # one core for the driver, another one for the robot
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(driver.pid, cores[-1:])
            os.sched_setaffinity(0, cores[:1])
        driver.stdin.write("arm\n")
        driver.stdin.flush()
        out = driver.stdout.read()
        if driver.wait() != 0:
            sys.exit("the drive failed: " + out)
        with np.load(record) as npz:
            jitter = np.abs(np.diff(npz["time_action"]) - 0.1) * 1e3
    words = ("steps,", "percentile", "usable")
    lines = [line for line in out.splitlines() if any(word in line for word in words)]
    print("\n".join(lines))
    computing = next(line for line in lines if line.startswith("computing")).split()[-2]
    middle, most = np.percentile(jitter, (50, 99))
    print(f"jitter: median {middle:.2f} ms, 99th percentile {most:.2f}, worst {jitter.max():.2f}")
    passed = float(computing) <= computing_bar and most <= jitter_bar
    print("within the bars" if passed else f"NOT within {computing_bar} and {jitter_bar} ms")
    return 0 if passed else 1


class Steady:
    """In the place of a policy"""

    sizes = SimpleNamespace(image_size=16, vector_size=2, action_size=2)

    def __call__(self, image, vector):
        return np.array([(0.8, 0.1)], np.float32)


def drive(port, max_seconds=20.0):
    """Drives in this process. -> what main raised"""
    read, write = os.pipe()
    sys.stdin = os.fdopen(read)
    os.write(write, b"arm\n")
    deploy.load_policy = lambda path: Steady()
    flags = {"robot": f"127.0.0.1:{port}", "vehicle": "duckie", "kinematics": "default"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            deploy.main(deploy.Args(**flags, checkpoint="-", max_seconds=max_seconds))
    except BaseException as e:
        return e
    finally:
        drive.terminal = write


def stops():
    """Each fault comes right after the tenth command that moves. The time counts from there to the
    first zero, by the robot's clock, over three tries."""
    faults = {
        name: lambda robot, air, name=name: robot.fault.add(name)
        for name in (
            "no frames",
            "frozen frames",
            "old frames",
            "corrupt frames",
            "no ticks",
            "stuck left wheel",
            "no acknowledgements",
            "late acknowledgements",
        )
    }
    faults["emergency stop, told"] = lambda robot, air: robot.press_stop(True)
    faults["emergency stop, not told"] = lambda robot, air: robot.press_stop(True, told=False)
    faults["the driver's connection breaks"] = lambda robot, air: robot.disconnect([0])
    faults["the watchdog's connection breaks"] = lambda robot, air: robot.disconnect([1])
    faults["Ctrl-C"] = lambda robot, air: os.kill(os.getpid(), signal.SIGINT)
    faults["packets lost for 0.6 s"] = lambda robot, air: (
        air.cut(),
        threading.Timer(0.6, air.restore).start(),
    )
    for name, fault in faults.items():
        times = []
        for _ in range(3):
            with FakeRobot() as robot, Air(robot.port) as air:
                robot.when(10, lambda robot=robot, air=air, fault=fault: fault(robot, air))
                error = drive(air.port)
                time.sleep(1.0)
                zeros = [c[0] for c in robot.commands if c[1:3] == (0, 0)]
                robot.fault.clear()  # so that the watchdog is answered, and ends
                time.sleep(2.5)
                times.append(min(t for t in zeros if t > robot.fault_time) - robot.fault_time)
        times = ", ".join(f"{t:.3f}" for t in sorted(times))
        print(f"{name}: {times} s; {str(error).removeprefix('error: ')}", flush=True)


def outages(*seconds):
    """The network swallows all packets for so long, without a reset; old connections stay dead."""
    for outage in map(float, seconds):
        with FakeRobot() as robot, Air(robot.port) as air:
            back = []

            def cut(air=air, outage=outage, back=back):
                air.cut()
                threading.Timer(outage, lambda: back.append(air.restore())).start()

            robot.when(10, cut)
            error = drive(air.port)
            while not back or time.monotonic() < back[0] + 3:
                time.sleep(0.1)
            after = min(c[0] for c in robot.commands if c[0] > back[0]) - back[0]
            stands = robot.motors == (0, 0) and robot.flag
            print(f"{outage:.0f} s: first zero {after:.2f} s after; {stands=}; {error}", flush=True)


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "latency"
    sys.exit({"latency": latency, "stops": stops, "outages": outages}[what](*sys.argv[2:]))
