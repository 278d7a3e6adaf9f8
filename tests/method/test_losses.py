"""The losses against numbers worked out by hand. Stubs stand for the networks wherever only the
arithmetic counts."""

import copy
import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TINY,
    borders,
    random_rows,
    random_states,
    read_metrics,
    save_tiny_draw,
    shaken_draw,
)
from torch import nn

import common
import draw_pretrain
import redraw_adapt
import train_policy
from common import (
    BINS,
    DRAW,
    ActorCritic,
    Critic,
    Rectified,
    Sizes,
    follow,
    kl_categorical,
    load_policy,
    sample_onehot,
    save_dataset,
    symexp,
    symlog,
    twohot_log_prob,
    twohot_mean,
    unimix,
)
from draw_pretrain import Ensemble, world_model_loss
from redraw_adapt import residual_loss

STEP = 40 / (BINS - 1)  # between two bins; bin 127 lies at 0


def test_symlog():
    x = torch.tensor([-1000.0, -1.5, -1e-3, 0.0, 0.3, 7.0, 1e5])
    assert torch.allclose(symexp(symlog(x)), x, rtol=1e-4)
    assert symlog(torch.tensor(math.e - 1)).item() == pytest.approx(1.0) and symlog(
        torch.tensor(1 - math.e)
    ).item() == pytest.approx(-1.0)


def twohot(x):
    """The two-hot encoding of x (n,), from the gradient of the cross-entropy: d/dlogits = target -
    softmax"""
    logits = torch.zeros(len(x), BINS, requires_grad=True)
    return torch.autograd.grad(twohot_log_prob(logits, x).sum(), logits)[0] + 1 / BINS


@pytest.mark.parametrize(
    "position, bins",  # position in symlog space
    [
        (0.0, {127: 1.0}),
        (3 * STEP, {130: 1.0}),
        (0.25 * STEP, {127: 0.75, 128: 0.25}),
        (-0.25 * STEP, {126: 0.25, 127: 0.75}),
        (-20.0, {0: 1.0}),
        (20.0, {254: 1.0}),
        (25.0, {254: 1.0}),  # beyond the range
        (-25.0, {0: 1.0}),
    ],
)
def test_twohot_puts_its_mass_around_the_value(position, bins):
    expected = torch.zeros(BINS)
    for i, mass in bins.items():
        expected[i] = mass
    assert torch.allclose(twohot(symexp(torch.tensor([position])))[0], expected, atol=1e-3)


def test_twohot_mean_is_the_value():
    x = torch.tensor([-300.0, -1.0, 0.0, 0.2, 1.0, 40.0, 5000.0])
    assert torch.allclose(twohot_mean(twohot(x).clamp(min=1e-12).log()), x, rtol=1e-3, atol=1e-4)
    assert twohot_log_prob(torch.zeros(2, BINS), x[:2]).tolist() == pytest.approx(
        [-math.log(255)] * 2
    )


def test_kl_categorical():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(
        0.5 / 0.75
    )  # and nothing from the second variable
    assert kl_categorical(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-5)
    assert kl_categorical(
        torch.randn(7, 2, 4).log_softmax(-1), torch.randn(7, 2, 4).log_softmax(-1)
    ).shape == (7,)


# ---- the world model: a stub whose posterior and prior are given, and whose heads say nothing of
# the latent

B, T, S, K = 2, 4, 3, 4
PAPER = draw_pretrain.Args()


def stub_draw(q, u, seen):
    """q log-probabilities and u logits, (B, T, S, K) each; `seen` collects the latents that the
    decoder was given"""
    draw = SimpleNamespace(
        encoder=lambda image, vector: torch.zeros(B, T, 5),
        posterior=lambda embed: q,
        observe=lambda z, action, first: u,
        decoder=lambda z: seen.append(z) or torch.full((B, T, 4, 4, 3), 0.5),
        vector_head=lambda z: torch.zeros(B, T, 2),
        reward_head=lambda z: torch.zeros(B, T, BINS),
        continue_head=lambda z: torch.full((B, T, 1), 2.0),
    )
    draw.reconstruction_errors = partial(DRAW.reconstruction_errors, draw)
    return draw


