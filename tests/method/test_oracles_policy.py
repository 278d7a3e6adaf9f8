"""Actor and critic of stages 1 and 3 against the slow float64 version of oracles.py: an update, and
so its imagination of H steps, against so many single steps with its noise."""

import csv
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    close,
    double,
    random_rows,
    random_states,
    save_tiny_adapted,
    shaken,
    shaken_draw,
)
from oracles import (
    actor64,
    actor_critic64,
    belief64,
    bounded64,
    check_gradients,
    initial64,
    mix64,
    mlp64,
    sample64,
    softmax64,
    step64,
    twohot_log_prob64,
    twohot_mean64,
    weights64,
)
from torch import nn

import draw_pretrain
import train_policy
from common import ActorCritic, Rectified, save_dataset
from draw_pretrain import Ensemble

S, K = TINY.S, TINY.K
HYPER = {"horizon": 3, "gamma": 0.9, "lam": 0.7, "entropy": 0.1}
GAMMA_LAM_ENTROPY = 0.9, 0.7, 0.1


def args_of(stage, **changes):
    given = {"checkpoint": "", "dataset": ""} if stage is train_policy else {}
    return stage.Args(**given, **HYPER, **changes)


def slow_world(draw, rectified, smooth=False, reward=None):
    heads = {name: weights64(getattr(draw, name)) for name in ("reward_head", "continue_head")}
    unmixed = rectified.options["method"] in ("residual", "replace")

    def reward_on_arriving(sigma, z, a, z_next):
        return twohot_mean64(mlp64(heads["reward_head"], z_next.ravel()))

    return SimpleNamespace(
        dynamics=step64(draw, rectified),
        prior=lambda sigma: sigma if unmixed else mix64(sigma),
        sample=(lambda p, n: p) if smooth else sample64,
        reward=reward or reward_on_arriving,
        cont=lambda z: 1 / (1 + math.exp(-mlp64(heads["continue_head"], z.ravel())[0])),
    )


def shaken_policy():
    """All three of its networks, so that the slow critic is another one than the critic"""
    policy = ActorCritic(TINY)
    for net in (policy.actor, policy.critic, policy.slow_critic):
        shaken(net)
    return policy


def nets_of(policy):
    parts = {"actor": policy.actor, "critic": policy.critic, "slow": policy.slow_critic}
    return {name: weights64(part.net) for name, part in parts.items()}


def test_both_stages_hold_the_same_text():
    names = "imagine lambda_returns actor_loss critic_loss reinforce rollout lasting_noise"
    names += " lookahead lesson_loss"
    for name in (*names.split(), "improve", "continued", "policy_adam"):
        one, three = (inspect.getsource(getattr(m, name)) for m in (draw_pretrain, train_policy))
        assert one == three, name


@pytest.mark.parametrize("stage", [draw_pretrain, train_policy])
@pytest.mark.parametrize("how", ["reinforce", "lookahead"])
def test_only_trajectories_that_go_on_are_continued(stage, how):
    """Not from a terminal start, and not from where the episode has probably ended."""
    args = args_of(stage, return_floor=1.0)
    draw = shaken_draw()
    z, sigma, _ = random_states(3)
    for lasts, expected in ((1.0, [True, False, True]), (0.6, [False, False, False])):
        draw.cont = lambda z, lasts=lasts: torch.full(z.shape[:-2], lasts)  # below 0.5 in two steps
        policy = shaken_policy()
        *_, ends = getattr(stage, how)(
            args, draw, Rectified(draw), policy, z, sigma, torch.tensor([1.0, 0.0, 1.0]),
            lambda z, sigma, action, z_next: draw.reward(z_next),
        )  # fmt: skip
        assert args.horizon >= 2 and ends[2].tolist() == expected
        args.restart = 0.0
        fresh, alive = torch.zeros_like(z), torch.tensor([0.25, 0.5, 0.75])
        begin, _, weight = stage.continued(args, ends, fresh, sigma, alive)
        on = torch.tensor(expected)
        assert torch.equal(begin, torch.where(on[:, None, None], ends[0], fresh))
        assert torch.equal(weight, torch.where(on, 1.0, alive))


