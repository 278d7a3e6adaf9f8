"""Runs that are killed, interrupted, out of disk or diverging: what was saved is never lost, and a resumed run ends where an undisturbed one does."""

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
from helpers import TINY, random_states, save_tiny_draw
from test_pipeline import ADAPT, POLICY, PRETRAIN, call
from tqdm import tqdm

import draw_pretrain
import redraw_adapt
import train_policy
from common import DRAW, load_checkpoint, load_dataset

KILLS = 15
STAGES = "draw_pretrain", "redraw_adapt", "train_policy"
RESULT = {"draw_pretrain": "draw.pt", "redraw_adapt": "last.pt", "train_policy": "policy.pt"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """stage -> (module, flags), on the toy environment, long enough to be killed in"""
    folder = tmp_path_factory.mktemp("inputs")
    draw = save_tiny_draw(folder / "draw.pt")
    data = folder / "data"
    call(redraw_adapt, *ADAPT, "--checkpoint", draw, "--target-env-id", "toy_env:ToyReversed-v0", "--run-dir", data)
    return {
        "draw_pretrain": (draw_pretrain, [*PRETRAIN, "--env-id", "toy_env:Toy-v0", "--n-envs", 1, "--steps", 1200, "--replay-size", 500, "--save-every", 100]),
        "redraw_adapt": (redraw_adapt, [*ADAPT, "--checkpoint", draw, "--target-env-id", "toy_env:ToyReversed-v0", "--updates", 400, "--save-every", 40]),
        "train_policy": (train_policy, [*POLICY, "--checkpoint", draw, "--dataset", data / "dataset.npz", "--updates", 300, "--save-every", 30,
                                        "--eval-env-ids", "toy_env:Toy-v0"]),
    }  # fmt: skip


def start(module, flags, run_dir, limit=None, log=os.devnull):
    """The stage in a process of its own, forked, so that the imports cost nothing"""

    def child():
        os.setsid()
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forked processes, and one that is killed would keep it
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            call(module, *flags, "--run-dir", run_dir)
        except SystemExit as e:
            print(e.code if isinstance(e.code, str) else "", file=sys.stderr)
            sys.stderr.flush()
            os._exit(e.code if isinstance(e.code, int) else 1)
        sys.stderr.flush()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def arrays(path):
    """Every number in a checkpoint, in order"""
    found, todo = [], [torch.load(path, weights_only=True)]
    while todo:
        item = todo.pop()
        if torch.is_tensor(item):
            found.append(item.double().numpy())
        elif isinstance(item, dict):
            todo += [v for k, v in sorted(item.items(), key=lambda kv: str(kv[0])) if k not in ("args", "source_args", "rng")]
        elif isinstance(item, (list, tuple)):
            todo += item
    return found


def assert_same(stage, one, two):
    """The results of two runs: logs, weights, data"""
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
    for name in (RESULT[stage], "state.pt"):
        a, b = arrays(one / name), arrays(two / name)
        assert len(a) == len(b) > 5 and all(np.array_equal(x, y) for x, y in zip(a, b)), name
    for data in ("replay", "dataset.npz"):
        if (one / data).exists():
            a, b = load_dataset(one / data), load_dataset(two / data)
            assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module", autouse=True)
def small_files():
    """so that the replay is more than one, some of them full"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_pretrain, "ROWS_PER_FILE", 150)
        yield


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """stage -> (folder of a run that nothing happened to, its seconds)"""
    runs = {}
    for stage, (module, stage_flags) in flags.items():
        folder, begun = tmp_path_factory.mktemp("undisturbed") / "run", time.monotonic()
        process = start(module, stage_flags, folder)
        process.join(120)
        assert process.exitcode == 0
        runs[stage] = folder, time.monotonic() - begun
    return runs


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_equals_undisturbed(stage, flags, undisturbed, tmp_path):
    module, stage_flags = flags[stage]
    (calm, seconds), run_dir, rng = undisturbed[stage], tmp_path / "run", random.Random(0)
    update, kills, moved, interval = 0, 0, 0, stage_flags[stage_flags.index("--save-every") + 1]
    while kills < KILLS:
        process = start(module, [*stage_flags, "--resume"], run_dir)
        time.sleep(rng.uniform(0.05, 0.6) * seconds if moved < 3 else rng.uniform(0.02, 0.2) * seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0 and kills < KILLS:  # it had ended before: anew
            shutil.rmtree(run_dir)
            update = 0
        elif (run_dir / "state.pt").exists():
            state = load_checkpoint(run_dir / "state.pt", ("state",))
            now = state["update"]
            assert now >= update  # what was saved stays saved
            logged = [int(line.split(",")[0]) for line in (run_dir / "metrics.csv").read_text().splitlines()[1:] if line.count(",") == 2]
            lost = max(logged, default=0) - now  # updates that had been logged and must be made again
            assert lost <= (interval if stage != "draw_pretrain" else interval // 4)  # there it is counted in steps, four an update
            moved += now > update
            update = now
        for name in (RESULT[stage], "best.pt"):
            if (run_dir / name).exists():
                load_checkpoint(run_dir / name, (stage,))
    assert moved >= 2  # killed on the way, not only before the first save
    process = start(module, [*stage_flags, "--resume"], run_dir)
    process.join(120)
    assert process.exitcode == 0
    assert_same(stage, calm, run_dir)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_the_middle_of_a_save(stage, flags, undisturbed, tmp_path, monkeypatch):
    """At the 1st, 2nd, ... time that a file is about to get its name, and with half of the file written"""
    module, stage_flags = flags[stage]
    run_dir, replace = tmp_path / "run", os.replace
    for nth in (3, 1, 2, 5, 4):
        count = iter(range(1, 1000))

        def killer(temporary, path):
            if next(count) == nth:
                size = os.path.getsize(temporary)
                os.truncate(temporary, size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(temporary, path)

        monkeypatch.setattr(os, "replace", killer)
        process = start(module, [*stage_flags, "--resume"], run_dir)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        monkeypatch.undo()
    process = start(module, [*stage_flags, "--resume"], run_dir)
    process.join(120)
    assert process.exitcode == 0
    assert not list(run_dir.rglob(".*.part"))
    assert_same(stage, undisturbed[stage][0], run_dir)


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_saves_and_goes_on(stage, flags, undisturbed, tmp_path):
    module, stage_flags = flags[stage]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(module, stage_flags, run_dir, log=log)
    while not (run_dir / "state.pt").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    text = log.read_text()
    assert "--resume" in text and "Traceback" not in text
    saved = load_checkpoint(run_dir / "state.pt", ("state",))["update"]
    process = start(module, [*stage_flags, "--resume"], run_dir)
    process.join(120)
    assert process.exitcode == 0 and (run_dir / RESULT[stage]).exists()
    assert load_checkpoint(run_dir / "state.pt", ("state",))["update"] > saved
    if stage != "draw_pretrain":  # there a save ends the running episodes, so one more save changes what comes
        assert_same(stage, undisturbed[stage][0], run_dir)


@pytest.mark.parametrize("stage", STAGES)
def test_full_disk_leaves_the_last_good_files(stage, flags, tmp_path):
    """A limit on the size of files stands for the full disk: writing past it fails in the same call."""
    module, stage_flags = flags[stage]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(module, stage_flags, run_dir)
    while not (run_dir / "state.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    before = {p: p.read_bytes() for p in run_dir.rglob("*.pt")}
    process = start(module, [*stage_flags, "--resume"], run_dir, limit=10_000, log=log)
    process.join(60)
    lines = [line for line in log.read_text().replace("\r", "\n").splitlines() if "error:" in line]
    assert process.exitcode == 1 and len(lines) == 1 and "can't write" in lines[0] and "Traceback" not in log.read_text()
    assert {p: p.read_bytes() for p in run_dir.rglob("*.pt")} == before


def test_full_disk_for_real(flags, tmp_path):
    """The same on a file system of 600 kB, where the logs may be what does not fit"""
    module, stage_flags = flags["draw_pretrain"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        log = tmp_path / "log"
        process = start(module, stage_flags, disk / "run", log=log)
        process.join(60)
        assert process.exitcode == 1 and "Traceback" not in log.read_text()
        assert [line for line in log.read_text().replace("\r", "\n").splitlines() if "error: can't write" in line]
        for path in (disk / "run").glob("*.pt"):
            torch.load(path, weights_only=True)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_same_metrics(stage, flags, undisturbed, tmp_path):
    module, stage_flags = flags[stage]
    for seed, equal in ((1, True), (2, False)):
        process = start(module, [*stage_flags, "--seed", seed], tmp_path / str(seed))
        process.join(120)
        assert ((tmp_path / str(seed) / "metrics.csv").read_text() == (undisturbed[stage][0] / "metrics.csv").read_text()) == equal


def test_resume_wants_the_flags_of_the_start(flags, undisturbed, tmp_path):
    module, stage_flags = flags["redraw_adapt"]
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed["redraw_adapt"][0], run_dir)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match="hidden was 16, now it is 32"):
        call(module, *stage_flags, "--hidden", 32, "--resume", "--run-dir", run_dir)
    with pytest.raises(SystemExit, match="not both"):
        call(module, *stage_flags, "--overwrite", "--resume", "--run-dir", run_dir)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "stage, part, term", [("draw_pretrain", "kl_categorical", "kl"), ("redraw_adapt", "kl_categorical", "kl"), ("train_policy", "twohot_log_prob", "critic")]
)
def test_divergence_names_the_term_and_keeps_the_weights_before(stage, part, term, flags, tmp_path, monkeypatch):
    module, stage_flags = flags[stage]
    plain, calls = getattr(module, part), iter(range(10**9))
    monkeypatch.setattr(module, part, lambda *args: plain(*args) * (torch.nan if next(calls) > 99 else 1.0))
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(module, stage_flags, run_dir, log=log)
    process.join(60)
    line = [line for line in log.read_text().replace("\r", "\n").splitlines() if "error:" in line]
    assert process.exitcode == 1 and len(line) == 1 and "not finite" in line[0] and "diverged.pt" in line[0]
    diverged = torch.load(run_dir / "diverged.pt", weights_only=True)
    assert diverged["update"] > 5 and any(term in t for t in diverged["terms"]) and all(t in line[0] for t in diverged["terms"])
    assert all(np.isfinite(a).all() for a in arrays(run_dir / "diverged.pt"))  # the step that would have spoilt them was not taken


def test_an_actor_critic_that_diverges_takes_no_step(monkeypatch):
    draw, args = DRAW(TINY).requires_grad_(False), draw_pretrain.PRESETS["laptop"][1]
    actor_critic = draw_pretrain.ActorCritic(TINY, args, "reinforce", 1.0, "cpu")
    z, sigma, _ = random_states(8)
    before = [p.clone() for p in actor_critic.actor.parameters()]

    def check(terms, batch):
        assert set(batch) == {"z", "sigma", "weight"} and torch.isnan(terms["reward"]).any()
        raise SystemExit("stopped")

    with pytest.raises(SystemExit, match="stopped"):
        actor_critic.update(draw, z, sigma, torch.ones(8), lambda z, sigma, action, z_next: torch.full(action.shape[:2], torch.nan), check)
    assert all(torch.equal(p, q) for p, q in zip(before, actor_critic.actor.parameters())) and torch.isfinite(actor_critic.scale)


@pytest.mark.parametrize("there", [["my thesis.txt"], ["args.json", "draw.pt"], ["metrics.csv"]])
def test_resume_does_not_touch_what_is_no_run_of_its_own(flags, tmp_path, there):
    module, stage_flags = flags["draw_pretrain"]
    for name in there:
        (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit, match="holds files already"):
        call(module, *stage_flags, "--resume", "--run-dir", tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "{}" for name in there}


def test_resume_notices_another_checkpoint(flags, undisturbed, tmp_path):
    module, stage_flags = flags["train_policy"]
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed["train_policy"][0], run_dir)
    torch.manual_seed(5)
    other = save_tiny_draw(tmp_path / "draw.pt")  # of the same name and size, other weights
    at = stage_flags.index("--checkpoint") + 1
    started = (run_dir / "args.json").read_text()
    (run_dir / "args.json").write_text(started.replace(str(stage_flags[at]), other))
    with pytest.raises(SystemExit, match="check sum of the inputs was"):
        call(module, *stage_flags[:at], other, *stage_flags[at + 1 :], "--resume", "--run-dir", run_dir)


def test_rows_of_a_save_that_was_cut_short_are_written_anew(tmp_path):
    """Killed between the replay's files and the state: the run goes on from the older state, maybe with other rows."""

    def add(replay, value, n):
        for _ in range(n):
            flags = {k: np.zeros(1, bool) for k in ("is_first", "is_last", "is_terminal")}
            replay.add(image=np.zeros((1, 16, 16, 3)), vector=np.full((1, 2), value), action=np.zeros((1, 1)), reward=np.zeros(1), **flags)

    replay = draw_pretrain.Replay(1000, 1, TINY)
    add(replay, 1.0, 140)
    names = replay.save(tmp_path)
    add(replay, 2.0, 20)
    replay.save(tmp_path)  # fills the first file of 150 rows; then the power fails
    replay = draw_pretrain.Replay(1000, 1, TINY)
    replay.load(tmp_path, names, added=140)
    add(replay, 3.0, 20)
    replay.save(tmp_path)
    assert load_dataset(tmp_path)["vector"][:, 0].tolist() == [1.0] * 140 + [3.0] * 20


def test_open_loop_of_a_single_frame():
    """as in a replay whose episodes have one row"""
    draw = DRAW(TINY)
    z, _, action = random_states(3)
    assert torch.equal(draw_pretrain.open_loop(draw, z, action[:, None][:, :0]), z[:, None])