def stub_data():
    data = {
        "image": torch.zeros(B, T, 4, 4, 3, dtype=torch.uint8),
        "vector": torch.full((B, T, 2), math.e - 1),
        "action": torch.zeros(B, T, 1),
        "reward": torch.zeros(B, T),
        "is_first": torch.zeros(B, T, dtype=torch.bool),
        "is_terminal": torch.zeros(B, T, dtype=torch.bool),
    }
    data["is_first"][0, 2] = True
    data["is_terminal"][1, 3] = True
    return data


# The first step of each sequence, and the border in the middle of one of them, have no cause to be
# predicted from.
NOT_FIRST = torch.tensor([[False, True, False, True], [False, True, True, True]])


@pytest.mark.parametrize(
    "sharp", [0.5, 6.0]
)  # posteriors whose KL to the prior is below and above the free nat
def test_world_model_loss(sharp):
    logits_q = (sharp * F.one_hot(torch.randint(K, (B, T, S)), K).float()).requires_grad_()
    u = torch.zeros(B, T, S, K, requires_grad=True)
    q = unimix(logits_q)
    loss, metrics, (_, _, sigma) = world_model_loss(
        stub_draw(q, u, []), stub_data(), PAPER, soft=0.0
    )

    kl = S * (
        math.log(K) + (q[0, 0, 0].exp() * q[0, 0, 0]).sum().item()
    )  # to a uniform prior, alike at every step
    assert (kl > 1) == (sharp == 6.0)
    assert metrics["world_model/kl"].item() == pytest.approx(
        kl, rel=1e-4
    )  # as it is, without free bits
    image, vector, reward = (
        48 * 0.5**2,
        2 * 1.0**2,
        7 / 8 * math.log(255),
    )  # 4*4*3 pixels off by a half, two symlogs of 1, uniform bins but in one step that begins
    cont = (
        7 * math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))
    ) / 8  # a logit of 2 in 8 steps, one of them terminal
    expected = (
        image + vector + reward + cont + 2.0 * max(1.0, kl) * NOT_FIRST.sum().item() / (B * T)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-4)

    # 1.5 pulls the prior to the posterior, 0.5 the posterior to the prior, and neither of them
    # moves below the free nat.
    grad_q, grad_u = torch.autograd.grad(
        loss, (logits_q, u), allow_unused=True, materialize_grads=True
    )
    p = unimix(u)
    mean = NOT_FIRST / (B * T) * (kl > 1)
    expected_u = torch.autograd.grad((1.5 * kl_categorical(q.detach(), p) * mean).sum(), u)[0]
    expected_q = torch.autograd.grad(
        (0.5 * kl_categorical(unimix(logits_q), p.detach()) * mean).sum(), logits_q
    )[0]
    assert torch.allclose(grad_u, expected_u, atol=1e-6) and torch.allclose(
        grad_q, expected_q, atol=1e-6
    )
    assert torch.allclose(
        sigma, torch.full_like(u, 1 / K)
    )  # the belief that is handed on is the plain softmax


def test_world_model_loss_weighs_its_parts():
    q = u = torch.zeros(B, T, S, K).log_softmax(-1)

    def loss(**scales):
        return world_model_loss(
            stub_draw(q, u, []), stub_data(), dataclasses.replace(PAPER, **scales), 0.0
        )[0].item()

    for name, part in (
        ("image_scale", 48 * 0.5**2),
        ("vector_scale", 2.0),
        ("reward_scale", 7 / 8 * math.log(255)),
    ):
        assert loss(**{name: 3.0}) - loss() == pytest.approx(2 * part, rel=1e-4)