@pytest.mark.parametrize(
    "stage, method, floor",
    [
        (draw_pretrain, "none", 1e-3),
        (draw_pretrain, "none", 5.0),
        (train_policy, "residual", 5.0),
        (train_policy, "none", 1e-3),
    ],
)
def test_actor_critic_losses(noise, stage, method, floor):
    args = args_of(stage, return_floor=floor)
    draw = shaken_draw()
    rectified = shaken(Rectified(draw, method, hidden=8)).requires_grad_(False)
    members = shaken(Ensemble(TINY, embed_size=5, members=3, target=4)).requires_grad_(False)
    policy = shaken_policy()
    slow_members = [weights64(m) for m in members.members]
    head = weights64(draw.reward_head)

    def reward_of(z, sigma, action, z_next):
        """As of both of stage 1's at once: the task's on arriving, disagreement on leaving"""
        return draw.reward(z_next) + members.disagreement(sigma, z, action)

    def slow_reward(sigma, z, a, z_next):
        x = np.concatenate([sigma.ravel(), z.ravel(), bounded64(a)])
        spread = np.array([mlp64(m, x) for m in slow_members]).std(0).mean()
        return twohot_mean64(mlp64(head, z_next.ravel())) + spread

    average, alive = 0.0, torch.tensor([1.0, 0.0, 1.0, 1.0])
    for _ in range(2):
        nets = nets_of(policy)
        z, sigma, _ = random_states(4)
        noise.uniform.clear()
        noise.normal.clear()
        loss, metrics, policy.range, ends = stage.reinforce(
            args, draw, rectified, policy, z, sigma, alive, reward_of
        )
        classes = [double(n)[..., 0] for n in noise.uniform]
        drawn = np.array([double(n) for n in noise.normal]), np.array(classes)
        expected, actor_loss, critic_loss = actor_critic64(
            slow_world(draw, rectified, False, slow_reward),
            nets,
            double(z),
            double(sigma),
            double(alive),
            drawn,
            *GAMMA_LAM_ENTROPY,
            average,
            floor,
            False,
        )
        average = expected["average"]
        close(policy.range, average, rtol=1e-3)
        for name in ("return", "reward", "entropy", "scale", "critic_loss"):
            close(metrics[name], expected[name], rtol=1e-3)
        close(loss, expected["actor_loss"] + expected["critic_loss"], rtol=1e-3)
        policy.update_slow_critic()
    loss.backward()
    check_gradients(actor_loss, nets["actor"], policy.actor.net)
    check_gradients(critic_loss, nets["critic"], policy.critic.net)
    assert all(p.grad is None for p in policy.slow_critic.parameters())


