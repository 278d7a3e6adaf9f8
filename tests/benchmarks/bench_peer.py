"""Updates per second against the PyTorch Dreamer of the project r2dreamer (model.rep_loss=dreamer),
on this machine, in one run.

    git clone https://github.com/NM512/r2dreamer /elsewhere/r2dreamer
    python3 -m venv /elsewhere/venv && /elsewhere/venv/bin/pip install torch==2.8.0
    tensordict==0.9.1 torchrl==0.9.2 hydra-core==1.3.2 \
        numpy==1.26.0 gymnasium==1.2.0 tensorboard setuptools==77.0.3
    python tests/benchmarks/bench_peer.py --checkout /elsewhere/r2dreamer --python
    /elsewhere/venv/bin/python

An update here is the world model's and the task actor-critic's; there it is Dreamer's, which trains
the same three parts. Both get 16 sequences of 64 frames of 64x64, in memory already, imagine 15
steps from all 1024 states, and run without compiling. Each runs at its
best: every setting of `THEIRS` and `OURS` is tried, and the fastest one of each side is measured,
in turns. The bar: 3 times the updates per second.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

B, T, HORIZON = 16, 64, 15
THEIRS = "fp32", "fp32, channels last", "bf16", "bf16, channels last"
OURS = "fp32", "bf16"


@dataclass
class Args:
    checkout: str  # of the peer
    python: str = sys.executable  # with what the peer needs
    size: str = "size12M"  # of the peer's configs/model
    cnn_depth: int = 16  # ours, as in the peer's size12M
    units: int = 512
    vector_units: int = 256
    repeats: int = 10


def peer(checkout, size):
    """The peer's side, in a process of its own with the peer's Python: reads a setting from stdin
    for each update, answers with its seconds."""
    sys.path.insert(0, checkout)
    import time

    import dreamer
    import gymnasium as gym
    import hydra
    import torch
    from tensordict import TensorDict

    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    flags = [
        f"model={size}",
        "device=cpu",
        "model.rep_loss=dreamer",
        "model.compile=False",
        f"model.imag_horizon={HORIZON}",
    ]
    spaces = gym.spaces.Dict(image=gym.spaces.Box(0, 255, (64, 64, 3)))
    sys.stdout, out = sys.stderr, sys.stdout  # what the peer prints is no answer
    agent, kind = None, None
    image, flag = (
        torch.randint(0, 256, (B, T, 64, 64, 3), dtype=torch.uint8),
        torch.zeros(B, T, 1, dtype=torch.bool),
    )
    batch = {
        "image": image,
        "action": torch.rand(B, T, 1) * 2 - 1,
        "reward": torch.rand(B, T, 1),
        "is_first": flag.squeeze(-1),
        "is_last": flag,
        "is_terminal": flag,
    }

    class Replay:
        def sample(self):
            return TensorDict(batch, batch_size=(B, T)).clone(False), None, agent.rssm.initial(B)

        def update(self, *_):
            pass

    for line in sys.stdin:
        setting = line.strip()
        if agent is None or setting != kind:
            with hydra.initialize_config_dir(
                str(Path(checkout).resolve() / "configs"), version_base=None
            ):  # anew, since the agent changes it
                config = hydra.compose("configs", flags)
            agent, kind = (
                dreamer.Dreamer(config.model, spaces, gym.spaces.Box(-1, 1, (1,))).to("cpu"),
                setting,
            )
            if "channels last" in setting:
                agent.to(memory_format=torch.channels_last)
            # its own autocast asks for float16, which is for GPUs
            bf16 = {"dtype": torch.bfloat16, "enabled": "bf16" in setting}
            dreamer.autocast = lambda device_type, dtype, how=bf16: torch.autocast("cpu", **how)
        start = time.perf_counter()
        agent.update(Replay())
        answer = {
            "seconds": time.perf_counter() - start,
            "parameters": sum(p.numel() for p in agent._named_params.values()),
        }
        print(json.dumps(answer), file=out, flush=True)


def ours(args):
    """-> (function (setting) that makes one update, number of trained parameters)"""
    import dataclasses

    import torch
    from bench_pretrain import Stage1

    import draw_pretrain

    paper = draw_pretrain.PRESETS["paper"][1]
    stage = Stage1(
        dataclasses.replace(
            paper,
            cnn_depth=args.cnn_depth,
            units=args.units,
            actor_units=args.units,
            vector_units=args.vector_units,
            horizon=HORIZON,
            batch=B,
            length=T,
            starts=B * T,
            ensemble_target=64,
        )
    )

    def update(setting):
        stage.args.bf16 = setting == "bf16"
        stage.autocast = torch.autocast("cpu", torch.bfloat16, enabled=stage.args.bf16)
        stage.both()

    modules = stage.draw, stage.task.actor, stage.task.critic
    return update, sum(p.numel() for module in modules for p in module.parameters())


def main(args):
    from measure import in_turns, machine, ms, ratio, table

    machine()
    # the allocator's thresholds that common.prepare sets for us
    env = os.environ | {
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    }
    command = [args.python, __file__, "--peer", args.checkout, args.size]
    theirs = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )

    def their_update(setting):
        theirs.stdin.write(setting + "\n")
        theirs.stdin.flush()
        answer = theirs.stdout.readline()
        if not answer:
            raise SystemExit("error: the peer stopped, see above")
        return json.loads(answer)

    our_update, our_size = ours(args)
    tried = {}
    for side, settings, update in (("theirs", THEIRS, their_update), ("ours", OURS, our_update)):
        for setting in settings:  # one to warm up, one that counts
            tried[side, setting] = in_turns({"": partial(update, setting)}, 1, 1)[""]
    table(
        "One update with each setting",
        ["", "", "s"],
        [[*key, f"{s[0]:.2f}"] for key, s in tried.items()],
    )
    best = {
        side: min((s, key[1]) for key, s in tried.items() if key[0] == side)[1]
        for side in ("theirs", "ours")
    }
    their_size = their_update(best["theirs"])["parameters"]
    seconds = in_turns(
        {"theirs": lambda: their_update(best["theirs"]), "ours": lambda: our_update(best["ours"])},
        args.repeats,
        1,
    )
    theirs.stdin.close()
    names = {
        "theirs": (f"r2dreamer, dreamer, {args.size}, {best['theirs']}", their_size),
        "ours": (f"ours, {best['ours']}", our_size),
    }
    rows = [
        [name, f"{n / 1e6:.1f} M", ms(seconds[side]), f"{1 / statistics.median(seconds[side]):.3f}"]
        for side, (name, n) in names.items()
    ]
    table(
        f"World model and actor-critic, {B} x {T} frames of 64x64, {B * T} starts, {HORIZON} steps",
        ["", "trained parameters", "ms an update, median (min - max)", "updates/s"],
        rows,
    )
    print(f"\n{ratio(seconds['theirs'], seconds['ours'])} times the updates per second (bar: 3)")


if __name__ == "__main__":
    if "--peer" in sys.argv:
        peer(*sys.argv[2:])
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__))
