"""Small things that several test files build on: a tiny world model, random data, checks of error messages."""

import dataclasses
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from common import DRAW, Actor, Sizes, UserError, save_checkpoint

# Fits toy_env
TINY = Sizes(image_size=16, vector_size=2, action_size=1, S=3, K=4, cnn_depth=2, vector_units=8, vector_layers=1, units=16, actor_units=16)


def random_rows(n, sizes=TINY, seed=0):
    """A dataset of n rows in two episodes, without rewards"""
    rng = np.random.default_rng(seed)
    row = np.arange(n)
    return {
        "image": rng.integers(0, 256, (n, sizes.image_size, sizes.image_size, 3), np.uint8),
        "vector": rng.normal(size=(n, sizes.vector_size)).astype(np.float32),
        "action": rng.uniform(-1, 1, (n, sizes.action_size)).astype(np.float32),
        "is_first": (row == 0) | (row == n // 2),
        "is_last": (row == n // 2 - 1) | (row == n - 1),
        "is_terminal": np.zeros(n, bool),
    }


def random_states(*batch, sizes=TINY):
    """(z, sigma, action) of random one-hot latents, beliefs and actions"""
    z = torch.nn.functional.one_hot(torch.randint(sizes.K, (*batch, sizes.S)), sizes.K).float()
    return z, torch.randn(*batch, sizes.S, sizes.K).softmax(-1), torch.rand(*batch, sizes.action_size) * 2 - 1


def save_tiny_draw(path, draw=None, sizes=TINY):
    """A checkpoint as stage 1 writes it, of an untrained world model"""
    actors = {name: Actor(sizes).state_dict() for name in ("task_actor", "explore_actor")}
    weights = {"draw": (draw or DRAW(sizes)).state_dict(), **actors}
    save_checkpoint(path, stage="draw_pretrain", args={}, sizes=dataclasses.asdict(sizes), updates=0, **weights)
    return str(path)


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