@pytest.mark.parametrize("method", ["residual", "none"])
def test_updates_of_stage_3(monkeypatch, tmp_path, noise, method):
    """Through main, from files of stage 2: starts are posterior states with the rectified belief,
    the range of returns goes on, gradients are cut at 100 each."""
    B, T, H = 2, 6, HYPER["horizon"]
    draw = shaken_draw()
    rectified = shaken(Rectified(draw, method, hidden=8, members=2)).requires_grad_(False)
    rows = random_rows(T)
    rows["is_terminal"][2] = True
    save_dataset(tmp_path / "data.npz", rows)
    save_tiny_adapted(tmp_path / "adapted.pt", draw, rectified)
    policy = shaken_policy()
    slow_before, cut = [], []
    update_slow, clip = ActorCritic.update_slow_critic, nn.utils.clip_grad_norm_
    monkeypatch.setattr(train_policy, "ActorCritic", lambda sizes: policy)
    monkeypatch.setattr(policy.slow_critic, "load_state_dict", lambda weights: None)

    def recorded_update(self):
        slow_before.append(weights64(self.slow_critic.net))
        update_slow(self)

    def recorded_clip(parameters, norm):
        cut.append(([id(p) for p in parameters], norm))
        return clip(parameters, norm)

    monkeypatch.setattr(ActorCritic, "update_slow_critic", recorded_update)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", recorded_clip)
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))
    nets = nets_of(policy)
    args = args_of(
        train_policy,
        run_dir=str(tmp_path / "run"),
        device="cpu",
        updates=2,
        batch=B,
        length=T,
        starts=B * T,
        log_every=1,
        actor_lr=0.0,
        critic_lr=0.0,
        return_floor=1e-3,
    )
    args.checkpoint, args.dataset = str(tmp_path / "adapted.pt"), str(tmp_path / "data.npz")
    train_policy.main(args)
    with open(tmp_path / "run" / "metrics.csv") as file:
        logged = {(int(r["step"]), r["metric"]): float(r["value"]) for r in csv.DictReader(file)}
    seen = draw.encoder(torch.from_numpy(rows["image"]), torch.from_numpy(rows["vector"]))
    q = double(draw.posterior(seen).exp())  # (T, S, K)
    world, average = slow_world(draw, rectified), 0.0
    for update in range(2):
        nets["slow"] = slow_before[update]
        # starts, then H steps
        uniform = [double(n)[..., 0] for n in noise.uniform[update * (H + 1) :][: H + 1]]
        z = np.array([[sample64(p, n) for p, n in zip(q, u, strict=True)] for u in uniform[0]])
        actions = rows["action"].astype(float)
        us = [
            belief64(world.dynamics, z[b], actions, rows["is_first"], *initial64(draw))
            for b in range(B)
        ]
        sigma = np.array([softmax64(u) for sequence in us for u in sequence])
        drawn = np.array([double(n) for n in noise.normal[update * H :][:H]]), np.array(uniform[1:])
        expected, _, _ = actor_critic64(
            world,
            nets,
            z.reshape(B * T, S, K),
            sigma,
            np.tile(1.0 - rows["is_terminal"], B),
            drawn,
            *GAMMA_LAM_ENTROPY,
            average,
            1e-3,
            False,
        )
        average = expected["average"]
        for name in ("return", "reward", "entropy", "scale", "critic_loss"):
            value = logged[update + 1, f"policy/{name}"]
            close(value, expected[name], rtol=1e-3, atol=1e-4)
    groups = [[id(p) for p in net.parameters()] for net in (policy.actor, policy.critic)]
    assert cut == [(group, 100.0) for group in groups] * 2


