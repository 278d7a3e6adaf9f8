"""Random changes of what the encoder sees, while the decoder reconstructs the clean frame."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import FixedReplay

import draw_pretrain
from common import DRAW, Sizes, kl_categorical
from draw_pretrain import Args, augment, source_range, world_model_loss

SIZES = Sizes(
    image_size=16,
    vector_size=1,
    action_size=1,
    S=8,
    K=4,
    cnn_depth=8,
    vector_units=8,
    vector_layers=1,
    units=32,
    actor_units=8,
)


def scenes(B, T=2):
    """Replayed sequences (B, T, ...) of one frame each: a bar somewhere on a dull floor below a
    sky"""
    place = torch.randint(2, 14, (B, T))
    image = torch.full((B, T, 16, 16, 3), 90, dtype=torch.uint8)
    image[:, :, :6] = torch.tensor([120, 160, 200], dtype=torch.uint8)
    bar = (torch.arange(16) - place[..., None]).abs() <= 1  # (B, T, 16)
    image[:, :, 6:] = torch.where(
        bar[:, :, None, :, None], torch.tensor([230, 220, 60], dtype=torch.uint8), image[:, :, 6:]
    )
    true = torch.ones(B, T, dtype=torch.bool)
    return {
        "image": image,
        "vector": torch.zeros(B, T, 1),
        "action": torch.zeros(B, T, 1),
        "reward": torch.zeros(B, T),
        "is_first": true,
        "is_terminal": ~true,
    }


def test_zero_strength_is_the_identity():
    image = torch.randint(0, 256, (3, 5, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(augment(image, 0.0), image)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_images_stay_images_and_each_is_changed_in_its_own_way(strength):
    image = scenes(1)["image"][:, :1].expand(64, 3, -1, -1, -1).clone()
    before = image.clone()
    seen = augment(image, strength)
    assert seen.shape == image.shape and seen.dtype == torch.uint8 and torch.equal(image, before)
    change = (seen.int() - image.int()).abs().float()
    assert (
        change.mean((2, 3, 4)) > 0.5
    ).all() and change.mean() < 75  # all are changed, none beyond recognition on average
    assert len(torch.unique(seen.flatten(0, 1).flatten(1), dim=0)) == 192
    assert seen.float().mean((2, 3)).std((0, 1)).min() > 4 * strength  # light and colours differ
    lower, upper = (
        augment(image, s).int().sub(image.int()).abs().float().mean() for s in (0.2, 0.8)
    )
    assert lower < upper


def test_noise_reaches_every_pixel_and_no_mean_shift():
    image = torch.full((2000, 1, 16, 16, 3), 128, dtype=torch.uint8)
    change = augment(image, 0.5).float().mean(0) - 128
    assert change.abs().max() < 30 and abs(change.mean()) < 20


def test_the_encoder_sees_the_changed_frame_and_the_decoder_is_shown_the_clean_one(monkeypatch):
    draw, data, seen, targets = DRAW(SIZES), scenes(4), [], []
    real = DRAW.reconstruction_errors
    monkeypatch.setattr(draw_pretrain, "augment", lambda image, strength: 255 - image)
    monkeypatch.setattr(
        DRAW,
        "reconstruction_errors",
        lambda draw, z, image, vector: targets.append(image) or real(draw, z, image, vector),
    )
    draw.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    world_model_loss(draw, data, Args(augment=0.5), 0.0)
    world_model_loss(draw, data, Args(augment=0.0), 0.0)
    source_range(draw, FixedReplay(data), Args(), "cpu")
    assert [torch.equal(s, 255 - data["image"]) for s in seen] == [True, False, False]
    assert [torch.equal(s, data["image"]) for s in seen] == [False, True, True]
    assert len(targets) == 3 and all(torch.equal(t, data["image"]) for t in targets)


def test_off_draws_no_random_numbers():
    draw, data = DRAW(SIZES), scenes(4)
    losses = []
    for change in ({}, {"augment": 0.0}):
        torch.manual_seed(3)
        losses.append(
            world_model_loss(draw, data, dataclasses.replace(Args(), **change), 0.0)[0].item()
        )
    torch.manual_seed(3)
    assert losses[0] == losses[1] != world_model_loss(draw, data, Args(augment=0.5), 0.0)[0].item()


def test_the_latent_of_a_changed_frame_is_nearer_to_that_of_the_clean_one():
    """Two small world models, trained with and without: KL(q(z | clean) || q(z | changed)), nats"""
    apart, error = {}, {}
    for strength in (0.0, 0.6):
        torch.manual_seed(0)
        draw, args = DRAW(SIZES), Args(augment=strength, image_scale=10.0)
        optimizer = torch.optim.Adam(draw.parameters(), lr=2e-3)
        for update in range(250):
            loss, metrics, _ = world_model_loss(draw, scenes(32), args, max(0.0, 1 - update / 100))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.manual_seed(1)
        data = scenes(64)
        with torch.no_grad():
            clean, changed = (
                draw.posterior(draw.encoder(i, data["vector"]))
                for i in (data["image"], augment(data["image"], 0.6))
            )
        apart[strength] = kl_categorical(clean, changed).mean().item()
        error[strength] = metrics["world_model/image"].item()
    blurred = (
        np.square(data["image"].numpy() / 255 - data["image"].numpy().mean((0, 1)) / 255)
        .sum((-3, -2, -1))
        .mean()
    )
    assert apart[0.6] < 0.5 * apart[0.0], apart
    # Both know where the bar is.
    assert error[0.0] < 0.5 * blurred and error[0.6] < 0.8 * blurred, (error, blurred)
