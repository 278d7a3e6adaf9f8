"""What learns from what, and what does not."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers import TINY, random_rows, random_states, save_tiny_draw
from torch import nn

import draw_pretrain
import redraw_adapt
import train_policy
from common import (
    DRAW,
    Actor,
    Critic,
    load_checkpoint,
    sample_onehot,
    save_checkpoint,
    save_dataset,
)
from draw_pretrain import ActorCritic, Ensemble, world_model_loss
from redraw_adapt import Rectified, adaptation_loss


def changed(before, after):
    """Names of the tensors that are not the same bit for bit"""
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("method", ["residual", "replace", "finetune", "none"])
def test_stage_2_changes_its_own_parameters_alone(monkeypatch, tmp_path, method):
    made = []

    def make(*args, **kwargs):
        rectified = Rectified(*args, **kwargs)
        made.append(copy.deepcopy(rectified.state_dict()))
        return rectified

    monkeypatch.setattr(redraw_adapt, "Rectified", make)
    save_dataset(tmp_path / "data.npz", random_rows(40))
    source = load_checkpoint(save_tiny_draw(tmp_path / "draw.pt"), ("draw_pretrain",))
    # The residual's output layer starts at zero, so that its other layers have no gradient in the
    # first update.
    redraw_adapt.main(
        redraw_adapt.Args(
            str(tmp_path / "draw.pt"),
            str(tmp_path / "data.npz"),
            run_dir=str(tmp_path / "run"),
            device="cpu",
            method=method,
            hidden=8,
            updates=3,
            batch=4,
            length=5,
            log_every=3,
        )
    )
    adapted = load_checkpoint(tmp_path / "run" / "last.pt", ("redraw_adapt",))
    dynamics = {name for name in source["draw"] if name.startswith("dynamics_net.")}
    assert changed(source["draw"], adapted["draw"]) == (dynamics if method == "finetune" else set())
    assert bool(adapted["rectified"]) == (method in ("residual", "replace"))
    assert changed(made[0], adapted["rectified"]) == set(adapted["rectified"])
    best = load_checkpoint(tmp_path / "run" / "best.pt", ("redraw_adapt",))
    assert changed(source["draw"], best["draw"]) <= dynamics


@pytest.mark.parametrize("method", ["residual", "replace", "finetune"])
def test_stage_2_has_no_gradient_for_the_teacher(method):
    """Even of a world model that is not frozen: the posterior is the teacher, so nothing of it
    learns."""
    draw = DRAW(TINY)
    rectified = Rectified(draw, method, hidden=8)
    rows = random_rows(12)
    data = {k: torch.from_numpy(v).unflatten(0, (2, 6)) for k, v in rows.items()}
    q = draw.posterior(draw.encoder(data["image"], data["vector"]))
    kl, _ = adaptation_loss(
        draw, rectified, q, sample_onehot(q.exp()).detach(), data["action"], data["is_first"]
    )
    kl.sum().backward()
    for part in (
        draw.encoder,
        draw.posterior_net,
        draw.decoder,
        draw.vector_head,
        draw.reward_head,
        draw.continue_head,
    ):
        assert all(p.grad is None for p in part.parameters())
    learns = rectified.delta[0][-1] if method != "finetune" else draw.dynamics_net
    assert all(p.grad.any() for p in learns.parameters())


def test_stage_1_kl_without_its_stopped_sides():
    """With the reconstructions off: 1.5 KL(sg q || p) alone teaches f, and what the encoder learns
    from it comes through z, not through q."""
    draw = DRAW(TINY)
    nn.init.normal_(draw.dynamics_net[-1].weight, std=3.0)  # KLs above the free nat
    data = {k: torch.from_numpy(v).unflatten(0, (2, 6)) for k, v in random_rows(12).items()} | {
        "reward": torch.zeros(2, 6)
    }
    args = draw_pretrain.Args(image_scale=0.0, vector_scale=0.0, reward_scale=0.0)
    posteriors, draw.posterior = (
        [],
        lambda embed: posteriors.append(DRAW.posterior(draw, embed)) or posteriors[-1],
    )
    observed, draw.observe = (
        [],
        lambda z, action, first: (
            observed.append(DRAW.observe(draw, z.detach(), action, first)) or observed[-1]
        ),
    )
    for p in draw.continue_head.parameters():
        nn.init.zeros_(p)  # passes no gradient to z
    loss, _, _ = world_model_loss(draw, data, args, 0.0)
    q, u = posteriors[0], observed[0]
    grad_q, grad_u = torch.autograd.grad(loss, (q, u))
    # By hand: d KL / d logits of the plain categorical, of the sides that are not stopped
    p, mask = (0.99 * u.softmax(-1) + 0.01 / TINY.K).detach(), torch.ones(2, 6)
    mask[:, 0] = 0.0
    kl = (q.exp() * (q - p.log())).sum((-2, -1))
    assert (kl > 1).any()
    weight = (mask * (kl > 1) / 12)[..., None, None]
    assert torch.allclose(grad_q, 0.5 * weight * q.exp() * (q - p.log() + 1), atol=1e-5)
    by_p = -1.5 * weight * q.exp() / p  # d / dp, then through the 0.99 and the softmax
    sigma = u.softmax(-1)
    assert torch.allclose(
        grad_u, 0.99 * sigma * (by_p - (sigma * by_p).sum(-1, keepdim=True)), atol=1e-5
    )


def test_straight_through_samples():
    """The sample of any function of logits passes on the gradient that the probabilities would have
    had; without a gradient, it is one-hot."""
    logits = (2 * torch.randn(4, TINY.S, TINY.K)).requires_grad_()
    probs, w = logits.softmax(-1), torch.randn(4, TINY.S, TINY.K)
    z = sample_onehot(probs)
    grad = torch.autograd.grad((z * w).sum(), logits)[0]
    p = probs.detach()
    assert torch.allclose(grad, p * (w - (p * w).sum(-1, keepdim=True)), atol=1e-6)
    assert set(sample_onehot(p).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("actor_grad", ["reinforce", "dynamics"])
def test_actor_critic_of_stage_1_leaves_the_world_model_alone(actor_grad):
    draw, ensemble = DRAW(TINY), Ensemble(TINY, 5, 2, 0)  # neither is frozen
    trained = ActorCritic(
        TINY,
        draw_pretrain.Args(horizon=3, actor_lr=1e-2),
        actor_grad,
        scale_floor=1.0,
        device="cpu",
    )
    nn.init.normal_(trained.critic.net[-1].weight)
    z, sigma, _ = random_states(4)
    before = {
        name: copy.deepcopy(module.state_dict())
        for name, module in (("draw", draw), ("ensemble", ensemble), ("slow", trained.slow_critic))
    }
    trained.update(
        draw,
        z,
        sigma,
        torch.ones(4),
        lambda z, sigma, a, z_next: draw.reward(z_next) + ensemble.disagreement(sigma, z, a),
    )
    assert all(
        p.grad is None
        for module in (draw, ensemble, trained.slow_critic)
        for p in module.parameters()
    )
    assert not changed(before["draw"], draw.state_dict()) and not changed(
        before["ensemble"], ensemble.state_dict()
    )
    assert (
        all(p.grad.any() for p in trained.actor.parameters())
        and trained.critic.net[-1].weight.grad.any()
    )
    # The slow critic moves by 2 % of the gap to the critic of after the update.
    for name, slow in trained.slow_critic.state_dict().items():
        assert torch.allclose(
            slow,
            before["slow"][name]
            + 0.02 * (trained.critic.state_dict()[name] - before["slow"][name]),
            atol=1e-6,
        )
    assert "net.6.weight" in changed(before["slow"], trained.slow_critic.state_dict())


@pytest.mark.parametrize("actor_grad", ["reinforce", "dynamics"])
def test_stage_3_leaves_the_world_model_alone(monkeypatch, tmp_path, actor_grad):
    draw = DRAW(TINY)
    rectified = Rectified(draw, "residual", hidden=8)
    for p in rectified.parameters():
        nn.init.normal_(p, std=0.3)
    save_dataset(tmp_path / "data.npz", random_rows(8))
    save_checkpoint(
        tmp_path / "adapted.pt",
        stage="redraw_adapt",
        args={},
        sizes=dataclasses.asdict(TINY),
        draw=draw.state_dict(),
        rectified=rectified.state_dict(),
        rectified_options=rectified.options,
    )
    before = copy.deepcopy((draw.state_dict(), rectified.state_dict()))
    made, slow_before = [], []

    def maker(cls):
        def make(sizes):
            made.append(cls(sizes))
            return made[-1]

        return make

    lerp = torch.Tensor.lerp_
    monkeypatch.setattr(
        torch.Tensor,
        "lerp_",
        lambda slow, *args: slow_before.append((slow, slow.clone())) or lerp(slow, *args),
    )
    monkeypatch.setattr(train_policy, "Actor", maker(Actor))
    monkeypatch.setattr(train_policy, "Critic", maker(Critic))
    # Neither is frozen, so that a gradient that went astray would show.
    monkeypatch.setattr(train_policy, "load_draw", lambda checkpoint, device: draw)
    monkeypatch.setattr(train_policy, "load_rectified", lambda checkpoint, draw, device: rectified)
    train_policy.main(
        train_policy.Args(
            str(tmp_path / "adapted.pt"),
            str(tmp_path / "data.npz"),
            run_dir=str(tmp_path / "run"),
            device="cpu",
            updates=2,
            batch=2,
            length=4,
            horizon=3,
            lr=1e-2,
            actor_grad=actor_grad,
        )
    )
    actor, critic, slow_critic = made
    assert all(
        p.grad is None for module in (draw, rectified, slow_critic) for p in module.parameters()
    )
    assert not changed(before[0], draw.state_dict()) and not changed(
        before[1], rectified.state_dict()
    )
    assert all(p.grad.any() for p in actor.parameters()) and critic.net[-1].weight.grad.any()
    n = len(list(slow_critic.parameters()))
    assert len(slow_before) == 2 * n  # once an update
    for (slow, old), fast in zip(slow_before[n:], critic.parameters(), strict=True):
        assert torch.allclose(slow, old + 0.02 * (fast - old), atol=1e-6)
    assert np.any([not torch.equal(slow, old) for slow, old in slow_before[n:]])
