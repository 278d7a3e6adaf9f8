"""Every equation against the slow float64 version of oracles.py, on random inputs. What is random
in the sources (noise of samples) is recorded as it is drawn, and given to the slow version."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    borders,
    close,
    double,
    random_rows,
    random_states,
    rowwise,
    shaken,
    shaken_draw,
)
from oracles import (
    actor64,
    base64,
    belief64,
    bounded64,
    check_gradients,
    dynamics64,
    initial64,
    kl64,
    mix64,
    mlp64,
    normal_entropy64,
    normal_log_prob64,
    quotients64,
    residual64,
    sample64,
    seen64,
    softmax64,
    step64,
    symexp64,
    symlog64,
    twohot64,
    twohot_log_prob64,
    twohot_mean64,
    weights64,
)

import draw_pretrain
import redraw_adapt
from common import (
    BINS,
    DRAW,
    Actor,
    Rectified,
    kl_categorical,
    sample_onehot,
    softmax,
    symexp,
    symlog,
    twohot_log_prob,
    twohot_mean,
    unimix,
)
from draw_pretrain import Ensemble, world_model_loss
from redraw_adapt import finetune_loss, residual_loss

S, K = TINY.S, TINY.K


# ---- distributions


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_unimix_softmax_and_kl(scale):
    a, b = torch.randn(2, 5, S, K) * scale, torch.randn(2, 5, S, K) * scale
    close(softmax(a), rowwise(softmax64, double(a)))
    p, q = (rowwise(lambda u: mix64(softmax64(u)), double(u)) for u in (a, b))
    close(unimix(a), np.log(p))
    close(kl_categorical(unimix(a), unimix(b)), rowwise(kl64, p, q), rtol=1e-3)


def test_samples_are_the_inverse_cdf(noise):
    probs = torch.randn(50, S, K).softmax(-1)
    z = sample_onehot(probs)
    close(
        z,
        np.array(
            [
                sample64(p, n)
                for p, n in zip(double(probs), double(noise.uniform[0])[..., 0], strict=True)
            ]
        ),
    )


# Beyond the ends of the range, at them, on bins, between bins, around zero
VALUES = [
    -1e12,
    -symexp64(20),
    symexp64(20),
    1e12,
    0.0,
    symexp64(40 / 254),
    symexp64(-7 * 40 / 254),
    -0.01,
    0.01,
    0.08,
    -0.09,
    1.0,
    -123.4,
    5e5,
    -4e8,
]


def test_symlog_and_symexp():
    x = torch.tensor(VALUES)
    close(symlog(x), [symlog64(v) for v in VALUES])
    close(symexp(symlog(x)), VALUES, rtol=1e-3)
    close(
        symexp(torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0])),
        [symexp64(v) for v in (-3.0, -0.1, 0.0, 0.1, 3.0)],
    )


def test_twohot():
    logits = torch.randn(len(VALUES), BINS) * 3
    close(
        twohot_log_prob(logits, torch.tensor(VALUES)),
        [twohot_log_prob64(row, v) for row, v in zip(double(logits), VALUES, strict=True)],
        atol=2e-3,
    )
    close(twohot_mean(logits), [twohot_mean64(row) for row in double(logits)])
    # The mean of a value's own encoding is the value, but for those beyond the ends.
    codes = torch.tensor(np.array([twohot64(v) for v in VALUES]))
    expected = [math.copysign(min(abs(v), symexp64(20)), v) for v in VALUES]
    close(twohot_mean(codes.clamp(min=1e-30).log().float()), expected, rtol=1e-3, atol=1e-4)


def test_actor():
    actor, z = shaken(Actor(dataclasses.replace(TINY, action_size=2)), 1.0), random_states(20)[0]
    pi = actor(z)
    action = pi.sample() * 2
    slow = [actor64(weights64(actor.net), row) for row in double(z)]
    close(pi.mean, [m for m, _ in slow])
    close(pi.stddev, [s for _, s in slow])
    close(
        pi.log_prob(action).sum(-1),
        [normal_log_prob64(m, s, a) for (m, s), a in zip(slow, double(action), strict=True)],
    )
    close(pi.entropy().sum(-1), [normal_entropy64(s) for _, s in slow])


# ---- the world model


def test_belief_over_a_sequence_with_borders():
    draw = shaken_draw()
    z, _, action = random_states(3, 7)
    first = borders(3, 7, (0, 0), (0, 3), (1, 1), (1, 2), (2, 6))
    close(
        draw.observe(z, action * 2, first),
        [
            belief64(step64(draw), double(z[b]), double(action[b] * 2), first[b], *initial64(draw))
            for b in range(3)
        ],
    )


OPTIONS = [
    ("residual", {}),
    ("residual", {"inputs": "za+sigma", "members": 2, "layers": 2}),
    ("residual", {"inputs": "za+base"}),
    ("replace", {}),
    ("replace", {"inputs": "za+sigma"}),
]


def target_case(method, options):
    """draw, rectified, log_q, z, action, first; and u, in float64, of three sequences of seven"""
    draw = shaken_draw()
    rectified = shaken(Rectified(draw, method, hidden=8, **options))
    z, _, action = random_states(3, 7)
    first = borders(3, 7, (0, 3), (1, 1), (1, 2), (2, 6))
    step = step64(draw, rectified)
    us = [
        belief64(step, double(z[b]), double(action[b]), first[b], *initial64(draw))
        for b in range(3)
    ]
    log_q = unimix(torch.randn(3, 7, S, K) * 3)
    return draw, rectified, log_q, z, action, first, np.array(us)


def predicted(first):
    """Steps (b, t) that are predicted from the one before"""
    return [(b, t) for b, t in np.ndindex(*first.shape) if t > 0 and not first[b, t]]


@pytest.mark.parametrize("method, options", OPTIONS)
def test_residual_loss(method, options):
    draw, rectified, log_q, z, action, first, us = target_case(method, options)
    close(draw.observe(z, action, first, rectified), us)
    expected = np.zeros((3, 7))
    for b, t, q, u_of_members in member_cases(draw, rectified, log_q, z, action, first, us):
        # The rectified distribution has no unimix; each member answers for itself.
        expected[b, t] = np.mean([kl64(q, softmax64(u)) for u in u_of_members])
    kl, mask = residual_loss(draw, rectified, log_q, z, action, first)
    close(kl, expected)
    assert [tuple(bt) for bt in mask.nonzero().tolist()] == predicted(first)
    # The penalty of large corrections: e is what u has beside f.
    for b, t, _, u_of_members in member_cases(draw, rectified, log_q, z, action, first, us):
        e = np.array(u_of_members) - base_of(draw, rectified, z, action, us, b, t)
        expected[b, t] += 0.5 * np.mean(e**2)
    close(residual_loss(draw, rectified, log_q, z, action, first, l2=0.5)[0], expected)
    u = torch.tensor(us, dtype=torch.float32)
    if len(rectified.delta) == 1:
        # Posteriors just like the prediction too: no free bits lift a small KL.
        kl, _ = residual_loss(draw, rectified, rectified.log_prior(u), z, action, first)
        close(kl, np.zeros((3, 7)), atol=1e-4)
    close(rectified.prior(softmax(u)), rectified.log_prior(u).exp())


def base_of(draw, rectified, z, action, us, b, t):
    """f's logits of step t, after the belief of step t - 1"""
    sigma = softmax64(us[b][t - 1])
    return base64(draw, rectified)(double(z[b, t - 1]), sigma, double(action[b, t - 1]))


