"""The three scripts as a user runs them: two tiny projects from end to end, what they leave behind, and mistakes."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from helpers import TINY, random_rows, save_tiny_draw, user_error

import draw_pretrain
import redraw_adapt
import train_policy
from common import load_checkpoint, load_dataset, load_policy, save_dataset

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("draw_pretrain", "redraw_adapt", "train_policy")

# Every size is given, so that no test depends on the presets.
PRETRAIN = """laptop --steps 600 --prefill 400 --n-envs 2 --episode-steps 50 --image-size 16 --collect mixed --hold 4 --replay-size 10000
    --S 4 --K 4 --cnn-depth 4 --vector-units 8 --vector-layers 1 --units 16 --actor-units 16 --batch 4 --length 8 --train-every 4 --lr 1e-3
    --warmup 5 --soft-updates 10 --image-scale 1 --vector-scale 1 --reward-scale 1 --return-floor 1 --actor-lr 3e-4
    --horizon 3 --starts 8 --policy-start 10 --policy-every 2 --explore-every 3 --rewarded 0.25 --actor-grad dynamics
    --ensemble 2 --ensemble-target 4 --log-every 10 --device cpu""".split()
ADAPT = """laptop --collect-steps 400 --collect-policy zero-shot --collect-noise 0.5 --episode-steps 50 --n-envs 2 --hidden 16 --lr 1e-2 --updates 60
    --batch 8 --length 8 --log-every 20 --device cpu""".split()
POLICY = "laptop --updates 20 --batch 2 --length 4 --rewarded 0.5 --horizon 3 --log-every 5 --eval-every 0 --eval-episodes 2 --device cpu".split()

PENDULUM = "redraw/PendulumSwingup-v0", "redraw/PendulumSwingupReversed-v0"
TOY = "toy_env:Toy-v0", "toy_env:ToyReversed-v0"  # an environment of the user's own


def run(script, *flags, cwd=None):
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)


def call(module, *flags):
    """The same in this process, which saves the seconds that imports take"""
    module.main(tyro.extras.overridable_config_cli(module.PRESETS, args=[str(f) for f in flags]))


def metric(run_dir, name):
    """The values that a run logged, in order"""
    return [float(row["value"]) for row in csv.DictReader(open(run_dir / "metrics.csv")) if row["metric"] == name]


@pytest.fixture(scope="module", params=[PENDULUM, TOY], ids=["pendulum", "toy"])
def project(request, tmp_path_factory):
    """(folder, source, target) after all three scripts"""
    source, target = request.param
    folder = tmp_path_factory.mktemp("project")
    for script, *flags in (
        ("draw_pretrain", *PRETRAIN, "--env-id", source, "--run-dir", "source"),
        ("redraw_adapt", *ADAPT, "--checkpoint", "source/draw.pt", "--target-env-id", target, "--run-dir", "adapted"),
        ("train_policy", *POLICY, "--checkpoint", "adapted/best.pt", "--dataset", "adapted/dataset.npz", "--run-dir", "policy",
         "--eval-env-ids", source, target),
    ):  # fmt: skip
        done = run(script, *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder, source, target


def check_rows(data, sign, rewards):
    """The toy environment tells what its data must look like."""
    first, last = data["is_first"], data["is_last"]
    assert (first[1:] & ~last[:-1]).sum() <= 1  # only where the rows of the second environment begin
    moved, action = data["vector"][1:, 0], data["action"][:-1, 0]
    assert np.allclose(moved[~first[1:]], sign * 0.2 * action[~first[1:]], atol=1e-5)  # the action AT x_t leads to x_{t+1}
    assert not data["vector"][first, 0].any()
    assert np.array_equal(data["is_terminal"], data["vector"][:, 1] >= 1) and not (data["is_terminal"] & ~last).any()
    if rewards:
        assert np.allclose(data["reward"], np.where(first, 0, data["vector"][:, 1]), atol=1e-5)  # of ARRIVING at x_t


def test_pretraining_leaves_a_model_and_its_replay(project):
    folder, source, _ = project
    checkpoint = load_checkpoint(folder / "source" / "draw.pt", ("draw_pretrain",))
    assert checkpoint["updates"] == 50 and checkpoint["args"]["env_id"] == source and checkpoint["sizes"]["image_size"] == 16
    assert checkpoint["source_range"]["kl"] == pytest.approx(metric(folder / "source", "world_model/kl")[-1], rel=0.5)
    data = load_dataset(folder / "source" / "replay")
    assert len(data["reward"]) == 600 and data["action"].std() > 0.1
    assert json.loads((folder / "source" / "args.json").read_text())["env_id"] == source
    assert len(metric(folder / "source", "world_model/loss")) == 5
    if source == TOY[0]:
        check_rows(data, 1.0, rewards=True)


def test_world_model_gets_better(project):
    image = metric(project[0] / "source", "world_model/image")
    assert np.isfinite(image).all() and image[-1] < 0.9 * image[0]


def test_adaptation_records_the_target_without_rewards(project):
    folder, _, target = project
    with np.load(folder / "adapted" / "dataset.npz") as npz:
        assert set(npz.files) == {"image", "vector", "action", "is_first", "is_last", "is_terminal"}
    data = load_dataset(folder / "adapted" / "dataset.npz", image_size=16)
    assert len(data["action"]) == 400 and 0.1 < np.abs(data["action"]).mean() and np.abs(data["action"]).max() <= 1
    assert data["is_first"].sum() >= 2 * 200 / 51
    if target == TOY[1]:
        check_rows(data, -1.0, rewards=False)


def test_adaptation_lowers_the_kl(project):
    folder = project[0] / "adapted"
    train, held_out = metric(folder, "adapt/kl_train"), metric(folder, "adapt/kl_held-out")
    assert len(train) == len(held_out) == 4 and train[-1] < 0.9 * train[0]
    best, last = (load_checkpoint(folder / name, ("redraw_adapt",)) for name in ("best.pt", "last.pt"))
    assert best["updates"] == 20 * int(np.argmin(held_out)) and last["updates"] == 60
    result = json.loads((folder / "result.json").read_text())
    assert result["best"]["held-out"] == pytest.approx(min(held_out), rel=1e-4) and result["source"] and "NO VERDICT" not in result["verdicts"][0]


def test_policy_is_saved_and_evaluated(project):
    folder, *ids = project
    results = json.loads((folder / "policy" / "eval.json").read_text())
    assert set(results) == set(ids)
    for env_id in ids:
        assert len(results[env_id]["returns"]) == 2 and results[env_id]["mean"] == pytest.approx(np.mean(results[env_id]["returns"]))
        assert metric(folder / "policy", f"eval/{env_id}") == pytest.approx([results[env_id]["mean"]], rel=1e-4, abs=1e-4)
    assert len(list((folder / "policy").glob("*.gif"))) == 2
    assert len(metric(folder / "policy", "policy/imagined_return")) == 4
    data = load_dataset(folder / "adapted" / "dataset.npz")
    actions = load_policy(folder / "policy" / "policy.pt")(data["image"][:3], data["vector"][:3])
    assert actions.shape == (3, data["action"].shape[1])


def test_no_temporary_files_are_left(project):
    assert [p for p in project[0].rglob(".*")] == []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an untrained draw.pt for the toy environment, and data.npz"""
    folder = tmp_path_factory.mktemp("files")
    save_tiny_draw(folder / "draw.pt")
    save_dataset(folder / "data.npz", random_rows(60))
    return folder


