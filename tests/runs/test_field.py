"""What users reported of foreign data, foreign environments and interrupted runs, each as a run.
(The reader of datasets, environments, resuming and flags have files of their own.)"""

import json
import sys

import numpy as np
import pytest
import torch
from bad_env import Once
from helpers import TINY, random_rows, read_replay, save_tiny_draw, user_error
from stages import ADAPT, POLICY, PRETRAIN, TOY, call

import draw_pretrain
import redraw_adapt
import train_policy
from common import DRAW, ActorCritic, Run, load_checkpoint, load_dataset, make_envs, save_dataset


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_tiny_draw(folder / "draw.pt")
    save_dataset(folder / "data.npz", random_rows(60))
    return folder


# ---- foreign data


def many_episodes(n=10, T=12):
    rows = random_rows(n * T)
    t = np.arange(n * T) % T
    rows |= {"is_first": t == 0, "is_last": t == T - 1}
    rows["action"][t == T - 1] = 0.0
    led = np.where((t == 0)[:, None], 0.0, np.roll(rows["action"], 1, 0)).astype(np.float32)
    return rows, rows | {"action": led}


@pytest.mark.parametrize("module, base", [(redraw_adapt, ADAPT), (train_policy, POLICY)])
def test_the_other_convention_of_actions(files, tmp_path, module, base):
    """It is refused; --actions-lead gives the very run that the same data in ours gives."""
    ours, theirs = many_episodes()
    save_dataset(tmp_path / "ours.npz", ours)
    save_dataset(tmp_path / "theirs.npz", theirs)
    flags = [*base, f"--checkpoint {files}/draw.pt --updates 5 --log-every 5"]
    with user_error("theirs.npz", "--actions-lead"):
        call(module, *flags, f"--dataset {tmp_path}/theirs.npz --run-dir {tmp_path}/no")
    assert not (tmp_path / "no").exists()
    call(module, *flags, f"--dataset {tmp_path}/ours.npz --run-dir {tmp_path}/a")
    lead = f"--dataset {tmp_path}/theirs.npz --actions-lead --run-dir {tmp_path}/b"
    call(module, *flags, lead)
    a, b = ((tmp_path / name / "metrics.csv").read_text() for name in "ab")
    assert a == b


def test_one_endless_episode(files, tmp_path):
    """Its last part is held out."""
    flags = "--target-env-id bad_env:EndlessGoal-v0 --n-envs 1 --collect-policy random"
    flags += f" --checkpoint {files}/draw.pt --updates 5 --run-dir {tmp_path}/run"
    call(redraw_adapt, *ADAPT, flags, "--episode-steps 100000")
    rows = load_dataset(tmp_path / "run" / "dataset.npz", TINY)
    assert rows["is_first"].sum() == 1 and len(rows["is_first"]) == 400
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["KL held-out"]["rectified"] > 0


def test_a_file_of_any_name_is_a_dataset(tmp_path):
    """where it is named itself; a folder's are those that end in .npz"""
    save_dataset(tmp_path / "hand", random_rows(8))
    assert len(load_dataset(tmp_path / "hand", TINY)["is_first"]) == 8
    with user_error(str(tmp_path), "npz"):
        load_dataset(tmp_path, TINY)


def test_dataset_rows_through_stages_2_and_3(files, tmp_path):
    flags = f"--checkpoint {files}/draw.pt --dataset {files}/data.npz --dataset-rows 40"
    call(redraw_adapt, *ADAPT, flags, f"--updates 2 --run-dir {tmp_path}/a --length 5")
    assert json.loads((tmp_path / "a" / "result.json").read_text())["data"]["rows"] == 40
    call(train_policy, *POLICY, flags, f"--updates 2 --run-dir {tmp_path}/b")


# ---- foreign environments


