"""The environments: the four source/target pairs against physics, the Gymnasium interface, a user's
own ids."""

import inspect

import gymnasium as gym
import numpy as np
import pytest
from bad_env import Once
from helpers import TINY, user_error

import train_policy
from common import DMCEnv, check_sizes, held_noise, make_envs, sizes_of
from train_policy import mean_and_interval

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


IMAGE_IDS = [
    f"redraw/PendulumSwingup{name}-v0"
    for name in ("Images", "ImagesReversed", "Image", "ImageReversed")
]


@pytest.mark.parametrize("env_id", IMAGE_IDS)
def test_images_instead_of_velocities(env_id):
    """The last frames in grey, oldest first; the first observation shows the first one thrice."""
    k = 3 if "Images" in env_id else 1
    stacked = gym.make(env_id, image_size=16)
    plain = gym.make(env_id.replace("Images", "").replace("Image", ""), image_size=16)
    assert set(stacked.observation_space) == {"image"}
    for seed in (1, 2):
        frames = [plain.reset(seed=seed)[0]["image"]] * k
        seen = [stacked.reset(seed=seed)[0]]
        wanted = [frames[-k:]]
        for action in random_actions(4, 1):
            frames.append(plain.step(action)[0]["image"])
            seen.append(stacked.step(action)[0])
            wanted.append(frames[-k:])
        for obs, last in zip(seen, wanted, strict=True):
            assert stacked.observation_space.contains(obs)
            grey = np.stack([frame.astype(float).mean(-1) for frame in last], -1)
            assert np.abs(obs["image"] - grey).max() <= 1
    stacked.close()
    plain.close()


def test_stock_look_is_dm_control_s():
    from dm_control import suite

    stock = gym.make("redraw/ReacherEasy-v0", look="stock")
    fast = gym.make("redraw/ReacherEasy-v0")
    image = stock.reset(seed=3)[0]["image"]
    by_hand = suite.load("reacher", "easy", task_kwargs={"random": 3})
    by_hand.reset()
    assert np.array_equal(image, by_hand.physics.render(64, 64, camera_id=0))
    assert not np.array_equal(image, fast.reset(seed=3)[0]["image"])
    stock.close()
    fast.close()


def test_half_of_the_episodes_may_start_fast():
    envs = make_envs("redraw/ReacherEasy-v0", 1, image_size=16, start_speed=3.0)
    env = envs.envs[0]
    speeds = np.array([env.reset(seed=seed)[0]["vector"] for seed in range(60)])
    again = np.array([env.reset(seed=seed)[0]["vector"] for seed in range(60)])
    assert (speeds == again).all()
    fast = (speeds != 0.0).any(-1)
    assert 15 < fast.sum() < 45 and np.abs(speeds).max() <= 3.0
    assert speeds[fast].min() < -2.0 and speeds[fast].max() > 2.0
    # The first step goes on from there.
    env.reset(seed=int(fast.argmax()))
    moved = env.step(np.zeros(2, np.float32))[0]["vector"]
    assert np.allclose(moved, speeds[fast.argmax()], atol=1.5)
    assert not (make_envs("redraw/ReacherEasy-v0", 1, 16).reset(seed=3)[0]["vector"]).any()


def test_time_limit_and_image_size_of_make_envs(capsys):
    envs = make_envs("redraw/PendulumSwingup-v0", 2, image_size=16, episode_steps=3)
    assert "3 steps" in capsys.readouterr().out
    obs, _ = envs.reset(seed=0)
    assert obs["image"].shape == (2, 16, 16, 3)
    assert not np.array_equal(obs["image"][0], obs["image"][1])  # each copy has a seed of its own
    ends = [envs.step(np.zeros((2, 1), np.float32))[3].tolist() for _ in range(3)]
    envs.close()
    assert ends == [[False] * 2, [False] * 2, [True] * 2]


@pytest.mark.parametrize("given, limit, told", [(None, 10, 0), (60, 10, 0), (10, 10, 0), (4, 4, 1)])
def test_episodes_are_never_longer_than_the_environment_s(capsys, given, limit, told):
    envs = make_envs("toy_env:Toy-v0", 1, episode_steps=given)
    envs.reset(seed=0)
    assert len(capsys.readouterr().out.splitlines()) == told  # one line where it is shorter
    ends = [envs.step(np.zeros((1, 1), np.float32))[3][0] for _ in range(limit)]
    envs.close()
    assert ends == [False] * (limit - 1) + [True]


def test_an_environment_without_a_limit_gets_one():
    envs = make_envs("bad_env:Endless-v0", 1, episode_steps=7)
    envs.reset(seed=0)
    assert [envs.step(np.zeros((1, 1), np.float32))[3][0] for _ in range(7)][-1]
    envs.close()


def test_infos_are_not_carried():
    """They may change their length and type, which gymnasium can't join."""
    envs = make_envs("bad_env:Infos-v0", 3)
    assert envs.reset(seed=0)[1] == {}
    for _ in range(25):
        assert envs.step(np.zeros((3, 1), np.float32))[4] == {}
    envs.close()


@pytest.mark.parametrize("name, word", [("LateNaN", "vector"), ("LateRewardNaN", "reward")])
def test_what_is_not_finite_ends_where_it_comes_from(name, word):
    envs = make_envs(f"bad_env:{name}-v0", 2)
    envs.reset(seed=0)
    with user_error(f"bad_env:{name}-v0", word, "7 steps"):
        for _ in range(8):
            envs.step(np.zeros((2, 1), np.float32))
    envs.close()