def test_soft_latents_fade_from_probabilities_to_samples():
    seen, q = [], torch.randn(B, T, S, K).log_softmax(-1)
    for soft in (1.0, 0.0, 0.5):
        world_model_loss(stub_draw(q, torch.zeros_like(q), seen), stub_data(), PAPER, soft)
    soft, hard, half = (z.unflatten(-1, (S, K)) for z in seen)
    assert torch.allclose(soft, q.exp(), atol=1e-5)
    assert torch.allclose(hard.max(-1).values, torch.ones(B, T, S), atol=1e-5)
    assert torch.allclose(
        half - 0.5 * q.exp(), (half - 0.5 * q.exp()).round(decimals=1), atol=1e-5
    )  # the other half is one-hot


def test_world_model_learns_from_every_part_of_the_loss():
    draw, rows = DRAW(TINY), random_rows(10)
    data = {k: torch.from_numpy(v)[None] for k, v in rows.items()} | {"reward": torch.randn(1, 10)}
    draw.posterior_net[-1].weight.data *= 5.0  # sharp, so the KL lies above its free nat
    loss, _, kept = world_model_loss(draw, data, PAPER, 0.0)
    loss.backward()
    still = [name for name, p in draw.named_parameters() if p.grad is None or not p.grad.any()]
    # A zero output layer passes no gradient to the layers below it, until it has moved.
    assert [name for name in still if not name.startswith("reward_head")] == []
    assert not any(x.requires_grad for x in kept)


def test_ensemble_loss():
    sizes = Sizes(S=2, K=2, units=4, action_size=1)
    ensemble = Ensemble(sizes, 3, members=2, target=0)
    for i, member in enumerate(ensemble.members):
        nn.init.zeros_(member[-1].weight)
        nn.init.constant_(
            member[-1].bias, float(i)
        )  # members predict 0 and 1 for each of three numbers
    z, sigma, action = random_states(1, 3, sizes=sizes)
    embed = torch.tensor([[[9.0] * 3, [2.0] * 3, [5.0] * 3]])
    first = torch.tensor([[False, False, True]])  # a border between the second and the third step
    assert ensemble.loss(sigma, z, action, embed, first).item() == pytest.approx(
        (3 * 2**2 + 3 * 1**2) / 2 / 2
    )  # of two members, two steps
    assert ensemble.disagreement(sigma, z, action).flatten().tolist() == pytest.approx(
        [0.5] * 3
    )  # deviation of 0 and 1


# ---- the actor-critic: classes 0, 1, 2, ... of one variable are a chain, walked one class a step

CHAIN = Sizes(S=1, K=8, units=8, actor_units=8, action_size=1)


def place(z):
    """The class (...) of a latent (..., 1, K)"""
    return (z.squeeze(-2) * torch.arange(8)).sum(-1)


class Chain:
    """An ActorCritic, its world and five starts in place 0. Half of the episodes end in place 2."""

    def __init__(self, monkeypatch, **changes):
        one_hot = lambda probs: F.one_hot(probs.argmax(-1), 8).float()  # noqa: E731
        monkeypatch.setattr(draw_pretrain, "sample_onehot", one_hot)
        changes = {"horizon": 3, "gamma": 0.8, "lam": 0.5, "return_floor": 1.0, **changes}
        self.args = draw_pretrain.Args(**changes)
        self.args.critic_lr = self.args.actor_lr
        self.policy = ActorCritic(CHAIN)
        self.adam = draw_pretrain.policy_adam(self.args, self.policy)
        self.z = F.one_hot(torch.zeros(5, 1, dtype=torch.long), 8).float()
        self.cont = lambda z: torch.where(place(z) == 2, 0.5, 1.0)

    def __call__(self, z, sigma, action):
        return 50 * z.roll(1, -1)

    def prior(self, sigma):
        return sigma

    def update(self, reward_of, alive=1.0):
        z = self.z
        alive = torch.full((len(z),), alive)
        loss, metrics, self.policy.range, _ = draw_pretrain.reinforce(
            self.args, self, self, self.policy, z, z, alive, reward_of
        )
        draw_pretrain.gradient_step(self.adam, loss, 100.0)
        self.policy.update_slow_critic()
        return metrics


def reward_of_the_place(z, sigma, action, z_next):
    assert z.shape == sigma.shape == z_next.shape == (3, 5, 1, 8) and action.shape == (3, 5, 1)
    assert torch.equal(place(z_next), place(z) + 1)
    return place(z_next)  # 1, 2, 3 on the way


