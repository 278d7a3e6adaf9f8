"""What learns from what, and what does not."""

import copy

import pytest
import torch
from helpers import (
    TINY,
    random_rows,
    random_states,
    save_tiny_adapted,
    save_tiny_draw,
    shaken_draw,
    tensors,
)
from torch import nn

import draw_pretrain
import redraw_adapt
import train_policy
from common import DRAW, ActorCritic, Rectified, load_checkpoint, sample_onehot, save_dataset
from draw_pretrain import Ensemble, world_model_loss
from redraw_adapt import finetune_loss, residual_loss


def changed(before, after):
    """Names of the tensors that are not the same bit for bit"""
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def adapt(tmp_path, **changes):
    """Stage 2 of draw.pt on data.npz into run, all in tmp_path"""
    sizes = {"hidden": 8, "updates": 3, "batch": 4, "length": 5, "log_every": 3, **changes}
    redraw_adapt.main(
        redraw_adapt.Args(
            str(tmp_path / "draw.pt"),
            dataset=str(tmp_path / "data.npz"),
            run_dir=str(tmp_path / "run"),
            device="cpu",
            **sizes,
        )
    )


@pytest.mark.parametrize("method", ["residual", "replace", "finetune", "lowrank", "none"])
def test_stage_2_changes_its_own_parameters_alone(monkeypatch, tmp_path, method):
    start = []
    resume = redraw_adapt.Run.resume

    def remember(run, modules):
        start.append(copy.deepcopy(modules["rectified"].state_dict()))
        return resume(run, modules)

    monkeypatch.setattr(redraw_adapt.Run, "resume", remember)
    save_dataset(tmp_path / "data.npz", random_rows(40))
    draw = DRAW(TINY)
    nn.init.normal_(draw.dynamics_net[-1].weight, std=3.0)  # KLs above the free nat
    source = load_checkpoint(save_tiny_draw(tmp_path / "draw.pt", draw), ("draw_pretrain",))
    # The residual's output layer starts at zero, so that its other layers have no gradient in the
    # first update.
    adapt(tmp_path, method=method)
    adapted = load_checkpoint(tmp_path / "run" / "last.pt", ("redraw_adapt",))
    own = {name for name in source["draw"] if name.startswith(("dynamics_net.", "initial_logits"))}
    assert len(own) == 12
    assert changed(source["draw"], adapted["draw"]) == (own if method == "finetune" else set())
    assert bool(adapted["rectified"]) == (method in ("residual", "replace", "lowrank"))
    assert changed(start[0], adapted["rectified"]) == set(adapted["rectified"])
    best = load_checkpoint(tmp_path / "run" / "best.pt", ("redraw_adapt",))
    assert changed(source["draw"], best["draw"]) <= own


@pytest.mark.parametrize("method", ["residual", "finetune"])
@pytest.mark.parametrize(
    "decay, shares", [(0.0, (0, 0, 1)), (0.5, (0.25, 0.25, 0.5)), (0.9, (1 / 3, 1 / 3, 1 / 3))]
)
def test_stage_2_saves_the_average_of_its_weights(monkeypatch, tmp_path, decay, shares, method):
    """Of three updates: the last one, an average that forgets, and their mean"""
    save_dataset(tmp_path / "data.npz", random_rows(40))
    save_tiny_draw(tmp_path / "draw.pt")
    weights = []
    step = torch.optim.Adam.step

    def recorded(self):
        step(self)
        weights.append([p.detach().clone() for p in self.param_groups[0]["params"]])

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    adapt(tmp_path, method=method, ema_decay=decay)
    last = load_checkpoint(tmp_path / "run" / "last.pt", ("redraw_adapt",))
    saved = list(last["rectified"].values())
    if method == "finetune":
        saved = [value for name, value in last["draw"].items() if name.startswith("dynamics_net.")]
        saved.append(last["draw"]["initial_logits"])
    assert len(weights) == 3 and len(saved) == len(weights[0])
    for value, *of_updates in zip(saved, *weights, strict=True):
        expected = sum(share * w for share, w in zip(shares, of_updates, strict=True))
        assert torch.allclose(value, expected, atol=1e-7)
        assert decay == 0.0 or not torch.allclose(value, of_updates[-1], atol=1e-7)


