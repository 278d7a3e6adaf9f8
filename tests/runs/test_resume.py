"""Runs that are killed, interrupted, out of disk or diverging: what was saved is never lost, and a
resumed run of stage 2 or 3 ends where an undisturbed one does, bit for bit. (A resumed stage 1
begins new episodes, so it ends elsewhere.)"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from helpers import TINY, random_rows, read_metrics, read_replay, save_tiny_draw, user_error
from stages import ADAPT, POLICY, PRETRAIN, SCRIPTS, TOY, call
from tqdm import tqdm

import draw_pretrain
import redraw_adapt
import train_policy
from common import Run, load_checkpoint, load_dataset, save_dataset

KILLS = 5
RESULT = {"draw_pretrain": "draw.pt", "redraw_adapt": "last.pt", "train_policy": "policy.pt"}
EVERY = {"draw_pretrain": 100, "redraw_adapt": 40, "train_policy": 30}  # --save-every


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """stage -> (module, flags), on the toy environment, long enough to be killed in"""
    folder = tmp_path_factory.mktemp("inputs")
    draw = save_tiny_draw(folder / "draw.pt")
    save_dataset(folder / "data.npz", random_rows(200))
    saves = {stage: f"--save-every {every}" for stage, every in EVERY.items()}
    source = f"--env-id {TOY[0]} --n-envs 1 --steps 1000 --train-every 8 --replay-size 300"
    target = f"--checkpoint {draw} --target-env-id {TOY[1]} --updates 300"
    lookahead = f"--checkpoint {draw} --dataset {folder}/data.npz --updates 200 --learn lookahead"
    return {
        "draw_pretrain": (draw_pretrain, [*PRETRAIN, source, saves["draw_pretrain"]]),
        "redraw_adapt": (redraw_adapt, [*ADAPT, target, saves["redraw_adapt"]]),
        "train_policy": (
            train_policy,
            [*POLICY, lookahead, "--restart 0.5 --decay", saves["train_policy"]],
        ),
    }


def start(module, flags, run_dir, limit=None, log=os.devnull):
    """The stage in a process of its own, forked, so that the imports cost nothing. On the CPU: a
    forked process can't use a GPU, and runs are equal bit for bit on a CPU alone."""

    def child():
        os.setsid()
        tqdm.set_lock(
            threading.RLock()
        )  # tqdm's own is shared with forked processes, and one that is killed would keep it
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            call(module, *flags, "--device", "cpu", "--run-dir", run_dir)
        except SystemExit as e:
            print(e.code if isinstance(e.code, str) else "", file=sys.stderr)
            sys.stderr.flush()
            os._exit(e.code if isinstance(e.code, int) else 1)
        sys.stderr.flush()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def wait_for(process, happened):
    """until happened(); the process must live as long"""
    while not happened():
        assert process.is_alive()
        time.sleep(0.01)


def arrays(path):
    """Every number in a checkpoint, in order"""
    found = []
    todo = [torch.load(path, weights_only=True)]
    while todo:
        item = todo.pop()
        if torch.is_tensor(item):
            found.append(item.double().numpy())
        elif isinstance(item, dict):
            todo += [item[key] for key in sorted(item, key=str) if key != "args"]
        elif isinstance(item, (list, tuple)):
            todo += item
    return found


def assert_same(stage, one, two):
    """The results of two runs: logs, weights, data"""
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
    for name in (RESULT[stage], "state.pt"):
        a, b = arrays(one / name), arrays(two / name)
        assert len(a) == len(b) > 5, name
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), name
    if (one / "dataset.npz").exists():
        a, b = (load_dataset(folder / "dataset.npz", TINY) for folder in (one, two))
        assert all(np.array_equal(a[key], b[key]) for key in a)


def assert_whole(stage, calm, run_dir):
    """The run came to its end; stages 2 and 3 as if nothing had happened."""
    if stage != "draw_pretrain":
        assert_same(stage, calm, run_dir)
        return
    a, b = (load_checkpoint(folder / "draw.pt", (stage,)) for folder in (calm, run_dir))
    assert a["updates"] == b["updates"] and b["source_range"]
    rows = read_replay(run_dir / "replay")
    assert len(rows["reward"]) >= 300  # as many as the ring holds
    # Rows of an episode that a kill cut are followed by a first one.
    moved, action, first = rows["vector"][1:, 0], rows["action"][:-1, 0], rows["is_first"][1:]
    assert np.allclose(moved[~first], 0.2 * action[~first], atol=1e-5)
    logged = [
        int(line.split(",")[0]) for line in (run_dir / "metrics.csv").open() if line[0] != "s"
    ]
    assert logged == sorted(logged) and logged[-1] == b["updates"]


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """stage -> (folder of a run that nothing happened to, its seconds)"""
    runs = {}
    for stage, (module, stage_flags) in flags.items():
        folder, begun = tmp_path_factory.mktemp("undisturbed") / "run", time.monotonic()
        process = start(module, stage_flags, folder)
        process.join(600)
        assert process.exitcode == 0
        runs[stage] = folder, time.monotonic() - begun
    return runs


