"""The scripts of the figures: what is done is not done again, a failure says why, and the pictures
come from the csv alone."""

import csv
import importlib
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from PIL import Image

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(FIGURES))
    return importlib.import_module("jobs")


def stage(jobs, folder, code="", name="made"):
    """A stage that runs `code` and then adds a line to folder/name"""
    path = folder / name
    return jobs.Stage(["-c", f"{code}\nopen({str(path)!r}, 'a').write('once\\n')"], path)


def lines(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_a_shared_stage_runs_once_and_a_finished_job_never_again(jobs, tmp_path, capsys):
    shared = stage(jobs, tmp_path, name="shared")
    own = [stage(jobs, tmp_path, name=f"own-{seed}") for seed in (1, 2, 3)]
    todo = [
        jobs.Job({"seed": seed}, [shared, own[seed - 1]], lambda seed=seed: {"return": 10 * seed})
        for seed in (1, 2, 3)
    ]
    table = tmp_path / "table.csv"
    jobs.run_all(table, todo[:2])
    assert lines(table)[0] == ["seed", "return"]
    assert sorted(lines(table)[1:]) == [["1", "10"], ["2", "20"]]
    assert (tmp_path / "shared").read_text() == "once\n"

    def never():
        raise AssertionError("a finished job")

    for job in todo[:2]:
        job.result = never
    jobs.run_all(table, todo)
    assert "2 of 3 runs are done, 1 to go" in capsys.readouterr().out
    assert sorted(lines(table)[1:]) == [["1", "10"], ["2", "20"], ["3", "30"]]
    for path in (tmp_path / "shared", tmp_path / "own-1", tmp_path / "own-3"):
        assert path.read_text() == "once\n"


def test_a_longer_run_goes_on_from_a_copy_of_the_shorter(jobs, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "state").write_text("3")
    short = stage(jobs, tmp_path / "short")
    copied = f"assert open({str(tmp_path / 'long' / 'state')!r}).read() == '3'"
    longer = stage(jobs, tmp_path / "long", copied)
    longer.before = short
    jobs.run_all(tmp_path / "table.csv", [jobs.Job({"seed": 1}, [short, longer], dict)])
    # Of the short run's last file there is no copy, or the long run would seem finished.
    assert (tmp_path / "long" / "made").read_text() == "once\n"


def test_an_interrupted_stage_is_not_finished(jobs, tmp_path):
    """Ctrl-C lets a stage save and draw its curves; the next call goes on with it."""
    folder = tmp_path / "run"
    stopped = "import pathlib; pathlib.Path('run/curves.png').touch(); raise SystemExit(130)"
    folder.mkdir()
    for build in (
        lambda: jobs.adapt(folder, "draw.pt"),
        lambda: jobs.train(folder, "best.pt", "data.npz", "id"),
    ):
        made = build()
        made.command = ["-c", f"import os; os.chdir({str(tmp_path)!r}); {stopped}"]
        with pytest.raises(RuntimeError):
            jobs.run_all(tmp_path / "table.csv", [jobs.Job({"seed": 1}, [made], dict)])
        assert (folder / "curves.png").exists() and not made.finished.exists()
        made.command = ["-c", ""]
        jobs.run_stage(made, {}, Lock())
        assert made.finished.exists()
        made.finished.unlink()


def test_a_stage_that_fails_ends_the_figure_with_its_last_line(jobs, tmp_path):
    fails = stage(jobs, tmp_path, "raise SystemExit('error: the disk is full')")
    job = jobs.Job({"seed": 1}, [fails], dict)
    with pytest.raises(RuntimeError, match="error: the disk is full"):
        jobs.run_all(tmp_path / "table.csv", [job])
    assert not (tmp_path / "table.csv").exists()


def test_a_policy_is_trained_with_its_pairs_flags_which_a_job_may_override(jobs, tmp_path):
    def command(env_id, *flags):
        return list(map(str, jobs.train(tmp_path, "best.pt", "data.npz", env_id, *flags).command))

    reacher = command("redraw/ReacherEasyReversed-v0", "--warm-start", "both")
    assert reacher[reacher.index("--gamma") + 1] == "0.97"
    assert reacher[-2:] == ["--warm-start", "both"]  # the last one counts
    assert "--gamma" not in command("redraw/PendulumSwingupReversed-v0")


def test_measured_reads_the_return_and_the_last_kl(jobs, tmp_path):
    (tmp_path / "eval.json").write_text('{"a": {"mean": 12.345, "ci95": 2.0, "returns": []}}')
    rows = [("step", "metric", "value"), (0, "adapt/kl_held-out", 5.0)]
    rows += [(9, "adapt/kl_train", 1.0), (9, "adapt/kl_held-out", 2.5)]
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert jobs.measured(tmp_path, "a", tmp_path) == {"return": 12.3, "ci95": 2.0, "kl": 2.5}


ROWS = {
    "methods": [
        {"pair": "pendulum", "method": method, "updates": updates, "seed": seed}
        for method in ("residual", "finetune", "none")
        for updates in ((500, 2000) if method != "none" else (0,))
        for seed in (1, 2)
    ],
    "inputs": [{"pair": "pendulum", "inputs": inputs, "seed": 1} for inputs in ("za", "za+sigma")],
    "data": [
        {"pair": "pendulum", "source": source, "kind": kind, "rows": rows, "seed": 1}
        for source in ("shipped", "shipped, rows alone", "task")
        for kind in ("expert", "random")
        for rows in (500, 2000)
    ],
    "capacity": [{"change": "gravity", "strength": s, "size": "64", "seed": 1} for s in (0.7, 1.3)],
}


@pytest.mark.parametrize("figure", ROWS)
def test_a_picture_comes_from_the_csv_alone(monkeypatch, jobs, tmp_path, figure):
    """Of no runs, and of a part of them; nothing is started"""
    module = importlib.import_module(figure)
    monkeypatch.setattr(module, "CSV", tmp_path / "table.csv")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "run_all", None)
    pictures = []
    for rows in ([], ROWS[figure]):
        for i, row in enumerate(rows):
            found = {"return": 100.0 + i, "ci95": 9.0, "kl": 2.0, "kl_over_home": 1.1}
            jobs.append(tmp_path / "table.csv", row | found | {"best_known": 400.0})
        module.main(draw=True)
        pictures.append(np.asarray(Image.open(tmp_path / f"{figure}.png")))
    assert pictures[0].shape[0] > 300 and pictures[1].shape[0] > 300
    assert not np.array_equal(*pictures)  # the rows are in it