@pytest.mark.parametrize(
    "method, lr", [("residual", 0.01), ("replace", 0.01), ("lowrank", 0.01), ("finetune", 1e-4)]
)
def test_stage_2_has_a_learning_rate_for_each_method(monkeypatch, tmp_path, method, lr):
    """The first step of Adam is as long as its learning rate, for each weight with a gradient."""
    save_dataset(tmp_path / "data.npz", random_rows(40))
    save_tiny_draw(tmp_path / "draw.pt")
    steps = []
    step = torch.optim.Adam.step

    def recorded(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        step(self)
        pairs = zip(parameters, before, strict=True)
        steps.append(max((p - b).abs().max().item() for p, b in pairs))

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    args = redraw_adapt.Args(
        str(tmp_path / "draw.pt"),
        dataset=str(tmp_path / "data.npz"),
        run_dir=str(tmp_path / "run"),
        device="cpu",
        method=method,
        hidden=8,
        updates=1,
        batch=4,
        length=5,
    )
    redraw_adapt.main(args)
    assert steps == pytest.approx([lr], rel=1e-2)


@pytest.mark.parametrize("method", ["residual", "replace", "finetune", "lowrank"])
def test_stage_2_has_no_gradient_for_the_teacher(method):
    """Even of a world model that is not frozen: the posterior is the teacher, so nothing of it
    learns; and of the residual's loss neither f nor the initial state. A change of low rank has f's
    own loss; what learns from it is up to its optimizer."""
    draw = DRAW(TINY)
    nn.init.normal_(draw.dynamics_net[-1].weight, std=3.0)  # KLs above the free nat
    rectified = Rectified(draw, method, hidden=8)
    data = tensors(random_rows(12), 2, 6)
    log_q = draw.posterior(draw.encoder(data["image"], data["vector"]))
    of_f = method in ("finetune", "lowrank")
    loss = finetune_loss if of_f else residual_loss
    z = sample_onehot(log_q.exp()).detach()
    kl, _ = loss(draw, rectified, log_q, z, data["action"], data["is_first"])
    kl.sum().backward()
    learns = [rectified.delta[0][-1]] if rectified.uses_delta else [draw.dynamics_net[-1]]
    learns += [change[1] for change in rectified.change]
    assert all(p.grad.any() for module in learns for p in module.parameters())
    own = ("dynamics_net.", "initial_logits") if of_f else ()
    for name, p in draw.named_parameters():
        assert p.grad is None or name.startswith(own) and own, name
    assert not of_f or draw.initial_logits.grad.any()


def test_stage_1_kl_without_its_stopped_sides():
    """With the reconstructions off: 1.5 KL(sg q || p) alone teaches f, and what the encoder learns
    from it comes through z, not through q."""
    draw = DRAW(TINY)
    nn.init.normal_(draw.dynamics_net[-1].weight, std=3.0)  # KLs above the free nat
    data = tensors(random_rows(12), 2, 6) | {"reward": torch.zeros(2, 6)}
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


def test_the_actor_critic_leaves_the_world_model_alone():
    draw, ensemble = DRAW(TINY).requires_grad_(True), Ensemble(TINY, 5, 2, 0)
    policy = ActorCritic(TINY)
    nn.init.normal_(policy.critic.net[-1].weight)
    z, sigma, _ = random_states(4)
    parts = {"draw": draw, "ensemble": ensemble, "slow": policy.slow_critic}
    before = {name: copy.deepcopy(module.state_dict()) for name, module in parts.items()}

    def reward_of(z, sigma, action, z_next):
        return draw.reward(z_next) + ensemble.disagreement(sigma, z, action)

    args = draw_pretrain.Args(horizon=3, actor_lr=1e-2, critic_lr=1e-2)
    adam = draw_pretrain.policy_adam(args, policy)
    loss, *_ = draw_pretrain.reinforce(
        args, draw, Rectified(draw), policy, z, sigma, torch.ones(4), reward_of
    )
    draw_pretrain.gradient_step(adam, loss, 100.0)
    policy.update_slow_critic()
    for module in (draw, ensemble):
        assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is None for p in policy.slow_critic.parameters())
    assert not changed(before["draw"], draw.state_dict())
    assert not changed(before["ensemble"], ensemble.state_dict())
    assert all(p.grad.any() for p in policy.actor.parameters())
    assert policy.critic.net[-1].weight.grad.any()
    # The slow critic moves by 2 % of the gap to the critic of after the update.
    critic = policy.critic.state_dict()
    for name, slow in policy.slow_critic.state_dict().items():
        old = before["slow"][name]
        assert torch.allclose(slow, old + 0.02 * (critic[name] - old), atol=1e-6)
    assert "net.6.weight" in changed(before["slow"], policy.slow_critic.state_dict())


