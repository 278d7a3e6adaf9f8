"""Every flag of stages 1 to 3 at both ends of its range, tiny. Where an end is more than a test can
hold (65,536 units) a large value stands for it."""

import dataclasses
import shlex

import numpy as np
import pytest
from helpers import random_rows, read_metrics, save_tiny_draw

import draw_pretrain
import redraw_adapt
import train_policy
from common import UserError, save_dataset

# flag: (low, high) of its range
STAGE_1 = {
    "seed": (0, 2**31 - 1),
    "log_every": (1, 10**9),
    "save_every": (1, 10**9),
    "n_envs": (1, 5),
    "episode_steps": (1, 10**9),
    "augment": (0.0, 1.0),
    "hold": (1e-9, 1e9),
    "gain": (1e-9, 1e9),
    "replay_size": (20, 10**9),
    "S": (1, 40),
    "K": (2, 40),
    "cnn_depth": (1, 9),
    "vector_units": (1, 40),
    "vector_layers": (1, 6),
    "units": (1, 40),
    "actor_units": (1, 40),
    "batch": (1, 9),
    "length": (2, 4),
    "rewarded": (0.0, 1.0),
    "train_every": (0.5, 1e9),
    "warmup": (0, 10**9),
    "decay": (False, True),
    "image_scale": (0.0, 1e9),
    "vector_scale": (0.0, 1e9),
    "reward_scale": (0.0, 1e9),
    "soft_updates": (0, 10**9),
    "start_speed": (0.0, 1e9),
    "horizon": (1, 20),
    "starts": (1, 36),
    "policy_start": (0, 10**9),
    "policy_every": (1, 10**9),
    "explore_every": (1, 10**9),
    "gamma": (0.0, 1.0),
    "lam": (0.0, 1.0),
    "entropy": (0.0, 1e9),
    "return_floor": (1e-9, 1e9),
    "ensemble": (2, 9),
    "restart": (0.0, 1.0),
    "least_reward": (0.0, 1e9),
    "states": (1, 40),
    "candidates": (5, 20),
    "ahead": (1, 9),
    "lesson_steps": (1, 9),
    "ensemble_target": (0, 40),
}
STAGE_2 = {
    "seed": (0, 2**31 - 1),
    "log_every": (1, 10**12),
    "save_every": (1, 10**12),
    "dataset_rows": (40, 10**12),
    "holdout": (0.0, 0.9),
    "hidden": (1, 300),
    "layers": (1, 5),
    "members": (1, 9),
    "rank": (1, 40),
    "updates": (0, 9),
    "batch": (1, 70),
    "length": (2, 6),
    "soft": (0.0, 1.0),
    "l2": (0.0, 10**6),
    "ema_decay": (0.0, 1 - 1e-9),
}
COLLECTING = {
    "collect_steps": (8, 200),
    "collect_noise": (0.0, 1.0),
    "hold": (1.0, 1e12),
    "gain": (1e-9, 1e9),
    "episode_steps": (1, 10**12),
    "n_envs": (1, 5),
}
STAGE_3 = {
    "seed": (0, 2**31 - 1),
    "dataset_rows": (4, 10**12),
    "log_every": (1, 10**12),
    "save_every": (1, 10**12),
    "eval_every": (0, 1),
    "eval_episodes": (2, 5),
    "n_envs": (1, 10**12),
    "updates": (1, 3),
    "batch": (1, 30),
    "length": (1, 4),
    "starts": (1, 120),
    "rewarded": (0.0, 1.0),
    "restart": (0.0, 1.0),
    "horizon": (1, 30),
    "least_reward": (0.0, 1e9),
    "gamma": (0.0, 1.0),
    "actor_lr": (0.0, 1e-3),
    "critic_lr": (0.0, 1e-3),
    "ema_decay": (0.0, 1 - 1e-9),
    "decay": (False, True),
    "return_floor": (1e-9, 1e9),
    "lam": (0.0, 1.0),
    "entropy": (0.0, 1e9),
    "states": (1, 400),
    "candidates": (5, 30),
    "ahead": (1, 9),
    "lesson_steps": (1, 9),
    "act_noise": (0.0, 10.0),
}
# Not numbers, tested elsewhere, or below by themselves
OTHERS = shlex.split(
    """env_id run_dir overwrite resume device track bf16 compile parallel_envs image_size look
    collect steps prefill lr actor_lr critic_lr checkpoint dataset actions_lead target_env_id
    collect_policy method inputs finetune_lr eval_env_ids warm_start learn"""
)
TINY_1 = {
    "steps": 44,
    "prefill": 20,
    "train_every": 4.0,
    "batch": 2,
    "length": 4,
    "starts": 4,
    "S": 3,
    "K": 4,
    "cnn_depth": 2,
    "vector_units": 8,
    "vector_layers": 1,
    "units": 16,
    "actor_units": 16,
    "horizon": 2,
    "ensemble": 2,
    "collect": "mixed",
    "device": "cpu",
}