def critic_of_places(sizes):
    """A critic that knows v = exp(2 k STEP) - 1 in place k: all its mass lies on one bin"""
    critic = Critic(sizes)
    critic.net = nn.Linear(sizes.S * sizes.K, BINS, bias=False)
    nn.init.zeros_(critic.net.weight)
    for k in range(sizes.K):
        nn.init.constant_(critic.net.weight[127 + 2 * k, k : k + 1], 50.0)
    return critic


# Continue is 1, 0.5, 1 on arriving at the places 1, 2, 3; gamma is 0.8, lambda 0.5. First with a
# critic that says 0 ...
R2 = 3.0
R1 = 2.0 + 0.8 * 0.5 * 0.5 * R2
R0 = 1.0 + 0.8 * 1.0 * 0.5 * R1
RETURNS = [R0, R1, R2]
MEAN_WEIGHT = (1 + 0.8 + 0.8 * 0.4) / 3
# ... then with the one above.
V1, V2, V3 = (math.exp(2 * k * STEP) - 1 for k in (1, 2, 3))
R2 = 3.0 + 0.8 * 1.0 * V3
R1 = 2.0 + 0.8 * 0.5 * (0.5 * V2 + 0.5 * R2)
R0 = 1.0 + 0.8 * 1.0 * (0.5 * V1 + 0.5 * R1)
MEAN_BOOTSTRAPPED_RETURN = (R0 + R1 + R2) / 3


def test_lambda_returns_weights_and_scale(monkeypatch):
    chain = Chain(monkeypatch)
    spread = np.subtract(*np.percentile(RETURNS * 5, [95, 5]))
    metrics = chain.update(reward_of_the_place)
    assert metrics["reward"].item() == pytest.approx(2.0)
    assert metrics["return"].item() == pytest.approx(np.mean(RETURNS), rel=1e-4)
    # A uniform critic pays log 255 for the return and for its slow copy.
    assert metrics["critic_loss"].item() == pytest.approx(MEAN_WEIGHT * 2 * math.log(255), rel=1e-4)
    # The average starts at 0.
    assert chain.policy.range.item() == pytest.approx(0.01 * spread, rel=1e-3)
    assert metrics["scale"] == 1.0


def test_lambda_returns_by_hand():
    reward, discount = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.8], [0.4], [0.8]])
    value = torch.tensor([[9.0], [V1], [V2], [V3]])
    returns = draw_pretrain.lambda_returns(reward, discount, value, 0.5)
    assert returns.flatten().tolist() == pytest.approx([R0, R1, R2])


def test_returns_bootstrap_from_the_critic(monkeypatch):
    chain = Chain(monkeypatch)
    chain.policy.critic = critic_of_places(CHAIN)
    chain.policy.slow_critic = critic_of_places(CHAIN)
    metrics = chain.update(reward_of_the_place)
    assert metrics["return"].item() == pytest.approx(MEAN_BOOTSTRAPPED_RETURN, rel=1e-4)


def test_return_scale_is_a_moving_average_with_a_floor(monkeypatch):
    chain = Chain(monkeypatch, horizon=2, gamma=0.0)  # returns are the rewards
    rewards = torch.stack([torch.zeros(5), torch.full((5,), 1000.0)])
    for expected in (10.0, 0.99 * 10 + 10):
        assert chain.update(lambda *_: rewards)["scale"].item() == pytest.approx(expected, rel=1e-3)


def actor_step(monkeypatch, floor, size):
    """Gradient of the actor in its first update, for rewards of +-size"""
    torch.manual_seed(0)
    chain = Chain(monkeypatch, entropy=0.0, return_floor=floor)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.zeros(()))
    chain.update(lambda z, sigma, action, z_next: size * action.sign().squeeze(-1))
    return torch.cat([p.grad.flatten() for p in chain.policy.actor.parameters()])