@pytest.mark.parametrize("stage", SCRIPTS)
def test_killed_and_resumed_equals_undisturbed(stage, flags, undisturbed, tmp_path):
    module, stage_flags = flags[stage]
    (calm, seconds), run_dir, rng = undisturbed[stage], tmp_path / "run", random.Random(0)
    saved, kills, moved = 0, 0, 0
    while kills < KILLS or (moved < 1 and kills < 4 * KILLS):
        process = start(module, [*stage_flags, "--resume"], run_dir)
        longest = 0.9 if moved < 2 else 0.2
        time.sleep(rng.uniform(0.05, longest) * seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0 and kills < KILLS:  # it had ended before: anew
            shutil.rmtree(run_dir)
            saved = 0
        elif (run_dir / "state.pt").exists():
            state = load_checkpoint(run_dir / "state.pt", ("state",))
            now = state["updates" if stage == "draw_pretrain" else "update"]
            assert now >= saved  # what was saved stays saved
            lines = (run_dir / "metrics.csv").read_text().splitlines()[1:]
            logged = [int(line.split(",")[0]) for line in lines if line.count(",") == 2]
            # Updates that had been logged and must be made again; stage 1 makes one in 8 steps.
            every = EVERY[stage] // (8 if stage == "draw_pretrain" else 1)
            assert max(logged, default=0) - now <= every
            moved += now > saved
            saved = now
        for name in (RESULT[stage], "best.pt"):
            if (run_dir / name).exists():
                load_checkpoint(run_dir / name, (stage,))
    assert moved >= 1  # killed on the way, not only before the first save
    process = start(module, [*stage_flags, "--resume"], run_dir)
    process.join(600)
    assert process.exitcode == 0
    assert_whole(stage, calm, run_dir)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_killed_in_the_middle_of_a_save(stage, flags, undisturbed, tmp_path, monkeypatch):
    """At the 1st, 2nd, ... time that a file is about to get its name, and with half of the file
    written"""
    module, stage_flags = flags[stage]
    run_dir, replace = tmp_path / "run", os.replace

    def kill_at(nth):
        count = iter(range(1, 1000))

        def killer(temporary, path):
            if next(count) == nth:
                os.truncate(temporary, os.path.getsize(temporary) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(temporary, path)

        return killer

    for nth in (2, 4):
        monkeypatch.setattr(os, "replace", kill_at(nth))
        process = start(module, [*stage_flags, "--resume"], run_dir)
        process.join(600)
        assert process.exitcode == -signal.SIGKILL
        monkeypatch.undo()
    process = start(module, [*stage_flags, "--resume"], run_dir)
    process.join(600)
    assert process.exitcode == 0
    assert not list(run_dir.rglob(".*.part"))
    assert_whole(stage, undisturbed[stage][0], run_dir)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_ctrl_c_saves_and_goes_on(stage, flags, undisturbed, tmp_path):
    module, stage_flags = flags[stage]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(module, stage_flags, run_dir, log=log)
    wait_for(process, (run_dir / "state.pt").exists)
    os.kill(process.pid, signal.SIGINT)
    process.join(600)
    assert process.exitcode == 130
    text = log.read_text()
    assert "--resume" in text and "Traceback" not in text
    saved = load_checkpoint(run_dir / "state.pt", ("state",))["step"]
    process = start(module, [*stage_flags, "--resume"], run_dir)
    process.join(600)
    assert process.exitcode == 0 and (run_dir / RESULT[stage]).exists()
    assert load_checkpoint(run_dir / "state.pt", ("state",))["step"] > saved
    if stage == "draw_pretrain":
        assert_whole(stage, undisturbed[stage][0], run_dir)
    else:  # one more save seeds anew once more, so other numbers come
        whole, other = (arrays(d / RESULT[stage]) for d in (undisturbed[stage][0], run_dir))
        assert [x.shape for x in whole] == [x.shape for x in other]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_full_disk_leaves_the_last_good_files(stage, flags, tmp_path):
    """A limit on the size of files stands for the full disk: writing past it fails in the same
    call."""
    module, stage_flags = flags[stage]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(module, stage_flags, run_dir)
    wait_for(process, (run_dir / "state.pt").exists)
    process.kill()
    process.join()
    before = {p: p.read_bytes() for p in run_dir.rglob("*.pt")}
    process = start(module, [*stage_flags, "--resume"], run_dir, limit=10_000, log=log)
    process.join(600)
    lines = [line for line in log.read_text().replace("\r", "\n").splitlines() if "error:" in line]
    assert (
        process.exitcode == 1
        and len(lines) == 1
        and "can't write" in lines[0]
        and "Traceback" not in log.read_text()
    )
    assert {p: p.read_bytes() for p in run_dir.rglob("*.pt")} == before


def test_full_disk_for_real(flags, tmp_path):
    """The same on a file system of 600 kB, where the logs may be what does not fit"""
    module, stage_flags = flags["draw_pretrain"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("can't mount a tmpfs here")
    try:
        log = tmp_path / "log"
        process = start(module, stage_flags, disk / "run", log=log)
        process.join(600)
        assert process.exitcode == 1 and "Traceback" not in log.read_text()
        assert [
            line
            for line in log.read_text().replace("\r", "\n").splitlines()
            if "error: can't write" in line
        ]
        for path in (disk / "run").glob("*.pt"):
            torch.load(path, weights_only=True)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_finished_stage_2_goes_on_with_more_updates(flags, tmp_path):
    """It ends like a run that had all updates from the start and saved at the same place."""
    module, flags_of = flags["redraw_adapt"]

    def run(folder, updates, more=""):
        data = f"--dataset {tmp_path}/data.npz --save-every 40 --log-every 20"
        more += f" --run-dir {tmp_path}/{folder} --updates {updates} --resume"
        call(module, *ADAPT, *flags_of[-2].split()[:2], data, more)

    save_dataset(tmp_path / "data.npz", random_rows(200))
    run("long", 120)
    run("extended", 80)
    run("extended", 120)
    assert_same("redraw_adapt", tmp_path / "long", tmp_path / "extended")
    assert json.loads((tmp_path / "extended/args.json").read_text())["updates"] == 120
    with user_error("has made 120 updates already, more than --updates 80"):
        run("extended", 80)
    with user_error("inputs was za, now it is za+sigma"):
        run("extended", 120, "--inputs za+sigma")
    assert_same("redraw_adapt", tmp_path / "long", tmp_path / "extended")


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_resume_wants_the_flags_of_the_start(flags, undisturbed, tmp_path):
    module, stage_flags = flags["redraw_adapt"]
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed["redraw_adapt"][0], run_dir)
    before = contents(run_dir)
    with user_error("hidden was 16, now it is 32"):
        call(module, *stage_flags, f"--hidden 32 --resume --run-dir {run_dir}")
    with user_error("not both"):
        call(module, *stage_flags, f"--overwrite --resume --run-dir {run_dir}")
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    "stage, part, term",
    [
        ("draw_pretrain", "kl_categorical", "world_model/loss"),
        ("redraw_adapt", "kl_categorical", "adapt/kl_train"),
        ("train_policy", "twohot_log_prob", "policy/"),
    ],
)
def test_divergence_names_the_term_and_keeps_the_last_save(
    stage, part, term, flags, tmp_path, monkeypatch
):
    """At the next log line or save"""
    module, stage_flags = flags[stage]
    plain, calls = getattr(module, part), iter(range(10**9))
    after = 60 if stage == "train_policy" else 120
    if stage == "train_policy":
        after *= 6  # so many steps an update
    spoilt = lambda *args: plain(*args) * (torch.nan if next(calls) > after else 1.0)  # noqa: E731
    monkeypatch.setattr(module, part, spoilt)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(module, stage_flags, run_dir, log=log)
    process.join(600)
    lines = log.read_text().replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if "error:" in line]
    assert process.exitcode == 1 and "not finite" in line and term in line
    assert "Traceback" not in log.read_text()
    assert all(np.isfinite(a).all() for a in arrays(run_dir / "state.pt"))
    if (run_dir / RESULT[stage]).exists():
        assert all(np.isfinite(a).all() for a in arrays(run_dir / RESULT[stage]))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Where a loss was finite at every log line"""
    run = Run(tmp_path, redraw_adapt.Args("draw.pt"))
    layer = torch.nn.Linear(2, 2)
    run.save(1, {"layer": layer})
    with torch.no_grad():
        layer.weight[0, 1] = torch.inf
    with user_error("layer.weight", "not finite at 2"):
        run.save(2, {"layer": layer})
    assert load_checkpoint(tmp_path / "state.pt", ("state",))["step"] == 1
    run.close()


@pytest.mark.parametrize("there", [["my thesis.txt"], ["draw.pt"], ["metrics.csv"]])
def test_resume_does_not_touch_what_is_no_run_of_its_own(flags, tmp_path, there):
    module, stage_flags = flags["draw_pretrain"]
    for name in there:
        (tmp_path / name).write_text("{}")
    with user_error("holds files already"):
        call(module, *stage_flags, f"--resume --run-dir '{tmp_path}'")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "{}" for name in there}


def test_resume_goes_by_the_contents_of_its_inputs(flags, undisturbed, tmp_path, monkeypatch):
    """The same bytes at another path are the same inputs; other bytes at the same path are not."""
    module, stage_flags = flags["train_policy"]
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed["train_policy"][0], run_dir)
    given = json.loads((run_dir / "args.json").read_text())
    shutil.copy(given["checkpoint"], tmp_path / "moved.pt")
    shutil.copy(given["dataset"], tmp_path / "moved.npz")
    monkeypatch.chdir(tmp_path)
    moved = "--checkpoint moved.pt --dataset ./moved.npz"
    call(module, *stage_flags, f"{moved} --resume --run-dir {run_dir}")
    torch.manual_seed(5)
    save_tiny_draw(tmp_path / "moved.pt")  # of the same size, other weights
    before = contents(run_dir)
    with user_error("contents of the checkpoint or of the dataset"):
        call(module, *stage_flags, f"{moved} --resume --run-dir {run_dir}")
    assert contents(run_dir) == before


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_that_ends_before_its_first_save_leaves_nothing_of_an_older_one(
    stage, flags, undisturbed, tmp_path
):
    """else the next stage would take the older results for the new arguments'"""
    module, stage_flags = flags[stage]
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[stage][0], run_dir)
    assert (run_dir / RESULT[stage]).exists()
    process = start(module, [*stage_flags, "--seed 3 --save-every 100000 --overwrite"], run_dir)
    wait_for(process, lambda: json.loads((run_dir / "args.json").read_text())["seed"] == 3)
    process.kill()
    process.join()
    assert not list(run_dir.glob("*.pt")) and not list(run_dir.glob("replay*/*.npz"))


