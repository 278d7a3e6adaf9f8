"""Checkpoints and datasets that a stage must refuse, and what it must say: tables of name ->
(function that makes the file's contents, words of the message)."""

import dataclasses
import io
import os
import pickle
import zipfile

import numpy as np
import torch
from helpers import TINY, tiny_checkpoint

from common import DRAW, Policy, Rectified

N = 60  # rows of the datasets


class Trap:
    """Unpickling one writes the file `path`: what a malicious file could do."""

    def __init__(self, path, shell=False):
        self.path, self.shell = str(path), shell

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",)) if self.shell else (open, (self.path, "w"))


# ---- checkpoints: name -> (function (folder) -> contents of the file, words of the message)


def adapted_checkpoint(**changes):
    rectified = Rectified(DRAW(TINY), "residual", hidden=8)
    return tiny_checkpoint(
        stage="redraw_adapt",
        **{"rectified": rectified.state_dict(), "rectified_options": rectified.options} | changes,
    )


def sizes(**changes):
    return dataclasses.asdict(TINY) | changes


def weights(change, name="posterior_net.0.weight"):
    """The state dict of a world model in which change(state dict, name) was done"""
    state = DRAW(TINY).state_dict()
    change(state, name)
    return state


def torch_bytes(contents, **options):
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