def member_cases(draw, rectified, log_q, z, action, first, us):
    """b, t, q and each member's u_t of the predicted steps; the belief is that of their mean"""
    f = base64(draw, rectified)
    members = [weights64(delta) for delta in rectified.delta]
    for b, t in predicted(first):
        before = double(z[b, t - 1])
        sigma = softmax64(us[b][t - 1])
        a = double(action[b, t - 1])
        base = f(before, sigma, a)
        also = seen64(rectified, sigma, base)
        us_of_members = [base + residual64([m], before, a, also) for m in members]
        yield b, t, np.exp(double(log_q[b, t])), us_of_members


@pytest.mark.parametrize("method, options", OPTIONS)
def test_residual_loss_has_the_gradient_of_each_step_alone(method, options):
    """f and the belief are constants: each e_t answers for its own step."""
    draw, rectified, log_q, z, action, first, us = target_case(method, options)
    kl, _ = residual_loss(draw, rectified, log_q, z, action, first)
    kl.sum().backward()
    f = base64(draw, rectified)
    cases = []  # q, f_t, z_{t-1}, a_{t-1}, what else the residual sees, of each predicted step
    for b, t in predicted(first):
        before = double(z[b, t - 1])
        sigma = softmax64(us[b][t - 1])
        a = double(action[b, t - 1])
        base = f(before, sigma, a)
        cases.append((np.exp(double(log_q[b, t])), base, before, a, seen64(rectified, sigma, base)))
    members = [weights64(delta) for delta in rectified.delta]

    def loss(first_member):
        return sum(
            kl64(q, softmax64(base + residual64([first_member], before, a, also))) / len(members)
            for q, base, before, a, also in cases
        )

    check_gradients(loss, members[0], rectified.delta[0])