@pytest.mark.parametrize("method", ["replace", "finetune", "none"])
def test_baselines(files, tmp_path, method):
    given = "--dataset", files / "data.npz"
    call(redraw_adapt, *ADAPT, *given, "--checkpoint", files / "draw.pt", "--run-dir", tmp_path / "adapted", "--method", method)
    train = metric(tmp_path / "adapted", "adapt/kl_train")
    assert train[-1] < 0.95 * train[0] if method != "none" else len(train) == 1
    call(train_policy, *POLICY, *given, "--checkpoint", tmp_path / "adapted" / "last.pt", "--run-dir", tmp_path / "policy")
    assert load_policy(tmp_path / "policy" / "policy.pt").sizes == TINY


@pytest.mark.parametrize("collect", ["explore", "task", "random"])
def test_runs_repeat_with_their_seed(tmp_path, collect):
    def weights(seed, run_dir):
        call(draw_pretrain, *PRETRAIN, "--steps", 440, "--policy-start", 2, "--collect", collect, "--env-id", TOY[0], "--seed", seed, "--run-dir", tmp_path / run_dir)
        checkpoint = load_checkpoint(tmp_path / run_dir / "draw.pt", ("draw_pretrain",))
        return torch.cat([w.flatten() for part in ("draw", "task_actor", "explore_actor") for w in checkpoint[part].values()])

    first, again, other = weights(1, "a"), weights(1, "b"), weights(2, "c")
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("policy", ["random", "explore", "a checkpoint"])
def test_policies_that_collect(files, tmp_path, policy):
    if policy == "a checkpoint":
        call(train_policy, *POLICY, "--checkpoint", files / "draw.pt", "--dataset", files / "data.npz", "--run-dir", tmp_path / "policy")
        policy = tmp_path / "policy" / "policy.pt"
    flags = "--target-env-id", TOY[1], "--collect-policy", policy
    call(redraw_adapt, *ADAPT, *flags, "--checkpoint", files / "draw.pt", "--run-dir", tmp_path / "adapted")
    data = load_dataset(tmp_path / "adapted" / "dataset.npz")
    assert data["action"].std() > 0.1
    check_rows(data, -1.0, rewards=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick(script):
    start = time.time()
    command = [sys.executable, "-X", "importtime", str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and time.time() - start < 15
    assert "laptop" in done.stdout and "paper" in done.stdout
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "torch" in imported and not imported & {"dm_control", "mujoco", "tensorboard"}  # the slow ones wait until they are needed


# ---- mistakes


@pytest.mark.parametrize(
    "script, flags",
    [
        ("draw_pretrain", [*PRETRAIN, "--env-id", "redraw/Pendulum-v0"]),
        ("redraw_adapt", [*ADAPT, "--checkpoint", "nowhere.pt", "--target-env-id", TOY[1]]),
        ("train_policy", [*POLICY, "--checkpoint", "nowhere.pt", "--dataset", "nowhere.npz"]),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, script, flags):
    done = run(script, *flags, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # no run folder that would stand in the way of the next try


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_not_overwritten_by_accident(files, tmp_path, script):
    module, flags = {
        "draw_pretrain": (draw_pretrain, [*PRETRAIN, "--steps", 440, "--env-id", TOY[0]]),
        "redraw_adapt": (redraw_adapt, [*ADAPT, "--checkpoint", files / "draw.pt", "--dataset", files / "data.npz"]),
        "train_policy": (train_policy, [*POLICY, "--checkpoint", files / "draw.pt", "--dataset", files / "data.npz"]),
    }[script]
    call(module, *flags, "--run-dir", tmp_path)
    old = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with user_error(str(tmp_path), "--overwrite"):
        call(module, *flags, "--run-dir", tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == old
    call(module, *flags, "--run-dir", tmp_path, "--overwrite")
    assert (tmp_path / "args.json").stat().st_mtime_ns > old[tmp_path / "args.json"]


def test_overwriting_leaves_no_rows_of_the_old_run(tmp_path):
    call(draw_pretrain, *PRETRAIN, "--env-id", TOY[0], "--run-dir", tmp_path)
    call(draw_pretrain, *PRETRAIN, "--env-id", TOY[0], "--run-dir", tmp_path, "--overwrite", "--n-envs", 1, "--steps", 440)
    assert len(load_dataset(tmp_path / "replay")["reward"]) == 440


# {F} is the folder of the fixture `files`
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id toy_env:ToyDiscrete-v0", ["action"]),
        ("--starts 33", ["--starts"]),  # of 4 sequences of 8
        ("--prefill 10", ["--prefill"]),
        ("--rewarded 1.5", ["--rewarded"]),
        ("--soft-updates -5", ["--soft-updates"]),
        ("--vector-layers 0", ["--vector-layers"]),
        ("--replay-size 10", ["--replay-size"]),
        ("--image-size 20 --env-id redraw/PendulumSwingup-v0", ["image"]),
        ("--device gpu", ["--device"]),
        ("--run-dir {F}/draw.pt", ["draw.pt"]),
    ],
)
def test_mistakes_in_pretraining(files, tmp_path, flags, words):
    with user_error(*words):
        call(draw_pretrain, *PRETRAIN, "--env-id", TOY[0], "--run-dir", tmp_path / "run", *flags.format(F=files).split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", ["--dataset", "--target-env-id"]),
        ("--target-env-id redraw/NoSuch-v0", ["redraw/NoSuch-v0"]),
        ("--target-env-id redraw/PendulumSwingupReversed-v0", ["vector"]),  # another vector size than the checkpoint's
        ("--target-env-id toy_env:Toy-v0 --collect-policy {F}/draw.pt", ["draw.pt", "train_policy.py"]),
        ("--target-env-id toy_env:Toy-v0 --collect-steps 1", ["--collect-steps"]),
        ("--dataset {F}/data.npz --updates -1", ["--updates"]),
        ("--dataset {F}/data.npz --holdout nan", ["--holdout"]),
        ("--dataset {F}/nowhere", ["nowhere"]),
        ("--dataset {F}/draw.pt", ["draw.pt"]),
        ("--dataset {F}/data.npz --length 40", ["--length"]),  # longer than the held-out episode
        ("--dataset {F}/data.npz --holdout 1", ["train"]),
        ("--dataset {F}/one_episode.npz", ["episode"]),
        ("--dataset {F}/data.npz --run-dir {F}/draw.pt", ["draw.pt"]),
    ],
)
def test_mistakes_in_adaptation(files, tmp_path, flags, words):
    rows = random_rows(60)
    save_dataset(files / "one_episode.npz", rows | {"is_first": np.arange(60) == 0, "is_last": np.arange(60) == 59})
    with user_error(*words):
        call(redraw_adapt, *ADAPT, "--checkpoint", files / "draw.pt", "--run-dir", tmp_path / "run", *flags.format(F=files).split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--checkpoint {F}/data.npz", ["data.npz"]),
        ("--dataset {F}/wide.npz", ["vector"]),
        ("--length 61", ["--length"]),
        ("--rewarded -0.1", ["--rewarded"]),
        ("--seed -1", ["--seed"]),
        ("--lr -1", ["--lr"]),
        ("--eval-env-ids toy_env:NoSuch-v0", ["NoSuch"]),  # before the training, not after it
        ("--eval-env-ids redraw/ReacherEasy-v0", ["ReacherEasy"]),  # the checkpoint has one action, it has two
        ("--eval-env-ids toy_env:Toy-v0 --eval-episodes 0", ["--eval-episodes"]),
        ("--run-dir {F}/draw.pt", ["draw.pt"]),
    ],
)
def test_mistakes_in_policy_training(files, tmp_path, flags, words):
    save_dataset(files / "wide.npz", random_rows(60) | {"vector": np.zeros((60, 9), np.float32)})
    common = ["--checkpoint", files / "draw.pt", "--dataset", files / "data.npz", "--run-dir", tmp_path / "run"]
    with user_error(*words):
        call(train_policy, *POLICY, *common, *flags.format(F=files).split())
    assert list(tmp_path.iterdir()) == []
