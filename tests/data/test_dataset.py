"""Datasets on disk, whatever a user hands over, and the replay of stage 1."""

import dataclasses
import zipfile

import numpy as np
import pytest
import torch
from helpers import TINY, Booby, random_rows, read_replay, user_error

from common import Replay, load_dataset, save_dataset, write_atomically


def same(a, b):
    return set(a) == set(b) and all(
        np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def test_round_trip(tmp_path):
    rows = random_rows(10)
    extra = {"reward": np.full(10, np.nan, np.float32), "log_entropy": np.zeros((10, 3))}
    save_dataset(tmp_path / "new folder" / "data.npz", rows | extra)
    # Rewards are not read, so they may be anything.
    assert same(load_dataset(tmp_path / "new folder" / "data.npz", TINY), rows)


def test_folder_of_chunks(tmp_path):
    a, b = random_rows(6, seed=1), random_rows(4, seed=2)
    b["is_first"][:] = b["is_last"][:] = (
        False  # a chunk that was cut out of the middle of an episode
    )
    save_dataset(tmp_path / "1.npz", b)
    save_dataset(tmp_path / "0.npz", a)
    (tmp_path / "notes.txt").write_text("not a chunk")
    both = load_dataset(tmp_path, TINY)
    for key in ("image", "vector", "action", "is_last"):
        assert np.array_equal(both[key], np.concatenate([a[key], b[key]]))
    # Nothing says that one file goes on where another one stopped, so each begins a sequence.
    assert np.flatnonzero(both["is_first"]).tolist() == [0, 3, 6]


@pytest.mark.parametrize("name", ["image_complement", "yaw_and_forward_vel"])
def test_key_names_of_the_authors(tmp_path, name):
    rows = random_rows(5)
    theirs = {k: v for k, v in rows.items() if k != "vector"} | {
        name: rows["vector"],
        "log_entropy": np.zeros((5, 3)),
        "id": np.array(["x"] * 5),
    }
    np.savez(tmp_path / "a.npz", **theirs)
    assert same(
        load_dataset(tmp_path / "a.npz", TINY), rows
    )  # and the keys that nobody knows are ignored


def test_other_number_types_are_converted(tmp_path):
    rows = random_rows(5)
    np.savez(
        tmp_path / "a.npz",
        **rows
        | {
            "vector": rows["vector"].astype(np.float64),
            "is_first": rows["is_first"].astype(np.uint8),
        },
    )
    assert same(load_dataset(tmp_path / "a.npz", TINY), rows)


def test_end_flags_are_optional(tmp_path):
    rows = random_rows(6)
    for key in ("is_last", "is_terminal"):
        del rows[key]
    save_dataset(tmp_path / "a.npz", rows)
    data = load_dataset(tmp_path, TINY)
    assert not data["is_last"].any() and not data["is_terminal"].any()


@pytest.mark.parametrize("key", ["is_last", "is_terminal"])
def test_a_row_after_an_end_is_a_first_one(tmp_path, key):
    """Also where ends are marked by is_terminal alone, as D4RL does"""
    rows = random_rows(8)
    del rows["is_terminal" if key == "is_last" else "is_last"]
    rows["is_first"][:] = False
    rows[key] = np.arange(8) == 4
    save_dataset(tmp_path / "a.npz", rows)
    assert np.flatnonzero(load_dataset(tmp_path / "a.npz", TINY)["is_first"]).tolist() == [0, 5]


@pytest.mark.parametrize("channels, V", [(1, 2), (9, 0), (3, 0), (4, 1)])
def test_any_channels_and_no_vector(tmp_path, channels, V):
    sizes = dataclasses.replace(TINY, channels=channels, vector_size=V)
    rows = random_rows(8, sizes)
    save_dataset(tmp_path / "a.npz", rows)
    assert same(load_dataset(tmp_path / "a.npz", sizes), rows)
    if not V:  # none is needed, and one that is there is not read
        for vector in (None, random_rows(8)["vector"]):
            changed = rows | {"vector": vector}
            save_dataset(tmp_path / "a.npz", {k: v for k, v in changed.items() if v is not None})
            assert same(load_dataset(tmp_path / "a.npz", sizes), rows)
    with user_error("image", f"(8, 16, 16, {channels})"):
        save_dataset(tmp_path / "a.npz", random_rows(8, dataclasses.replace(sizes, channels=2)))
        load_dataset(tmp_path / "a.npz", sizes)


def test_hidden_files_are_no_chunks(tmp_path):
    rows = random_rows(6)
    save_dataset(tmp_path / "0.npz", rows)
    (tmp_path / "._0.npz").write_bytes(b"what macOS leaves")
    (tmp_path / ".0.npz.part").write_bytes(b"half")
    assert same(load_dataset(tmp_path, TINY), rows)


def test_two_names_of_the_vector(tmp_path):
    """vector itself counts."""
    rows = random_rows(6)
    also = {"image_complement": rows["vector"] + 1, "yaw_and_forward_vel": np.zeros((6, 9))}
    np.savez(tmp_path / "a.npz", **also, **rows)
    assert same(load_dataset(tmp_path / "a.npz", TINY), rows)


def test_partly_filled_chunks(tmp_path):
    """A DreamerV3 chunk named TIME-UUID-SUCCESSOR-ROWS.npz has the chunk's full size; what lies
    after ROWS rows was never written. A name of three fields says something else."""
    rows = random_rows(12)
    rest = {key: np.zeros((500, *value.shape[1:]), value.dtype) for key, value in rows.items()}
    rest["vector"] += np.nan
    chunk = {key: np.concatenate([rows[key], rest[key]]) for key in rows}
    np.savez(tmp_path / "20250101T000000F000000-uuid1-uuid2-12.npz", **chunk)
    assert same(load_dataset(tmp_path, TINY), rows)
    (three,) = tmp_path.iterdir()
    three.unlink()
    np.savez(tmp_path / "20250101T000000-uuid1-11.npz", **rows)  # DreamerV2: steps, not rows
    assert len(load_dataset(tmp_path, TINY)["is_first"]) == 12


# ---- the newest rows


def numbered_chunks(folder, counts):
    """Files whose vectors count the rows of all"""
    begin = 0
    for i, n in enumerate(counts):
        rows = random_rows(n) | {"vector": np.arange(begin, begin + n)[:, None] * np.ones((1, 2))}
        save_dataset(folder / f"{i:02d}.npz", rows)
        begin += n


@pytest.mark.parametrize(
    "newest, read", [(1, 0), (4, 1), (5, 1), (6, 2), (11, 2), (12, 3), (20, 3), (10**9, 3)]
)
def test_newest_rows(tmp_path, monkeypatch, newest, read):
    numbered_chunks(tmp_path, [9, 6, 5])
    opened = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda f, **kw: opened.append(f.stem) or load(f, **kw))
    if newest < 2:
        with user_error("2 rows"):
            load_dataset(tmp_path, TINY, newest)
        return
    data = load_dataset(tmp_path, TINY, newest)
    n = min(newest, 20)
    assert data["vector"][:, 0].tolist() == list(range(20 - n, 20))
    assert data["is_first"][0]  # nothing says what came before
    assert sorted(set(opened)) == [f"{i:02d}" for i in range(3 - read, 3)]  # no older file