@pytest.mark.parametrize("method, options", OPTIONS)
def test_the_gradient_of_a_residual_does_not_depend_on_later_data(monkeypatch, method, options):
    """d loss / d e_t = (softmax(u_t) - q_t) / members, whatever follows."""
    draw, rectified, log_q, z, action, first, us = target_case(method, options)
    made = []

    def recorded(self, *inputs):
        e = residuals(self, *inputs)
        if e.requires_grad:
            e.retain_grad()
            made.append(e)
        return e

    residuals = Rectified.residuals
    monkeypatch.setattr(Rectified, "residuals", recorded)

    def gradient(log_q, z, action, first):
        made.clear()
        residual_loss(draw, rectified, log_q, z, action, first)[0].sum().backward()
        (e,) = made  # one batched call, none in the recurrence
        return e.grad.transpose(0, 1).transpose(1, 2)  # (B, T, members, S, K)

    grad = gradient(log_q, z, action, first)
    expected = np.zeros(grad.shape)
    for b, t, q, u_of_members in member_cases(draw, rectified, log_q, z, action, first, us):
        for i, u in enumerate(u_of_members):
            expected[b, t, i] = (softmax64(u) - q) / len(u_of_members)
    close(grad, expected)
    for t in range(6):
        other = target_case(method, options)[2:6]
        later = [
            torch.cat([x[:, : t + 1], y[:, t + 1 :]], 1)
            for x, y in zip((log_q, z, action, first), other, strict=True)
        ]
        again = gradient(*later)
        # z_t and a_t are data of step t, but e_t sees those of t - 1 alone.
        close(again[:, : t + 1], expected[:, : t + 1])
        assert not torch.allclose(again[:, t + 1 :], grad[:, t + 1 :], atol=1e-3)


@pytest.mark.parametrize("method", ["none", "finetune", "lowrank"])
def test_finetune_loss_is_the_dynamics_term_of_stage_1(method):
    draw, rectified, log_q, z, action, first, us = target_case(method, {})
    close(draw.observe(z, action, first, rectified), us)
    log_q[1] = unimix(torch.tensor(us[1], dtype=torch.float32))  # predicted: the free nat counts
    expected = np.zeros((3, 7))
    for b, t in predicted(first):
        kl = kl64(np.exp(double(log_q[b, t])), mix64(softmax64(us[b][t])))  # with unimix
        expected[b, t] = 1.5 * max(1.0, kl)
    assert (expected == 1.5).any() and (expected > 1.5).any()
    kl, mask = finetune_loss(draw, rectified, log_q, z, action, first)
    close(kl, expected)
    assert [tuple(bt) for bt in mask.nonzero().tolist()] == predicted(first)
    u = torch.tensor(us, dtype=torch.float32)
    close(rectified.prior(softmax(u)), rectified.log_prior(u).exp())


def test_finetune_loss_goes_through_f_and_time():
    draw, rectified, log_q, z, action, first, _ = target_case("finetune", {})
    draw.dynamics_net.requires_grad_(True)
    draw.initial_logits.requires_grad_(True)
    finetune_loss(draw, rectified, log_q, z, action, first)[0].sum().backward()
    z0, sigma0 = initial64(draw)

    def total(us):
        return sum(
            1.5 * max(1.0, kl64(np.exp(double(log_q[b, t])), mix64(softmax64(us[b][t]))))
            for b, t in predicted(first)
        )

    def sequences(step, sigma0):
        return [
            belief64(step, double(z[b]), double(action[b]), first[b], z0, sigma0) for b in range(3)
        ]

    def loss_of_f(weights):
        return total(sequences(lambda z, sigma, a: dynamics64(weights, z, sigma, a), sigma0))

    def loss_of_the_initial(weights):
        return total(sequences(step64(draw), softmax64(weights["initial_logits"])))

    check_gradients(loss_of_f, weights64(draw.dynamics_net), draw.dynamics_net)
    start = SimpleNamespace(named_parameters=lambda: [("initial_logits", draw.initial_logits)])
    check_gradients(loss_of_the_initial, {"initial_logits": double(draw.initial_logits)}, start)