def test_advantages_are_divided_by_the_scale(monkeypatch):
    small = actor_step(monkeypatch, 1.0, 0.1)  # their range is below the floor
    assert torch.allclose(actor_step(monkeypatch, 0.5, 0.1), 2 * small, rtol=1e-4)
    assert torch.allclose(actor_step(monkeypatch, 1.0, 0.2), 2 * small, rtol=1e-4)
    # Their range is far above the floor: the size of rewards is of no account.
    large = actor_step(monkeypatch, 1e-3, 1000.0)
    assert torch.allclose(actor_step(monkeypatch, 1e-3, 2000.0), large, rtol=1e-3)


def test_nothing_is_learned_after_the_end_of_an_episode(monkeypatch):
    chain = Chain(monkeypatch)
    before = copy.deepcopy(chain.policy.state_dict())
    assert chain.update(reward_of_the_place, alive=0.0)["critic_loss"] == 0
    after = chain.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "range")


def test_actor_and_critic_learn_the_way_they_should(monkeypatch):
    chain = Chain(monkeypatch, actor_lr=1e-2, gamma=0.0)
    chain.z = chain.z.repeat(20, 1, 1)
    mean = chain.policy.actor(chain.z).mean.mean().item()
    for _ in range(40):
        chain.update(lambda z, sigma, action, z_next: 3.0 + action.squeeze(-1))
    assert chain.policy.actor(chain.z).mean.mean() > mean + 0.3  # it pays to push
    # The returns, of about 3, are on their way into the critic.
    assert twohot_mean(chain.policy.critic(chain.z)).mean() > 1.0


def test_slow_critic_follows(monkeypatch):
    chain = Chain(monkeypatch, actor_lr=0.1)
    before = chain.policy.slow_critic.net[-1].bias.clone()
    chain.update(reward_of_the_place)
    now, fast = chain.policy.slow_critic.net[-1].bias, chain.policy.critic.net[-1].bias
    assert not torch.equal(fast, before)
    assert torch.allclose(now, 0.98 * before + 0.02 * fast, atol=1e-6)


# ---- stage 2


@pytest.mark.parametrize("inputs", ["za", "za+sigma", "za+base"])
def test_residual_loss_is_the_kl_along_the_recurrence(inputs):
    """The recurrence once more, a row at a time: f and delta start anew at a first step, and f gets
    the rectified belief."""
    draw = DRAW(TINY).requires_grad_(False)
    rectified = Rectified(draw, "residual", inputs=inputs)
    for p in rectified.parameters():
        nn.init.normal_(p, std=0.3)
    z, _, action = random_states(2, 6)
    first = borders(2, 6, (0, 3))
    u = torch.zeros(2, 6, TINY.S, TINY.K)
    for b in range(2):
        for t in range(6):
            sigma = u[b, t - 1][None].softmax(-1)
            previous = (z[b, t - 1][None], sigma, action[b, t - 1][None])
            if t == 0 or first[b, t]:
                previous = (*(x[None] for x in draw.initial()), torch.zeros(1, 1))
            u[b, t] = rectified(*previous)[0]
    log_q = u.log_softmax(-1).detach()
    kl, mask = residual_loss(draw, rectified, log_q, z, action, first)
    assert kl.abs().max() < 1e-5
    no, yes = False, True
    assert mask.tolist() == [[no, yes, yes, no, yes, yes], [no, yes, yes, yes, yes, yes]]

    other = torch.randn(2, 6, TINY.S, TINY.K).log_softmax(-1).requires_grad_()
    kl, _ = residual_loss(draw, rectified, other, z, action, first)
    assert torch.allclose(kl, kl_categorical(other, log_q) * mask, atol=1e-5)  # no free bits
    assert (kl[mask] > 0).all() and not kl[~mask].any()
    # The posterior is the teacher.
    assert torch.autograd.grad(kl.sum(), other, allow_unused=True) == (None,)


@pytest.mark.parametrize("method, l2", [("residual", 0.25), ("replace", 0.0)])
def test_a_residual_alone_is_kept_small(method, l2):
    draw = DRAW(TINY)
    args = redraw_adapt.Args("draw.pt", method=method, l2=0.25)
    loss, trained, lr = redraw_adapt.what_learns(args, draw, Rectified(draw, method, 8))
    assert loss.keywords == {"l2": l2} and lr == args.lr
    assert len(trained) == 5


