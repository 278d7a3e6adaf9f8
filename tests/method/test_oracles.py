"""Every equation against the slow float64 version of oracles.py, on random inputs. What is random in the sources (noise of samples) is
recorded as it is drawn, and given to the slow version."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, random_rows, random_states
from oracles import (actor64, actor_critic64, belief64, bounded64, dynamics64, kl64, mix64, mlp64, normal_entropy64, normal_log_prob64,
                     quotients64, residual64, sample64, softmax64, symexp64, symlog64, twohot64, twohot_log_prob64, twohot_mean64,
                     weights64)  # fmt: skip
from torch import nn

import draw_pretrain
import train_policy
from common import (BINS, DRAW, Actor, Critic, kl_categorical, sample_onehot, save_checkpoint, save_dataset, softmax, symexp, symlog, twohot_log_prob,
                    twohot_mean, unimix)  # fmt: skip
from draw_pretrain import ActorCritic, Ensemble, world_model_loss
from redraw_adapt import Rectified, adaptation_loss

S, K = TINY.S, TINY.K


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


@pytest.fixture
def noise(monkeypatch):
    """Records the noise of every sample: .uniform of the latents (..., S, 1), .normal of the actions (..., A)"""
    drawn, rand_like = SimpleNamespace(uniform=[], normal=[]), torch.rand_like

    def uniform(x):
        drawn.uniform.append(rand_like(x))
        return drawn.uniform[-1]

    def rsample(self):
        drawn.normal.append(torch.randn_like(self.mean))
        return self.mean + self.stddev * drawn.normal[-1]

    monkeypatch.setattr(torch, "rand_like", uniform)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", rsample)
    return drawn


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
    close(z, np.array([sample64(p, n) for p, n in zip(double(probs), double(noise.uniform[0])[..., 0])]))


# Beyond the ends of the range, at them, on bins, between bins, around zero
VALUES = [-1e12, -symexp64(20), symexp64(20), 1e12, 0.0, symexp64(40 / 254), symexp64(-7 * 40 / 254), -0.01, 0.01, 0.08, -0.09, 1.0, -123.4, 5e5, -4e8]


def test_symlog_and_symexp():
    x = torch.tensor(VALUES)
    close(symlog(x), [symlog64(v) for v in VALUES])
    close(symexp(symlog(x)), VALUES, rtol=1e-3)
    close(symexp(torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0])), [symexp64(v) for v in (-3.0, -0.1, 0.0, 0.1, 3.0)])


def test_twohot():
    logits = torch.randn(len(VALUES), BINS) * 3
    close(twohot_log_prob(logits, torch.tensor(VALUES)), [twohot_log_prob64(row, v) for row, v in zip(double(logits), VALUES)], atol=2e-3)
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
    close(pi.log_prob(action).sum(-1), [normal_log_prob64(m, s, a) for (m, s), a in zip(slow, double(action))])
    close(pi.entropy().sum(-1), [normal_entropy64(s) for _, s in slow])


# ---- the world model


def borders(B, T, *where):
    first = torch.zeros(B, T, dtype=torch.bool)
    for b, t in where:
        first[b, t] = True
    return first


def shaken_draw(sizes=TINY):
    return shaken(DRAW(sizes)).requires_grad_(False)


def slow_initial(draw):
    sigma = softmax64(double(draw.initial_logits))
    return np.array([[float(v == max(row)) for v in row] for row in sigma]), sigma


def slow_step(draw, rectified=None):
    """(z, sigma, a) -> u, as the method of `rectified` has it"""
    f = weights64(draw.dynamics_net)
    if rectified is None or rectified.method in ("none", "finetune"):
        return lambda z, sigma, a: dynamics64(f, z, sigma, a)
    members = [weights64(delta) for delta in rectified.delta]
    base = 1.0 if rectified.method == "residual" else 0.0
    return lambda z, sigma, a: base * dynamics64(f, z, sigma, a) + residual64(members, z, sigma if rectified.use_sigma else None, a)


def test_belief_over_a_sequence_with_borders():
    draw = shaken_draw()
    z, _, action = random_states(3, 7)
    first = borders(3, 7, (0, 0), (0, 3), (1, 1), (1, 2), (2, 6))
    close(draw.observe(z, action * 2, first), [belief64(slow_step(draw), double(z[b]), double(action[b] * 2), first[b], *slow_initial(draw)) for b in range(3)])


@pytest.mark.parametrize("method, options", [("residual", {}), ("residual", {"use_sigma": True, "members": 2, "layers": 2}), ("replace", {}), ("none", {})])
def test_rectified_belief_and_the_adaptation_loss(method, options):
    draw = shaken_draw()
    rectified = shaken(Rectified(draw, method, hidden=8, **options))
    z, _, action = random_states(3, 7)
    first = borders(3, 7, (0, 3), (1, 1), (1, 2), (2, 6))
    us = [belief64(slow_step(draw, rectified), double(z[b]), double(action[b]), first[b], *slow_initial(draw)) for b in range(3)]
    close(draw.observe(z, action, first, rectified), us)

    q = unimix(torch.randn(3, 7, S, K) * 3)
    expected, mask = np.zeros((3, 7)), np.ones((3, 7), bool)
    for b in range(3):
        for t in range(7):
            mask[b, t] = t > 0 and not first[b, t]
            p = softmax64(us[b][t]) if method != "none" else mix64(softmax64(us[b][t]))  # the source's own distribution keeps its unimix
            expected[b, t] = mask[b, t] * kl64(np.exp(double(q[b, t])), p)
    # Posteriors just like the prediction too: no free bits lift a small KL.
    near = torch.stack([rectified.log_prior(torch.tensor(u, dtype=torch.float32)) for u in us])
    kl, torch_mask = adaptation_loss(draw, rectified, q, z, action, first)
    close(kl, expected)
    assert np.array_equal(torch_mask.numpy(), mask)
    close(adaptation_loss(draw, rectified, near, z, action, first)[0], np.zeros((3, 7)), atol=1e-4)
    sigma = softmax(torch.tensor(us[0], dtype=torch.float32))
    close(rectified.prior(sigma), rectified.log_prior(torch.tensor(us[0], dtype=torch.float32)).exp())


def world_model_data(draw):
    rows = random_rows(12)
    rows["vector"] *= 5
    data = {k: torch.from_numpy(v).unflatten(0, (2, 6)) for k, v in rows.items()} | {"reward": torch.randn(2, 6) * 3}
    data["is_first"] = borders(2, 6, (0, 0), (0, 4), (1, 1))
    data["is_terminal"] = borders(2, 6, (0, 3), (1, 0))
    return data


def test_world_model_loss(noise):
    draw = shaken_draw()
    data, args = world_model_data(draw), draw_pretrain.Args(image_scale=0.5, vector_scale=2.0, reward_scale=3.0)
    embed = draw.encoder(data["image"], data["vector"])
    loss, metrics, (_, z, sigma) = world_model_loss(draw, data, args, soft=0.0)
    nets = {name: weights64(getattr(draw, name)) for name in ("posterior_net", "vector_head", "reward_head", "continue_head")}
    totals = dict.fromkeys(("loss", "image", "vector", "reward", "continue", "kl", "posterior_entropy"), 0.0)
    slow_z, slow_sigma, steps = np.zeros((2, 6, S, K)), np.zeros((2, 6, S, K)), 0
    for b in range(2):
        q = [mix64(softmax64(mlp64(nets["posterior_net"], double(e)).reshape(S, K))) for e in embed[b]]
        slow_z[b] = [sample64(p, double(n)[:, 0]) for p, n in zip(q, noise.uniform[0][b])]
        u = belief64(slow_step(draw), slow_z[b], double(data["action"][b]), data["is_first"][b], *slow_initial(draw))
        for t in range(6):
            slow_sigma[b, t] = softmax64(u[t])
            flat = slow_z[b, t].ravel()
            picture = double(draw.decoder(torch.tensor(flat[None], dtype=torch.float32))[0])
            image = ((picture - data["image"][b, t].numpy() / 255) ** 2).sum()
            vector = sum((v - symlog64(x)) ** 2 for v, x in zip(mlp64(nets["vector_head"], flat), data["vector"][b, t].tolist()))
            reward = -twohot_log_prob64(mlp64(nets["reward_head"], flat), data["reward"][b, t].item())
            goes_on = 1 / (1 + math.exp(-mlp64(nets["continue_head"], flat)[0]))
            cont = -math.log(1 - goes_on if data["is_terminal"][b, t] else goes_on)
            kl = 0.0
            if t > 0 and not data["is_first"][b, t]:
                steps += 1
                kl = kl64(q[t], mix64(slow_sigma[b, t]))
            known = t > 0 and not data["is_first"][b, t]
            total = 0.5 * image + 2.0 * vector + 3.0 * reward + cont + known * (1.5 * max(1.0, kl) + 0.5 * max(1.0, kl))
            entropy = -sum(p * math.log(p) for p in q[t].ravel())
            for name, value in zip(totals, (total, image, vector, reward, cont, kl, entropy)):
                totals[name] += value / 12
    totals["kl"] *= 12 / steps  # a mean over the steps that are predicted
    close(z, slow_z)
    close(sigma, slow_sigma)
    close(loss, totals["loss"])
    for name, value in totals.items():
        close(metrics[f"world_model/{name}"], value, rtol=1e-3)


def test_the_two_sides_of_the_kl():
    """Gradients as difference quotients: the factor 1.5 moves the prior alone, 0.5 the posterior alone, neither below the free nat or at
    a first step."""
    logits_q, u = (torch.randn(2, 6, S, K) * torch.linspace(0.1, 3.0, 6)[:, None, None] for _ in range(2))
    logits_q.requires_grad_(), u.requires_grad_()
    data = world_model_data(None)
    draw = SimpleNamespace(
        encoder=lambda image, vector: torch.zeros(2, 6, 1), posterior=lambda embed: unimix(logits_q), observe=lambda z, action, first: u,
        decoder=lambda z: torch.zeros(2, 6, 16, 16, 3), vector_head=lambda z: torch.zeros(2, 6, 2), reward_head=lambda z: torch.zeros(2, 6, BINS),
        continue_head=lambda z: torch.zeros(2, 6, 1),
    )  # fmt: skip
    grads = torch.autograd.grad(world_model_loss(draw, data, draw_pretrain.Args(), 0.0)[0], (logits_q, u))
    below = 0
    for side, (factor, grad) in enumerate(zip((0.5, 1.5), grads)):
        for b, t in np.ndindex(2, 6):

            def loss(weights):
                q, p = mix64(softmax64(weights["q"])), mix64(softmax64(weights["u"]))
                return factor * max(1.0, kl64(q, p)) / 12 * (t > 0 and not data["is_first"][b, t])

            both = {"q": double(logits_q[b, t]), "u": double(u[b, t])}
            below += loss(both) == factor / 12
            name = ("q", "u")[side]
            for _, i, slope in quotients64(lambda moved: loss(both | moved), {name: both[name]}, 4):
                assert grad[b, t].flatten()[i].item() == pytest.approx(slope, rel=1e-2, abs=1e-5)
    assert 2 <= below <= 16  # cases of both kinds


def test_ensemble(noise):
    ensemble = shaken(Ensemble(TINY, embed_size=5, members=3, target=4))
    z, sigma, action = random_states(2, 6)
    embed, first = torch.randn(2, 6, 5), borders(2, 6, (0, 3), (1, 1))
    members, projection = [weights64(m) for m in ensemble.members], double(ensemble.projection)

    def predictions(b, t):
        x = np.concatenate([double(sigma[b, t]).ravel(), double(z[b, t]).ravel(), bounded64(2 * double(action[b, t]))])
        return np.array([mlp64(m, x) for m in members])

    spread, error = np.zeros((2, 6)), 0.0
    for b, t in np.ndindex(2, 6):
        spread[b, t] = np.mean([math.sqrt(sum((v - column.mean()) ** 2 for v in column) / 2) for column in predictions(b, t).T])
        if t > 0 and not first[b, t]:
            error += ((predictions(b, t - 1) - double(embed[b, t]) @ projection) ** 2).sum() / 3 / (2 * 5)
    close(ensemble.disagreement(sigma, z, 2 * action), spread)
    close(ensemble.loss(sigma, z, 2 * action, embed, first), error)


# ---- actor and critic, of stage 1 and of stage 3: an update, and so its imagination of H steps, against so many single steps with its noise


def slow_world(draw, rectified=None, smooth=False, reward=None):
    heads = {name: weights64(getattr(draw, name)) for name in ("reward_head", "continue_head")}
    unmixed = rectified is not None and rectified.method in ("residual", "replace")
    return SimpleNamespace(
        dynamics=slow_step(draw, rectified),
        prior=lambda sigma: sigma if unmixed else mix64(sigma),
        sample=(lambda p, n: p) if smooth else sample64,
        reward=reward or (lambda sigma, z, a, z_next: twohot_mean64(mlp64(heads["reward_head"], z_next.ravel()))),
        cont=lambda z: 1 / (1 + math.exp(-mlp64(heads["continue_head"], z.ravel())[0])),
    )


def check_gradients(loss, weights, module):
    """Those that are left in the module's parameters against difference quotients of the slow loss"""
    grads = {name: p.grad for name, p in module.named_parameters()}
    scale = max(g.abs().max().item() for g in grads.values())
    assert scale > 1e-6
    for name, i, slope in quotients64(loss, weights, 16):
        assert grads[name].flatten()[i].item() == pytest.approx(slope, rel=5e-3, abs=2e-3 * scale), name


