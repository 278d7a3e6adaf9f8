"""The environments: the four source/target pairs against physics, the Gymnasium interface, a user's
own ids."""

import gymnasium as gym
import numpy as np
import pytest
from helpers import user_error

from common import DMCEnv, held_noise, make_envs
from train_policy import evaluate, mean_and_interval

NAMES = (
    "PendulumSwingup",
    "PendulumSwingupReversed",
    "BallInCupCatch",
    "BallInCupCatchWindy",
    "FingerTurnHard",
    "FingerTurnHardTorque",
    "ReacherEasy",
    "ReacherEasyReversed",
)
IDS = [f"redraw/{name}-v0" for name in NAMES]


def rollout(env, actions, seed=0):
    """The vectors (T+1, V) of one episode, in an environment or in a new one of that name"""
    if isinstance(env, str):
        env = gym.make(f"redraw/{env}-v0", image_size=16)
    return np.stack(
        [env.reset(seed=seed)[0]["vector"]] + [env.step(action)[0]["vector"] for action in actions]
    )


def random_actions(steps, size, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, size)).astype(np.float32)


@pytest.mark.parametrize("env_id", IDS)
def test_observations_are_those_of_the_spaces(env_id):
    env = gym.make(env_id)
    assert (
        env.observation_space["image"].shape == (64, 64, 3)
        and env.observation_space["image"].dtype == np.uint8
    )
    assert env.observation_space["vector"].dtype == np.float32
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    observations = [env.reset(seed=0)[0], env.step(env.action_space.sample())[0]]
    for obs in observations:
        assert env.observation_space.contains(obs)
        assert obs["image"].std() > 5  # a picture, not a blank frame
    assert np.array_equal(
        observations[1]["vector"], env.unwrapped.physics.velocity().astype(np.float32)
    )
    env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_episodes_are_seeded(env_id):
    env = gym.make(env_id, image_size=16)
    actions = random_actions(5, env.action_space.shape[0])
    first, other, again = (
        rollout(env, actions, seed) for seed in (3, 4, 3)
    )  # also whatever the episode before was
    env.close()
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    "source, target",
    [("PendulumSwingup", "PendulumSwingupReversed"), ("ReacherEasy", "ReacherEasyReversed")],
)
def test_reversed_actions(source, target):
    actions = random_actions(20, 1 if "Pendulum" in source else 2)
    a = rollout(source, actions)
    assert np.allclose(a, rollout(target, -actions), atol=1e-6)
    assert not np.allclose(a, rollout(target, actions), atol=1e-2)


def test_wind_pushes_the_ball():
    env = gym.make("redraw/BallInCupCatchWindy-v0", image_size=16)
    for seed in (
        1,
        2,
        # two starts with a slack string, so that the ball flies freely; a reset must not end the
        # wind
    ):
        env.reset(seed=seed)
        obs = env.step(np.zeros(2, np.float32))[0]
        mass = env.unwrapped.physics.named.model.body_mass["ball"]
        # The order of the joints is cup x, cup z, ball x, ball z. One step is two frames of 0.02 s:
        # v = F t / m.
        assert obs["vector"][2] == pytest.approx(-2.0 * 0.04 / mass, rel=1e-3)
        assert obs["vector"][3] == pytest.approx(-9.81 * 0.04, rel=1e-3)  # and gravity as ever
        for _ in range(3):
            env.step(np.zeros(2, np.float32))
        force = env.unwrapped.physics.named.data.xfrc_applied
        assert force["ball"].tolist() == [-2, 0, 0, 0, 0, 0] and not force["cup"].any()
    env.close()
    assert (
        rollout("BallInCupCatch", np.zeros((1, 2), np.float32), seed=1)[-1, 2] == 0
    )  # no wind in the source


def test_torque_turns_the_spinner():
    env = gym.make("redraw/FingerTurnHardTorque-v0", image_size=16)
    for seed in (0, 1):
        env.reset(seed=seed)
        for _ in range(10):
            obs = env.step(np.zeros(2, np.float32))[0]
        # Where damping (0.5 per rad/s) and friction (0.1) hold the torque of 4 N·m. The hinge's
        # axis is -y.
        assert obs["vector"][2] == pytest.approx(-(4.0 - 0.1) / 0.5, rel=1e-3)
        assert obs["vector"][:2] == pytest.approx(
            [0, 0], abs=1e-3
        )  # the finger itself is not turned
        assert env.unwrapped.physics.named.data.xfrc_applied["spinner"].tolist() == [
            0,
            0,
            0,
            0,
            4,
            0,
        ]
    env.close()
    assert not rollout("FingerTurnHard", np.zeros((3, 2), np.float32)).any()


def test_reward_is_that_of_the_last_of_two_frames():
    from dm_control import suite

    env = DMCEnv(
        "cartpole", "swingup", image_size=16
    )  # a task whose reward differs from frame to frame
    env.reset(seed=5)
    by_hand = suite.load("cartpole", "swingup", task_kwargs={"random": 5})
    by_hand.reset()
    for action in random_actions(10, 1):
        obs, reward, _, _, _ = env.step(action)
        frames = [by_hand.step(action).reward for _ in range(2)]
        assert frames[0] != frames[1]
        assert reward == pytest.approx(frames[1], abs=1e-9)
        assert obs["vector"] == pytest.approx(by_hand.physics.velocity(), abs=1e-5)
    env.close()


def test_episodes_are_truncated_after_500_steps_and_never_terminal():
    assert all(gym.spec(env_id).max_episode_steps == 500 for env_id in IDS)
    env = gym.make("redraw/PendulumSwingup-v0", image_size=16)
    env.reset(seed=0)
    ends = [env.step(action)[2:4] for action in random_actions(500, 1)]
    env.close()
    assert ends == [(False, False)] * 499 + [(False, True)]