def test_the_average_of_delta_starts_as_a_mean_and_then_forgets():
    """After updates 1, 2 and 3 the mean of their weights, from then on the last ones count more"""
    weights = [[1.0, -2.0], [4.0, 0.0], [1.0, 5.0], [12.0, 1.0]]
    module, average = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    expected = [[1.0, -2.0], [2.5, -1.0], [2.0, 1.0], [2.0 + 10.0 / 3.0, 1.0]]
    for update, (now, then) in enumerate(zip(weights, expected, strict=True), 1):
        module.weight.data = torch.tensor([now])
        follow(average, module, max(1.0 / update, 1.0 / 3.0))
        assert torch.allclose(average.weight.data, torch.tensor([then]))
        assert torch.equal(module.weight.data, torch.tensor([now]))
    module.requires_grad_(False)  # what is not trained stays
    follow(average, module, 1.0)
    assert torch.allclose(average.weight.data, torch.tensor([then]))


# ---- stage 3, whose algorithm stands in its main(): run it on a world model of which everything is
# known


def run_policy(monkeypatch, tmp_path, draw, rows, **changes):
    """Runs train_policy.main; returns {metric: [values]} and its policy"""
    save_dataset(tmp_path / "data.npz", rows)
    save_tiny_draw(tmp_path / "draw.pt", draw)
    monkeypatch.setattr(
        train_policy, "load_draw", lambda checkpoint, device: draw.requires_grad_(False)
    )
    args = {
        "updates": 1,
        "batch": 4,
        "length": len(rows["is_first"]),
        "horizon": 3,
        "log_every": 1,
        "gamma": 0.8,
        "lam": 0.5,
        **changes,
    }
    args = {"starts": args["batch"] * args["length"], **args}
    train_policy.main(
        train_policy.Args(
            str(tmp_path / "draw.pt"),
            str(tmp_path / "data.npz"),
            run_dir=str(tmp_path / "run"),
            device="cpu",
            **args,
        )
    )
    metrics = read_metrics(tmp_path / "run")
    return metrics, load_policy(tmp_path / "run" / "policy.pt")


@pytest.mark.parametrize("learn", ["reinforce", "lookahead"])
@pytest.mark.parametrize(
    "decay, shares", [(0.0, (0, 0, 1)), (0.5, (0.25, 0.25, 0.5)), (0.9, (1 / 3, 1 / 3, 1 / 3))]
)
def test_what_acts_is_the_average_of_the_actor(monkeypatch, tmp_path, decay, shares, learn):
    """Of three updates: the last one, an average that forgets, and their mean"""
    weights = []
    improve = train_policy.improve

    def recorded(args, draw, dynamics, policy, *others):
        result = improve(args, draw, dynamics, policy, *others)
        weights.append([p.detach().clone() for p in policy.actor.parameters()])
        return result

    monkeypatch.setattr(train_policy, "improve", recorded)
    changes = {"updates": 3, "actor_lr": 1e-2, "learn": learn, "ema_decay": decay}
    _, deployed = run_policy(monkeypatch, tmp_path, shaken_draw(), random_rows(8), **changes)
    assert len(weights) == 3
    for value, *of_updates in zip(deployed.actor.parameters(), *weights, strict=True):
        expected = sum(share * w for share, w in zip(shares, of_updates, strict=True))
        assert torch.allclose(value, expected, atol=1e-6)
    assert not torch.allclose(weights[0][0], weights[2][0], atol=1e-4)


