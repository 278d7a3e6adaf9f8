"""docs/pretrained/sac.py: its rows, the copy of SAC's networks, f, and a tiny run with sbx-rl."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from helpers import TINY, user_error
from stages import ROOT

from common import (
    DRAW,
    Actor,
    ActorCritic,
    Rectified,
    load_checkpoint,
    load_draw,
    save_checkpoint,
    twohot_log_prob,
)

sys.path.insert(0, str(ROOT / "docs/pretrained"))
import sac  # noqa: E402

TOY = "toy_env:Toy-v0"  # it ends at position 1
SMALL = "--steps 400 --prefill 40 --n-envs 2 --episode-steps 5 --copy-updates 60 --f-updates 40"
SMALL += " --env-id toy_env:ToyGoal-v0"


def arguments(flags, tmp_path, model="model.pt"):
    given = f"--model {tmp_path / model} --out {tmp_path / 'out.pt'} {SMALL} {flags}"
    return tyro.cli(sac.Args, args=given.split())


def write_model(path, sizes=TINY):
    torch.manual_seed(0)
    draw, policy = DRAW(sizes), ActorCritic(sizes)
    networks = {
        "task_actor": policy.actor,
        "task_critic": policy.critic,
        "explore_actor": policy.actor,
    }
    contents = {name: module.state_dict() for name, module in networks.items()}
    contents |= {"args": {}, "sizes": vars(sizes), "source_range": {"kl": 99.0}}
    save_checkpoint(path, stage="draw_pretrain", draw=draw.state_dict(), **contents)
    return draw


def sac_networks(sizes, units=16):
    """Random networks in the form of `networks_of`"""
    torch.manual_seed(1)
    n_in, A = sizes.S * sizes.K, sizes.action_size
    weights = {}
    for i, (rows, columns) in enumerate([(n_in, units), (units, units), (units, A)]):
        weights[f"actor.Dense_{i}.kernel"] = torch.randn(rows, columns) * 0.3
        weights[f"actor.Dense_{i}.bias"] = torch.randn(columns) * 0.1
    for i, (rows, columns) in enumerate([(n_in + A, units), (units, units), (units, 1)]):
        weights[f"q.Dense_{i}.kernel"] = torch.randn(2, rows, columns) * 0.3
        weights[f"q.Dense_{i}.bias"] = torch.randn(2, columns) * 0.1
        if i < 2:
            weights[f"q.LayerNorm_{i}.scale"] = torch.rand(2, units) + 0.5
            weights[f"q.LayerNorm_{i}.bias"] = torch.randn(2, units) * 0.1
    return weights


class Counting:
    """An environment that counts: the vector is the number of the step, the reward its tenth."""

    def __init__(self, limit):
        self.limit = limit

    def reset(self, seed=None):
        self.t = 0
        return self.observe(), {}

    def observe(self):
        L, C = TINY.image_size, TINY.channels
        vector = np.full(TINY.vector_size, self.t, np.float32)
        return {"image": np.zeros((L, L, C), np.uint8), "vector": vector}

    def step(self, action):
        self.t += 1
        return self.observe(), self.t / 10, False, self.t == self.limit, {}


class FakeSac:
    """Keeps what it is given"""

    def __init__(self, args, sizes):
        self.added = []
        self.trained = 0
        self.replay_buffer = SimpleNamespace(add=lambda *given: self.added.append(given))
        size = (args.n_envs, sizes.action_size)
        self.policy = SimpleNamespace(predict=lambda x: (np.full(size, 0.5), None))

    def train(self, gradient_steps, batch_size):
        self.trained += gradient_steps


def test_rows_and_what_sac_learns_from(tmp_path, monkeypatch):
    """A row's reward is that of arriving at it; at the time limit SAC sees the true last state."""
    draw = write_model(tmp_path / "model.pt")
    args = arguments("", tmp_path)
    fake = FakeSac(args, TINY)
    monkeypatch.setattr(sac, "new_sac", lambda *_: fake)
    monkeypatch.setattr(sac, "networks_of", lambda _: {})
    envs = [Counting(5), Counting(5)]
    data, _ = sac.learn_from_rewards(args, draw, Actor(TINY), envs)
    assert len(data["reward"]) == 400 and data["log_q"].dtype == torch.float16
    t = torch.arange(400) % 200 % 5
    torch.testing.assert_close(data["reward"], t / 10)
    assert torch.equal(data["is_first"], t == 0)
    vector = torch.arange(6.0)[:, None].expand(6, TINY.vector_size)
    image = torch.zeros(6, TINY.image_size, TINY.image_size, TINY.channels, dtype=torch.uint8)
    with torch.no_grad():
        known = draw.posterior(draw.encoder(image, vector)).exp().flatten(-2)
    torch.testing.assert_close(
        data["log_q"][:5].float().exp().flatten(-2), known[:5], atol=2e-3, rtol=0
    )
    z, reached, action, reward, done, infos = fake.added[4]
    np.testing.assert_allclose(z[0], known[4], atol=1e-5)
    np.testing.assert_allclose(reached[0], known[5], atol=1e-5)
    assert reward[0] == np.float32(0.5) and done[0] == 1 and infos[0]["TimeLimit.truncated"]
    assert fake.added[3][4][0] == 0 and not fake.added[3][5][0]["TimeLimit.truncated"]
    # 180 steps in two environments were its own, half an update each, always eight at once.
    assert fake.trained == 176
    assert (data["action"][20:200] == 0.5).all() and not (data["action"][:20] == 0.5).all()