@pytest.mark.parametrize("change", ["gravity-1.3", "mass-1.5"])
def test_the_expert_knows_the_changed_physics(monkeypatch, change):
    """What works at home hardly ever comes up here, so that its rows would show no reward."""
    monkeypatch.syspath_prepend(str(FIGURES))
    experts = importlib.import_module("experts")
    env_id = f"capacity:redraw/Pendulum-{change}-v0"
    _, expert, _ = experts.load_expert(env_id)
    knowing, naive = (
        experts.returns_of(controller, env_id, 2, seed=0).mean()
        for controller in (expert, experts.energy_shaping)
    )
    assert knowing > 200.0 and knowing > naive + 100.0


def test_what_the_expert_records_is_what_acts(monkeypatch):
    """With weaker torques energy shaping asks for more than there is."""
    monkeypatch.syspath_prepend(str(FIGURES))
    experts = importlib.import_module("experts")
    _, expert, _ = experts.load_expert("capacity:redraw/Pendulum-gain-0.8-v0")
    assert expert(np.array([-1.0, 0.0, 0.1])) == 1.0  # at the bottom, full torque


def test_recorded_episodes_are_short_and_shaken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FIGURES))
    experts = importlib.import_module("experts")
    recorded = []
    for jitter in (0.0, 1.0):
        out = tmp_path / f"{jitter}.npz"
        given = {"jitter": jitter, "episode_steps": 20, "image_size": 32}
        experts.record("redraw/PendulumSwingup-v0", out, rows=63, **given)
        recorded.append(np.load(out))
        assert (np.flatnonzero(recorded[-1]["is_first"]) == [0, 21, 42]).all()
    plain, shaken = (rows["action"] for rows in recorded)
    assert np.abs(plain - shaken).max() > 0.1 and np.abs(shaken).max() <= 1.0
    with pytest.raises(SystemExit, match="--jitter"):
        experts.record("redraw/PendulumSwingup-v0", out, jitter=float("nan"))


@pytest.mark.parametrize("env_id", ["redraw/FingerTurnHard-v0", "redraw/FingerTurnHardTorque-v0"])
def test_the_fingers_planner_knows_what_will_happen(monkeypatch, env_id):
    """The planner sees the task's state alone; MuJoCo goes on from it as the environment does."""
    monkeypatch.syspath_prepend(str(FIGURES))
    experts = importlib.import_module("experts")
    env = experts.TrueState(env_id)
    planner = experts.Planner(env_id)
    state, _ = env.reset(seed=0)
    rewards = []
    gaps = []
    for _ in range(120):
        action = planner(state)
        predicted = planner.gaps(state, np.tile(action, (1, planner.KNOTS, 1)))[0]
        state, reward, *_ = env.step(action)
        rewards.append(reward)
        gaps.append(state[-1])
        # MuJoCo's sensors are one step late; state[-1] is measured from the target's edge.
        error = predicted[planner.repeat] - planner.RADIUS - state[-1]
        assert abs(error) < 1e-2  # in contact the solver's start matters
    env.close()
    assert np.ptp(gaps) > 0.05  # it turned
    assert sum(rewards[-20:]) > 15.0


def test_the_rows_alone_have_a_line_of_their_own(monkeypatch, jobs, tmp_path):
    """Without stage 2, and in the picture"""
    data = importlib.import_module("data")
    job = data.alone_job("pendulum", "random", 2000, 3, tmp_path)
    record, train = job.stages
    words = list(map(str, train.command))
    assert record.command[0] == "redraw_adapt.py" and words[0] == "train_policy.py"
    assert words[words.index("--checkpoint") + 1].endswith("pretrained/pendulum.pt")
    assert words[words.index("--learn") + 1] == "recorded" and train.finished != record.finished
    monkeypatch.setattr(data, "CSV", tmp_path / "table.csv")
    monkeypatch.setattr(data, "HERE", tmp_path)
    pictures = []
    for row in (ROWS["data"][0], job.key):
        jobs.append(tmp_path / "table.csv", row | {"return": 99.0, "ci95": 9.0, "kl": ""})
        data.picture("pendulum")
        pictures.append(np.asarray(Image.open(tmp_path / "data.png")))
    assert pictures[0].shape != pictures[1].shape or not np.array_equal(*pictures)


def test_the_finger_has_a_teacher(monkeypatch):
    """SAC's actor, which nearly always succeeds; the yardstick stays the planner."""
    monkeypatch.syspath_prepend(str(FIGURES))
    experts = importlib.import_module("experts")
    env_id = "redraw/FingerTurnHard-v0"
    returns = experts.returns_of(experts.load_teacher(env_id), env_id, 4, seed=0)
    assert (returns > 300).sum() >= 3
    assert isinstance(experts.load_expert(env_id)[1], experts.Planner)
    target = experts.load_teacher("redraw/FingerTurnHardTorque-v0")
    assert isinstance(target, experts.Planner)  # no actor was trained there