def test_overwriting_spares_the_inputs(flags, tmp_path):
    """A checkpoint that lies in the folder that is overwritten"""
    module, stage_flags = flags["redraw_adapt"]
    draw = save_tiny_draw(tmp_path / "draw.pt")
    (tmp_path / "old.pt").write_bytes(b"of an older run")
    flags = f"--checkpoint {draw} --updates 1 --overwrite --run-dir {tmp_path}"
    call(module, *stage_flags, flags)
    assert (tmp_path / "draw.pt").exists() and not (tmp_path / "old.pt").exists()


# ---- saves and episodes


def test_a_save_does_not_end_the_running_episodes(tmp_path):
    """With saves more frequent than a goal that lies late in an episode, its reward is seen."""
    flags = "--env-id toy_env:ToyGoal-v0 --episode-steps 60 --n-envs 2 --save-every 20"
    call(draw_pretrain, *PRETRAIN, flags, f"--run-dir {tmp_path}")
    rows = read_replay(tmp_path / "replay")
    for env in np.split(np.arange(600), 2):
        firsts = np.flatnonzero(rows["is_first"][env])
        assert firsts.tolist() == [0, 61, 122, 183, 244]  # whole episodes, whatever was saved
        assert rows["reward"][env].sum() == 4 * 11 + 6  # 11 steps of each pay, 6 of the last
        assert rows["is_last"][env].sum() == 4