def zip_bytes(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


CHECKPOINTS = {
    "empty": (lambda F: b"", ["not a checkpoint"]),
    "text": (lambda F: b"these are no weights\n" * 99, ["not a checkpoint"]),
    "bytes": (lambda F: bytes(range(256)) * 9, ["not a checkpoint"]),
    "a zip of something else": (lambda F: zip_bytes(readme=b"hello"), ["not a checkpoint"]),
    "a dataset": (lambda F: (F / "data.npz").read_bytes(), ["not a checkpoint"]),
    "a tensor": (lambda F: torch_bytes(torch.zeros(3)), ["not a checkpoint"]),
    "a list": (lambda F: torch_bytes([1, 2]), ["not a checkpoint"]),
    "a number": (lambda F: torch_bytes(7), ["not a checkpoint"]),
    "a whole module": (lambda F: torch_bytes(torch.nn.Linear(2, 2)), ["not a checkpoint"]),
    "bare weights": (lambda F: torch_bytes(DRAW(TINY).state_dict()), ["not a checkpoint"]),
    "no stage": (lambda F: torch_bytes(tiny_checkpoint(stage=None)), ["not a checkpoint"]),
    "an unknown stage": (lambda F: torch_bytes(tiny_checkpoint(stage="dreamer")), ["dreamer"]),
    "a stage that is no text": (
        lambda F: torch_bytes(tiny_checkpoint(stage=[1, {}])),
        ["draw_pretrain.py"],
    ),
    "of another stage": (
        lambda F: (F / "policy.pt").read_bytes(),
        ["train_policy.py", "draw_pretrain.py"],
    ),
    "trap": (lambda F: torch_bytes(tiny_checkpoint(trap=Trap(F / "ran"))), ["not a checkpoint"]),
    "trap in the shell": (lambda F: torch_bytes(Trap(F / "ran", shell=True)), ["not a checkpoint"]),
    "trap in the old format": (
        lambda F: torch_bytes(Trap(F / "ran"), _use_new_zipfile_serialization=False),
        ["not a checkpoint"],
    ),
    "trap without torch": (lambda F: pickle.dumps(Trap(F / "ran")), ["not a checkpoint"]),
    "no world model": (lambda F: torch_bytes(tiny_checkpoint(draw=None)), ["'draw'"]),
    "a world model that is a list": (
        lambda F: torch_bytes(tiny_checkpoint(draw=[1, 2])),
        ["'draw'"],
    ),
    "a weight is missing": (
        lambda F: torch_bytes(tiny_checkpoint(draw=weights(lambda w, k: w.pop(k)))),
        ["posterior_net.0.weight"],
    ),
    "a weight too many": (
        lambda F: torch_bytes(tiny_checkpoint(draw=weights(lambda w, k: w.update(more=w[k])))),
        ["'draw'", "more"],
    ),
    "a weight of another shape": (
        lambda F: torch_bytes(tiny_checkpoint(draw=weights(lambda w, k: w.update({k: w[k].T})))),
        ["posterior_net.0.weight"],
    ),
    "a weight of another type": (
        lambda F: torch_bytes(
            tiny_checkpoint(draw=weights(lambda w, k: w.update({k: w[k].cfloat()})))
        ),
        ["posterior_net.0.weight"],
    ),
    "a weight that is a text": (
        lambda F: torch_bytes(tiny_checkpoint(draw=weights(lambda w, k: w.update({k: "0.5"})))),
        ["'draw'"],
    ),
    "a weight is NaN": (
        lambda F: torch_bytes(
            tiny_checkpoint(draw=weights(lambda w, k: w[k][0, 0].fill_(torch.nan)))
        ),
        ["finite", "posterior_net.0.weight"],
    ),
    "a weight is infinite": (
        lambda F: torch_bytes(tiny_checkpoint(draw=weights(lambda w, k: w[k].fill_(torch.inf)))),
        ["finite"],
    ),
    "no sizes": (lambda F: torch_bytes(tiny_checkpoint(sizes=None)), ["sizes"]),
    "sizes that are a list": (lambda F: torch_bytes(tiny_checkpoint(sizes=[16, 2])), ["sizes"]),
    "an unknown size": (lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(colour=3))), ["colour"]),
    "other sizes": (lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(units=17))), ["'draw'"]),
    "other image size": (
        lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(image_size=32))),
        ["'draw'"],
    ),
    "size of zero": (
        lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(vector_size=0))),
        ["'draw'"],
    ),
    "negative size": (lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(S=-3))), ["S can't be -3"]),
    "absurd size": (
        lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(vector_layers=10**12))),
        ["vector_layers"],
    ),
    "all memory": (
        lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(units=65536, S=65536))),
        ["'draw'"],
    ),
    "half a size": (lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(K=3.5))), ["K can't be 3.5"]),
    "a size that is a text": (
        lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(image_size="16"))),
        ["image_size"],
    ),
    "odd image size": (
        lambda F: torch_bytes(tiny_checkpoint(sizes=sizes(image_size=24))),
        ["image_size"],
    ),
    **{
        f"truncated to {share}": (
            lambda F, share=share: (F / "draw.pt").read_bytes()[
                : int(share * (F / "draw.pt").stat().st_size)
            ],
            ["not a checkpoint"],
        )
        for share in (0.001, 0.1, 0.5, 0.9, 0.999)
    },
}
ADAPTED = {  # for stage 3 only
    "no residual": (lambda F: torch_bytes(adapted_checkpoint(rectified=None)), ["'rectified'"]),
    "no options": (
        lambda F: torch_bytes(adapted_checkpoint(rectified_options=None)),
        ["'rectified'"],
    ),
    "unknown option": (
        lambda F: torch_bytes(adapted_checkpoint(rectified_options={"colour": 1})),
        ["colour"],
    ),
    "unknown method": (
        lambda F: torch_bytes(adapted_checkpoint(rectified_options={"method": "magic"})),
        ["magic"],
    ),
    "absurd layers": (
        lambda F: torch_bytes(
            adapted_checkpoint(rectified_options={"method": "residual", "layers": 10**12})
        ),
        ["layers"],
    ),
    "other hidden": (
        lambda F: torch_bytes(
            adapted_checkpoint(rectified_options={"method": "residual", "hidden": 9})
        ),
        ["'rectified'"],
    ),
    "no members": (
        lambda F: torch_bytes(
            adapted_checkpoint(rectified_options={"method": "residual", "hidden": 8, "members": 0})
        ),
        ["members"],
    ),
    "NaN in the residual": (
        lambda F: torch_bytes(
            adapted_checkpoint(
                rectified={
                    k: v * torch.nan
                    for k, v in Rectified(DRAW(TINY), "residual", hidden=8).state_dict().items()
                }
            )
        ),
        ["finite"],
    ),
}


# ---- datasets: name -> (function (rows, folder) -> contents of the file, words of the message)