@pytest.mark.parametrize("ends_now, floor, ahead", [(None, 0.01, 3), (1, 1.0, 2), (None, 0.1, 1)])
def test_lookahead(noise, ends_now, floor, ahead):
    """The comparison of actions in each state, against single steps without samples; start 1 may
    be terminal."""
    B, M, H, n = 3, 6, HYPER["horizon"], 5
    args = args_of(train_policy, candidates=M, states=n, ahead=ahead, return_floor=floor)
    draw, policy = shaken_draw(), shaken_policy()
    draw.continue_head[-1].bias += 3.0  # above 0.5 in two steps
    rectified = shaken(Rectified(draw, "residual", hidden=8)).requires_grad_(False)
    z, sigma, _ = random_states(B)
    z = sigma.roll(1, 0)  # probabilities
    alive = torch.ones(B)
    if ends_now is not None:
        alive[ends_now] = 0.0
    torch.manual_seed(2)
    lessons, metrics, ends = train_policy.lookahead(
        args, draw, rectified, policy, z, sigma, alive, lambda *now: draw.reward(now[-1])
    )
    # The noise once more
    torch.manual_seed(2)
    fresh = torch.randn(H, B, 1)
    held = fresh[0]
    pushes = [double(held)]
    for t in range(1, H):
        held = torch.where(torch.rand(B, 1) < 1 / 4, fresh[t], held)
        pushes.append(double(held))
    pick = torch.randperm(H * B)[:n].tolist()
    offsets = double(torch.randn(n, M, 1))
    uniform = 2.0 * double(torch.rand(n, 3, 1)) - 1.0
    world, nets = slow_world(draw, rectified, smooth=True), nets_of(policy)

    def follow(place, belief, alive, noises):
        """[(z, sigma)] and [(reward, discount)] of the actor's mean plus noise, and the value"""
        places, steps = [(place, belief)], []
        for push in noises:
            action = (actor64(nets["actor"], place)[0] + push).clip(-1, 1)
            before = place
            belief = softmax64(world.dynamics(place, belief, action))
            place = belief
            reward = world.reward(belief, before, action, place)
            discount = HYPER["gamma"] * world.cont(place)
            steps.append((alive * reward, alive * discount))
            places.append((place, belief))
        return places, steps

    def slow(place):
        return twohot_mean64(mlp64(nets["slow"], place.ravel()))

    paths = []
    for b, deviation in enumerate((0.0, 0.0, 0.6)):
        given = double(z[b]), double(sigma[b]), alive[b].item()
        paths.append(follow(*given, [deviation * push[b] for push in pushes]))
        close(ends[0][b], paths[b][0][-1][0])
        close(ends[1][b], paths[b][0][-1][1])
    for row, at in enumerate(pick):
        t, b = divmod(at, B)
        places, steps = paths[b]
        place, belief = places[t]
        mu = actor64(nets["actor"], place)[0]
        o = np.linspace(0.0, 1.0, M)[:, None] * offsets[row]
        o[-3:] = uniform[row] - mu
        Q = []
        for k in range(M):
            noises = [o[k] * 0.5 ** (i / max(ahead - 1, 1)) for i in range(ahead)]
            after, paid = follow(place, belief, alive[b].item(), noises)
            R = slow(after[-1][0])
            for reward, discount in reversed(paid):
                R = reward + discount * R
            Q.append(R)
        Q = np.array(Q)
        p = np.exp((Q - Q.max()) / (0.3 * Q.std(ddof=1) + 0.03 * floor))
        p /= p.sum()
        better = (p * Q).sum() - Q[0]
        w = np.clip(better / (0.5 * Q.std(ddof=1) + 0.03 * floor), 0.0, 1.0)
        R = slow(places[-1][0])
        for i in reversed(range(t, H)):
            reward, discount = steps[i]
            R = reward + discount * (0.3 * slow(places[i + 1][0]) + 0.7 * R)
        close(lessons["z"][row], place)
        close(lessons["a"][row], p @ (mu + o).clip(-1, 1), rtol=1e-2, atol=1e-3)
        close(lessons["w"][row], w, rtol=1e-2, atol=1e-3)
        close(lessons["R"][row], R if b < 2 else Q[0], rtol=1e-3, atol=1e-4)
    rows = [row for row, at in enumerate(pick) if at % B == ends_now]
    assert ends_now is None or (rows and not lessons["w"][rows].any())
    assert len(lessons["R"]) == n and metrics["weight"] > 0
    assert ends[2].tolist() == [b != ends_now for b in range(B)]


def test_lookahead_teaches_no_state_behind_an_end():
    """The episode ends in the first step, so of each trajectory only the start counts."""
    args = args_of(train_policy, states=100, return_floor=0.01)  # more than there are
    draw, policy = shaken_draw(), shaken_policy()
    draw.cont = lambda z: torch.full(z.shape[:-2], 0.3)
    z, sigma, _ = random_states(8)
    lessons, _, ends = train_policy.lookahead(
        args,
        draw,
        Rectified(draw),
        policy,
        z,
        sigma,
        torch.ones(8),
        lambda *now: draw.reward(now[-1]),
    )
    starts = (lessons["z"][:, None] == z).flatten(2).all(-1).any(1)
    assert len(starts) == 8 * HYPER["horizon"] and starts.sum() == 8
    assert lessons["w"][starts].any() and not lessons["w"][~starts].any() and not ends[2].any()


