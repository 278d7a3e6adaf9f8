"""The three scripts as a user runs them: tiny projects from end to end, and what they leave."""

import json
import runpy
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import TINY, random_rows, read_replay, save_tiny_draw, user_error
from stages import ADAPT, POLICY, PRETRAIN, ROOT, SCRIPTS, TOY, call, metric, run, three_stages

import draw_pretrain
import redraw_adapt
import train_policy
from common import (
    Sizes,
    load_checkpoint,
    load_dataset,
    load_policy,
    save_checkpoint,
    save_dataset,
)

PENDULUM = "redraw/PendulumSwingup-v0", "redraw/PendulumSwingupReversed-v0"
MODULES = {
    "draw_pretrain": draw_pretrain,
    "redraw_adapt": redraw_adapt,
    "train_policy": train_policy,
}


def call_stage(script, *flags):
    call(MODULES[script], *flags)


def run_stage(script, *flags):
    done = run(script, *flags)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["pendulum", "toy"])
def project(request, tmp_path_factory):
    """(folder, source, target) after all three scripts"""
    if request.param == "toy":
        return request.getfixturevalue("toy"), *TOY
    folder = tmp_path_factory.mktemp("pendulum")
    three_stages(run_stage, folder, *PENDULUM)
    return folder, *PENDULUM


def sizes_of(path):
    return Sizes(**torch.load(path)["sizes"])


def check_rows(data, sign):
    """The toy environment tells what its data must look like."""
    first, last = data["is_first"], data["is_last"]
    # Only where the rows of the second environment begin
    assert (first[1:] & ~last[:-1]).sum() <= 1
    moved, action = data["vector"][1:, 0], data["action"][:-1, 0]
    # The action AT x_t leads to x_{t+1}.
    assert np.allclose(moved[~first[1:]], sign * 0.2 * action[~first[1:]], atol=1e-5)
    assert not data["vector"][first, 0].any()
    assert np.array_equal(data["is_terminal"], data["vector"][:, 1] >= 1)
    assert not (data["is_terminal"] & ~last).any()
    if "reward" in data:  # of ARRIVING at x_t
        assert np.allclose(data["reward"], np.where(first, 0, data["vector"][:, 1]), atol=1e-5)


def test_pretraining_leaves_a_model_and_its_replay(project):
    folder, source, _ = project
    checkpoint = load_checkpoint(folder / "source" / "draw.pt", ("draw_pretrain",))
    assert checkpoint["updates"] == 50 and checkpoint["args"]["env_id"] == source
    assert checkpoint["sizes"]["image_size"] == 16
    last = metric(folder / "source", "world_model/kl")[-1]
    assert checkpoint["source_range"]["kl"] == pytest.approx(last, rel=0.5)
    data = read_replay(folder / "source" / "replay")
    assert len(data["reward"]) == 600 and data["action"].std() > 0.1
    assert json.loads((folder / "source" / "args.json").read_text())["env_id"] == source
    assert len(metric(folder / "source", "world_model/loss")) == 5
    # The replay is a dataset for the later stages.
    rows = load_dataset(folder / "source" / "replay", sizes_of(folder / "source" / "draw.pt"))
    assert np.array_equal(rows["image"], data["image"])
    if source == TOY[0]:
        check_rows(data, 1.0)


def test_world_model_gets_better(project):
    image = metric(project[0] / "source", "world_model/image")
    assert np.isfinite(image).all() and image[-1] < 0.9 * image[0]


def test_adaptation_records_the_target_without_rewards(project):
    folder, _, target = project
    with np.load(folder / "adapted" / "dataset.npz") as npz:
        assert set(npz.files) == {"image", "vector", "action", "is_first", "is_last", "is_terminal"}
    sizes = sizes_of(folder / "source" / "draw.pt")
    data = load_dataset(folder / "adapted" / "dataset.npz", sizes)
    assert len(data["action"]) == 400 and np.abs(data["action"]).mean() > 0.1
    assert np.abs(data["action"]).max() <= 1
    assert data["is_first"].sum() >= 2 * 200 / 51
    if target == TOY[1]:
        check_rows(data, -1.0)


