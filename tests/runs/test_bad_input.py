"""Everything that can be wrong with flags, checkpoints, datasets and environments: one line, and no file is touched.

Each case is tried twice, in a new run folder and, with --overwrite, in one that holds a run: neither may change anything.
"""

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # noqa: F401 (before a test gives its rights away: see `unprivileged`)
import tyro
from helpers import TINY, random_rows, save_tiny_draw
from test_pipeline import ADAPT, POLICY, PRETRAIN, metric, run

import draw_pretrain
import redraw_adapt
import train_policy
from common import DRAW, Policy, load_checkpoint, load_dataset, load_policy, save_checkpoint, save_dataset
from redraw_adapt import Rectified

N = 60  # rows of the datasets
TARGET = "--target-env-id toy_env:ToyReversed-v0 --collect-policy random"
STAGES = {
    "pretrain": (draw_pretrain, [*PRETRAIN, "--env-id", "toy_env:Toy-v0"]),
    "adapt": (redraw_adapt, [*ADAPT, "--checkpoint", "{F}/draw.pt", "--dataset", "{F}/data.npz"]),
    "collect": (redraw_adapt, [*ADAPT, "--checkpoint", "{F}/draw.pt"]),
    "policy": (train_policy, [*POLICY, "--checkpoint", "{F}/draw.pt", "--dataset", "{F}/data.npz"]),
}


class Trap:
    """Unpickling one writes the file `path`: what a malicious file could do."""

    def __init__(self, path, shell=False):
        self.path, self.shell = str(path), shell

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",)) if self.shell else (open, (self.path, "w"))


# ---- checkpoints: name -> (function (folder) -> contents of the file, words of the message)


def draw_checkpoint(**changes):
    """What stage 1 saves, changed; a key whose value is None is left out"""
    whole = {"stage": "draw_pretrain", "args": {}, "sizes": dataclasses.asdict(TINY), "draw": DRAW(TINY).state_dict(), "updates": 0}
    return {k: v for k, v in (whole | changes).items() if v is not None}