def test_newest_rows_of_one_file(tmp_path):
    save_dataset(tmp_path / "a.npz", random_rows(20))
    whole = load_dataset(tmp_path / "a.npz", TINY)
    part = load_dataset(tmp_path / "a.npz", TINY, 7)
    for key, value in part.items():
        assert np.array_equal(value[1:], whole[key][-6:]) and len(value) == 7
    assert part["is_first"].tolist() == [True] + [False] * 6


# ---- the other convention of actions


def many_episodes(n=5, T=8, last=0.0):
    """n episodes of T rows in our convention; the action of last rows is `last`"""
    rows = random_rows(n * T)
    t = np.arange(n * T) % T
    rows |= {"is_first": t == 0, "is_last": t == T - 1}
    rows["action"][t == T - 1] = last
    return rows


def as_leading(rows):
    """The same in the convention of DreamerV2: the action that LED to the row, 0 in first rows"""
    led = np.where(rows["is_first"][:, None], 0.0, np.roll(rows["action"], 1, 0))
    return rows | {"action": led.astype(np.float32)}


def test_actions_that_lead_are_refused_or_shifted(tmp_path):
    rows = many_episodes()
    save_dataset(tmp_path / "ours.npz", rows)
    save_dataset(tmp_path / "theirs.npz", as_leading(rows))
    with user_error("theirs.npz", "--actions-lead"):
        load_dataset(tmp_path / "theirs.npz", TINY)
    ours = load_dataset(tmp_path / "ours.npz", TINY)
    assert same(load_dataset(tmp_path / "theirs.npz", TINY, actions_lead=True), ours)


def test_actions_that_lead_in_chunks_and_of_the_newest_rows(tmp_path):
    rows = many_episodes()
    theirs = as_leading(rows)
    for i in range(5):
        part = {key: value[8 * i : 8 * i + 8] for key, value in theirs.items()}
        save_dataset(tmp_path / "theirs" / f"{i}.npz", part)
    save_dataset(tmp_path / "ours.npz", rows)
    for newest in (None, 20):
        ours = load_dataset(tmp_path / "ours.npz", TINY, newest)
        found = load_dataset(tmp_path / "theirs", TINY, newest, actions_lead=True)
        assert same(found, ours)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows,  # our convention
        lambda rows: rows | {"action": 0 * rows["action"]},  # nobody acts
        lambda rows: {k: v[:16] for k, v in as_leading(rows).items()},  # two episodes say little
    ],
)
def test_data_in_our_convention_is_not_refused(tmp_path, change):
    save_dataset(tmp_path / "a.npz", change(many_episodes(last=0.5)))
    load_dataset(tmp_path / "a.npz", TINY)


