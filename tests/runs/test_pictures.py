"""What a run leaves to be looked at: learning curves, films, TensorBoard's pictures; and what it warns of."""

import imageio.v3
import numpy as np
import pytest
import torch
from helpers import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pipeline import ADAPT, POLICY, PRETRAIN, call

import draw_pretrain
import redraw_adapt
import train_policy
from common import Logger


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with a run of each stage, on the toy environment (episodes of 10 steps, so films of 11 frames)"""
    F = tmp_path_factory.mktemp("runs")
    call(draw_pretrain, *PRETRAIN, "--env-id", "toy_env:Toy-v0", "--run-dir", F / "source")
    call(redraw_adapt, *ADAPT, "--checkpoint", F / "source/draw.pt", "--target-env-id", "toy_env:ToyReversed-v0", "--run-dir", F / "adapted")
    call(train_policy, *POLICY, "--checkpoint", F / "adapted/best.pt", "--dataset", F / "adapted/dataset.npz", "--eval-env-ids", "toy_env:ToyReversed-v0",
         "--run-dir", F / "policy")  # fmt: skip
    return F


def test_each_run_leaves_curves_and_a_film(runs):
    for stage, film in (("source", "prediction.gif"), ("source", "disagreement.gif"), ("adapted", "prediction.gif"), ("policy", "ToyReversed-v0.gif")):
        curves = imageio.v3.imread(runs / stage / "curves.png")
        assert curves.shape[1] == 980 and 20 < curves[..., :3].std()  # a white page with panels on it
        frames = imageio.v3.imread(runs / stage / film, index=None)
        assert (len(frames) == 1) == (film == "disagreement.gif") and frames.std() > 5
        events = EventAccumulator(str(runs / stage), size_guidance={"images": 0}).Reload()
        assert film.removesuffix(".gif") in events.Tags()["images"]
        logged = {line.split(",")[1] for line in (runs / stage / "metrics.csv").read_text().splitlines()[1:]}
        assert logged == set(events.Tags()["scalars"])


def test_the_film_of_stage_1_shows_what_happened(runs):
    """Its upper third is the recorded frames, doubled; the two models' thirds lie below."""
    frames = imageio.v3.imread(runs / "source" / "prediction.gif", index=None)
    T, height, width, _ = frames.shape
    assert height == 3 * 2 * 16 and width % (2 * 16) == 0
    real = frames[:, : 2 * 16, : 2 * 16]
    columns = (real[:, 8, 1::2].mean(-1) > 128).sum(-1)  # toy_env: one white column
    assert (columns == 1).all() and T > 1


def test_a_video_is_the_frames_that_were_given(tmp_path):
    args = draw_pretrain.Args()
    logger = Logger(tmp_path / "run", args)
    frames = np.zeros((3, 8, 12, 3), np.uint8)
    frames[1] = 255
    logger.video(1, "film", frames)
    read = imageio.v3.imread(tmp_path / "run" / "film.gif", index=None)
    assert read.shape == frames.shape and np.array_equal(read, frames)
    logger.close()


def test_warnings_come_once_and_only_when_due(tmp_path, capsys):
    logger = Logger(tmp_path / "run", draw_pretrain.Args())
    for when in (False, True, True):
        logger.warn(when, "the critic is running away")
    logger.close()
    assert capsys.readouterr().out.count("warning: the critic is running away") == 1


@pytest.mark.parametrize("word", [None, "entropy is at its floor"])
def test_stage_3_warns_of_a_policy_that_stopped_exploring(runs, tmp_path, capsys, monkeypatch, word):
    if word:  # an actor whose deviation lies at its floor
        monkeypatch.setattr(train_policy.Actor, "forward", lambda self, z: torch.distributions.Normal(torch.tanh(self.net(z.flatten(-2))[..., :1]),
                            torch.full((*z.shape[:-2], TINY.action_size), 0.1), validate_args=False))  # fmt: skip
    call(train_policy, *POLICY, "--checkpoint", runs / "adapted/best.pt", "--dataset", runs / "adapted/dataset.npz", "--run-dir", tmp_path / "run")
    out = capsys.readouterr().out
    assert (word in out) if word else "warning" not in out


STAGE_1 = {  # what stage 1's logger is made to see -> words of its warning
    "world_model/kl": (1.0, "the KL lies at its free nat"),
    "task/entropy": (-0.85 * TINY.action_size, "the task policy's entropy is at its floor"),
    "task/scale": (1e6, "the critic is running away"),
}


@pytest.mark.parametrize("name", [None, *STAGE_1])
def test_stage_1_warns_of_tell_tale_signs(tmp_path, capsys, monkeypatch, name):
    """A run whose logged figures are healthy, but for one"""
    healthy = {"world_model/kl": 2.0, "task/entropy": 1.0, "task/scale": 0.1}
    wrong = {name: STAGE_1[name][0]} if name else {}
    log = draw_pretrain.Logger.log
    monkeypatch.setattr(draw_pretrain.Logger, "log", lambda self, step, metrics: log(self, step, metrics) | healthy | wrong)

    call(draw_pretrain, *PRETRAIN, "--env-id", "toy_env:Toy-v0", "--run-dir", tmp_path / "run")
    out = capsys.readouterr().out
    for other, (_, words) in STAGE_1.items():
        assert (words in out) == (other == name), other


def test_stage_3_warns_of_a_critic_that_runs_away(runs, tmp_path, capsys, monkeypatch):
    log = train_policy.Logger.log
    monkeypatch.setattr(train_policy.Logger, "log", lambda self, step, metrics: log(self, step, metrics) | {"policy/scale": 1e6})
    call(train_policy, *POLICY, "--checkpoint", runs / "adapted/best.pt", "--dataset", runs / "adapted/dataset.npz", "--run-dir", tmp_path / "run")
    assert "the critic is running away" in capsys.readouterr().out
