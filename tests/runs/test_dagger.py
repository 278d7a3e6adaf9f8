"""docs/pretrained/dagger.py: its rows, what the actor learns, the critic, and a tiny run."""

import sys

import numpy as np
import pytest
import torch
import tyro
from helpers import TINY, user_error
from stages import ROOT
from test_sac import Counting, write_model

from common import Actor, ActorCritic, load_checkpoint, load_draw, save_checkpoint, twohot_mean

sys.path.insert(0, str(ROOT / "docs/pretrained"))
import dagger  # noqa: E402

TOY = "toy_env:Toy-v0"  # it ends at position 1
SMALL = (
    "--steps 400 --n-envs 2 --episode-steps 5 --critic-updates 40 --f-updates 40 --start-speed 0"
)
SMALL += " --env-id toy_env:ToyGoal-v0"


def arguments(flags, tmp_path, model="model.pt"):
    given = f"--model {tmp_path / model} --out {tmp_path / 'out.pt'} {SMALL} {flags}"
    return tyro.cli(dagger.Args, args=given.split())


@pytest.fixture(autouse=True)
def a_teacher(monkeypatch):
    """In an episode it says 0.6, 0.3, 0, -0.3, -0.6."""
    monkeypatch.setattr(dagger.experts, "true_state", lambda env: getattr(env, "t", 0))

    def teacher(t):
        return np.full(TINY.action_size, 0.6 - 0.3 * t)

    monkeypatch.setattr(dagger.experts, "load_teacher", lambda env_id: teacher)
    return teacher


def tell_the_step(draw, observations):
    """log q that differs from step to step; a model that learned nothing sees them alike"""
    t = torch.tensor([int(each["vector"][0]) for each in observations])
    log_q = torch.full((len(t), TINY.S, TINY.K), -9.0)
    log_q[torch.arange(len(t)), t // TINY.K, t % TINY.K] = 0.0
    return log_q


def test_the_actor_learns_what_the_expert_says(tmp_path, monkeypatch, a_teacher):
    """And a row's reward is that of arriving at it."""
    monkeypatch.setattr(dagger, "beliefs", tell_the_step)
    draw = write_model(tmp_path / "model.pt")
    actor = Actor(TINY)
    args = arguments("--steps 2000 --updates 1", tmp_path)
    data = dagger.learn_from_expert(args, draw, actor, [Counting(5), Counting(5)], [a_teacher] * 2)
    assert len(data["reward"]) == 2000 and data["log_q"].dtype == torch.float16
    t = torch.arange(2000) % 1000 % 5
    torch.testing.assert_close(data["reward"], t / 10)
    assert torch.equal(data["is_first"], t == 0)
    with torch.no_grad():
        mean = actor(data["log_q"][:5].float().exp()).mean
    expected = torch.tensor([0.6, 0.3, 0.0, -0.3, -0.6])[:, None].expand_as(mean)
    torch.testing.assert_close(mean, expected, atol=0.15, rtol=0)
    # The first environment has no noise: in the end the actor does there what it says.
    torch.testing.assert_close(data["action"][995:1000], expected, atol=0.3, rtol=0)
    # The second one has.
    assert (data["action"][1995:] - expected).abs().max() > 0.05


def test_the_expert_acts_now_and_then(tmp_path, a_teacher):
    """From the second episode on, in 0.4 of them, in half of their steps"""
    draw = write_model(tmp_path / "model.pt")
    args = arguments("--steps 2000 --updates 0.01", tmp_path)
    envs = [Counting(5), Counting(5)]
    data = dagger.learn_from_expert(args, draw, Actor(TINY), envs, [a_teacher] * 2)
    t = torch.arange(1000) % 5  # of the first environment, which has no noise
    own = torch.isclose(data["action"][:1000], (0.6 - 0.3 * t)[:, None], atol=1e-3).all(1)
    assert not own[:5].any() and 0.13 < own.float().mean() < 0.27


def test_the_critic_learns_from_rewards(tmp_path):
    """Each row is paid 1, so a value is 1 + gamma + gamma^2 + ..."""
    torch.manual_seed(0)
    policy = ActorCritic(TINY)
    log_q = torch.randn(200, TINY.S, TINY.K).log_softmax(-1)
    first = torch.arange(200) % 100 == 0
    data = {"log_q": log_q, "action": torch.zeros(200, TINY.action_size), "is_first": first}
    data["reward"] = torch.ones(200)
    actor = {name: weight.clone() for name, weight in policy.actor.state_dict().items()}
    args = arguments("--critic-updates 1500 --gamma 0.5", tmp_path)
    dagger.learn_values(args, policy, data)
    with torch.no_grad():
        assert twohot_mean(policy.critic(log_q.exp())).mean() == pytest.approx(2.0, abs=0.1)
    assert all(weight.equal(actor[name]) for name, weight in policy.actor.state_dict().items())


def test_a_tiny_run(tmp_path, monkeypatch):
    """The same command goes on from the rows, another one does not."""
    write_model(tmp_path / "model.pt")
    dagger.main(arguments("", tmp_path))
    made = load_checkpoint(tmp_path / "out.pt", ("draw_pretrain",))
    given = load_checkpoint(tmp_path / "model.pt", ("draw_pretrain",))
    before = load_draw(given).state_dict()
    changed = {name.split(".")[0] for name, w in made["draw"].items() if not w.equal(before[name])}
    assert changed == {"dynamics_net", "initial_logits", "reward_head"}
    for network in ("task_actor", "task_critic"):
        assert any(not w.equal(given[network][name]) for name, w in made[network].items())
    assert made["source_range"]["kl"] != 99.0 and made["args"]["learn"] == "lookahead"
    monkeypatch.setattr(dagger, "learn_from_expert", None)  # is not called again
    dagger.main(arguments("--f-updates 2", tmp_path))
    with user_error("another seed"):
        dagger.main(arguments("--seed 2", tmp_path))
    rows = dict(load_checkpoint(tmp_path / "out.rows.pt", ("dagger",)))
    del rows["actor"], rows["file"]
    save_checkpoint(tmp_path / "out.rows.pt", **rows)
    with user_error("out.rows.pt is damaged"):
        dagger.main(arguments("", tmp_path))


def test_an_environment_that_ends_by_itself(tmp_path):
    write_model(tmp_path / "model.pt")
    with user_error("ends before its time limit"):
        dagger.main(arguments(f"--episode-steps 10 --env-id {TOY}", tmp_path))


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--n-envs 1", "--n-envs"),
        ("--gamma 2", "--gamma"),
        ("--updates 0", "--updates"),
        ("--steps 100", "--steps"),
        ("--out model.pt --model model.pt", "new file"),
    ],
)
def test_bad_flags_end_in_one_line(flags, name, tmp_path):
    with user_error(name):
        dagger.main(arguments(flags, tmp_path))