def test_lesson_loss():
    policy = shaken_policy()
    z, _, a = random_states(5)
    R, w = torch.randn(5) * 3, torch.tensor([0.0, 0.2, 0.4, 0.8, 1.0])
    expected = 0.0
    for i in range(5):
        mean = actor64(weights64(policy.actor.net), double(z[i]))[0]
        logits = mlp64(weights64(policy.critic.net), double(z[i]).ravel())
        expected += (
            w[i].item() * ((mean - double(a[i])) ** 2).sum()
            - twohot_log_prob64(logits, R[i].item())
        ) / 5
    close(train_policy.lesson_loss(policy, z, a, R, w), expected)


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_lessons_from_recorded_rows(ahead):
    """Against a loop over rows: two episodes of 8; small rewards do not count"""
    args = args_of(train_policy, ahead=ahead, least_reward=1.0, return_floor=0.5)
    policy = shaken_policy()
    log_q = (3.0 * torch.randn(16, S, K)).log_softmax(-1)
    cont = torch.full((16,), 0.9)
    cont[15] = 0.0  # the first episode ends by its time limit, the second by itself
    reward = torch.linspace(-10.0, 10.0, 16)  # rows 7 and 8 are nearer to 0 than least_reward
    first = torch.zeros(16, dtype=torch.bool)
    first[[0, 8]] = True
    action = torch.rand(16, TINY.action_size) * 2 - 1
    data = {"log_q": log_q, "action": action, "is_first": first, "reward": reward, "cont": cont}
    lessons, metrics = train_policy.recorded_lessons(args, policy, data, n=300)

    slow = double(train_policy.twohot_mean(policy.slow_critic(log_q.exp())))
    value = double(train_policy.twohot_mean(policy.critic(log_q.exp())))
    expected = {}
    for t in [*range(7), *range(8, 15)]:  # the last row of an episode leads nowhere
        R, discount, end = 0.0, 1.0, t
        while end < min(t + ahead, 7 if t < 8 else 15):
            end += 1
            r = float(reward[end])
            R += discount * (0.0 if abs(r) < 1.0 else r)
            discount *= 0.9 * float(cont[end])
        expected[t] = R + discount * slow[end]
    row = torch.cdist(lessons["a"], action).argmin(1).tolist()  # actions tell the rows apart
    assert set(row) == set(expected)
    assert torch.equal(lessons["z"], log_q[row].exp())
    R = np.array([expected[t] for t in row])
    close(lessons["R"], R)
    better = R - value[row]
    assert (better > 0).any() and (better < 0).any()
    close(lessons["w"], np.clip(better / (better.std(ddof=1) + 0.03 * 0.5), 0.0, 1.0))
    close(lessons["w_critic"], np.where(better > 0, 0.7, 0.3))
    close(metrics["return"], R.mean())
    close(metrics["reward"], double(reward)[[t + 1 for t in row]].mean())


def test_the_loss_of_recorded_lessons():
    policy = shaken_policy()
    z, _, a = random_states(4)
    R, w, w_critic = torch.randn(4), torch.rand(4), torch.rand(4)
    nets = nets_of(policy)
    losses = []
    for i in range(4):
        x = double(z[i]).ravel()
        error = ((actor64(nets["actor"], x)[0] - double(a[i])) ** 2).sum()
        log_p = twohot_log_prob64(mlp64(nets["critic"], x), float(R[i]))
        losses.append(float(w[i]) * error - float(w_critic[i]) * log_p)
    expected = np.mean(losses)
    close(train_policy.recorded_loss(policy, z, a, R, w, w_critic), expected)
