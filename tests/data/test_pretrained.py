"""The world models of docs/pretrained/: they load, and they know what they were trained on."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from common import Actor, Critic, load_checkpoint, load_draw, load_module

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pretrained"


def test_the_pendulum_is_paid_at_the_top_alone():
    checkpoint = load_checkpoint(FOLDER / "pendulum.pt", ("draw_pretrain",))
    draw = load_draw(checkpoint)
    env = gym.make("redraw/PendulumSwingup-v0", image_size=draw.sizes.image_size).unwrapped
    env.reset(seed=0)
    rewards = []
    for angle in (0.0, np.pi):  # top, bottom
        env.physics.data.qpos[0] = angle
        env.physics.data.qvel[0] = 0.0
        env.physics.forward()
        obs = env.observe()
        image = torch.from_numpy(obs["image"])[None]
        q = draw.posterior(draw.encoder(image, torch.from_numpy(obs["vector"])[None]))
        rewards.append(draw.reward(q.exp()).item())
    env.close()
    assert rewards[0] > 0.8 and abs(rewards[1]) < 0.05


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.pt")), ids=lambda path: path.name)
def test_actors_and_critic_load_and_the_file_is_small(path):
    checkpoint = load_checkpoint(path, ("draw_pretrain",))
    sizes = load_draw(checkpoint).sizes
    for key, make in (("task_actor", Actor), ("explore_actor", Actor), ("task_critic", Critic)):
        load_module(checkpoint, key, lambda make=make: make(sizes))
    assert checkpoint["source_range"]["kl"] > 0
    assert path.stat().st_size < 4 * 2**20
