"""What a run leaves to be looked at: learning curves, films, TensorBoard's pictures; and what it
warns of."""

import csv

import imageio.v3
import numpy as np
import pytest
import torch
from helpers import TINY, user_error
from stages import POLICY, PRETRAIN, TOY, call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import draw_pretrain
import train_policy
from common import Run


def test_each_run_leaves_curves_and_a_film(toy):
    for stage, film in (
        ("source", "prediction.gif"),
        ("source", "disagreement.gif"),
        ("adapted", "prediction.gif"),
        ("policy", "ToyReversed-v0.gif"),
    ):
        curves = imageio.v3.imread(toy / stage / "curves.png")
        assert curves.shape[1] == 980 and curves[..., :3].std() > 20  # a page with panels on it
        frames = imageio.v3.imread(toy / stage / film, index=None)
        assert (len(frames) == 1) == (film == "disagreement.gif") and frames.std() > 5
        events = EventAccumulator(str(toy / stage), size_guidance={"images": 0}).Reload()
        assert film.removesuffix(".gif") in events.Tags()["images"]
        with open(toy / stage / "metrics.csv") as file:
            logged = {row["metric"] for row in csv.DictReader(file)}
        assert logged == set(events.Tags()["scalars"])


def test_the_film_of_stage_1_shows_what_happened(toy):
    """Its upper third is the recorded frames, doubled; the two models' thirds lie below."""
    frames = imageio.v3.imread(toy / "source" / "prediction.gif", index=None)
    T, height, width, _ = frames.shape
    assert height == 3 * 2 * 16 and width == 4 * 2 * 16
    for i in range(4):
        real = frames[:, : 2 * 16, 32 * i : 32 * i + 32]
        columns = (real[:, 8, 1::2].mean(-1) > 128).sum(-1)  # toy_env: one white column
        assert (columns == 1).all() and T > 1


@pytest.mark.parametrize("channels", [3, 1, 4])
def test_a_video_is_the_frames_that_were_given(tmp_path, channels):
    """The last one of stacked frames"""
    run = Run(tmp_path / "run", draw_pretrain.Args())
    frames = np.zeros((3, 8, 12, channels), np.uint8)
    frames[1, ..., -1:] = 255
    frames[2] = 100
    run.video(1, "film", frames)
    read = imageio.v3.imread(tmp_path / "run" / "film.gif", index=None)
    shown = frames if channels == 3 else frames[..., -1:].repeat(3, -1)
    assert read.shape == shown.shape and np.abs(read.astype(int) - shown).max() <= 8
    run.close()


def test_warnings_come_once_and_only_when_due(tmp_path, capsys):
    run = Run(tmp_path / "run", draw_pretrain.Args())
    for when in (False, True, True):
        run.warn(when, "the critic is running away")
    run.close()
    assert capsys.readouterr().out.count("warning: the critic is running away") == 1


def test_due():
    assert [step for step in range(1, 12) if Run.due(step, 4)] == [4, 8]
    # In strides of 3 a multiple may be passed over.
    assert [step for step in range(3, 25, 3) if Run.due(step, 4, 3)] == [6, 9, 12, 18, 21, 24]


@pytest.mark.parametrize("bad", [np.nan, np.inf, torch.tensor(-np.inf), torch.tensor(np.nan)])
def test_a_figure_that_is_not_finite_ends_the_run(tmp_path, bad):
    """named, with nothing of its line logged"""
    run = Run(tmp_path / "run", draw_pretrain.Args())
    run.log(1, {"loss": torch.tensor(2.0, requires_grad=True)})
    with user_error("world_model/kl is not finite at 7"):
        run.log(7, {"loss": 1.0, "world_model/kl": bad})
    assert (tmp_path / "run" / "metrics.csv").read_text() == "step,metric,value\n1,loss,2\n"
    run.close()


@pytest.mark.parametrize("word", [None, "entropy is at its floor"])
def test_stage_3_warns_of_a_policy_that_stopped_exploring(toy, tmp_path, capsys, monkeypatch, word):
    if word:  # an actor whose deviation lies at its floor
        forward = train_policy.ActorCritic(TINY).actor.__class__.forward

        def certain(self, z):
            pi = forward(self, z)
            floor = torch.full_like(pi.mean, 0.1)
            return torch.distributions.Normal(pi.mean, floor, validate_args=False)

        monkeypatch.setattr("common.Actor.forward", certain)
    given = f"--checkpoint {toy}/adapted/best.pt --dataset {toy}/adapted/dataset.npz"
    call(train_policy, *POLICY, given, f"--run-dir {tmp_path}/run")
    out = capsys.readouterr().out
    assert (word in out) if word else "warning" not in out


STAGE_1 = {  # what stage 1's run is made to see -> words of its warning
    "world_model/kl": (1.0, "the KL lies at its free nat"),
    "task/entropy": (-0.85 * TINY.action_size, "hardly random any more"),
    "task/scale": (1e6, "wider than real rewards allow"),
}


@pytest.mark.parametrize("name", [None, *STAGE_1])
def test_stage_1_warns_of_tell_tale_signs(tmp_path, capsys, monkeypatch, name):
    """A run whose logged figures are healthy, but for one"""
    healthy = {"world_model/kl": 2.0, "task/entropy": 1.0, "task/scale": 0.1}
    wrong = {name: STAGE_1[name][0]} if name else {}
    log = Run.log
    monkeypatch.setattr(Run, "log", lambda *args: log(*args) | healthy | wrong)
    call(draw_pretrain, *PRETRAIN, f"--env-id {TOY[0]} --steps 480 --run-dir {tmp_path}/run")
    out = capsys.readouterr().out
    for other, (_, words) in STAGE_1.items():
        assert (words in out) == (other == name), other


def test_stage_1_says_that_no_policy_learns(tmp_path, capsys):
    flags = f"--env-id {TOY[0]} --steps 440 --policy-start 10 --run-dir {tmp_path}/run"
    call(draw_pretrain, *PRETRAIN, flags)  # 10 updates
    assert "no policy learns" in capsys.readouterr().out