def test_what_is_not_finite_in_a_process_of_its_own(capfd):
    envs = make_envs("bad_env:LateNaN-v0", 2, parallel=True)
    envs.reset(seed=0)
    with pytest.raises(SystemExit) as error:
        for _ in range(8):
            envs.step(np.zeros((2, 1), np.float32))
    told = capfd.readouterr().err + str(error.value)
    assert "error: bad_env:LateNaN-v0: vector" in told and "Traceback" not in told


def test_an_action_that_is_not_finite():
    envs = make_envs("toy_env:Toy-v0", 1)
    envs.reset(seed=0)
    with user_error("toy_env:Toy-v0", "action"):
        envs.step(np.full((1, 1), np.nan, np.float32))


@pytest.mark.parametrize(
    "name, C, V",
    [("", 3, 2), ("Grey", 1, 2), ("Stack", 9, 2)] + [("Images", 3, 0), ("GreyImages", 1, 0)],
)
def test_sizes_of_any_observations(name, C, V):
    envs = make_envs(f"toy_env:Toy{name}-v0", 2)
    sizes = sizes_of(envs, S=5)
    assert (sizes.channels, sizes.vector_size, sizes.action_size, sizes.S) == (C, V, 1, 5)
    obs, _ = envs.reset(seed=0)
    assert obs["image"].shape == (2, 16, 16, C) and obs["vector"].shape == (2, V)
    check_sizes("toy", envs, sizes)
    if name:
        with user_error("toy", "channels" if C != 3 else "vector_size"):
            check_sizes("toy", envs, TINY)
    envs.close()


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
    "env_id, words",
    [
        ("redraw/NoSuch-v0", ["redraw/PendulumSwingup-v0"]),  # names what there is
        ("no_such_module:Toy-v0", ["no_such_module"]),
        ("toy_env:NoSuch-v0", ["NoSuch"]),
        ("toy_env:ToyDiscrete-v0", ["action"]),
        ("toy_env:ToyWideActions-v0", ["RescaleAction"]),
        ("toy_env:ToyFloatImage-v0", ["uint8"]),
        ("toy_env:ToyOddImage-v0", ["64"]),
        ("toy_env:ToyDoubleVector-v0", ["float32"]),
        ("bad_env:FloatImage-v0", ["image", "float32", "its own space"]),
        ("bad_env:LaterFloatImage-v0", ["image", "float32", "its own space"]),
        ("bad_env:FewerColumns-v0", ["(16, 8, 3)"]),
        ("bad_env:FourValues-v0", ["step 5"]),
        ("bad_env:RewardArray-v0", ["reward", "(1,)"]),
        ("bad_env:Vector64-v0", ["float64"]),
    ],
)
def test_environments_that_can_not_be_used(env_id, words):
    with user_error(env_id, *words):
        make_envs(env_id, 1)


def test_the_useful_words_come_first():
    """In an error about an id: not after a list of all ids"""
    with pytest.raises(SystemExit) as error:
        make_envs("no_such_module:Toy-v0", 1)
    assert str(error.value).index("No module named") < 150


def test_an_environment_that_can_exist_only_once():
    with user_error("bad_env:Once-v0", "--n-envs 1", "address already in use"):
        make_envs("bad_env:Once-v0", 2)
    Once.held = False
    envs = make_envs("bad_env:Once-v0", 1)  # the copy that was looked at is closed before
    envs.close()
    make_envs("bad_env:Once-v0", 1).close()


def evaluate(policy, env_id="toy_env:Toy-v0", **changes):
    policy.sizes = TINY
    args = train_policy.Args("", "", seed=7, **changes)
    return train_policy.evaluate(args, env_id, policy)


def test_evaluate_counts_one_episode_of_each_copy():
    envs = make_envs("toy_env:Toy-v0", 3)
    start = envs.reset(seed=7 + 20_000)[0]["vector"][:, 1]
    envs.close()
    seen = []

    def push_right(image, vector):
        seen.append(image.shape)
        return np.full((len(vector), 1), 5.0, np.float32)

    returns, frames = evaluate(push_right, eval_episodes=3)
    # Each episode ends at position 1; the copies end at different times.
    steps = np.ceil((1 - start) / 1.0).astype(int)
    expected = [sum(p + np.arange(1, n + 1)) for p, n in zip(start, steps, strict=True)]
    assert returns == pytest.approx(expected, abs=1e-4)
    assert len(frames) == -(-steps[0] // 2) and set(seen) == {(3, 16, 16, 3)}


def hold_still(image, vector):
    return np.zeros((len(vector), 1), np.float32)


@pytest.mark.parametrize(
    "episodes, n_envs, most", [(2, 20, 2), (20, 20, 20), (23, 20, 20), (5, 1, 1)]
)
def test_evaluate_runs_as_many_episodes_as_asked(episodes, n_envs, most):
    """n_envs at a time, each from a start of its own"""
    together = []

    def policy(image, vector):
        together.append(len(vector))
        return hold_still(image, vector)

    returns, frames = evaluate(policy, eval_episodes=episodes, n_envs=n_envs)
    assert returns.shape == (episodes,) and len(set(returns)) == episodes and len(frames) == 5
    assert set(together) == {most}


def test_a_film_does_not_grow_with_the_episode(monkeypatch):
    args = train_policy.Args("", "", eval_episodes=2, n_envs=2)
    hold_still.sizes = TINY
    _, frames = train_policy.evaluate(args, "toy_env:ToyGoal-v0", hold_still, most_frames=9)
    assert len(frames) == 9  # of 60 steps
    default = inspect.signature(train_policy.evaluate).parameters["most_frames"].default
    assert default <= 500


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
