"""The reader of datasets against data and damage that nobody thought of."""

import io
import tempfile
from pathlib import Path

import numpy as np
from helpers import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import Sizes, UserError, load_dataset, save_dataset

# The same examples each time, so that a test that passed does not fail on another day
modest = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

NDIMS = {"image": 4, "vector": 2, "action": 2, "is_first": 1, "is_last": 1, "is_terminal": 1}
DTYPES = {"image": np.uint8, "vector": np.float32, "action": np.float32}
FLAGS = ("is_first", "is_last", "is_terminal")
DTYPES |= dict.fromkeys(FLAGS, np.bool_)


@st.composite
def chunks(draw, count):
    """`count` valid datasets of one kind, the same sizes and keys, any number of rows; their
    Sizes"""
    C, A = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    V = draw(st.integers(0, 4))
    missing = draw(st.sets(st.sampled_from(["reward", "is_last", "is_terminal"])))
    vector_dtype = draw(st.sampled_from([np.float16, np.float32, np.float64, np.int32]))
    flag_dtype = draw(st.sampled_from([np.bool_, np.uint8, np.float32]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1.0, 1e4]))
    parts = []
    for _ in range(count):
        n = draw(st.integers(2, 9))
        rows = {
            "image": rng.integers(0, 256, (n, 16, 16, C), np.uint8),
            "vector": (scale * rng.normal(size=(n, V))).astype(vector_dtype),
            "action": rng.uniform(-1, 1, (n, A)).astype(np.float32),
            "reward": rng.normal(size=n),
            **{key: (rng.random(n) < 0.3).astype(flag_dtype) for key in FLAGS},
        }
        parts.append({k: v for k, v in rows.items() if k not in missing})
    return parts, Sizes(image_size=16, channels=C, vector_size=V, action_size=A)


def check_valid(data, sizes):
    """What every reader of a dataset counts on"""
    n = len(data["is_first"])
    assert set(data) == set(NDIMS) and n >= 2
    for key, value in data.items():
        assert value.dtype == DTYPES[key] and value.ndim == NDIMS[key] and len(value) == n
        assert np.isfinite(value).all()
    assert data["image"].shape == (n, 16, 16, sizes.channels) and data["is_first"][0]
    ended = data["is_last"] | data["is_terminal"]
    assert not (ended[:-1] & ~data["is_first"][1:]).any()  # a reset follows an end


def check_same(data, parts, sizes):
    """The loaded data are the parts, one after the other"""
    check_valid(data, sizes)
    start = 0
    for rows in parts:
        n = len(rows["is_first"])
        got = {k: v[start : start + n] for k, v in data.items()}
        for key in ("image", "vector", "action", "is_last", "is_terminal"):
            if key in rows:
                assert np.array_equal(got[key], rows[key].astype(DTYPES[key]))
            else:
                assert not got[key].any()
        after = np.append(True, (got["is_last"] | got["is_terminal"])[:-1])
        assert np.array_equal(got["is_first"], rows["is_first"].astype(bool) | after)
        start += n
    assert start == len(data["is_first"])


@modest
@given(st.integers(1, 4).flatmap(chunks))
def test_any_folder_of_chunks_comes_back(case):
    parts, sizes = case
    with tempfile.TemporaryDirectory() as folder:
        for i, rows in enumerate(parts):
            save_dataset(Path(folder) / f"{i:03d}.npz", rows)
        check_same(load_dataset(folder, sizes), parts, sizes)
        check_same(load_dataset(f"{folder}/000.npz", sizes), parts[:1], sizes)


@modest
@given(st.integers(1, 4).flatmap(chunks), st.integers(2, 40))
def test_newest_rows_are_the_end_of_all(case, newest):
    parts, sizes = case
    with tempfile.TemporaryDirectory() as folder:
        for i, rows in enumerate(parts):
            save_dataset(Path(folder) / f"{i:03d}.npz", rows)
        whole, part = load_dataset(folder, sizes), load_dataset(folder, sizes, newest)
        n = min(newest, len(whole["is_first"]))
        for key, value in part.items():
            assert len(value) == n and np.array_equal(value[1:], whole[key][-n:][1:])
        assert part["is_first"][0]


def load_or_refuse(data, sizes=TINY):
    """The file `data` either is a valid dataset or ends in one line; no other exception ever"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(data)
        try:
            loaded = load_dataset(path, sizes)
        except UserError as e:
            assert str(e).startswith("error: ") and "\n" not in str(e) and "a.npz" in str(e)
        else:
            check_valid(loaded, sizes)
        assert path.read_bytes() == data and len(list(Path(folder).iterdir())) == 1


@modest
@given(
    st.one_of(
        st.binary(max_size=400),
        st.binary(max_size=200).map(b"PK\x03\x04".__add__),
        st.binary(max_size=200).map(b"\x93NUMPY".__add__),
    )
)
def test_any_bytes_are_read_or_refused(data):
    load_or_refuse(data)


@modest
@given(chunks(1), st.booleans(), st.data())
def test_any_damage_is_read_or_refused(case, compressed, data):
    parts, sizes = case
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **parts[0])
    whole = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    start, end = sorted(
        data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole))))
    )
    cut = data.draw(st.sampled_from(["nothing", "the end", "the middle"]))
    if cut == "the end":
        whole = whole[:start]
    if cut == "the middle":
        whole = whole[:start] + whole[end:]
    load_or_refuse(bytes(whole), sizes)


@modest
@given(chunks(1), st.sampled_from(sorted(NDIMS)), st.data())
def test_any_array_in_any_place_is_read_or_refused(case, key, data):
    """A valid dataset, one of whose arrays has another type, another shape, or special numbers in
    it"""
    parts, sizes = case
    n = len(parts[0]["is_first"])
    dtype = data.draw(
        st.sampled_from(
            ["f4", "f8", "f2", "u1", "i8", "?", "c8", "U3", "S2", "M8[s]", "f4,i2", ">f4", ">i2"]
        )
    )
    shape = data.draw(
        st.one_of(
            st.just(np.shape(parts[0].get(key, np.zeros(n)))),
            st.lists(st.integers(0, 4), max_size=5).map(tuple),
        )
    )
    array = np.zeros(shape, dtype)
    if array.dtype.kind in "fc" and array.size:
        array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(
            st.sampled_from([np.nan, np.inf, -np.inf, 6e4])
        )
    file = io.BytesIO()
    np.savez(file, **parts[0] | {key: array})
    load_or_refuse(file.getvalue(), sizes)
