"""How far the stock look of dm_control is from the fast one, for an encoder trained on the latter.

    python docs/figures/looks.py --checkpoint docs/pretrained/pendulum.pt \
        --env-id redraw/PendulumSwingup-v0

renders the same states in both looks and prints how far the pictures, the latents and the
reconstructions are apart.
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import (  # noqa: E402
    held_noise,
    kl_categorical,
    load_checkpoint,
    load_draw,
    sample_onehot,
    symlog,
)


def same_states(env_id, image_size, n, seed):
    """Images of n states, {"fast", "stock"} -> uint8 (n, L, L, C), and vectors (n, V)."""
    envs = {
        look: gym.make(env_id, image_size=image_size, look=look).unwrapped
        for look in ("fast", "stock")
    }
    images = {look: [] for look in envs}
    vectors = []
    action = np.zeros((1, *envs["fast"].action_space.shape), np.float32)
    for step in range(5 * n):
        if step % 100 == 0:
            # The same seed draws the same target, which is no part of the physics' state.
            for env in envs.values():
                env.reset(seed=seed + step)
        action = held_noise(action, hold=16.0, gain=2.0)
        obs, *_ = envs["fast"].step(action[0])
        if step % 5 == 0:  # neighbours look alike
            envs["stock"].physics.set_state(envs["fast"].physics.get_state())
            envs["stock"].physics.forward()
            images["fast"].append(obs["image"])
            images["stock"].append(envs["stock"].render())
            vectors.append(obs["vector"])
    return {look: np.stack(frames) for look, frames in images.items()}, np.stack(vectors)


@torch.no_grad()
def main(checkpoint: str, env_id: str, states: int = 1000, seed: int = 0):
    """Prints how far the two looks are apart.

    Args:
        checkpoint: draw.pt of a stage 1 with --look fast
        env_id: its environment
        states: how many are looked at, along episodes of random actions
        seed: of the environments and of everything random
    """
    np.random.seed(seed)
    torch.manual_seed(seed)
    saved = load_checkpoint(checkpoint, ("draw_pretrain",))
    draw = load_draw(saved)
    images, vectors = same_states(env_id, draw.sizes.image_size, states, seed)
    vector = torch.from_numpy(vectors)
    log_q = {}
    for look, image in images.items():
        image = torch.from_numpy(image)
        log_q[look] = draw.posterior(draw.encoder(image, vector))  # (n, S, K)
        z = sample_onehot(log_q[look].exp()).flatten(-2)
        image_error = ((draw.decoder(z) - image / 255.0) ** 2).sum((-3, -2, -1)).mean()
        vector_error = ((draw.vector_head(z) - symlog(vector)) ** 2).sum(-1).mean()
        print(f"{look}: squared error of image {image_error:.3g}, of vector {vector_error:.3g}")
    apart = np.abs(images["stock"].astype(float) - images["fast"]).mean()
    kl = kl_categorical(log_q["stock"], log_q["fast"]).mean()
    print(f"pictures differ by {apart:.1f} of 255; KL(q of stock || q of fast) {kl:.2f} nats")
    print(f"the dynamics' own KL at home: {saved['source_range']['kl']:.2f} nats a step")


if __name__ == "__main__":
    tyro.cli(main)
