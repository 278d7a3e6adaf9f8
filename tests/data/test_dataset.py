"""Datasets on disk, whatever a user hands over, and the replay of stage 1."""

import zipfile

import numpy as np
import pytest
import torch
from helpers import TINY, Booby, random_rows, user_error

import draw_pretrain
from common import load_dataset, save_dataset, write_atomically
from draw_pretrain import Replay


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_round_trip(tmp_path):
    rows = random_rows(10) | {"reward": np.arange(10, dtype=np.float32)}
    save_dataset(tmp_path / "new folder" / "data.npz", rows)
    assert same(load_dataset(tmp_path / "new folder" / "data.npz"), rows)


def test_folder_of_chunks(tmp_path):
    a, b = random_rows(6, seed=1), random_rows(4, seed=2)
    b["is_first"][:] = b["is_last"][:] = False  # a chunk that was cut out of the middle of an episode
    save_dataset(tmp_path / "1.npz", b)
    save_dataset(tmp_path / "0.npz", a)
    (tmp_path / "notes.txt").write_text("not a chunk")
    both = load_dataset(tmp_path)
    for key in ("image", "vector", "action", "is_last"):
        assert np.array_equal(both[key], np.concatenate([a[key], b[key]]))
    # Nothing says that one file goes on where another one stopped, so each begins a sequence.
    assert np.flatnonzero(both["is_first"]).tolist() == [0, 3, 6]


@pytest.mark.parametrize("name", ["image_complement", "yaw_and_forward_vel"])
def test_key_names_of_the_authors(tmp_path, name):
    rows = random_rows(5)
    theirs = {k: v for k, v in rows.items() if k != "vector"} | {name: rows["vector"], "log_entropy": np.zeros((5, 3)), "id": np.array(["x"] * 5)}
    np.savez(tmp_path / "a.npz", **theirs)
    assert same(load_dataset(tmp_path / "a.npz"), rows)  # and the keys that nobody knows are ignored


def test_other_number_types_are_converted(tmp_path):
    rows = random_rows(5)
    np.savez(tmp_path / "a.npz", **rows | {"vector": rows["vector"].astype(np.float64), "is_first": rows["is_first"].astype(np.uint8)})
    assert same(load_dataset(tmp_path / "a.npz"), rows)


def test_rewards_and_end_flags_are_optional(tmp_path):
    rows = random_rows(6)
    for key in ("is_last", "is_terminal"):
        del rows[key]
    save_dataset(tmp_path / "a.npz", rows)
    data = load_dataset(tmp_path)
    assert "reward" not in data and not data["is_last"].any() and not data["is_terminal"].any()
    save_dataset(tmp_path / "b.npz", rows | {"reward": np.zeros(6, np.float32)})
    assert "reward" not in load_dataset(tmp_path)  # one of two files has rewards: there are none for all rows


def test_a_row_after_an_end_is_a_first_one(tmp_path):
    rows = random_rows(8)
    rows["is_first"][:] = False
    rows["is_last"] = np.arange(8) == 4
    save_dataset(tmp_path / "a.npz", rows)
    assert np.flatnonzero(load_dataset(tmp_path / "a.npz")["is_first"]).tolist() == [0, 5]


BAD_ROWS = {
    "missing key": (lambda r: r.pop("action"), "action"),
    "float images": (lambda r: r.update(image=r["image"].astype(np.float32)), "uint8"),
    "gray images": (lambda r: r.update(image=r["image"][..., 0]), "image"),
    "one channel": (lambda r: r.update(image=r["image"][..., :1]), "image"),
    "not square": (lambda r: r.update(image=r["image"][:, :8]), "image"),
    "text": (lambda r: r.update(vector=np.array([["a"]] * 6)), "vector"),
    "flat vector": (lambda r: r.update(vector=r["vector"][:, 0]), "vector"),
    "flags of two dimensions": (lambda r: r.update(is_last=r["is_last"][:, None]), "is_last"),
    "unequal lengths": (lambda r: r.update(action=r["action"][:-1]), "(5, 1)"),
    "a number": (lambda r: r.update(is_last=np.array(True)), "is_last"),
    "one row": (lambda r: r.update({k: v[:1] for k, v in r.items()}), "2 rows"),
    "NaN": (lambda r: r["vector"].__setitem__((4, 0), np.nan), "row 4"),
    "infinity": (lambda r: r["action"].__setitem__((2, 0), np.inf), "action"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, name):
    rows = random_rows(6)
    change, word = BAD_ROWS[name]
    change(rows)
    np.savez(tmp_path / "a.npz", **rows)
    with user_error("a.npz", word):
        load_dataset(tmp_path / "a.npz")


def test_sizes_other_than_the_checkpoint_s(tmp_path):
    save_dataset(tmp_path / "a.npz", random_rows(6))
    load_dataset(tmp_path / "a.npz", image_size=16, vector_size=2, action_size=1)
    for key, size in (("image", {"image_size": 32}), ("vector", {"vector_size": 3}), ("action", {"action_size": 2})):
        with user_error(key, "a.npz"):
            load_dataset(tmp_path / "a.npz", **size)


def test_files_that_do_not_fit_each_other(tmp_path):
    rows = random_rows(6)
    save_dataset(tmp_path / "a.npz", rows)
    save_dataset(tmp_path / "b.npz", rows | {"vector": np.zeros((6, 3), np.float32)})
    with user_error("b.npz", "vector"):
        load_dataset(tmp_path)


def test_no_such_dataset(tmp_path):
    with user_error("nowhere"):
        load_dataset(tmp_path / "nowhere")
    with user_error(str(tmp_path)):  # an empty folder
        load_dataset(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path, share):
    save_dataset(tmp_path / "whole.npz", random_rows(6))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "part.npz").write_bytes(whole[: int(share * len(whole))])
    with user_error("part.npz"):
        load_dataset(tmp_path / "part.npz")