def chain_metrics(monkeypatch, tmp_path):
    """The first update of stage 3 on the chain of above, with one terminal state among eight
    starts"""
    monkeypatch.setattr(
        train_policy, "sample_onehot", lambda probs: F.one_hot(probs.argmax(-1), 4).float()
    )
    draw = DRAW(TINY)
    draw.posterior = lambda embed: torch.tensor([0.0, -99.0, -99.0, -99.0]).expand(
        *embed.shape[:-1], 3, 4
    )
    draw.dynamics = lambda z, sigma, action, change: 50 * z.roll(1, -1)
    draw.reward = lambda z: z[..., 0, :] @ torch.arange(4.0)
    draw.cont = lambda z: 1 - 0.5 * z[..., 0, 2]
    rows = random_rows(8)
    rows["is_terminal"][3] = True
    return run_policy(monkeypatch, tmp_path, draw, rows, return_floor=0.5)[0]


def test_stage_3_returns_and_weights(monkeypatch, tmp_path):
    metrics = chain_metrics(monkeypatch, tmp_path)
    assert metrics["policy/return"] == pytest.approx([np.mean(RETURNS)], rel=1e-3)
    assert metrics["policy/critic_loss"] == pytest.approx(
        [7 / 8 * MEAN_WEIGHT * 2 * math.log(255)], rel=1e-3
    )
    assert metrics["policy/scale"] == [0.5]  # the floor


def test_stage_3_bootstraps_from_the_critic(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "Critic", critic_of_places)
    assert chain_metrics(monkeypatch, tmp_path)["policy/return"] == pytest.approx(
        [MEAN_BOOTSTRAPPED_RETURN], rel=1e-3
    )


def test_stage_3_starts_where_reward_is_predicted(monkeypatch, tmp_path):
    draw = DRAW(TINY)
    draw.encoder.forward = lambda image, vector: vector
    draw.posterior = lambda vector: (
        20
        * F.one_hot((vector[..., 0] > 0).long(), 4)
        .float()
        .unsqueeze(-2)
        .expand(*vector.shape[:-1], 3, 4)
        - 20
    )
    draw.dynamics = lambda z, sigma, action, change: 50 * z  # nothing moves
    draw.reward = lambda z: z[..., 0, 1]
    rows = random_rows(8)
    rows["vector"][:, 0] = np.arange(8) == 5  # the sixth row is the one that pays
    for rewarded, low, high in ((0.0, 0.0, 0.5), (0.5, 0.4, 0.8), (1.0, 0.95, 1.0)):
        (tmp_path / str(rewarded)).mkdir()
        metrics, _ = run_policy(
            monkeypatch, tmp_path / str(rewarded), draw, rows, rewarded=rewarded, batch=64, length=1
        )
        assert low <= metrics["policy/reward"][0] <= high


def test_policy_learns_to_do_what_pays(monkeypatch, tmp_path):
    draw = DRAW(TINY)
    sign = torch.tensor([1.0, -1.0, 0.0, 0.0])
    draw.dynamics = lambda z, sigma, action, change: (
        4 * action.clamp(-1, 1)[..., None] * sign + torch.zeros_like(z)
    )  # a positive action leads to class 0
    draw.reward = lambda z: z[..., 0].mean(-1)  # which pays
    rows = random_rows(8)
    _, policy = run_policy(
        monkeypatch, tmp_path, draw, rows, updates=60, actor_lr=1e-2, critic_lr=1e-2, entropy=0.0
    )
    z = sample_onehot(torch.full((100, TINY.S, TINY.K), 1 / TINY.K))
    assert policy.actor(z).mean.mean() > 0.5


def test_a_share_of_the_residual_s_sequences_is_soft():
    """z is q itself in `soft` of the sequences, as lookahead imagines, a sample in the others."""
    N, T = 400, 4
    log_q = unimix(torch.randn(N, 3, 4))
    data = {"log_q": log_q, "action": torch.zeros(N, 1), "is_first": torch.zeros(N, dtype=bool)}
    starts = np.arange(0, N - T, 2)
    for soft in (0.0, 0.5, 1.0):
        seen, z, _, _ = redraw_adapt.sequences(data, np.arange(N), starts, T, soft)
        is_soft = (z == seen.exp()).flatten(1).all(1)
        one_hot = ((z == 0) | (z == 1)).flatten(1).all(1)
        assert (is_soft ^ one_hot).all() and abs(is_soft.float().mean() - soft) < 0.12