def npz_bytes(rows):
    file = io.BytesIO()
    np.savez(file, **rows)
    return file.getvalue()


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def with_value(row, key, value, dtype=None):
    """Rows in which one number was changed"""
    array = row[key].astype(dtype or row[key].dtype)
    array.flat[array[0].size * 4] = value  # the first number of row 4
    return npz_bytes(row | {key: array})


def trap_array(F):
    return np.array([Trap(F / "ran")] * N, dtype=object)


DATASETS = {
    "empty": (lambda r, F: b"", ["can't be read"]),
    "text": (lambda r, F: b"no arrays\n" * 99, ["can't be read"]),
    "a zip of something else": (lambda r, F: zip_bytes(readme=b"hello"), ["lacks"]),
    "a zip of texts": (
        lambda r, F: zip_bytes(**{f"{k}.npy": b"no array" for k in r}),
        ["can't be read"],
    ),
    "a checkpoint": (lambda r, F: (F / "draw.pt").read_bytes(), ["lacks"]),
    "one array": (lambda r, F: npy_bytes(r["image"]), ["can't be read"]),
    "trap": (
        lambda r, F: npz_bytes(r | {"image": trap_array(F)}),
        ["can't be read", "allow_pickle"],
    ),
    "trap in the flags": (
        lambda r, F: npz_bytes(r | {"is_first": trap_array(F)}),
        ["can't be read", "allow_pickle"],
    ),
    "trap as an array": (lambda r, F: npy_bytes(trap_array(F)), ["can't be read"]),
    "trap as a pickle": (lambda r, F: pickle.dumps(Trap(F / "ran")), ["can't be read"]),
    "a header that lies": (
        lambda r, F: zip_bytes(
            **{f"{k}.npy": npy_bytes(v).replace(b"(60,", b"(6**") for k, v in r.items()}
        ),
        ["can't be read"],
    ),
    "more rows than there are": (
        lambda r, F: zip_bytes(
            **{f"{k}.npy": npy_bytes(v).replace(b"(60,", b"(99,") for k, v in r.items()}
        ),
        ["can't be read"],
    ),
    "more rows than memory": (
        lambda r, F: zip_bytes(
            **{f"{k}.npy": npy_bytes(v).replace(b"(60,", b"(99999999999999,") for k, v in r.items()}
        ),
        ["can't be read"],
    ),
    "no rows": (lambda r, F: npz_bytes({k: v[:0] for k, v in r.items()}), ["2 rows"]),
    "one row": (lambda r, F: npz_bytes({k: v[:1] for k, v in r.items()}), ["2 rows"]),
    "no arrays": (lambda r, F: npz_bytes({}), ["lacks", "nothing of use"]),
    **{
        f"no {key}": (
            lambda r, F, key=key: npz_bytes({k: v for k, v in r.items() if k != key}),
            ["lacks", key],
        )
        for key in ("image", "vector", "action", "is_first")
    },
    "float images": (lambda r, F: npz_bytes(r | {"image": r["image"] / 255.0}), ["image", "uint8"]),
    "signed images": (
        lambda r, F: npz_bytes(r | {"image": r["image"].astype(np.int16)}),
        ["image", "uint8"],
    ),
    "gray images": (lambda r, F: npz_bytes(r | {"image": r["image"][..., 0]}), ["image"]),
    "four channels": (
        lambda r, F: npz_bytes(r | {"image": r["image"][..., [0, 1, 2, 2]]}),
        ["image"],
    ),
    "channels first": (
        lambda r, F: npz_bytes(r | {"image": r["image"].transpose(0, 3, 1, 2)}),
        ["image"],
    ),
    "oblong images": (lambda r, F: npz_bytes(r | {"image": r["image"][:, :8]}), ["image"]),
    "empty images": (lambda r, F: npz_bytes(r | {"image": r["image"][:, :0, :0]}), ["image"]),
    "images of another size": (
        lambda r, F: npz_bytes(r | {"image": r["image"].repeat(2, 1).repeat(2, 2)}),
        ["image", "(60, 16, 16, 3)"],
    ),
    "flat vector": (lambda r, F: npz_bytes(r | {"vector": r["vector"][:, 0]}), ["vector"]),
    "empty vector": (lambda r, F: npz_bytes(r | {"vector": r["vector"][:, :0]}), ["vector"]),
    "vector of another size": (
        lambda r, F: npz_bytes(r | {"vector": r["vector"][:, [0, 1, 1]]}),
        ["vector", "(60, 2)"],
    ),
    "vector of texts": (
        lambda r, F: npz_bytes(r | {"vector": r["vector"].astype(str)}),
        ["vector"],
    ),
    "vector of times": (
        lambda r, F: npz_bytes(r | {"vector": r["vector"].astype("m8[s]")}),
        ["vector"],
    ),
    "complex vector": (
        lambda r, F: npz_bytes(r | {"vector": r["vector"].astype(complex)}),
        ["vector", "complex"],
    ),
    "NaN in the vector": (lambda r, F: with_value(r, "vector", np.nan), ["vector", "row 4"]),
    "infinity in the vector": (lambda r, F: with_value(r, "vector", -np.inf), ["vector", "row 4"]),
    "too large for float32": (
        lambda r, F: with_value(r, "vector", 1e300, np.float64),
        ["vector", "row 4"],
    ),
    "actions of another size": (
        lambda r, F: npz_bytes(r | {"action": r["action"][:, [0, 0]]}),
        ["action", "(60, 1)"],
    ),
    "flat actions": (lambda r, F: npz_bytes(r | {"action": r["action"][:, 0]}), ["action"]),
    "numbered actions": (lambda r, F: npz_bytes(r | {"action": np.zeros(N, np.int64)}), ["action"]),
    "NaN in the actions": (lambda r, F: with_value(r, "action", np.nan), ["action", "row 4"]),
    "infinity in the actions": (lambda r, F: with_value(r, "action", np.inf), ["action", "row 4"]),
    "NaN in the flags": (
        lambda r, F: with_value(r, "is_last", np.nan, np.float32),
        ["is_last", "row 4"],
    ),
    "flags as texts": (
        lambda r, F: npz_bytes(r | {"is_first": r["is_first"].astype(str)}),
        ["is_first"],
    ),
    "one flag for all": (
        lambda r, F: npz_bytes(r | {"is_first": np.array(True)}),
        ["can't be read"],
    ),
    "flags in a table": (
        lambda r, F: npz_bytes(r | {"is_terminal": r["is_terminal"][:, None]}),
        ["is_terminal"],
    ),
    "records": (
        lambda r, F: npz_bytes(r | {"action": np.zeros(N, [("left", "f4"), ("right", "f4")])}),
        ["action"],
    ),
    "actions too few": (
        lambda r, F: npz_bytes(r | {"action": r["action"][:-1]}),
        ["action", "(60, 1)", "(59, 1)"],
    ),
    "images too few": (
        lambda r, F: npz_bytes(r | {"image": r["image"][:-1]}),
        ["image", "(60, 16, 16, 3)", "(59, 16, 16, 3)"],
    ),
    **{
        f"truncated to {share}": (
            lambda r, F, share=share: npz_bytes(r)[: int(share * len(npz_bytes(r)))],
            ["can't be read"],
        )
        for share in (0.001, 0.1, 0.5, 0.9, 0.999)
    },
    "a damaged byte": (
        lambda r, F: npz_bytes(r).replace(r["image"].tobytes()[5000:5009], b"\0" * 9),
        ["can't be read"],
    ),
}


def file_name(kind, name):
    return f"{kind}-{name}{'.npz' if kind == 'dataset' else '.pt'}".replace(" ", "-")


def write_files(folder, kind, table, *args):
    for name, (make, _) in table.items():
        (folder / file_name(kind, name)).write_bytes(make(*args))


def policy_checkpoint(of=TINY, factor=1.0):
    return {
        "stage": "train_policy",
        "args": {},
        "sizes": dataclasses.asdict(of),
        "policy": {k: v * factor for k, v in Policy(of).state_dict().items()},
    }