def write_text(path):
    path.write_text("these are not arrays\n" * 9)


def write_npy(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(6))  # one array instead of an archive of them


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        for key in random_rows(6):
            archive.writestr(key, b"these are not arrays")


@pytest.mark.parametrize("write", [write_text, write_npy, write_zip])
def test_file_of_another_kind(tmp_path, write):
    write(tmp_path / "a.npz")
    with user_error("a.npz"):
        load_dataset(tmp_path / "a.npz")


def test_dataset_can_not_run_code(tmp_path):
    np.savez(tmp_path / "a.npz", **random_rows(1) | {"image": np.array([Booby(tmp_path / "ran")], dtype=object)})
    with user_error("a.npz", "allow_pickle"):
        load_dataset(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.npz"
    save_dataset(path, random_rows(4))
    old = path.read_bytes()

    def write(file):
        file.write(b"half of a")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_file_that_can_not_be_written(tmp_path):
    (tmp_path / "taken").mkdir()
    with user_error("taken"):
        save_dataset(tmp_path / "taken", random_rows(4))
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and not any((tmp_path / "taken").iterdir())


def filled_replay(rows, added, n_envs=2):
    """A replay whose rewards count the rows of an environment, and whose vectors tell the environment"""
    replay = Replay(rows, n_envs, TINY)
    no = np.zeros(n_envs, bool)
    for t in range(added):
        replay.add(
            image=np.full((n_envs, 16, 16, 3), t % 256, np.uint8), vector=np.arange(n_envs)[:, None] * np.ones((1, 2)), reward=np.full(n_envs, t),
            action=np.full((n_envs, 1), t % 7), is_first=no | (t == 0), is_last=no, is_terminal=no,
        )  # fmt: skip
    return replay


@pytest.mark.parametrize("added", [12, 20, 37, 40])  # before the ring (20 rows for each environment) is full, full, and wrapped
def test_replay_samples_stretches_of_time(added):
    replay = filled_replay(40, added)
    assert len(replay) == min(added, 20)
    data = replay.sample(500, 5, "cpu")
    t = data["reward"]  # (500, 5)
    assert (t.diff(dim=1) == 1).all()  # contiguous, so never across the ring's head
    assert (data["vector"] == data["vector"][:, :1]).all()  # of one environment
    assert (data["image"][..., 0, 0, 0] == t).all() and (data["action"][..., 0] == t % 7).all()  # rows stay together
    oldest = added - len(replay)
    assert torch.equal(t[:, 0].unique(), torch.arange(oldest, added - 4.0))  # every start that there is
    assert set(data["vector"][:, 0, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("added", [20, 37])  # before the ring has wrapped, and after it
def test_replay_draws_rewarded_sequences(added):
    replay = filled_replay(40, added)
    time = replay.data["reward"].clone()  # (environments, rows of the ring)
    replay.data["action"][:] = time[..., None]
    replay.data["reward"][:] = (time == added - 9) * torch.tensor([[0.0], [1.0]])  # one reward, in the second environment
    data = replay.sample(400, 5, "cpu", rewarded=0.5)
    paid = data["reward"].sum(1) > 0
    assert paid[:200].all() and 10 <= paid[200:].sum() <= 60  # 5 of 32 sequences of the rest hold it by chance
    assert set(data["reward"][:200].argmax(1).tolist()) == set(range(5))  # at any place of the sequence
    assert (data["action"].diff(dim=1) == 1).all()  # contiguous, so never across the ring's head
    replay.data["reward"][:] = 0
    assert not replay.sample(400, 5, "cpu", rewarded=0.5)["reward"].any()  # as long as there is no reward: any sequence


@pytest.mark.parametrize("added", [10, 27])
def test_replay_saves_a_dataset(tmp_path, monkeypatch, added):
    monkeypatch.setattr(draw_pretrain, "ROWS_PER_FILE", 4)
    filled_replay(40, added).save(tmp_path)
    data = load_dataset(tmp_path)
    n = min(added, 20)
    expected = np.arange(added - n, added)
    assert np.array_equal(data["reward"], np.concatenate([expected, expected]))  # oldest first, one environment after the other
    assert np.array_equal(data["vector"][:, 0], np.repeat([0, 1], n))
    firsts = np.concatenate([np.load(f)["reward"][:1] for f in sorted(tmp_path.glob("*.npz"))])
    assert data["reward"][data["is_first"]].tolist() == firsts.tolist()  # each file's first row
    assert len(firsts) == 2 * (-(-added // 4) - (added - n) // 4)
