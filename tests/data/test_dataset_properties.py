"""The reader of datasets against data and damage that nobody thought of."""

import io
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import UserError, load_dataset, save_dataset

# The same examples each time, so that a test that passed does not fail on another day
modest = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

NDIMS = {
    "image": 4,
    "vector": 2,
    "action": 2,
    "reward": 1,
    "is_first": 1,
    "is_last": 1,
    "is_terminal": 1,
}
DTYPES = {"image": np.uint8, "vector": np.float32, "action": np.float32, "reward": np.float32} | {
    k: np.bool_ for k in ("is_first", "is_last", "is_terminal")
}


@st.composite
def chunks(draw, count):
    """`count` valid datasets of one kind: the same sizes and keys, any number of rows"""
    L, V, A = (draw(st.integers(1, n)) for n in (6, 4, 3))
    missing = draw(st.sets(st.sampled_from(["reward", "is_last", "is_terminal"])))
    vector_dtype = draw(st.sampled_from([np.float16, np.float32, np.float64, np.int32]))
    flag_dtype = draw(st.sampled_from([np.bool_, np.uint8, np.float32]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1.0, 1e4]))
    parts = []
    for _ in range(count):
        n = draw(st.integers(2, 9))
        rows = {
            "image": rng.integers(0, 256, (n, L, L, 3), np.uint8),
            "vector": (scale * rng.normal(size=(n, V))).astype(vector_dtype),
            "action": rng.uniform(-1, 1, (n, A)).astype(np.float32),
            "reward": rng.normal(size=n),
            **{
                k: (rng.random(n) < 0.3).astype(flag_dtype)
                for k in ("is_first", "is_last", "is_terminal")
            },
        }
        parts.append({k: v for k, v in rows.items() if k not in missing})
    return parts


def check_valid(data):
    """What every reader of a dataset counts on"""
    n, L = len(data["is_first"]), data["image"].shape[1]
    assert {"image", "vector", "action", "is_first", "is_last", "is_terminal"} <= set(data) <= set(
        NDIMS
    ) and n >= 2
    for key, value in data.items():
        assert (
            value.dtype == DTYPES[key]
            and value.ndim == NDIMS[key]
            and len(value) == n
            and value.size
            and np.isfinite(value).all()
        )
    assert data["image"].shape == (n, L, L, 3) and data["is_first"][0]
    assert not (data["is_last"][:-1] & ~data["is_first"][1:]).any()  # a reset follows an end


def check_same(data, parts):
    """The loaded data are the parts, one after the other"""
    check_valid(data)
    start = 0
    for rows in parts:
        n = len(rows["is_first"])
        got = {k: v[start : start + n] for k, v in data.items()}
        for key in ("image", "vector", "action", "reward", "is_last", "is_terminal"):
            if key in rows:
                assert np.array_equal(got[key], rows[key].astype(DTYPES[key]))
            elif key != "reward":
                assert not got[key].any()
        last = got["is_last"][:-1]
        assert np.array_equal(
            got["is_first"], rows["is_first"].astype(bool) | np.append(True, last)
        )
        start += n
    assert start == len(data["is_first"]) and ("reward" in data) == ("reward" in parts[0])


@modest
@given(chunks(1))
def test_any_dataset_comes_back(parts):
    with tempfile.TemporaryDirectory() as folder:
        save_dataset(Path(folder) / "a.npz", parts[0])
        check_same(load_dataset(Path(folder) / "a.npz"), parts)


@modest
@given(st.integers(1, 4).flatmap(chunks))
def test_any_folder_of_chunks_comes_back(parts):
    with tempfile.TemporaryDirectory() as folder:
        for i, rows in enumerate(parts):
            save_dataset(Path(folder) / f"{i:03d}.npz", rows)
        check_same(load_dataset(folder), parts)


def load_or_refuse(data):
    """The file `data` either is a valid dataset or ends in one line; no other exception ever"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(data)
        try:
            loaded = load_dataset(path)
        except UserError as e:
            assert str(e).startswith("error: ") and "\n" not in str(e) and "a.npz" in str(e)
        else:
            check_valid(loaded)
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
def test_any_damage_is_read_or_refused(parts, compressed, data):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **parts[0])
    whole = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    start, end = sorted(
        data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole))))
    )
    cut = data.draw(st.sampled_from(["nothing", "the end", "the middle"]))
    load_or_refuse(
        bytes(
            whole
            if cut == "nothing"
            else whole[:start]
            if cut == "the end"
            else whole[:start] + whole[end:]
        )
    )


@modest
@given(chunks(1), st.sampled_from(sorted(NDIMS)), st.data())
def test_any_array_in_any_place_is_read_or_refused(parts, key, data):
    """A valid dataset, one of whose arrays has another type, another shape, or special numbers in
    it"""
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
    load_or_refuse(file.getvalue())