def adapted_checkpoint(**changes):
    rectified = Rectified(DRAW(TINY), "residual", hidden=8)
    return draw_checkpoint(stage="redraw_adapt", **{"rectified": rectified.state_dict(), "rectified_options": rectified.options} | changes)


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
    "no stage": (lambda F: torch_bytes(draw_checkpoint(stage=None)), ["not a checkpoint"]),
    "an unknown stage": (lambda F: torch_bytes(draw_checkpoint(stage="dreamer")), ["dreamer"]),
    "a stage that is no text": (lambda F: torch_bytes(draw_checkpoint(stage=[1, {}])), ["draw_pretrain.py"]),
    "of another stage": (lambda F: (F / "policy.pt").read_bytes(), ["train_policy.py", "draw_pretrain.py"]),
    "trap": (lambda F: torch_bytes(draw_checkpoint(trap=Trap(F / "ran"))), ["not a checkpoint"]),
    "trap in the shell": (lambda F: torch_bytes(Trap(F / "ran", shell=True)), ["not a checkpoint"]),
    "trap in the old format": (lambda F: torch_bytes(Trap(F / "ran"), _use_new_zipfile_serialization=False), ["not a checkpoint"]),
    "trap without torch": (lambda F: pickle.dumps(Trap(F / "ran")), ["not a checkpoint"]),
    "no world model": (lambda F: torch_bytes(draw_checkpoint(draw=None)), ["'draw'"]),
    "a world model that is a list": (lambda F: torch_bytes(draw_checkpoint(draw=[1, 2])), ["'draw'"]),
    "a weight is missing": (lambda F: torch_bytes(draw_checkpoint(draw=weights(lambda w, k: w.pop(k)))), ["posterior_net.0.weight"]),
    "a weight too many": (lambda F: torch_bytes(draw_checkpoint(draw=weights(lambda w, k: w.update(more=w[k])))), ["'draw'", "more"]),
    "a weight of another shape": (lambda F: torch_bytes(draw_checkpoint(draw=weights(lambda w, k: w.update({k: w[k].T})))), ["posterior_net.0.weight"]),
    "a weight of another type": (lambda F: torch_bytes(draw_checkpoint(draw=weights(lambda w, k: w.update({k: w[k].cfloat()})))), ["posterior_net.0.weight"]),
    "a weight that is a text": (lambda F: torch_bytes(draw_checkpoint(draw=weights(lambda w, k: w.update({k: "0.5"})))), ["'draw'"]),
    "a weight is NaN": (lambda F: torch_bytes(draw_checkpoint(draw=weights(lambda w, k: w[k][0, 0].fill_(torch.nan)))), ["finite", "posterior_net.0.weight"]),
    "a weight is infinite": (lambda F: torch_bytes(draw_checkpoint(draw=weights(lambda w, k: w[k].fill_(torch.inf)))), ["finite"]),
    "no sizes": (lambda F: torch_bytes(draw_checkpoint(sizes=None)), ["sizes"]),
    "sizes that are a list": (lambda F: torch_bytes(draw_checkpoint(sizes=[16, 2])), ["sizes"]),
    "an unknown size": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(colour=3))), ["colour"]),
    "other sizes": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(units=17))), ["sizes"]),
    "other image size": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(image_size=32))), ["sizes"]),
    "size of zero": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(vector_size=0))), ["vector_size"]),
    "negative size": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(S=-3))), ["S can't be -3"]),
    "absurd size": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(vector_layers=10**12))), ["vector_layers"]),
    "all memory": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(units=65536, S=65536))), ["sizes"]),
    "half a size": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(K=3.5))), ["K can't be 3.5"]),
    "a size that is a text": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(image_size="16"))), ["image_size"]),
    "odd image size": (lambda F: torch_bytes(draw_checkpoint(sizes=sizes(image_size=24))), ["image_size"]),
    **{
        f"truncated to {share}": (lambda F, share=share: (F / "draw.pt").read_bytes()[: int(share * (F / "draw.pt").stat().st_size)], ["not a checkpoint"])
        for share in (0.001, 0.1, 0.5, 0.9, 0.999)
    },
}
ADAPTED = {  # for stage 3 only
    "no residual": (lambda F: torch_bytes(adapted_checkpoint(rectified=None)), ["'rectified'"]),
    "no options": (lambda F: torch_bytes(adapted_checkpoint(rectified_options=None)), ["rectified_options"]),
    "unknown option": (lambda F: torch_bytes(adapted_checkpoint(rectified_options={"colour": 1})), ["colour"]),
    "unknown method": (lambda F: torch_bytes(adapted_checkpoint(rectified_options={"method": "magic"})), ["magic"]),
    "absurd layers": (lambda F: torch_bytes(adapted_checkpoint(rectified_options={"method": "residual", "layers": 10**12})), ["layers"]),
    "other hidden": (lambda F: torch_bytes(adapted_checkpoint(rectified_options={"method": "residual", "hidden": 9})), ["'rectified'"]),
    "no members": (lambda F: torch_bytes(adapted_checkpoint(rectified_options={"method": "residual", "hidden": 8, "members": 0})), ["members"]),
    "NaN in the residual": (
        lambda F: torch_bytes(adapted_checkpoint(rectified={k: v * torch.nan for k, v in Rectified(DRAW(TINY), "residual", hidden=8).state_dict().items()})),
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
    "a zip of texts": (lambda r, F: zip_bytes(**{f"{k}.npy": b"no array" for k in r}), ["2 rows"]),
    "a checkpoint": (lambda r, F: (F / "draw.pt").read_bytes(), ["lacks"]),
    "one array": (lambda r, F: npy_bytes(r["image"]), ["can't be read"]),
    "trap": (lambda r, F: npz_bytes(r | {"image": trap_array(F)}), ["can't be read", "allow_pickle"]),
    "trap in the flags": (lambda r, F: npz_bytes(r | {"is_first": trap_array(F)}), ["can't be read", "allow_pickle"]),
    "trap as an array": (lambda r, F: npy_bytes(trap_array(F)), ["can't be read"]),
    "trap as a pickle": (lambda r, F: pickle.dumps(Trap(F / "ran")), ["can't be read"]),
    "a header that lies": (lambda r, F: zip_bytes(**{f"{k}.npy": npy_bytes(v).replace(b"(60,", b"(6**") for k, v in r.items()}), ["can't be read"]),
    "more rows than there are": (lambda r, F: zip_bytes(**{f"{k}.npy": npy_bytes(v).replace(b"(60,", b"(99,") for k, v in r.items()}), ["can't be read"]),
    "more rows than memory": (
        lambda r, F: zip_bytes(**{f"{k}.npy": npy_bytes(v).replace(b"(60,", b"(99999999999999,") for k, v in r.items()}), ["can't be read"]
    ),
    "no rows": (lambda r, F: npz_bytes({k: v[:0] for k, v in r.items()}), ["2 rows"]),
    "one row": (lambda r, F: npz_bytes({k: v[:1] for k, v in r.items()}), ["2 rows"]),
    "no arrays": (lambda r, F: npz_bytes({}), ["lacks", "nothing of use"]),
    **{f"no {key}": (lambda r, F, key=key: npz_bytes({k: v for k, v in r.items() if k != key}), ["lacks", key]) for key in ("image", "vector", "action", "is_first")},
    "float images": (lambda r, F: npz_bytes(r | {"image": r["image"] / 255.0}), ["image", "uint8"]),
    "signed images": (lambda r, F: npz_bytes(r | {"image": r["image"].astype(np.int16)}), ["image", "uint8"]),
    "gray images": (lambda r, F: npz_bytes(r | {"image": r["image"][..., 0]}), ["image"]),
    "four channels": (lambda r, F: npz_bytes(r | {"image": r["image"][..., [0, 1, 2, 2]]}), ["image"]),
    "channels first": (lambda r, F: npz_bytes(r | {"image": r["image"].transpose(0, 3, 1, 2)}), ["image"]),
    "oblong images": (lambda r, F: npz_bytes(r | {"image": r["image"][:, :8]}), ["image"]),
    "empty images": (lambda r, F: npz_bytes(r | {"image": r["image"][:, :0, :0]}), ["image"]),
    "images of another size": (lambda r, F: npz_bytes(r | {"image": r["image"].repeat(2, 1).repeat(2, 2)}), ["image", "(60, 16, 16, 3)"]),
    "flat vector": (lambda r, F: npz_bytes(r | {"vector": r["vector"][:, 0]}), ["vector"]),
    "empty vector": (lambda r, F: npz_bytes(r | {"vector": r["vector"][:, :0]}), ["vector"]),
    "vector of another size": (lambda r, F: npz_bytes(r | {"vector": r["vector"][:, [0, 1, 1]]}), ["vector", "(60, 2)"]),
    "vector of texts": (lambda r, F: npz_bytes(r | {"vector": r["vector"].astype(str)}), ["vector"]),
    "vector of times": (lambda r, F: npz_bytes(r | {"vector": r["vector"].astype("m8[s]")}), ["vector"]),
    "complex vector": (lambda r, F: npz_bytes(r | {"vector": r["vector"].astype(complex)}), ["vector", "complex"]),
    "NaN in the vector": (lambda r, F: with_value(r, "vector", np.nan), ["vector", "row 4"]),
    "infinity in the vector": (lambda r, F: with_value(r, "vector", -np.inf), ["vector", "row 4"]),
    "too large for float32": (lambda r, F: with_value(r, "vector", 1e300, np.float64), ["vector", "row 4"]),
    "actions of another size": (lambda r, F: npz_bytes(r | {"action": r["action"][:, [0, 0]]}), ["action", "(60, 1)"]),
    "flat actions": (lambda r, F: npz_bytes(r | {"action": r["action"][:, 0]}), ["action"]),
    "numbered actions": (lambda r, F: npz_bytes(r | {"action": np.zeros(N, np.int64)}), ["action"]),
    "NaN in the actions": (lambda r, F: with_value(r, "action", np.nan), ["action", "row 4"]),
    "infinity in the actions": (lambda r, F: with_value(r, "action", np.inf), ["action", "row 4"]),
    "NaN in the rewards": (lambda r, F: with_value(r | {"reward": np.zeros(N, np.float32)}, "reward", np.nan), ["reward", "row 4"]),
    "NaN in the flags": (lambda r, F: with_value(r, "is_last", np.nan, np.float32), ["is_last", "row 4"]),
    "flags as texts": (lambda r, F: npz_bytes(r | {"is_first": r["is_first"].astype(str)}), ["is_first"]),
    "one flag for all": (lambda r, F: npz_bytes(r | {"is_first": np.array(True)}), ["is_first"]),
    "flags in a table": (lambda r, F: npz_bytes(r | {"is_terminal": r["is_terminal"][:, None]}), ["is_terminal"]),
    "records": (lambda r, F: npz_bytes(r | {"action": np.zeros(N, [("left", "f4"), ("right", "f4")])}), ["action"]),
    "actions too few": (lambda r, F: npz_bytes(r | {"action": r["action"][:-1]}), ["action", "(60, 1)", "(59, 1)"]),
    "images too few": (lambda r, F: npz_bytes(r | {"image": r["image"][:-1]}), ["image", "(60, 16, 16, 3)", "(59, 16, 16, 3)"]),
    "rewards too many": (lambda r, F: npz_bytes(r | {"reward": np.zeros(N + 1)}), ["reward", "(60,)", "(61,)"]),
    **{
        f"truncated to {share}": (lambda r, F, share=share: npz_bytes(r)[: int(share * len(npz_bytes(r)))], ["can't be read"])
        for share in (0.001, 0.1, 0.5, 0.9, 0.999)
    },
    "a damaged byte": (lambda r, F: npz_bytes(r).replace(r["image"].tobytes()[5000:5009], b"\0" * 9), ["can't be read"]),
}


def file_name(kind, name):
    return f"{kind}-{name}{'.npz' if kind == 'dataset' else '.pt'}".replace(" ", "-")


def write_files(folder, kind, table, *args):
    for name, (make, _) in table.items():
        (folder / file_name(kind, name)).write_bytes(make(*args))


def policy_checkpoint(of=TINY, factor=1.0):
    return {"stage": "train_policy", "args": {}, "sizes": dataclasses.asdict(of), "policy": {k: v * factor for k, v in Policy(of).state_dict().items()}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one good file of each kind, two runs, and every bad file"""
    F = tmp_path_factory.mktemp("files")
    rows = random_rows(N)
    save_tiny_draw(F / "draw.pt")
    save_dataset(F / "data.npz", rows)
    save_checkpoint(F / "policy.pt", **policy_checkpoint())
    save_checkpoint(F / "adapted.pt", **adapted_checkpoint())
    save_checkpoint(F / "no-actors.pt", **draw_checkpoint())
    save_checkpoint(F / "wide-policy.pt", **policy_checkpoint(dataclasses.replace(TINY, vector_size=9)))
    save_checkpoint(F / "NaN-policy.pt", **policy_checkpoint(factor=torch.nan))
    write_files(F, "checkpoint", CHECKPOINTS | ADAPTED, F)
    write_files(F, "dataset", DATASETS, rows, F)
    for run_dir in ("old", "half"):  # half: of a run that was killed, or whatever else is in a folder
        save_dataset(F / run_dir / "replay" / "env000-00000.npz", random_rows(6))
        for name in ("draw.pt", "best.pt", "dataset.npz", "metrics.csv", "result.json", "events.out.tfevents.1"):
            (F / run_dir / name).write_text(f"what an hour of training made: {name}")
    (F / "old" / "args.json").write_text("{}")
    (F / "empty-folder").mkdir()
    for name, second in (("bad-chunk", b"not a chunk"), ("other-chunk", npz_bytes(random_rows(6, dataclasses.replace(TINY, vector_size=5))))):
        save_dataset(F / name / "0.npz", random_rows(6))
        (F / name / "1.npz").write_bytes(second)
    (F / "folder-of-folders" / "0.npz").mkdir(parents=True)
    save_dataset(F / "one-episode.npz", rows | {"is_first": np.arange(N) == 0, "is_last": np.arange(N) == N - 1})
    (F / "raises_at_import.py").write_text("raise RuntimeError('a module of mine\\nis not ready')")
    (F / "no_python.py").write_text("def broken(:")
    return F


# ---- flags: (stage, flags, words of the message); no words: tyro's own message, which is longer, and exit status 2


def flagged(stage, text, *words):
    return pytest.param(stage, text.split(), list(words), id=f"{stage} {text}"[:80])


def filed(table, kind, *stages):
    """The cases of a table of files, the stages in turn: all read with the same functions. The traps are set to each."""
    cases = [(stage, n, words) for i, (n, (_, words)) in enumerate(table.items()) for stage in (stages if "trap" in n else [stages[i % len(stages)]])]
    return [flagged(stage, f"--{kind} {{F}}/{file_name(kind, n)}", file_name(kind, n), *words) for stage, n, words in cases]


def env(name, *words, stages=("pretrain", "collect", "policy")):
    flag = {"pretrain": "--env-id", "collect": "--collect-policy random --target-env-id", "policy": "--eval-env-ids"}
    return [flagged(stage, f"{flag[stage]} {name}", name, *words) for stage in stages]


FLAGS = [
    # of all stages
    *(flagged(stage, flags, *words) for stage in ("pretrain", "adapt", "policy") for flags, *words in (
        ("--seed -1", "--seed"),
        ("--seed 4294967295", "--seed"),
        ("--seed 99999999999999999999999999", "--seed"),
        ("--lr nan", "--lr"),
        ("--lr -1", "--lr"),
        ("--lr inf", "--lr"),
        ("--batch 0", "--batch"),
        ("--batch -4", "--batch"),
        ("--batch 9999999999", "--batch"),
        ("--length 0", "--length"),
        ("--log-every 0", "--log-every"),
        ("--device tpu", "--device tpu"),
        ("--device meta", "--device meta"),
        ("--device cuda:99", "--device cuda:99"),
        ("--run-dir {F}/draw.pt", "draw.pt"),
        ("--run-dir {F}/draw.pt/run", "draw.pt"),
        ("--run-dir {F}/old", "old", "--overwrite"),
        ("--run-dir {F}/half", "--overwrite"),
        ("--run-dir /proc/run", "/proc/run"),
        ("--run-dir {F}/" + "x" * 300, "xxx"),
        # tyro's own
        ("--no-such-flag 1",),
        ("--batch many",),
        ("--batch 1.5",),
        ("--lr",),
        ("--overwrite perhaps",),
    )),
    # stage 1
    *(flagged("pretrain", flags, *words) for flags, *words in (
        ("--steps 0", "--steps"),
        ("--steps -5", "--steps"),
        ("--steps 400", "--prefill"),  # is as many
        ("--prefill 601", "--prefill"),
        ("--prefill -1", "--prefill"),
        ("--prefill 10", "--prefill"),
        ("--n-envs 0", "--n-envs"),
        ("--n-envs 100", "--prefill"),
        ("--replay-size 10", "--replay-size"),
        ("--replay-size 0", "--replay-size"),
        ("--replay-size 1000000000000000", "--replay-size"),
        ("--replay-size 1" + 30 * "0", "--replay-size"),
        ("--starts 33", "--starts"),  # of 4 sequences of 8
        ("--starts 0", "--starts"),
        ("--length 1", "--length"),
        ("--horizon 0", "--horizon"),
        ("--horizon -1", "--horizon"),
        ("--S 0", "--S"),
        ("--S 1" + 30 * "0", "--S"),
        ("--K 1", "--K"),
        ("--K 0", "--K"),
        ("--units 0", "--units"),
        ("--units 65536 --S 65536 --K 65536", "memory"),
        ("--cnn-depth -1", "--cnn-depth"),
        ("--vector-layers 0", "--vector-layers"),
        ("--ensemble 1", "--ensemble"),
        ("--ensemble-target -1", "--ensemble-target"),
        ("--episode-steps 0", "--episode-steps"),
        ("--hold 0", "--hold"),
        ("--hold inf", "--hold"),
        ("--train-every 0", "--train-every"),
        ("--train-every inf", "--train-every"),
        ("--warmup -1", "--warmup"),
        ("--soft-updates -1", "--soft-updates"),
        ("--image-scale nan", "--image-scale"),
        ("--vector-scale -1", "--vector-scale"),
        ("--rewarded nan", "--rewarded"),
        ("--rewarded 1.5", "--rewarded"),
        ("--gamma 1.5", "--gamma"),
        ("--gamma nan", "--gamma"),
        ("--lam -1", "--lam"),
        ("--entropy nan", "--entropy"),
        ("--entropy -1", "--entropy"),
        ("--return-floor 0", "--return-floor"),
        ("--actor-lr nan", "--actor-lr"),
        ("--policy-start -1", "--policy-start"),
        ("--policy-every 0", "--policy-every"),
        ("--image-size 0 --env-id redraw/PendulumSwingup-v0", "--image-size"),
        ("--image-size -64 --env-id redraw/PendulumSwingup-v0", "--image-size"),
        ("--image-size 48 --env-id redraw/PendulumSwingup-v0", "48"),
        ("--image-size 8 --env-id redraw/PendulumSwingup-v0", "8"),
        ("--image-size 1024 --env-id redraw/PendulumSwingup-v0", "1024"),
        ("--collect sometimes",),
        ("--actor-grad none",),
    )),
    # stage 2
    *(flagged("adapt", flags, *words) for flags, *words in (
        ("--updates -1", "--updates"),
        ("--length 1", "--length"),
        ("--length 40", "--length"),  # longer than the held-out episode
        ("--holdout 2", "--holdout"),
        ("--holdout -0.1", "--holdout"),
        ("--holdout nan", "--holdout"),
        ("--holdout 1", "train"),
        ("--hidden 0", "--hidden"),
        ("--hidden 1000000000000", "--hidden"),
        ("--layers 0", "--layers"),
        ("--members 0", "--members"),
        ("--members 1000000000000", "--members"),
        ("--lr 0", "--lr"),
        ("--dataset {F}/nowhere.npz", "nowhere.npz"),
        ("--dataset {F}/one-episode.npz", "episode"),
        ("--checkpoint {F}/adapted.pt", "redraw_adapt.py", "draw_pretrain.py"),
        ("--target-env-id toy_env:Toy-v0", "--dataset", "--target-env-id"),  # both
        ("--method magic",),
    )),
    *(flagged("collect", flags, *words) for flags, *words in (
        ("", "--dataset", "--target-env-id"),  # neither
        (TARGET + " --collect-steps 31", "--collect-steps"),
        (TARGET + " --collect-steps -1", "--collect-steps"),
        (TARGET + " --collect-noise 2", "--collect-noise"),
        (TARGET + " --collect-noise nan", "--collect-noise"),
        (TARGET + " --n-envs 0", "--n-envs"),
        (TARGET + " --hold -1", "--hold"),
        (TARGET + " --episode-steps -1", "--episode-steps"),
        (TARGET + " --collect-policy nonexisting", "nonexisting"),
        (TARGET + " --collect-policy {F}", "not a checkpoint"),
        (TARGET + " --collect-policy {F}/draw.pt", "train_policy.py"),
        (TARGET + " --collect-policy {F}/data.npz", "data.npz"),
        (TARGET + " --collect-policy {F}/wide-policy.pt", "sizes"),
        (TARGET + " --collect-policy {F}/NaN-policy.pt", "finite"),
        (TARGET + " --collect-policy zero-shot --checkpoint {F}/no-actors.pt", "task_actor"),
        (TARGET + " --collect-policy explore --checkpoint {F}/no-actors.pt", "explore_actor"),
    )),
    # stage 3
    *(flagged("policy", flags, *words) for flags, *words in (
        ("--updates 0", "--updates"),
        ("--length 61", "--length"),  # of 60 rows
        ("--length 1000000", "--length"),
        ("--horizon 0", "--horizon"),
        ("--rewarded -0.1", "--rewarded"),
        ("--rewarded nan", "--rewarded"),
        ("--gamma 1.5", "--gamma"),
        ("--lam -1", "--lam"),
        ("--lam nan", "--lam"),
        ("--entropy nan", "--entropy"),
        ("--return-floor 0", "--return-floor"),
        ("--return-floor nan", "--return-floor"),
        ("--eval-every -1", "--eval-every"),
        ("--eval-episodes 1", "--eval-episodes"),
        ("--checkpoint {F}/policy.pt", "train_policy.py", "redraw_adapt.py"),
        ("--eval-env-ids toy_env:Toy-v0 toy_env:NoSuch-v0", "NoSuch"),
        ("--eval-env-ids bad_env:Endless-v0", "time limit"),
        ("--actor-grad none",),
    )),
    # paths
    *(flagged(stage, flags, *words) for stage in ("adapt", "policy") for flags, *words in (
        ("--checkpoint {F}", "not a checkpoint"),
        ("--checkpoint {F}/nowhere.pt", "nowhere.pt"),
        ("--checkpoint {F}/" + "x" * 300, "not a checkpoint"),
        ("--checkpoint /proc/self/mem", "/proc/self/mem"),  # not even root can read its beginning
        ("--dataset {F}/empty-folder", "no dataset"),
        ("--dataset {F}/folder-of-folders", "no dataset"),
        ("--dataset {F}/bad-chunk", "1.npz"),
        ("--dataset {F}/other-chunk", "vector"),
        ("--dataset {F}/" + "x" * 300, "no dataset"),
        ("--dataset /proc/self/mem", "/proc/self/mem"),
        ("--dataset /dev/null", "no dataset"),
    )),
]  # fmt: skip

ENVIRONMENTS = [
    *env("redraw/NoSuch-v0", "redraw/PendulumSwingup-v0"),  # names what there is
    *env("no_such_module:Toy-v0"),
    *env("toy_env:NoSuch-v0"),
    *env("raises_at_import:Toy-v0", "not ready"),
    *env("no_python:Toy-v0", "SyntaxError"),
    *env("toy_env:Toy-v0:Toy-v0"),
    *env("toy_env:", stages=["pretrain"]),
    *env("..:Toy-v0", stages=["pretrain"]),
    *env("CartPole-v1", "image", stages=["pretrain"]),
    *env("toy_env:ToyDiscrete-v0", "action"),
    *env("toy_env:ToyWideActions-v0", "RescaleAction"),
    *env("toy_env:ToyNoVector-v0", "vector"),
    *env("toy_env:ToyFloatImage-v0", "uint8"),
    *env("toy_env:ToyOddImage-v0", "64"),
    *env("toy_env:ToyDoubleVector-v0", "float32"),
    *(case for name, *words in (
        ("NoDict", "Dict"), ("Tuple", "Dict"), ("Nested", "image"), ("EmptyVector", "vector"), ("DiscreteVector", "vector"), ("TinyImage", "image"),
        ("WideImage", "image"), ("GrayImage", "image"), ("NoAction", "action"), ("WholeActions", "action"), ("TableOfActions", "action"),
        ("MultiDiscrete", "action"), ("Unmade", "OSError", "licence server"), ("Quits", "KeyError"),
    ) for case in env(f"bad_env:{name}-v0", *words, stages=["pretrain"])),
    *(case for name in ("NoDict", "EmptyVector", "NoAction", "Unmade")
      for case in env(f"bad_env:{name}-v0", stages=["collect", "policy"])),
    *env("bad_env:TwoActions-v0", "sizes", stages=["collect", "policy"]),  # the checkpoint has one
    *env("redraw/PendulumSwingup-v0", "sizes", stages=["collect", "policy"]),
]  # fmt: skip

CASES = [
    *FLAGS, *ENVIRONMENTS, *filed(CHECKPOINTS, "checkpoint", "adapt", "policy"), *filed(ADAPTED, "checkpoint", "policy"),
    *filed(DATASETS, "dataset", "adapt", "policy"),
]  # fmt: skip


def contents(folder):
    """Everything under a folder: {path: bytes, or None for a folder}"""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*") if "__pycache__" not in p.parts}


def attempt(monkeypatch, F, stage, flags):
    """What `python SCRIPT.py FLAGS` exits with, in this process"""
    module, base = STAGES[stage]
    monkeypatch.setattr(sys, "argv", [module.__file__, *(f.format(F=F) for f in [*base, *flags])])
    with pytest.raises(SystemExit) as error:
        module.main(tyro.extras.overridable_config_cli(module.PRESETS, description=module.__doc__))
    return error.value.code


@pytest.mark.parametrize("stage, flags, words", CASES)
def test_bad_input(files, monkeypatch, capfd, stage, flags, words):
    monkeypatch.syspath_prepend(str(files))
    before = contents(files)
    for run_dir in (["--run-dir", "{F}/new"], ["--run-dir", "{F}/old", "--overwrite"]):
        if "--run-dir" in flags:
            run_dir = []
        with warnings.catch_warnings(record=True) as warned:
            code = attempt(monkeypatch, files, stage, [*run_dir, *flags])
        assert [str(w.message) for w in warned if w.category in (UserWarning, RuntimeWarning)] == []  # would be further lines
        out, err = capfd.readouterr()
        if words:
            assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code
            assert all(w in code for w in words), code
            assert err == ""
        else:
            assert code == 2 and out + err
        assert "Traceback" not in out + err
        assert contents(files) == before


GOOD_RANGE = {"kl": 1.0, "image error": [1.0, 2.0, 3.0], "vector error": [1.0, 2.0, 3.0], "posterior entropy": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    "wrong", [[1], {}, "range", GOOD_RANGE | {"kl": 0.0}, GOOD_RANGE | {"kl": "1"}, GOOD_RANGE | {"vector error": [1.0]}, GOOD_RANGE | {"image error": [float("nan")] * 3}]
)  # fmt: skip
def test_yardsticks_that_make_no_sense(files, tmp_path, monkeypatch, wrong):
    """of the source, in draw.pt: found before the training, not by the report after it"""
    save_checkpoint(tmp_path / "draw.pt", **draw_checkpoint(source_range=wrong))
    code = attempt(monkeypatch, files, "adapt", ["--checkpoint", str(tmp_path / "draw.pt"), "--run-dir", str(tmp_path / "run")])
    assert code.startswith("error: ") and "source_range" in code and not (tmp_path / "run").exists()


# ---- the same from outside, one of each kind


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("redraw_adapt", "--checkpoint {F}/checkpoint-trap-in-the-shell.pt --dataset {F}/data.npz", ["not a checkpoint"]),
        ("redraw_adapt", "--checkpoint {F}/draw.pt --dataset {F}/dataset-trap.npz", ["allow_pickle"]),
        ("train_policy", "--checkpoint {F}/checkpoint-truncated-to-0.5.pt --dataset {F}/data.npz", ["not a checkpoint"]),
        ("train_policy", "--checkpoint {F}/draw.pt --dataset {F}/data.npz --eval-env-ids bad_env:Unmade-v0", ["bad_env:Unmade-v0"]),
        ("draw_pretrain", "--env-id redraw/PendulumSwingup-v0 --image-size 1024", ["1024"]),
    ],
)
def test_bad_input_from_outside(files, script, flags, words):
    before = contents(files)
    base = {"draw_pretrain": PRETRAIN, "redraw_adapt": ADAPT, "train_policy": POLICY}[script]
    done = run(script, *base, *flags.format(F=files).split(), "--run-dir", files / "new", cwd=files)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and all(w in done.stderr for w in words), done.stderr
    assert contents(files) == before


def test_tyro_s_own_messages_from_outside(files):
    done = run("train_policy", *POLICY, "--checkpoint", "a.pt", "--dataset", "b.npz", "--updates", "many", cwd=files)
    assert done.returncode == 2 and "--updates" in done.stderr + done.stdout and "Traceback" not in done.stderr


# ---- permissions: root has them all, so a test of root's gives them away for a moment


@contextlib.contextmanager
def unprivileged():
    """(a folder that everyone may enter) as a user who is not root"""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield folder, lambda: os.seteuid(65534) if root else None
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
            path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("mode, target, words", [
    (0o000, "draw.pt", ["draw.pt"]), (0o000, "data.npz", ["data.npz"]), (0o000, "locked", ["locked"]), (0o555, "locked", ["can't write", "locked"]),
])  # fmt: skip
def test_no_permission(monkeypatch, mode, target, words):
    with unprivileged() as (F, give_away):
        save_tiny_draw(F / "draw.pt")
        save_dataset(F / "data.npz", random_rows(N))
        (F / "locked").mkdir()
        for path in F.iterdir():
            path.chmod(0o755)
        (F / target).chmod(mode)
        give_away()
        code = attempt(monkeypatch, F, "policy", ["--run-dir", "{F}/locked/run"])
        os.seteuid(os.getuid())
        assert code.startswith("error: ") and "\n" not in code and all(w in code for w in words), code
        (F / target).chmod(0o755)
        assert sorted(p.name for p in F.rglob("*")) == ["data.npz", "draw.pt", "locked"]


# ---- what the tables rest on


@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if n.startswith("trap")])
def test_the_traps_of_checkpoints_are_real(files, tmp_path, name):
    """A careless loader would run their code, so it means something that ours did not."""
    data = CHECKPOINTS[name][0](tmp_path)
    pickle.loads(data) if name == "trap without torch" else torch.load(io.BytesIO(data), weights_only=False)
    assert (tmp_path / "ran").exists() and not (files / "ran").exists()


@pytest.mark.parametrize("name", [n for n in DATASETS if n.startswith("trap")])
def test_the_traps_of_datasets_are_real(files, tmp_path, name):
    loaded = np.load(io.BytesIO(DATASETS[name][0](random_rows(N), tmp_path)), allow_pickle=True)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        dict(loaded)
    assert (tmp_path / "ran").exists() and not (files / "ran").exists()


def test_policies_are_read_with_the_same_care(files, tmp_path):
    for name, word in (("trap", "not a checkpoint"), ("NaN-policy", "finite")):
        path = files / ("NaN-policy.pt" if name == "NaN-policy" else file_name("checkpoint", name))
        with pytest.raises(SystemExit, match=word):
            load_policy(path)
    assert load_policy(files / "policy.pt").sizes == TINY
    assert not (files / "ran").exists()


def test_good_files_are_read(files):
    load_checkpoint(files / "draw.pt", ("draw_pretrain",))
    checkpoint = load_checkpoint(files / "adapted.pt", ("redraw_adapt",))
    redraw_adapt.load_rectified(checkpoint, redraw_adapt.load_draw(checkpoint, "cpu"), "cpu")
    assert len(load_dataset(files / "data.npz", 16, 2, 1)["is_first"]) == N


# ---- what is unusual and allowed


def test_actions_out_of_bounds_are_clipped_by_the_models():
    draw = DRAW(TINY)
    z, sigma = (torch.nn.functional.one_hot(torch.zeros(6, TINY.S, dtype=torch.long), TINY.K).float() for _ in range(2))
    far, bound = torch.full((6, 1), -40.0), torch.full((6, 1), -1.0)
    assert torch.equal(draw.dynamics(z, sigma, far), draw.dynamics(z, sigma, bound))


def test_huge_numbers_are_no_reason_to_diverge(files, tmp_path):
    rows = random_rows(N)
    rows["vector"][:5], rows["action"][:5] = 1e30, -1e30
    save_dataset(tmp_path / "data.npz", rows)
    module, base = STAGES["adapt"]
    flags = [f.format(F=files) for f in base] + ["--dataset", str(tmp_path / "data.npz"), "--run-dir", str(tmp_path / "run"), "--updates", "20"]
    module.main(tyro.extras.overridable_config_cli(module.PRESETS, args=flags))
    assert np.isfinite(metric(tmp_path / "run", "adapt/kl_train")).all()


@pytest.mark.parametrize("name, word", [("LateNaN", "world_model/vector"), ("LateRewardNaN", "world_model/reward")])
def test_an_environment_that_returns_nan(files, tmp_path, monkeypatch, name, word):
    """ends stage 1 with the loss term that it spoils (an exception in an environment's code shows as it is: its author needs the traceback)"""
    code = attempt(monkeypatch, files, "pretrain", ["--env-id", f"bad_env:{name}-v0", "--run-dir", str(tmp_path / "run")])
    assert code.startswith("error: ") and word in code and "not finite" in code and "\n" not in code


def test_nan_is_not_recorded(files, tmp_path, monkeypatch):
    code = attempt(monkeypatch, files, "collect", ["--target-env-id", "bad_env:LateNaN-v0", "--run-dir", str(tmp_path / "run")])
    assert code.startswith("error: bad_env:LateNaN-v0") and "vector" in code and not list(tmp_path.rglob("*.npz"))