def test_a_resumed_stage_1_starts_new_episodes(tmp_path):
    flags = [*PRETRAIN, f"--env-id {TOY[0]} --n-envs 1 --steps 500 --save-every 415"]
    run_dir = tmp_path / "run"
    process = start(draw_pretrain, flags, run_dir)
    wait_for(process, (run_dir / "state.pt").exists)
    process.kill()
    process.join()
    call(draw_pretrain, *flags, f"--resume --run-dir {run_dir}")
    saved = 415
    first = read_replay(run_dir / "replay")["is_first"]
    assert first[saved] and not first[saved - 3 : saved].all() and len(first) == 500
    assert sorted(p.name for p in (run_dir / "replay").iterdir()) == [
        "env000-0000000000.npz",
        "env000-0000000415.npz",
    ]
    assert len(read_metrics(run_dir)["world_model/loss"]) == 3


def test_the_baseline_of_stage_3_goes_on(tmp_path, flags, monkeypatch):
    """It imagines nothing, so it saves no place where trajectories ended."""
    module, given = flags["train_policy"]
    given = [*given, "--learn recorded --updates 6 --save-every 2 --log-every 1 --device cpu"]
    call(module, *given, "--run-dir", tmp_path / "calm")
    improve = train_policy.improve_from_rows
    calls = []

    def broken(*args):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return improve(*args)

    monkeypatch.setattr(train_policy, "improve_from_rows", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        call(module, *given, "--run-dir", tmp_path / "cut")
    call(module, *given, "--resume", "--run-dir", tmp_path / "cut")
    assert len(calls) == 4 + 4  # from update 3 on
    assert_same("train_policy", tmp_path / "calm", tmp_path / "cut")
