"""Small things that several test files build on: a tiny world model, random data, checks of error
messages."""

import csv
import dataclasses
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from common import DRAW, Actor, Critic, Sizes, UserError, save_checkpoint

# Fits toy_env
TINY = Sizes(
    image_size=16,
    vector_size=2,
    action_size=1,
    S=3,
    K=4,
    cnn_depth=2,
    vector_units=8,
    vector_layers=1,
    units=16,
    actor_units=16,
)


def image_shape(*batch, sizes=TINY):
    return (*batch, sizes.image_size, sizes.image_size, sizes.channels)


def random_rows(n, sizes=TINY, seed=0):
    """A dataset of n rows in two episodes, without rewards"""
    rng = np.random.default_rng(seed)
    row = np.arange(n)
    return {
        "image": rng.integers(0, 256, image_shape(n, sizes=sizes), np.uint8),
        "vector": rng.normal(size=(n, sizes.vector_size)).astype(np.float32),
        "action": rng.uniform(-1, 1, (n, sizes.action_size)).astype(np.float32),
        "is_first": (row == 0) | (row == n // 2),
        "is_last": (row == n // 2 - 1) | (row == n - 1),
        "is_terminal": np.zeros(n, bool),
    }


def random_states(*batch, sizes=TINY):
    """(z, sigma, action) of random one-hot latents, beliefs and actions"""
    z = torch.nn.functional.one_hot(torch.randint(sizes.K, (*batch, sizes.S)), sizes.K).float()
    return (
        z,
        torch.randn(*batch, sizes.S, sizes.K).softmax(-1),
        torch.rand(*batch, sizes.action_size) * 2 - 1,
    )


def tensors(rows, *batch):
    """A dataset's arrays as tensors (*batch, ...)"""
    return {key: torch.from_numpy(value).unflatten(0, batch) for key, value in rows.items()}


def tiny_checkpoint(model=None, of=TINY, /, **changes):
    """What stage 1 saves, of an untrained world model; a key whose value is None is left out."""
    whole = {"stage": "draw_pretrain", "args": {}, "sizes": dataclasses.asdict(of), "updates": 0}
    whole["draw"] = (model or DRAW(of)).state_dict()
    for name, make in (("task_actor", Actor), ("explore_actor", Actor), ("task_critic", Critic)):
        whole[name] = make(of).state_dict()
    return {key: value for key, value in (whole | changes).items() if value is not None}


def save_tiny_draw(path, draw=None, sizes=TINY, **changes):
    """A checkpoint as stage 1 writes it; returns the path as text."""
    save_checkpoint(path, **tiny_checkpoint(draw, sizes, **changes))
    return str(path)


def save_tiny_adapted(path, draw, rectified, **changes):
    """A checkpoint as stage 2 writes it; returns the path as text."""
    parts = {"rectified": rectified.state_dict(), "rectified_options": rectified.options}
    parts |= {"source_actor": Actor(draw.sizes).state_dict()}
    parts |= {"source_critic": Critic(draw.sizes).state_dict()}
    return save_tiny_draw(path, draw, draw.sizes, stage="redraw_adapt", **(parts | changes))


def double(x):
    return x.detach().double().numpy()


def close(torch_value, slow, rtol=1e-4, atol=1e-5):
    value = double(torch_value) if torch.is_tensor(torch_value) else np.asarray(torch_value)
    assert value.shape == np.shape(slow)
    np.testing.assert_allclose(value, slow, rtol=rtol, atol=atol)


def rowwise(function, *arrays):
    """function of each row of the last two dimensions, (..., S, K)"""
    shape = arrays[0].shape[:-2]
    results = np.array([function(*(a[i] for a in arrays)) for i in np.ndindex(shape)])
    return results.reshape(*shape, *results.shape[1:])


def shaken(module, std=0.4):
    """The module with weights that are nowhere zero, so that every path shows"""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * (std if p.dim() == 1 else std / p.shape[1] ** 0.5))
    return module


def shaken_draw(sizes=TINY):
    return shaken(DRAW(sizes)).requires_grad_(False)


def borders(B, T, *where):
    """is_first (B, T), true at some (b, t)"""
    first = torch.zeros(B, T, dtype=torch.bool)
    for b, t in where:
        first[b, t] = True
    return first


class FixedReplay:
    """A replay whose every batch is `data`"""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 1

    def sample(self, B, T, device, rewarded=0.0):
        return self.data


def read_replay(folder):
    """All arrays of stage 1's replay, rewards too, an environment after the other, oldest first"""
    files = sorted(Path(folder).glob("*.npz"))
    chunks = [dict(np.load(file)) for file in files]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def read_metrics(run_dir):
    """What a run logged: {metric: its values in order}"""
    metrics = {}
    with open(Path(run_dir) / "metrics.csv") as file:
        for row in csv.DictReader(file):
            metrics.setdefault(row["metric"], []).append(float(row["value"]))
    return metrics


@contextmanager
def user_error(*words):
    """Expects a UserError whose message is one line and holds all the words."""
    with pytest.raises(UserError) as error:
        yield
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text
    assert all(w in text for w in words), text


class Booby:
    """Unpickling one makes the folder `path`: what a malicious file could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