def test_adaptation_lowers_the_kl(project):
    folder = project[0] / "adapted"
    train, held_out = metric(folder, "adapt/kl_train"), metric(folder, "adapt/kl_held-out")
    assert len(train) == len(held_out) == 4 and train[-1] < 0.9 * train[0]
    best, last = (
        load_checkpoint(folder / name, ("redraw_adapt",)) for name in ("best.pt", "last.pt")
    )
    assert best["updates"] == 20 * int(np.argmin(held_out)) and last["updates"] == 60
    result = json.loads((folder / "result.json").read_text())
    assert result["KL held-out"]["rectified"] == pytest.approx(min(held_out), rel=1e-4)
    assert result["KL held-out"]["source"] > 0 and "NO VERDICT" not in result["verdicts"][0]


def test_policy_is_saved_and_evaluated(project):
    folder, *ids = project
    results = json.loads((folder / "policy" / "eval.json").read_text())
    assert set(results) == set(ids)
    for env_id in ids:
        mean, returns = results[env_id]["mean"], results[env_id]["returns"]
        assert len(returns) == 2 and mean == pytest.approx(np.mean(returns))
        logged = metric(folder / "policy", f"eval/{env_id}")
        assert logged == pytest.approx([mean], rel=1e-4, abs=1e-4)
    assert len(list((folder / "policy").glob("*.gif"))) == 2
    assert len(metric(folder / "policy", "policy/return")) == 4
    data = load_dataset(folder / "adapted" / "dataset.npz", sizes_of(folder / "source" / "draw.pt"))
    actions = load_policy(folder / "policy" / "policy.pt")(data["image"][:3], data["vector"][:3])
    assert actions.shape == (3, data["action"].shape[1])


def test_no_temporary_files_are_left(project):
    assert [p for p in project[0].rglob(".*")] == []


@pytest.mark.parametrize("name, C, V", [("Stack", 9, 2), ("GreyImages", 1, 0), ("Images", 3, 0)])
def test_any_observations(tmp_path, name, C, V):
    """One channel, three, nine, and no vector, through all stages and the dataset reader"""
    three_stages(call_stage, tmp_path, f"toy_env:Toy{name}-v0", f"toy_env:Toy{name}Reversed-v0")
    sizes = sizes_of(tmp_path / "source" / "draw.pt")
    assert (sizes.channels, sizes.vector_size) == (C, V)
    for path in ("source/replay", "adapted/dataset.npz"):
        data = load_dataset(tmp_path / path, sizes)
        assert data["image"].shape[1:] == (16, 16, C) and data["vector"].shape[1:] == (V,)
    assert load_policy(tmp_path / "policy" / "policy.pt").sizes == sizes
    for film in ("source/prediction.gif", "source/disagreement.gif", "adapted/prediction.gif"):
        assert (tmp_path / film).exists()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an untrained draw.pt for the toy environment, and data.npz"""
    folder = tmp_path_factory.mktemp("files")
    save_tiny_draw(folder / "draw.pt")
    save_dataset(folder / "data.npz", random_rows(60))
    return folder


@pytest.mark.parametrize("method", ["replace", "finetune", "lowrank", "none"])
def test_baselines(files, tmp_path, method):
    given = f"--dataset {files}/data.npz --checkpoint {files}/draw.pt"
    call(redraw_adapt, *ADAPT, given, f"--run-dir {tmp_path}/adapted --method {method}")
    train = metric(tmp_path / "adapted", "adapt/kl_train")
    assert train[-1] < 0.95 * train[0] if method != "none" else len(train) == 1
    given = f"--dataset {files}/data.npz --checkpoint {tmp_path}/adapted/last.pt"
    call(train_policy, *POLICY, given, f"--run-dir {tmp_path}/policy --warm-start both")
    assert load_policy(tmp_path / "policy" / "policy.pt").sizes == TINY


@pytest.mark.parametrize("warm, parts", [("none", ()), ("critic", (1,)), ("both", (0, 1))])
@pytest.mark.parametrize("stage", ["draw_pretrain", "redraw_adapt"])
def test_warm_start(files, tmp_path, warm, parts, stage):
    """A policy begins with the source's critic, or with critic and actor."""
    source = load_checkpoint(files / "draw.pt", ("draw_pretrain",))
    nets = [source["task_actor"], source["task_critic"]]
    if stage == "redraw_adapt":
        source = {**source, "source_actor": nets[0], "source_critic": nets[1], "stage": stage}
    args = train_policy.Args("", "", warm_start=warm)
    policy = train_policy.begin_policy(args, source, TINY)
    for i, net in enumerate((policy.actor, policy.critic)):
        names = [n for n, w in net.state_dict().items() if not torch.equal(w, nets[i][n])]
        assert (names == []) == (i in parts)
    slow = policy.slow_critic.state_dict()
    assert all(torch.equal(w, slow[name]) for name, w in policy.critic.state_dict().items())