def test_what_stage_1_learns_from_policies_is_thrown_away(tmp_path):
    """The world model's weights are the same with other policies."""
    weights = []
    for actor_lr in (1e-6, 1e-2):
        args = draw_pretrain.Args(
            env_id="toy_env:Toy-v0",
            run_dir=str(tmp_path / str(actor_lr)),
            device="cpu",
            steps=80,
            prefill=60,
            train_every=5,
            collect="random",
            batch=2,
            length=4,
            starts=4,
            horizon=2,
            n_envs=2,
            S=3,
            K=4,
            cnn_depth=2,
            vector_units=8,
            vector_layers=1,
            units=16,
            actor_units=16,
            ensemble=2,
            actor_lr=actor_lr,
        )
        draw_pretrain.main(args)
        weights.append(load_checkpoint(tmp_path / str(actor_lr) / "draw.pt", ("draw_pretrain",)))
    assert not changed(weights[0]["draw"], weights[1]["draw"])
    assert changed(weights[0]["task_actor"], weights[1]["task_actor"])


@pytest.mark.parametrize("learn", ["reinforce", "lookahead", "recorded"])
def test_stage_3_leaves_the_world_model_alone(monkeypatch, tmp_path, learn):
    draw = shaken_draw()  # its rewards differ from action to action
    rectified = Rectified(draw, "residual", hidden=8)
    for p in rectified.parameters():
        nn.init.normal_(p, std=0.3)
    save_dataset(tmp_path / "data.npz", random_rows(8))
    save_tiny_adapted(tmp_path / "adapted.pt", draw, rectified)
    worlds, policies = [], []

    def remember(load, found):
        def loaded(*args):
            found.append(load(*args))
            return found[-1]

        return loaded

    for name in ("load_draw", "load_rectified"):
        monkeypatch.setattr(train_policy, name, remember(getattr(train_policy, name), worlds))
    monkeypatch.setattr(train_policy, "begin_policy", remember(train_policy.begin_policy, policies))
    train_policy.main(
        train_policy.Args(
            str(tmp_path / "adapted.pt"),
            str(tmp_path / "data.npz"),
            run_dir=str(tmp_path / "run"),
            device="cpu",
            updates=2,
            batch=2,
            length=4,
            starts=8,
            horizon=3,
            actor_lr=1e-2,
            critic_lr=1e-2,
            learn=learn,
        )
    )
    for module, original in zip(worlds, (draw, rectified), strict=True):
        assert not changed(original.state_dict(), module.state_dict())
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    (policy,) = policies
    assert all(p.grad.any() for p in policy.actor.parameters())
    assert policy.critic.net[-1].weight.grad.any()
    assert changed(policy.critic.state_dict(), policy.slow_critic.state_dict())