@pytest.fixture
def clips(monkeypatch):
    """The norms that gradients are clipped to, which they are not"""
    seen = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, norm: seen.append(norm) or torch.zeros(()))
    return seen


HYPER = {"horizon": 3, "gamma": 0.9, "lam": 0.7, "entropy": 0.1}
GAMMA_LAM_ENTROPY = 0.9, 0.7, 0.1


# With gradients through the dynamics the latents are probabilities, not samples, so that difference quotients exist.
@pytest.mark.parametrize("actor_grad, floor", [("reinforce", 1e-3), ("reinforce", 5.0), ("dynamics", 1e-3)])
def test_actor_critic_of_stage_1(monkeypatch, noise, clips, actor_grad, floor):
    smooth = actor_grad == "dynamics"
    if smooth:
        monkeypatch.setattr(draw_pretrain, "sample_onehot", lambda probs: probs)
    draw = shaken_draw()
    members = shaken(Ensemble(TINY, embed_size=5, members=3, target=4)).requires_grad_(False)
    # Learning rate 0: several updates of the scale, and one model for all of them
    trained = ActorCritic(TINY, draw_pretrain.Args(actor_lr=0.0, **HYPER), actor_grad, scale_floor=floor, device="cpu")
    for net in (trained.actor, trained.critic, trained.slow_critic):  # the slow critic is another one than the critic
        shaken(net)
    nets = {"actor": weights64(trained.actor.net), "critic": weights64(trained.critic.net)}
    slow_members = [weights64(m) for m in members.members]
    head = weights64(draw.reward_head)

    def slow_reward(sigma, z, a, z_next):
        """As of both actor-critics at once: the task's on arriving, the disagreement on leaving"""
        x = np.concatenate([sigma.ravel(), z.ravel(), bounded64(a)])
        return twohot_mean64(mlp64(head, z_next.ravel())) + np.array([mlp64(m, x) for m in slow_members]).std(0, ddof=1).mean()

    average, alive = 0.0, torch.tensor([1.0, 0.0, 1.0, 1.0])
    for _ in range(2):
        nets["slow"] = weights64(trained.slow_critic.net)
        z, sigma, _ = random_states(4)
        noise.uniform.clear(), noise.normal.clear(), clips.clear()
        metrics = trained.update(draw, z, sigma, alive, lambda z, sigma, a, z_next: draw.reward(z_next) + members.disagreement(sigma, z, a))
        drawn = np.array([double(n) for n in noise.normal]), np.array([double(n)[..., 0] for n in noise.uniform] or [[[0.0] * S] * 4] * 3)
        world = slow_world(draw, smooth=smooth, reward=slow_reward)
        expected, actor_loss, critic_loss = actor_critic64(
            world, nets, double(z), double(sigma), double(alive), drawn, *GAMMA_LAM_ENTROPY, average, floor, smooth
        )
        average = expected["average"]
        for name, key in (("return", "return"), ("reward", "reward"), ("entropy", "entropy"), ("scale", "average"), ("critic_loss", "critic_loss")):
            close(metrics[name], expected[key], rtol=1e-3)
    check_gradients(actor_loss, nets["actor"], trained.actor.net)
    check_gradients(critic_loss, nets["critic"], trained.critic.net)
    assert clips == [100.0, 100.0]