def test_mean_kl(monkeypatch):
    """Over sequences one after the other, without the first steps of each"""
    draw, rectified = shaken_draw(), None
    rectified = shaken(Rectified(draw, "residual", hidden=8))
    log_q = unimix(torch.randn(20, S, K) * 3)
    action = torch.rand(20, 1) * 2 - 1
    is_first = torch.arange(20) == 9
    data = {"log_q": log_q, "action": action, "is_first": is_first}
    rows = np.flatnonzero(np.arange(20) != 3)  # without one row, so 4 sequences of 4 and 3 left
    mode = torch.nn.functional.one_hot(log_q.argmax(-1), K).float()
    monkeypatch.setattr(
        redraw_adapt,
        "sample_onehot",
        lambda probs: torch.nn.functional.one_hot(probs.argmax(-1), K).float(),
    )
    found = []
    for part in rows[:16].reshape(4, 4):
        us = belief64(
            step64(draw, rectified),
            double(mode[part]),
            double(action[part]),
            is_first[part],
            *initial64(draw),
        )
        for t in (1, 2, 3):
            if not is_first[part[t]]:
                found.append(kl64(np.exp(double(log_q[part[t]])), softmax64(us[t])))
    assert len(found) in (11, 12)
    assert redraw_adapt.mean_kl(draw, rectified, data, rows, 4) == pytest.approx(
        np.mean(found), rel=1e-4
    )


def world_model_data(draw):
    rows = random_rows(12)
    rows["vector"] *= 5
    data = {k: torch.from_numpy(v).unflatten(0, (2, 6)) for k, v in rows.items()} | {
        "reward": torch.randn(2, 6) * 3
    }
    data["is_first"] = borders(2, 6, (0, 0), (0, 4), (1, 1))
    data["is_terminal"] = borders(2, 6, (0, 3), (1, 0))
    return data


def test_world_model_loss(noise):
    draw = shaken_draw()
    data, args = (
        world_model_data(draw),
        draw_pretrain.Args(image_scale=0.5, vector_scale=2.0, reward_scale=3.0),
    )
    embed = draw.encoder(data["image"], data["vector"])
    loss, metrics, (_, z, sigma) = world_model_loss(draw, data, args, soft=0.0)
    nets = {
        name: weights64(getattr(draw, name))
        for name in ("posterior_net", "vector_head", "reward_head", "continue_head")
    }
    totals = dict.fromkeys(
        ("loss", "image", "vector", "reward", "continue", "kl", "posterior_entropy"), 0.0
    )
    slow_z, slow_sigma, steps = np.zeros((2, 6, S, K)), np.zeros((2, 6, S, K)), 0
    for b in range(2):
        q = [
            mix64(softmax64(mlp64(nets["posterior_net"], double(e)).reshape(S, K)))
            for e in embed[b]
        ]
        slow_z[b] = [
            sample64(p, double(n)[:, 0]) for p, n in zip(q, noise.uniform[0][b], strict=True)
        ]
        u = belief64(
            step64(draw),
            slow_z[b],
            double(data["action"][b]),
            data["is_first"][b],
            *initial64(draw),
        )
        for t in range(6):
            slow_sigma[b, t] = softmax64(u[t])
            flat = slow_z[b, t].ravel()
            picture = double(draw.decoder(torch.tensor(flat[None], dtype=torch.float32))[0])
            image = ((picture - data["image"][b, t].numpy() / 255) ** 2).sum()
            vector = sum(
                (v - symlog64(x)) ** 2
                for v, x in zip(
                    mlp64(nets["vector_head"], flat), data["vector"][b, t].tolist(), strict=True
                )
            )
            reward = -twohot_log_prob64(
                mlp64(nets["reward_head"], flat), data["reward"][b, t].item()
            )
            if data["is_first"][b, t]:
                reward = 0.0  # nothing arrives there
            goes_on = 1 / (1 + math.exp(-mlp64(nets["continue_head"], flat)[0]))
            cont = -math.log(1 - goes_on if data["is_terminal"][b, t] else goes_on)
            kl = 0.0
            if t > 0 and not data["is_first"][b, t]:
                steps += 1
                kl = kl64(q[t], mix64(slow_sigma[b, t]))
            known = t > 0 and not data["is_first"][b, t]
            total = (
                0.5 * image
                + 2.0 * vector
                + 3.0 * reward
                + cont
                + known * (1.5 * max(1.0, kl) + 0.5 * max(1.0, kl))
            )
            entropy = -sum(p * math.log(p) for p in q[t].ravel())
            for name, value in zip(
                totals, (total, image, vector, reward, cont, kl, entropy), strict=True
            ):
                totals[name] += value / 12
    totals["kl"] *= 12 / steps  # a mean over the steps that are predicted
    close(z, slow_z)
    close(sigma, slow_sigma)
    close(loss, totals["loss"])
    for name, value in totals.items():
        close(metrics[f"world_model/{name}"], value, rtol=1e-4)