def ends(table, i):
    return {flag: values[i] for flag, values in table.items()}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The flags --checkpoint and --dataset"""
    folder = tmp_path_factory.mktemp("given")
    save_dataset(folder / "data.npz", random_rows(80))
    return {
        "checkpoint": save_tiny_draw(folder / "draw.pt"),
        "dataset": str(folder / "data.npz"),
    }


@pytest.mark.parametrize(
    "stage, tables",
    [
        (draw_pretrain, [STAGE_1]),
        (redraw_adapt, [STAGE_2, COLLECTING]),
        (train_policy, [STAGE_3]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_every_flag_is_in_the_tables(stage, tables):
    flags = {field.name for field in dataclasses.fields(stage.Args)}
    tested = set().union(*tables)
    assert tested <= flags and flags <= tested | set(OTHERS), (tested - flags, flags - tested)


def pretrain(run_dir, **changes):
    args = TINY_1 | {"env_id": "toy_env:Toy-v0", "run_dir": str(run_dir)} | changes
    draw_pretrain.main(draw_pretrain.Args(**args))
    return read_metrics(run_dir)


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("learn", ["reinforce", "lookahead"])
def test_stage_1(tmp_path, end, learn):
    changes = ends(STAGE_1, end) | {"learn": learn}
    metrics = pretrain(tmp_path, **changes)
    assert len(metrics) >= (8 if end else 12) or changes["train_every"] == 1e9


@pytest.mark.parametrize(
    "flags",
    [
        {"train_every": 0.5, "gamma": 1.0, "lam": 1.0},
        {"policy_start": 0, "gamma": 1.0, "learn": "lookahead", "restart": 0.0},
        {"lr": 0.0, "actor_lr": 0.0, "critic_lr": 0.0, "collect": "task"},
        {"lr": 1.0, "actor_lr": 1.0, "critic_lr": 1.0, "collect": "explore"},  # may diverge
        {"steps": 21, "collect": "random"},
        {"soft_updates": 10**9, "rewarded": 1.0, "horizon": 20},
        {"image_scale": 1e9, "warmup": 10**9},
    ],
    ids=str,
)
def test_stage_1_by_itself(tmp_path, flags):
    try:
        metrics = pretrain(tmp_path, **flags)
    except UserError as e:
        assert "diverged" in str(e) and flags.get("lr") == 1.0
        return
    assert all(np.isfinite(values).all() for values in metrics.values())


@pytest.mark.parametrize("end", [0, 1])
def test_stage_2(tmp_path, given, end):
    more = {"run_dir": str(tmp_path), "device": "cpu"}
    redraw_adapt.main(redraw_adapt.Args(**given, **more, **ends(STAGE_2, end)))
    assert (tmp_path / "best.pt").exists() and (tmp_path / "report.txt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        {"lr": 1e-9},
        {"lr": 1.0},
        {"method": "finetune", "finetune_lr": 1e-9},
        {"method": "finetune", "finetune_lr": 1.0},
        {"method": "lowrank", "rank": 1},
        {"method": "lowrank", "rank": 300, "bf16": True},
        {"method": "lowrank", "lr": 1.0},
        {"method": "replace", "inputs": "za+base"},
        {"inputs": "za+sigma", "members": 2, "bf16": True},
    ],
    ids=str,
)
def test_stage_2_by_itself(tmp_path, given, flags):
    more = {"run_dir": str(tmp_path), "device": "cpu", "updates": 3, "length": 4, "hidden": 8}
    try:
        redraw_adapt.main(redraw_adapt.Args(**given, **more, **flags))
    except UserError as e:
        assert "diverged" in str(e) and 1.0 in flags.values()


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("policy", ["random", "zero-shot"])
def test_stage_2_collects(tmp_path, given, end, policy):
    args = {"run_dir": str(tmp_path), "device": "cpu", "updates": 1, "length": 2, "hidden": 8}
    args |= {"checkpoint": given["checkpoint"], "target_env_id": "toy_env:ToyReversed-v0"}
    redraw_adapt.main(redraw_adapt.Args(**args, collect_policy=policy, **ends(COLLECTING, end)))
    assert (tmp_path / "dataset.npz").exists() and (tmp_path / "best.pt").exists()


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("learn", ["reinforce", "lookahead", "recorded"])
def test_stage_3(tmp_path, given, end, learn):
    more = {"run_dir": str(tmp_path), "device": "cpu", "learn": learn}
    more |= {"eval_env_ids": ("toy_env:Toy-v0",)}
    train_policy.main(train_policy.Args(**given, **more, **ends(STAGE_3, end)))
    assert (tmp_path / "policy.pt").exists() and (tmp_path / "eval.json").exists()


@pytest.mark.parametrize("learn", ["reinforce", "lookahead", "recorded"])
@pytest.mark.parametrize("warm_start", ["none", "critic", "both"])
def test_stage_3_by_itself(tmp_path, given, learn, warm_start):
    more = {"run_dir": str(tmp_path), "device": "cpu", "learn": learn, "warm_start": warm_start}
    more |= {
        "updates": 2,
        "batch": 2,
        "length": 3,
        "starts": 4,
        "horizon": 2,
        "actor_lr": 1.0,
        "critic_lr": 1.0,
    }
    train_policy.main(train_policy.Args(**given, **more, bf16=True))
    assert (tmp_path / "policy.pt").exists()


def test_rows_that_no_action_led_to(tmp_path, given):
    """Episodes of one row each: nothing is recorded of what an action does."""
    rows = random_rows(8) | {"is_first": np.ones(8, bool)}
    save_dataset(tmp_path / "data.npz", rows)
    more = {"learn": "recorded", "updates": 2, "batch": 2, "run_dir": str(tmp_path / "run")}
    more |= {"length": 2, "starts": 4}
    data = {"dataset": str(tmp_path / "data.npz"), "device": "cpu"}
    with pytest.raises(UserError, match="no row that an action led to"):
        train_policy.main(train_policy.Args(**given | data, **more))