@pytest.mark.parametrize("actor_grad, method, floor", [("reinforce", "residual", 1e-3), ("reinforce", "none", 5.0), ("dynamics", "residual", 1e-3)])
def test_actor_critic_of_stage_3(monkeypatch, tmp_path, noise, clips, actor_grad, method, floor):
    """Through main, from files of stage 2: the starts are posterior states with the rectified belief."""
    smooth, B, T = actor_grad == "dynamics", 2, 6
    if smooth:
        monkeypatch.setattr(train_policy, "sample_onehot", lambda probs: probs)
    draw = shaken_draw()
    rectified = shaken(Rectified(draw, method, hidden=8)).requires_grad_(False)
    rows = random_rows(T)
    rows["is_terminal"][2] = True
    save_dataset(tmp_path / "data.npz", rows)
    save_checkpoint(tmp_path / "adapted.pt", stage="redraw_adapt", args={}, sizes=dataclasses.asdict(TINY), draw=draw.state_dict(),
                    rectified=rectified.state_dict(), rectified_options=rectified.options)  # fmt: skip
    made = []  # actor, critic, slow critic

    def maker(cls):
        def make(sizes):
            made.append(shaken(cls(sizes)))
            if len(made) == 3:  # the slow critic stays another one than the critic
                made[2].load_state_dict = lambda weights: None
            return made[-1]

        return make

    monkeypatch.setattr(train_policy, "Actor", maker(Actor))
    monkeypatch.setattr(train_policy, "Critic", maker(Critic))
    slow_of_update = []
    update_slow = torch.Tensor.lerp_
    monkeypatch.setattr(torch.Tensor, "lerp_", lambda *args: slow_of_update.append(weights64(made[2].net)) or update_slow(*args))
    train_policy.main(train_policy.Args(
        str(tmp_path / "adapted.pt"), str(tmp_path / "data.npz"), run_dir=str(tmp_path / "run"), device="cpu", updates=2, batch=B, length=T, log_every=1,
        lr=0.0, actor_grad=actor_grad, return_floor=floor, **HYPER,
    ))  # fmt: skip
    logged = [(row["metric"].split("/")[1], float(row["value"])) for row in csv.DictReader(open(tmp_path / "run" / "metrics.csv"))]
    nets = {"actor": weights64(made[0].net), "critic": weights64(made[1].net)}
    q = double(draw.posterior(draw.encoder(torch.from_numpy(rows["image"]), torch.from_numpy(rows["vector"]))).exp())  # (T, S, K)
    world, average, H = slow_world(draw, rectified, smooth), 0.0, HYPER["horizon"]
    tensors = len(list(made[2].parameters()))
    for update in range(2):
        nets["slow"] = slow_of_update[tensors * update]  # as it was before the update's own step
        uniform = [double(n)[..., 0] for n in noise.uniform[update * (H + 1) : (update + 1) * (H + 1)]]  # starts, then H steps
        z = np.array([q if smooth else [world.sample(p, n) for p, n in zip(q, uniform[0][b])] for b in range(B)])
        us = [belief64(world.dynamics, z[b], rows["action"].astype(float), rows["is_first"], *slow_initial(draw)) for b in range(B)]
        sigma = np.array([softmax64(u) for sequence in us for u in sequence])
        drawn = np.array([double(n) for n in noise.normal[update * H : (update + 1) * H]]), np.array(uniform[1:] or np.zeros((H, B * T, S)))
        expected, actor_loss, critic_loss = actor_critic64(
            world, nets, z.reshape(B * T, S, K), sigma, np.tile(1.0 - rows["is_terminal"], B), drawn, *GAMMA_LAM_ENTROPY, average, floor, smooth
        )
        average = expected["average"]
        names = {"imagined_return": "return", "imagined_reward": "reward", "entropy": "entropy", "scale": "scale", "actor_loss": "actor_loss",
                 "critic_loss": "critic_loss"}  # fmt: skip
        assert [name for name, _ in logged[6 * update : 6 * update + 6]] == list(names)
        for name, value in logged[6 * update : 6 * update + 6]:
            close(value, expected[names[name]], rtol=1e-3, atol=1e-4)
    check_gradients(actor_loss, nets["actor"], made[0].net)
    check_gradients(critic_loss, nets["critic"], made[1].net)
    assert clips == [100.0] * 4