def test_an_environment_that_can_exist_only_once(files, tmp_path):
    Once.held = False
    once = "--n-envs 1 --run-dir"
    flags = f"--env-id bad_env:Once-v0 --steps 408 {once} {tmp_path}/source"
    call(draw_pretrain, *PRETRAIN, flags)
    draw = f"--checkpoint {files}/draw.pt --updates 2"
    target = f"--target-env-id bad_env:Once-v0 --collect-steps 60 {once} {tmp_path}/adapted"
    call(redraw_adapt, *ADAPT, draw, target)
    given = f"{draw} --dataset {files}/data.npz --eval-env-ids bad_env:Once-v0 --eval-every 1"
    call(train_policy, *POLICY, given, f"{once} {tmp_path}/policy")
    assert len(
        json.loads((tmp_path / "policy/eval.json").read_text())["bad_env:Once-v0"]["returns"]
    )


def test_infos_of_changing_length(tmp_path):
    flags = f"--env-id bad_env:Infos-v0 --steps 420 --run-dir {tmp_path}/run"
    call(draw_pretrain, *PRETRAIN, flags)
    assert len(read_replay(tmp_path / "run" / "replay")["reward"]) == 420


def test_policy_and_evaluation_are_saved_before_what_can_fail(files, tmp_path, monkeypatch):
    flags = [*POLICY, f"--checkpoint {files}/draw.pt --dataset {files}/data.npz --updates 1"]
    flags += [f"--eval-env-ids {TOY[0]}"]

    def fails(*args, **kwargs):
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "video", fails)
        with pytest.raises(OSError):
            call(train_policy, *flags, f"--run-dir {tmp_path}/a")
    assert (tmp_path / "a" / "eval.json").exists() and (tmp_path / "a" / "policy.pt").exists()
    monkeypatch.setattr(train_policy, "evaluate", fails)
    with pytest.raises(OSError):
        call(train_policy, *flags, f"--run-dir {tmp_path}/b")
    assert load_checkpoint(tmp_path / "b" / "policy.pt", ("train_policy",))