@pytest.mark.parametrize("size", [16, 32])
def test_small_images_are_averages_of_the_large_one(size):
    large, small = (
        gym.make("redraw/ReacherEasy-v0", image_size=s).reset(seed=0)[0]["image"]
        for s in (64, size)
    )
    k = 64 // size
    mean = large.reshape(size, k, size, k, 3).astype(float).mean((1, 3))
    assert small.shape == (size, size, 3)
    assert np.abs(small - mean).max() < 1  # up to rounding


def test_time_limit_and_image_size_of_make_envs():
    envs = make_envs("redraw/PendulumSwingup-v0", 2, image_size=16, episode_steps=3)
    obs, _ = envs.reset(seed=0)
    assert obs["image"].shape == (2, 16, 16, 3)
    assert not np.array_equal(obs["image"][0], obs["image"][1])  # each copy has a seed of its own
    ends = [envs.step(np.zeros((2, 1), np.float32))[3].tolist() for _ in range(3)]
    envs.close()
    assert ends == [[False] * 2, [False] * 2, [True] * 2]


def test_step_after_an_end_starts_the_next_episode():
    envs = make_envs("toy_env:Toy-v0", 2)
    obs, _ = envs.reset(seed=0)
    start = obs["vector"][:, 1]
    push = np.array(
        [[1.0], [-1.0]], np.float32
    )  # the first copy reaches the end at position 1, the other one never does
    steps = int(np.ceil((1 - start[0]) / 0.2))
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = envs.step(push)
    # The last row of the episode is still seen ...
    assert terminated.tolist() == [True, False] and not truncated.any()
    assert obs["vector"][0, 1] == pytest.approx(start[0] + 0.2 * steps, abs=1e-5) == reward[0]
    obs, reward, terminated, truncated, _ = envs.step(push)
    # ... and the first row of the next one comes without a reward and with the action ignored.
    assert (
        obs["vector"][0, 0] == 0
        and abs(obs["vector"][0, 1]) <= 0.5
        and reward[0] == 0
        and not terminated.any()
    )
    assert obs["vector"][1, 0] == pytest.approx(-0.2)  # the other copy just goes on
    envs.close()


@pytest.mark.parametrize(
    "env_id, word",
    [
        ("redraw/NoSuch-v0", "redraw/PendulumSwingup-v0"),  # names what there is
        ("no_such_module:Toy-v0", "no_such_module"),
        ("toy_env:NoSuch-v0", "NoSuch"),
        ("toy_env:ToyDiscrete-v0", "action"),
        ("toy_env:ToyWideActions-v0", "RescaleAction"),
        ("toy_env:ToyNoVector-v0", "vector"),
        ("toy_env:ToyFloatImage-v0", "uint8"),
        ("toy_env:ToyOddImage-v0", "64"),
        ("toy_env:ToyDoubleVector-v0", "float32"),
    ],
)
def test_environments_that_can_not_be_used(env_id, word):
    with user_error(env_id, word):
        make_envs(env_id, 1)


def test_evaluate_counts_one_episode_of_each_copy():
    envs = make_envs("toy_env:Toy-v0", 3)
    start = envs.reset(seed=7)[0]["vector"][:, 1]
    envs.close()
    seen = []

    def push_right(image, vector):
        seen.append(image.shape)
        return np.full((len(vector), 1), 5.0, np.float32)  # is clipped to 1

    returns, frames = evaluate("toy_env:Toy-v0", push_right, episodes=3, seed=7)
    steps = np.ceil((1 - start) / 0.2).astype(
        int
    )  # each episode ends at position 1; the copies end at different times
    assert len(set(steps)) > 1
    assert returns == pytest.approx(
        [sum(p + 0.2 * np.arange(1, n + 1)) for p, n in zip(start, steps, strict=True)], abs=1e-4
    )
    assert len(frames) == steps[0] + 1 and set(seen) == {(3, 16, 16, 3)}


def test_mean_and_interval():
    mean, half = mean_and_interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2 and half == pytest.approx(
        4.302653 * 1.0 / 3**0.5, abs=1e-5
    )  # Student's t with two degrees of freedom


def test_held_noise_holds():
    action, changes = np.zeros((500, 2), np.float32), 0
    for _ in range(40):
        new = held_noise(action, hold=8.0, gain=1.0)
        assert new.dtype == np.float32 and np.abs(new).max() <= 1
        changed = new != action
        assert (changed[:, 0] == changed[:, 1]).all()  # all of an action is drawn anew, or nothing
        changes += changed[:, 0].mean()
        action = new
    assert changes / 40 == pytest.approx(1 / 8, rel=0.1)
    assert action.std() == pytest.approx(1 / 3**0.5, rel=0.05)  # uniform in [-1, 1]
    full = np.abs(held_noise(action, hold=1.0, gain=2.0)) == 1
    assert full.mean() == pytest.approx(0.5, abs=0.06)  # half of the draws on a bound


@pytest.mark.parametrize("episodes", [2, 20, 23])
def test_evaluate_runs_as_many_episodes_as_asked(episodes):
    """twenty at a time, each from a start of its own"""
    returns, frames = evaluate(
        "toy_env:Toy-v0",
        lambda image, vector: np.zeros((len(vector), 1), np.float32),
        episodes=episodes,
        seed=7,
    )
    assert returns.shape == (episodes,) and len(set(returns)) == episodes and len(frames) == 11