@pytest.mark.parametrize("share, factor, told", [(1.0, 2.0, True), (0.005, 9.0, False)])
def test_actions_in_other_units(tmp_path, capsys, share, factor, told):
    rows = random_rows(400)
    n = int(share * 400)
    rows["action"][:n] *= factor
    save_dataset(tmp_path / "a.npz", rows)
    assert same(load_dataset(tmp_path / "a.npz", TINY), rows)  # the models clip them
    out = capsys.readouterr().out
    assert ("warning: " in out and "units" in out) == told
    if told:
        outside = np.abs(rows["action"])[:, 0] > 1
        assert f"{outside.mean():.0%}" in out and f"{np.abs(rows['action']).max():.3g}" in out


# ---- what can't be read


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
    "a number": (lambda r: r.update(is_last=np.array(True)), "can't be read"),
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
        load_dataset(tmp_path / "a.npz", TINY)


def test_sizes_other_than_the_checkpoint_s(tmp_path):
    save_dataset(tmp_path / "a.npz", random_rows(6))
    for key, size in (
        ("image", {"image_size": 32}),
        ("image", {"channels": 1}),
        ("vector", {"vector_size": 3}),
        ("action", {"action_size": 2}),
    ):
        with user_error(key, "a.npz"):
            load_dataset(tmp_path / "a.npz", dataclasses.replace(TINY, **size))


def test_files_that_do_not_fit_each_other(tmp_path):
    rows = random_rows(6)
    save_dataset(tmp_path / "a.npz", rows)
    save_dataset(tmp_path / "b.npz", rows | {"vector": np.zeros((6, 3), np.float32)})
    with user_error("b.npz", "vector"):
        load_dataset(tmp_path, TINY)


def test_no_such_dataset(tmp_path):
    with user_error("nowhere"):
        load_dataset(tmp_path / "nowhere", TINY)
    with user_error(str(tmp_path)):  # an empty folder
        load_dataset(tmp_path, TINY)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path, share):
    save_dataset(tmp_path / "whole.npz", random_rows(6))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "part.npz").write_bytes(whole[: int(share * len(whole))])
    with user_error("part.npz"):
        load_dataset(tmp_path / "part.npz", TINY)


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
        load_dataset(tmp_path / "a.npz", TINY)


def test_dataset_can_not_run_code(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        **random_rows(1) | {"image": np.array([Booby(tmp_path / "ran")], dtype=object)},
    )
    with user_error("a.npz", "allow_pickle"):
        load_dataset(tmp_path / "a.npz", TINY)
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
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and not any(
        (tmp_path / "taken").iterdir()
    )


def filled_replay(rows, added, n_envs=2):
    """A replay whose rewards count the rows of an environment, and whose vectors tell the
    environment"""
    replay = Replay(rows, n_envs, TINY)
    fill(replay, added)
    return replay


def fill(replay, n, shift=0.0):
    n_envs = len(replay.data["reward"])
    no = np.zeros(n_envs, bool)
    for t in range(replay.added, replay.added + n):
        replay.add(
            image=np.full((n_envs, 16, 16, 3), t % 256, np.uint8),
            vector=np.arange(n_envs)[:, None] * np.ones((1, 2)),
            reward=np.full(n_envs, t + shift),
            action=np.full((n_envs, 1), t % 7),
            is_first=no | (t == 0),
            is_last=no,
            is_terminal=no,
        )