def test_a_module_in_the_working_directory(tmp_path, monkeypatch):
    """while the script lies elsewhere"""
    text = "import toy_env\ntoy_env.register('Mine')\n"
    (tmp_path / "a_module_of_mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    make_envs("a_module_of_mine:Mine-v0", 1).close()


def test_the_default_folder_has_no_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(draw_pretrain, *PRETRAIN, f"--env-id {TOY[0]} --steps 408 --seed 7")
    (folder,) = (tmp_path / "runs").iterdir()
    assert not set(folder.name) & set(':/\\ "') and "Toy-v0" in folder.name and "7" in folder.name


# ---- defaults and flags


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_unusual_predicted_rewards_are_odd_whatever_their_sign(sign):
    class Draw:
        def encoder(self, image, vector):
            return vector

        def posterior(self, vector):
            return vector[:, :1, None].expand(-1, 3, 4)

        def reward(self, z):
            return sign * z[:, 0, 0].log()

        def cont(self, z):
            return torch.ones(len(z))

    rows = random_rows(20) | {"vector": np.zeros((20, 2), np.float32)}
    rows["vector"][6] = 3.0
    odd = train_policy.encode(Draw(), rows, "cpu")["odd"]
    assert odd.argmax() == 6 and odd[6] == pytest.approx(3.0, rel=1e-3)
    assert (odd > 0).all() and odd[torch.arange(20) != 6].max() < 1e-5


def test_half_of_the_episodes_of_a_policy_are_quiet():
    """Stage 1 must see where the policy goes when nothing disturbs it."""
    n = 3000
    args = draw_pretrain.Args(n_envs=n, collect="mixed", learn="lookahead", hold=4.0)
    draw = DRAW(TINY)
    policies = {name: ActorCritic(TINY) for name in ("task", "explore")}
    collector = draw_pretrain.Collector(args, TINY, draw, policies)
    for name, action in (("task", 0.9), ("explore", -0.9)):
        answer = np.full((n, TINY.action_size), action, np.float32)
        collector.actors[name] = Answer(True, answer)
    obs = {"image": np.zeros(n), "vector": np.zeros(n)}
    first = np.ones(n, bool)
    assert np.abs(collector.act(obs, first, by_policies=False)).std() > 0.2  # all at random
    action = collector.act(obs, first, by_policies=True)
    task = action[:, 0] > 0
    assert abs(task.mean() - 2 / 3) < 0.05
    quiet = (np.abs(action) == np.float32(0.9)).all(-1)
    assert abs(quiet.mean() - 0.5) < 0.05
    assert np.abs(action).min() > 0.5 and np.abs(action).max() == 1.0
    # It stays so until the next episode.
    again = collector.act(obs, np.zeros(n, bool), by_policies=True)
    assert ((again[:, 0] > 0) == task).all()
    assert ((np.abs(again) == np.float32(0.9)).all(-1) == quiet).all()


class Answer:
    """A policy that always gives the same answer, a row an environment"""

    def __init__(self, by_mean, answer):
        self.by_mean = by_mean
        self.answer = answer

    def __call__(self, image, vector):
        return self.answer[: len(image)].copy()


def test_every_other_episode_is_calm_with_one_environment_too():
    args = redraw_adapt.Args("", collect_steps=800, hold=1.0, gain=2.0, n_envs=1)
    rows = redraw_adapt.collect(args, make_envs(TOY[1], 1), None)
    episode = np.cumsum(rows["is_first"])
    full = np.abs(rows["action"][:, 0]) == 1
    inside = ~rows["is_first"]
    shares = [full[inside & (episode % 2 == i)].mean() for i in (0, 1)]
    assert min(shares) < 0.01 and max(shares) == pytest.approx(0.5, abs=0.1)


def test_tiny_returns_are_printed_with_their_digits(files, tmp_path, monkeypatch, capsys):
    returns, frames = np.array([-1.25e-5, -1.5e-5]), np.zeros((2, 16, 16, 3), np.uint8)
    monkeypatch.setattr(train_policy, "evaluate", lambda *args: (returns, frames))
    flags = f"--checkpoint {files}/draw.pt --dataset {files}/data.npz --updates 1"
    call(train_policy, *POLICY, flags, f"--eval-env-ids {TOY[0]} --run-dir {tmp_path}/run")
    assert "-1.375e-05 +- 1.6e-05" in capsys.readouterr().out


# ---- --resume and --overwrite


def test_files_of_other_names_do_not_block_resume(files, tmp_path):
    flags = [*POLICY, f"--checkpoint {files}/draw.pt --dataset {files}/data.npz --updates 2"]
    flags += [f"--run-dir {tmp_path}/run"]
    call(train_policy, *flags)
    (tmp_path / "run" / "diverged.pt").write_bytes(b"of an older version")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    call(train_policy, *flags, "--resume")
    assert (tmp_path / "run" / "notes.txt").exists()


def test_a_run_that_was_killed_before_its_first_save_starts_when_it_resumes(files, tmp_path):
    flags = [*POLICY, f"--checkpoint {files}/draw.pt --dataset {files}/data.npz --updates 4"]
    flags += [f"--log-every 1 --run-dir {tmp_path}/run"]
    call(train_policy, *flags)
    whole = (tmp_path / "run" / "metrics.csv").read_text()
    (tmp_path / "run" / "state.pt").unlink()
    (tmp_path / "run" / "policy.pt").unlink()
    call(train_policy, *flags, "--resume")
    assert (tmp_path / "run" / "metrics.csv").read_text() == whole


def test_a_recording_in_pieces_is_refused_with_the_share():
    """As jitter makes it: 40 of 100 rows lie in a sequence that is long enough."""
    is_first = np.arange(100) % 5 == 0
    is_first[1:40] = False
    with user_error("only 40%", "--length 8"):
        redraw_adapt.split_episodes(is_first, redraw_adapt.Args("draw.pt", length=8))