def test_the_copy_says_what_sac_says(tmp_path):
    draw = write_model(tmp_path / "model.pt")
    weights = sac_networks(TINY)
    log_q = torch.randn(500, TINY.S, TINY.K).log_softmax(-1)
    args = arguments("--copy-updates 400", tmp_path)
    policy = sac.copied(args, draw, {"log_q": log_q}, weights)
    with torch.no_grad():
        action = sac.sac_action(weights, log_q.exp().flatten(-2))
        found = policy.actor(log_q.exp()).mean
    assert (found - action).square().mean() < 0.5 * action.var()


def test_f_learns_from_the_rows(tmp_path):
    """All rows show the same state, so f can learn to foresee it."""
    draw = write_model(tmp_path / "model.pt")
    torch.manual_seed(0)
    log_q = torch.randn(TINY.S, TINY.K).mul(3).log_softmax(-1).expand(600, -1, -1).half()
    first = torch.arange(600) % 20 == 0
    data = {"log_q": log_q, "action": torch.zeros(600, TINY.action_size), "is_first": first}
    data["reward"] = torch.full((600,), 0.7)
    encoder = {name: w.clone() for name, w in draw.encoder.state_dict().items()}
    before = sac.mean_kl(draw, Rectified(draw), data | {"log_q": log_q.float()}, np.arange(600), 8)
    kl = sac.learn_dynamics(arguments("--f-updates 300", tmp_path), draw, data)
    assert kl < 0.3 * before
    head = draw.reward_head(log_q[:1].float().exp().flatten(-2))
    # Over 255 bins a head that knows nothing has -log 255 = -5.5.
    assert twohot_log_prob(head, torch.tensor([0.7])) > -4.0
    assert all(torch.equal(w, encoder[name]) for name, w in draw.encoder.state_dict().items())


def test_a_tiny_run(tmp_path, monkeypatch):
    """Without sbx-rl: SAC's place is taken by random networks. The same command goes on from the
    rows, another one does not."""
    write_model(tmp_path / "model.pt", TINY)
    monkeypatch.setattr(sac, "new_sac", FakeSac)
    monkeypatch.setattr(sac, "networks_of", lambda _: sac_networks(TINY))
    sac.main(arguments("", tmp_path))
    made = load_checkpoint(tmp_path / "out.pt", ("draw_pretrain",))
    before = load_draw(load_checkpoint(tmp_path / "model.pt", ("draw_pretrain",))).state_dict()
    changed = {name.split(".")[0] for name, w in made["draw"].items() if not w.equal(before[name])}
    assert changed == {"dynamics_net", "initial_logits", "reward_head"}
    assert made["source_range"]["kl"] != 99.0 and made["args"]["learn"] == "lookahead"
    monkeypatch.setattr(sac, "learn_from_rewards", None)  # is not called again
    sac.main(arguments("--f-updates 2", tmp_path))
    with user_error("another gamma, seed"):
        sac.main(arguments("--gamma 0.9 --seed 2", tmp_path))
    rows = dict(load_checkpoint(tmp_path / "out.rows.pt", ("sac",)))
    del rows["weights"], rows["file"]
    save_checkpoint(tmp_path / "out.rows.pt", **rows)
    with user_error("out.rows.pt is damaged"):
        sac.main(arguments("", tmp_path))


def test_what_diverged_is_not_saved(tmp_path, monkeypatch):
    write_model(tmp_path / "model.pt")
    monkeypatch.setattr(sac, "new_sac", FakeSac)
    weights = sac_networks(TINY)
    weights["actor.Dense_2.bias"][0] = torch.nan
    monkeypatch.setattr(sac, "networks_of", lambda _: weights)
    with user_error("SAC diverged"):
        sac.main(arguments("", tmp_path))
    assert not list(tmp_path.glob("out*"))


def test_an_environment_that_ends_by_itself(tmp_path, monkeypatch):
    write_model(tmp_path / "model.pt")
    monkeypatch.setattr(sac, "new_sac", FakeSac)
    with user_error("ends before its time limit"):
        sac.main(arguments(f"--episode-steps 10 --env-id {TOY}", tmp_path))


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--n-envs 1", "--n-envs"),
        ("--gamma 2", "--gamma"),
        ("--updates 0", "--updates"),
        ("--steps 100", "--steps"),
        ("--prefill 300", "--prefill"),
        ("--out model.pt --model model.pt", "new file"),
        ("--out .", "new file"),
    ],
)
def test_bad_flags_end_in_one_line(flags, name, tmp_path):
    with user_error(name):
        sac.main(arguments(flags, tmp_path))


def test_with_sbx(tmp_path):
    """What the copied networks say is what SAC's own say."""
    pytest.importorskip("sbx")
    import jax

    args = arguments("--steps 400", tmp_path)
    model = sac.new_sac(args, TINY)
    # New biases are 0 and new scales 1, so that a lost one would not be seen.
    rng = np.random.default_rng(0)
    for name in ("actor_state", "qf_state"):
        state = getattr(model.policy, name)
        moved = jax.tree.map(
            lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), state.params
        )
        setattr(model.policy, name, state.replace(params=moved))
    weights = sac.networks_of(model)
    x = torch.rand(5, TINY.S * TINY.K)
    action = model.policy.predict(x.numpy(), deterministic=True)[0]
    np.testing.assert_allclose(sac.sac_action(weights, x).numpy(), action, atol=1e-5)
    values = model.policy.qf_state.apply_fn(model.policy.qf_state.params, x.numpy(), action)
    found = sac.sac_value(weights, x, torch.from_numpy(np.array(action)))
    np.testing.assert_allclose(found.numpy(), np.asarray(values).mean(0)[:, 0], atol=1e-4)
