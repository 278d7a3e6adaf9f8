"""Running the three stages, tiny: flags on the toy environment, in this process or from outside."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import tyro
from helpers import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("draw_pretrain", "redraw_adapt", "train_policy")
TOY = "toy_env:Toy-v0", "toy_env:ToyReversed-v0"  # an environment of the user's own

# Every size is given, so that no test depends on the presets.
PRETRAIN = shlex.split(
    """laptop --steps 600 --prefill 400 --n-envs 2 --episode-steps 50 --image-size 16
    --start-speed 0 --collect mixed --hold 4 --gain 1 --replay-size 10000 --save-every 100000
    --S 4 --K 4 --cnn-depth 4 --vector-units 8 --vector-layers 1 --units 16 --actor-units 16
    --batch 4 --length 8 --train-every 4 --lr 1e-3 --warmup 5 --no-decay --soft-updates 10
    --image-scale 1 --vector-scale 1 --reward-scale 1 --return-floor 1 --actor-lr 3e-4
    --horizon 3 --starts 8 --policy-start 10 --policy-every 2 --explore-every 3 --rewarded 0.25
    --gamma 0.99 --learn reinforce --restart 1 --least-reward 0 --critic-lr 3e-4 --ensemble 2
    --ensemble-target 4 --log-every 10
    --device cpu"""
)
ADAPT = shlex.split(
    """laptop --collect-steps 400 --collect-policy zero-shot --collect-noise 0.5 --hold 16
    --episode-steps 50 --n-envs 2 --hidden 16 --lr 1e-2 --finetune-lr 1e-2 --updates 60
    --batch 8 --length 8 --soft 0.5 --l2 0.03 --ema-decay 0.97 --log-every 20
    --save-every 1000 --device cpu"""
)
POLICY = shlex.split(
    """laptop --updates 20 --batch 2 --length 4 --starts 8 --rewarded 0.5 --horizon 3
    --log-every 5 --save-every 1000 --eval-every 0 --eval-episodes 2 --n-envs 2 --learn reinforce
    --restart 1 --least-reward 0 --actor-lr 5e-4 --critic-lr 5e-4 --no-decay --ema-decay 0.9
    --device cpu"""
)


def words(flags):
    """Flags as a command line has them; a text may hold several of them."""
    return [word for flag in flags for word in shlex.split(str(flag))]


def run(script, *flags, cwd=None, timeout=600):
    """A stage as a user runs it"""
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / f"{script}.py"), *words(flags)]
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


def call(module, *flags):
    """The same in this process, which saves the seconds that imports take"""
    module.main(tyro.extras.overridable_config_cli(module.PRESETS, args=words(flags)))


def three_stages(run_stage, folder, source, target):
    """Runs them on top of each other, each in its folder."""
    draw, adapted, data = (
        f"{folder}/{name}" for name in ("source/draw.pt", "adapted/best.pt", "adapted/dataset.npz")
    )
    run_stage("draw_pretrain", *PRETRAIN, f"--env-id {source} --run-dir {folder}/source")
    given = f"--checkpoint {draw} --target-env-id {target} --run-dir {folder}/adapted"
    run_stage("redraw_adapt", *ADAPT, given)
    given = f"--checkpoint {adapted} --dataset {data} --run-dir {folder}/policy"
    run_stage("train_policy", *POLICY, given, f"--eval-env-ids {source} {target}")


def metric(run_dir, name):
    """The values that a run logged, in order"""
    return read_metrics(run_dir)[name]