def test_runs_repeat_with_their_seed(tmp_path):
    def weights(seed, run_dir):
        flags = f"--steps 440 --policy-start 2 --env-id {TOY[0]}"
        call(draw_pretrain, *PRETRAIN, flags, f"--seed {seed} --run-dir {tmp_path}/{run_dir}")
        checkpoint = load_checkpoint(tmp_path / run_dir / "draw.pt", ("draw_pretrain",))
        parts = [checkpoint[part] for part in ("draw", "task_actor", "explore_actor")]
        return torch.cat([w.flatten() for part in parts for w in part.values()])

    first, again, other = weights(1, "a"), weights(1, "b"), weights(2, "c")
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_a_packed_model_is_evaluated_as_it_is(files, tmp_path):
    """docs/pretrained/: stage 3's policy in stage 1's model, half precision, without a dataset"""
    pack = runpy.run_path(str(ROOT / "docs/pretrained/pack.py"))["main"]
    draw = f"--checkpoint {files}/draw.pt"
    call(train_policy, *POLICY, draw, f"--dataset {files}/data.npz --run-dir {tmp_path}/policy")
    packed = tmp_path / "packed.pt"
    pack(files / "draw.pt", packed)
    own, first = (load_checkpoint(f, ("draw_pretrain",)) for f in (packed, files / "draw.pt"))
    assert all(torch.equal(w, first["task_actor"][k].half()) for k, w in own["task_actor"].items())
    pack(files / "draw.pt", packed, tmp_path / "policy")
    assert load_checkpoint(packed, ("draw_pretrain",))["draw"]["initial_logits"].dtype == torch.half
    given = f"--checkpoint {packed} --updates 0 --warm-start both --run-dir {tmp_path}/as-it-is"
    call(train_policy, *POLICY, given, f"--eval-env-ids {TOY[0]} {TOY[1]}")
    assert set(json.loads((tmp_path / "as-it-is/eval.json").read_text())) == set(TOY)
    before = load_policy(tmp_path / "policy/policy.pt").state_dict()
    after = load_policy(tmp_path / "as-it-is/policy.pt").state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.allclose(weight, after[name], rtol=1e-3, atol=1e-4), name