@pytest.mark.parametrize(
    "added", [12, 20, 37, 40]
)  # before the ring (20 rows for each environment) is full, full, and wrapped
def test_replay_samples_stretches_of_time(added):
    replay = filled_replay(40, added)
    assert len(replay) == min(added, 20)
    data = replay.sample(500, 5, "cpu")
    t = data["reward"]  # (500, 5)
    assert (t.diff(dim=1) == 1).all()  # contiguous, so never across the ring's head
    assert (data["vector"] == data["vector"][:, :1]).all()  # of one environment
    # Rows stay together.
    assert (data["image"][..., 0, 0, 0] == t).all() and (data["action"][..., 0] == t % 7).all()
    oldest = added - len(replay)
    # Every start that there is
    assert torch.equal(t[:, 0].unique(), torch.arange(oldest, added - 4.0))
    assert set(data["vector"][:, 0, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("added", [20, 37])  # before the ring has wrapped, and after it
@pytest.mark.parametrize("usual, unusual", [(0.0, 1.0), (0.0, -1.0), (-1.0, 0.0)])
def test_replay_draws_rewarded_sequences(added, usual, unusual):
    replay = filled_replay(40, added)
    time = replay.data["reward"].copy()  # (environments, rows of the ring)
    replay.data["action"][:] = time[..., None]
    replay.data["reward"][:] = usual
    replay.data["reward"][1, time[1] == added - 9] = unusual  # once, in the second environment
    data = replay.sample(400, 5, "cpu", rewarded=0.5)
    odd = data["reward"] != usual
    paid = odd.any(1)
    # 5 of 32 sequences of the rest hold it by chance.
    assert paid[:200].all() and 10 <= paid[200:].sum() <= 60
    # at any place of the sequence
    assert set(odd[:200].int().argmax(1).tolist()) == set(range(5))
    assert (data["action"].diff(dim=1) == 1).all()  # contiguous, so never across the ring's head
    replay.data["reward"][:] = usual
    # The 0 of first rows says nothing.
    replay.data["reward"][0, time[0] == added - 7] = unusual
    replay.data["is_first"][0, time[0] == added - 7] = True
    odd = (replay.sample(400, 5, "cpu", rewarded=1.0)["reward"] != usual).any(1)
    assert 20 <= odd.sum() <= 120  # by chance
    replay.data["reward"][:] = usual
    # As long as all rewards are the usual one: any sequence
    assert (replay.sample(400, 5, "cpu", rewarded=0.5)["reward"] == usual).all()


@pytest.mark.parametrize("added", [(10,), (4, 10), (10, 27), (7, 20, 21, 27), (30, 70)])
def test_replay_is_saved_as_chunks_of_new_rows(tmp_path, added):
    """After each save the files hold all rows of the ring, whole chunks of older ones maybe too; no
    file is written twice; the replay reads itself back."""
    replay = filled_replay(40, 0)
    written = {}
    for total in added:
        fill(replay, total - replay.added)
        replay.save(tmp_path)
        for file in tmp_path.iterdir():
            data = file.read_bytes()
            assert written.setdefault(file.name, data) == data
        rows = read_replay(tmp_path)
        n = len(rows["reward"]) // 2
        # One environment after the other, oldest first, up to the newest
        assert np.array_equal(rows["vector"][:, 0], np.repeat([0, 1], n))
        for reward in rows["reward"].reshape(2, n):
            assert (np.diff(reward) > 0).all()
            assert reward[-len(replay) :].tolist() == list(range(total - len(replay), total))
    largest = max(np.diff((0, *added)))
    assert n < len(replay) + 2 * largest  # what has left the ring is deleted, by whole files
    again = filled_replay(40, 0)
    again.load(tmp_path, replay.added)
    assert (again.added, len(again)) == (replay.added, len(replay))
    for key, value in replay.data.items():
        assert np.array_equal(value[:, : len(replay)], again.data[key][:, : len(replay)])
    data = load_dataset(tmp_path, TINY)
    assert len(data["is_first"]) == 2 * n


def test_rows_of_a_save_that_was_cut_short_are_written_anew(tmp_path):
    """Killed between the replay's files and the state: the run goes on from the older state, with
    other rows."""
    replay = filled_replay(1000, 140)
    replay.save(tmp_path)
    fill(replay, 20)
    replay.save(tmp_path)  # then the power fails
    replay = filled_replay(1000, 0)
    replay.load(tmp_path, 140)
    assert replay.added == 140
    fill(replay, 20, shift=1000.0)
    replay.save(tmp_path)
    expected = [*range(140), *range(1140, 1160)]
    assert read_replay(tmp_path)["reward"].tolist() == expected * 2


def test_a_save_that_was_cut_short_keeps_what_the_state_before_needs(tmp_path):
    """Killed after the replay's files, before the state: the run goes on with the rows that the
    ring held at the save before."""
    replay = filled_replay(40, 25)
    replay.save(tmp_path)
    fill(replay, 30)
    replay.save(tmp_path)  # then the power fails
    again = Replay(40, 2, TINY)
    again.data["reward"][:] = -1.0
    again.load(tmp_path, 25)
    assert sorted(again.data["reward"][0]) == list(range(5, 25))


def test_a_replay_of_fewer_rows_than_the_state_counts(tmp_path):
    """Of several processes one may have been killed before its save."""
    replay = filled_replay(1000, 50)
    replay.save(tmp_path)
    again = filled_replay(1000, 0)
    again.load(tmp_path, 80)
    assert again.added == 50 and again.sample(5, 4, "cpu")["reward"].max() < 50