def test_the_two_sides_of_the_kl():
    """Gradients as difference quotients: the factor 1.5 moves the prior alone, 0.5 the posterior
    alone, neither below the free nat or at a first step."""
    logits_q, u = (
        torch.randn(2, 6, S, K) * torch.linspace(0.1, 3.0, 6)[:, None, None] for _ in range(2)
    )
    logits_q.requires_grad_(), u.requires_grad_()
    data = world_model_data(None)
    draw = SimpleNamespace(
        encoder=lambda image, vector: torch.zeros(2, 6, 1),
        posterior=lambda embed: unimix(logits_q),
        observe=lambda z, action, first: u,
        decoder=lambda z: torch.zeros(2, 6, 16, 16, 3),
        vector_head=lambda z: torch.zeros(2, 6, 2),
        reward_head=lambda z: torch.zeros(2, 6, BINS),
        continue_head=lambda z: torch.zeros(2, 6, 1),
    )
    draw.reconstruction_errors = partial(DRAW.reconstruction_errors, draw)
    grads = torch.autograd.grad(
        world_model_loss(draw, data, draw_pretrain.Args(), 0.0)[0], (logits_q, u)
    )
    below = 0
    for side, (factor, grad) in enumerate(zip((0.5, 1.5), grads, strict=True)):
        for b, t in np.ndindex(2, 6):
            both = {"q": double(logits_q[b, t]), "u": double(u[b, t])}
            known = t > 0 and not data["is_first"][b, t]

            def loss(moved, both=both, factor=factor, known=known):
                q, p = (mix64(softmax64((both | moved)[name])) for name in ("q", "u"))
                return known * factor * max(1.0, kl64(q, p)) / 12

            below += loss({}) == factor / 12
            name = ("q", "u")[side]
            for _, i, slope in quotients64(loss, {name: both[name]}, 4):
                assert grad[b, t].flatten()[i].item() == pytest.approx(slope, rel=1e-2, abs=1e-5)
    assert 2 <= below <= 16  # cases of both kinds


def test_ensemble(noise):
    ensemble = shaken(Ensemble(TINY, embed_size=5, members=3, target=4))
    z, sigma, action = random_states(2, 6)
    embed, first = torch.randn(2, 6, 5), borders(2, 6, (0, 3), (1, 1))
    members, projection = [weights64(m) for m in ensemble.members], double(ensemble.projection)

    def predictions(b, t):
        x = np.concatenate(
            [
                double(sigma[b, t]).ravel(),
                double(z[b, t]).ravel(),
                bounded64(2 * double(action[b, t])),
            ]
        )
        return np.array([mlp64(m, x) for m in members])

    spread, error = np.zeros((2, 6)), 0.0
    for b, t in np.ndindex(2, 6):
        spread[b, t] = np.mean(
            [
                math.sqrt(sum((v - column.mean()) ** 2 for v in column) / 3)
                for column in predictions(b, t).T
            ]
        )
        if t > 0 and not first[b, t]:
            error += (
                ((predictions(b, t - 1) - double(embed[b, t]) @ projection) ** 2).sum()
                / 3
                / (2 * 5)
            )
    close(ensemble.disagreement(sigma, z, 2 * action), spread)
    close(ensemble.loss(sigma, z, 2 * action, embed, first), error)