def test_a_round_lets_f_and_the_policy_learn_on(monkeypatch, files, tmp_path):
    """docs/pretrained/rounds.py: f and the initial state change, the encoder does not, and the
    policy is another one. What is finished is not made again; the next round goes on from there."""
    rounds = runpy.run_path(str(ROOT / "docs/pretrained/rounds.py"))["main"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/support"))  # where the toy is
    source, out = tmp_path / "source.pt", tmp_path / "better.pt"
    contents = load_checkpoint(files / "draw.pt", ("draw_pretrain",))
    names = ("image error", "vector error", "posterior entropy")
    contents["source_range"] = {"kl": 99.0} | {name: [0.0, 1.0, 2.0] for name in names}
    save_checkpoint(source, **contents)
    small = {"rounds": 1, "rows": 600, "updates": 30, "policy_updates": 2}
    rounds(source, TOY[0], out, **small)
    before, after = (load_checkpoint(f, ("draw_pretrain",)) for f in (source, out))
    for name, weight in before["draw"].items():
        learns = name.startswith("dynamics_net.") and weight.dim() == 2 or name == "initial_logits"
        same = torch.equal(weight.half(), after["draw"][name])
        if learns or not name.startswith("dynamics_net."):  # half precision may hide a bias's step
            assert same != learns, name
    for part in ("task_actor", "task_critic"):
        assert any((w.half() != after[part][k]).any() for k, w in before[part].items())
    first = tmp_path / "better-round-1/f"
    kl = json.loads((first / "result.json").read_text())["KL held-out"]["rectified"]
    assert after["source_range"]["kl"] == kl
    written = (first / "result.json").stat().st_mtime_ns
    rounds(source, TOY[0], out, **(small | {"rounds": 2}))
    assert (first / "result.json").stat().st_mtime_ns == written
    second = tmp_path / "better-round-2/f"
    rows = [np.load(folder / "dataset.npz")["action"] for folder in (first, second)]
    assert len(rows[1]) == 2 * len(rows[0]) and (rows[1][: len(rows[0])] == rows[0]).all()
    began = json.loads((second / "args.json").read_text())["checkpoint"]
    assert began == str(tmp_path / "better-round-1/model.pt")
    assert out.read_bytes() == (tmp_path / "better-round-2/model.pt").read_bytes()
    pack = runpy.run_path(str(ROOT / "docs/pretrained/pack.py"))["main"]
    given = f"--checkpoint {files}/draw.pt --dataset {files}/data.npz --method none"
    call(redraw_adapt, *ADAPT, f"{given} --run-dir {tmp_path}/none")
    with user_error("finetune"):
        pack(files / "draw.pt", out, finetuned=tmp_path / "none/best.pt")


def test_recording_adds_to_a_dataset(files, tmp_path):
    """In rounds: what was recorded before comes first, and --resume does not record again."""
    given = f"--checkpoint {files}/draw.pt --target-env-id {TOY[1]} --updates 1"
    call(redraw_adapt, *ADAPT, f"{given} --run-dir {tmp_path}/one")
    old = dict(np.load(tmp_path / "one/dataset.npz"))
    n = len(old["action"])
    again = [*ADAPT, f"{given} --dataset {tmp_path}/one/dataset.npz"]
    call(redraw_adapt, *again, f"--run-dir {tmp_path}/two --seed 2")
    both = dict(np.load(tmp_path / "two/dataset.npz"))
    assert len(both["action"]) == 2 * n and both["is_first"][n]
    assert all((both[key][:n] == old[key]).all() for key in old)
    assert (both["action"][n:] != old["action"]).any()
    written = (tmp_path / "two/dataset.npz").stat().st_mtime_ns
    call(redraw_adapt, *again, f"--run-dir {tmp_path}/two --seed 2 --resume")
    assert (tmp_path / "two/dataset.npz").stat().st_mtime_ns == written
    with user_error("another --run-dir"):
        call(redraw_adapt, *again, f"--run-dir {tmp_path}/one --overwrite")
    assert len(np.load(tmp_path / "one/dataset.npz")["action"]) == n


@pytest.mark.parametrize("policy", ["random", "explore", "a checkpoint"])
def test_policies_that_collect(files, tmp_path, policy):
    draw = f"--checkpoint {files}/draw.pt"
    if policy == "a checkpoint":
        given = f"--dataset {files}/data.npz --run-dir {tmp_path}/policy"
        call(train_policy, *POLICY, draw, given)
        policy = tmp_path / "policy" / "policy.pt"
    flags = f"--target-env-id {TOY[1]} --collect-policy {policy} --updates 1"
    call(redraw_adapt, *ADAPT, draw, flags, f"--run-dir {tmp_path}/adapted")
    data = load_dataset(tmp_path / "adapted" / "dataset.npz", TINY)
    assert data["action"].std() > 0.1
    check_rows(data, -1.0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick(script):
    start = time.time()
    command = [sys.executable, "-X", "importtime", str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and time.time() - start < 60
    assert "laptop" in done.stdout and "paper" in done.stdout
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    # The slow ones wait until they are needed.
    assert "torch" in imported and not imported & {"dm_control", "mujoco", "tensorboard"}


@pytest.mark.parametrize(
    "script, name", list(zip(SCRIPTS, ("source", "adapted", "policy"), strict=True))
)
def test_a_run_is_not_overwritten_by_accident(toy, tmp_path, script, name):
    run_dir = tmp_path / "run"
    shutil.copytree(toy / name, run_dir)
    flags = {
        "draw_pretrain": [*PRETRAIN, f"--steps 440 --env-id {TOY[0]}"],
        "redraw_adapt": [*ADAPT, f"--checkpoint {toy}/source/draw.pt --target-env-id {TOY[1]}"],
        "train_policy": [
            *POLICY,
            f"--checkpoint {toy}/adapted/best.pt --dataset {toy}/adapted/dataset.npz",
        ],
    }[script]
    old = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    with user_error(str(run_dir), "--overwrite"):
        call(MODULES[script], *flags, f"--run-dir {run_dir}")
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == old
    call(MODULES[script], *flags, f"--run-dir {run_dir} --overwrite")
    assert (run_dir / "args.json").stat().st_mtime_ns > old[run_dir / "args.json"]
    if script == "draw_pretrain":  # no rows of the old run are left
        assert len(read_replay(run_dir / "replay")["reward"]) == 440
