"""The Duckietown task, in the real simulator. It can't render in one process with dm_control, so
these tests have a process of their own: this file runs itself under pytest and reports."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = "DUCKIETOWN_TESTS" in os.environ

if not CHILD:

    def test_duckietown():
        env = os.environ | {"DUCKIETOWN_TESTS": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", __file__],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert "passed" in done.stdout and "skipped" not in done.stdout

else:
    import cv2
    import gymnasium as gym
    import imageio
    from fake_rosbridge import FakeRobot
    from helpers import user_error
    from test_pipeline import ADAPT, POLICY, PRETRAIN, call

    import deploy_duckiebot as deploy
    import draw_pretrain
    import redraw_adapt
    import train_policy
    from common import Policy, Sizes, load_dataset, load_policy, make_envs, save_checkpoint

    SOURCE, REVERSED, MISCALIBRATED = (
        f"redraw/Duckietown{name}-v0" for name in ("", "Reversed", "Miscalibrated")
    )

    def rollout(env, actions, seed=0):
        """(vectors (T+1, 2), rewards, infos) of one episode"""
        obs, info = env.reset(seed=seed)
        vectors, rewards, infos = [obs["vector"]], [], [info]
        for action in actions:
            obs, reward, terminated, _, info = env.step(action)
            assert not terminated
            vectors.append(obs["vector"])
            rewards.append(reward)
            infos.append(info)
        return np.array(vectors), np.array(rewards), infos

    @pytest.fixture(scope="module")
    def env():
        return gym.make(SOURCE)

    def drive(env, seed, steps=200):
        """The expert of deploy_duckiebot; (observations, rewards, infos)"""
        obs, info = env.reset(seed=seed)
        seen = [(obs, 0.0, info)]
        for _ in range(steps):
            turn = (30 * info["dist"] + 8 * info["angle"]) / deploy.TURN
            obs, reward, _, truncated, info = env.step(np.array([1.0, np.clip(turn, -1, 1)]))
            seen.append((obs, reward, info))
        assert truncated == (steps == 200)
        return zip(*seen, strict=True)

    def test_quiet(capfd):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"import deploy_duckiebot as d; d.gym.make('{SOURCE}').reset(seed=0)",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode == 0
            and done.stdout == ""
            and "DEBUG" not in done.stderr
            and "INFO" not in done.stderr
        ), done.stdout + done.stderr

    def test_spaces_and_time_limit(env):
        obs, _ = env.reset(seed=0)
        assert (
            env.observation_space.contains(obs)
            and obs["image"].shape == (64, 64, 3)
            and obs["image"].std() > 10
        )
        assert (
            obs["vector"].tolist() == [0, 0]
            and (env.action_space.low == -1).all()
            and (env.action_space.high == 1).all()
        )
        assert all(gym.spec(i).max_episode_steps == 200 for i in (SOURCE, REVERSED, MISCALIBRATED))

    def test_resets_are_seeded(env):
        actions = np.random.default_rng(0).uniform(-1, 1, (10, 2))
        first, other, again = (rollout(env, actions, seed) for seed in (3, 4, 3))
        assert (
            first[2][-1] == again[2][-1]
            and np.array_equal(first[1], again[1])
            and first[2][-1] != other[2][-1]
        )
        images = [env.reset(seed=s)[0]["image"] for s in (3, 4, 3)]
        assert np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[1])
        env.reset(seed=3)
        assert not np.array_equal(
            env.reset()[0]["image"], images[0]
        )  # without a seed the next episode is another one

    def test_speed_turn_and_delay(env):
        vectors, _, infos = rollout(env, np.tile([1.0, 0.0], (30, 1)))
        duty = 0.25 / (0.0318 * 27)
        assert vectors[-1] == pytest.approx([0, 3 * duty / 5 / 0.6], abs=0.01)  # where 3 duty = 5 v
        # A step of 100 ms has three ticks of the physics; when the command comes 50 ms late, two
        # of them have it.
        assert vectors[1, 1] == pytest.approx(3 * duty / 30 * (1 + (1 - 5 / 30)) / 0.6, rel=1e-3)
        turning, _, turned = rollout(env, np.tile([0.0, 0.4], (30, 1)))
        assert turning[-1, 0] == pytest.approx(
            15 * 2 * (0.16 / (0.0318 * 27)) / 4 / np.deg2rad(159), rel=0.02
        )  # left is positive
        assert turned[2]["angle"] < turned[0]["angle"]  # and `angle` counts to the right
        late = gym.make(SOURCE, delay=0.15)
        assert not rollout(late, np.tile([1.0, 0.0], (1, 1)))[0][1].any()

    def test_expert_keeps_the_lane_and_the_picture_is_not_mirrored(env):
        for seed in range(3):
            observations, rewards, infos = drive(env, seed)
            dist = np.array([i["dist"] for i in infos])
            assert np.abs(dist[50:]).max() < deploy.LANE_HALF and np.mean(rewards[50:]) > 0.1
            sides = []
            for obs, info in zip(observations[50:], infos[50:], strict=True):
                r, g, b = obs["image"][40:].astype(int).transpose(2, 0, 1)
                yellow = (r > 130) & (g > 110) & (b < 100)
                if abs(info["angle"]) < 0.1 and yellow.sum() > 5:
                    sides.append(np.nonzero(yellow)[1].mean())
            assert (
                len(sides) > 10 and np.median(sides) < 28
            )  # traffic keeps to the right of the yellow line

    def test_reward(env):
        obs, rewards, infos = drive(env, 1, 100)
        for o, r, i in list(zip(obs, rewards, infos, strict=True))[1:]:
            yaw, v = o["vector"] * [1, 0.6]
            expected = min(v * np.cos(i["angle"]), 0.62) / 0.62 if abs(i["dist"]) < 0.07 else -1
            assert r == pytest.approx(expected - (0.5 * abs(yaw) if abs(v) > 0.12 else 0), abs=1e-5)
        _, rewards, infos = rollout(env, np.tile([1.0, 0.0], (150, 1)))  # straight on, off the road
        assert np.isnan(infos[-1]["dist"]) and rewards[-1] == pytest.approx(-1, abs=0.01)

    def test_targets(env):
        actions = np.random.default_rng(1).uniform(-1, 1, (20, 2))
        source, reversed_ = rollout(env, actions), rollout(gym.make(REVERSED), -actions)
        assert np.allclose(source[0], reversed_[0], atol=1e-6) and np.allclose(
            source[1], reversed_[1], atol=1e-6
        )
        straight = np.tile([0.8, 0.0], (30, 1))
        target = rollout(gym.make(MISCALIBRATED), straight)[0]
        assert target[-1, 1] == pytest.approx(1.4 * rollout(env, straight)[0][-1, 1], rel=0.02)
        duty = 0.2 / (0.0318 * 27)
        assert target[-1, 0] == pytest.approx(
            15 * 2 * 0.1 * duty / 4 / np.deg2rad(159), rel=0.05
        )  # it pulls to the left
        assert not target[1].any()  # the delay is more than a step

    def test_options():
        start = gym.make(SOURCE).reset(seed=0)[0]["image"]
        random_ = gym.make(SOURCE, domain_rand=True)
        pictures = [random_.reset(seed=s)[0]["image"] for s in (0, 1, 0)]
        assert (
            np.array_equal(pictures[0], pictures[2])
            and np.abs(pictures[0].astype(int) - start).mean() > 5
        )
        physics = gym.make(SOURCE, physics_rand=True)
        speeds = [
            rollout(physics, np.tile([1.0, 0.0], (20, 1)), seed)[0][-5:, 1] for seed in range(12)
        ]
        assert np.std(np.mean(speeds, 1)) > 0.05 and np.std(speeds, 1).mean() > 0.003
        bent = gym.make(SOURCE, distortion=True).reset(seed=0)[0]["image"]
        assert bent.shape == (64, 64, 3) and np.abs(bent.astype(int) - start).mean() > 5
        small = gym.make(SOURCE, image_size=32).reset(seed=0)[0]["image"]
        assert np.abs(start.reshape(32, 2, 32, 2, 3).mean((1, 3)) - small).mean() < 4
        other = gym.make(SOURCE, map_name="loop_empty")
        assert other.unwrapped.sim.map_name == "loop_empty"
        with user_error("no_such_map"):
            gym.make(SOURCE, map_name="no_such_map")

    def test_copies_in_one_process_do_not_mix():
        envs = make_envs(f"deploy_duckiebot:{SOURCE}", 3, image_size=32)
        obs, _ = envs.reset(seed=5)
        actions = np.random.default_rng(0).uniform(-1, 1, (5, 3, 2)).astype(np.float32)
        for action in actions:
            obs, *_ = envs.step(action)
        for k in range(3):
            alone = gym.make(SOURCE, image_size=32)
            alone.reset(seed=5 + k)
            for action in actions[:, k]:
                one, *_ = alone.step(action)
            assert (
                np.array_equal(one["vector"], obs["vector"][k])
                and np.abs(one["image"].astype(int) - obs["image"][k]).max() <= 2
            )

    def test_all_stages_and_the_drive(tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        source, target = f"deploy_duckiebot:{SOURCE}", f"deploy_duckiebot:{REVERSED}"
        call(draw_pretrain, *PRETRAIN, "--env-id", source, "--run-dir", "source")
        deploy.main(
            deploy.Args(
                drive="random",
                env_id=REVERSED,
                max_seconds=40.0,
                record="target.npz",
                image_size=16,
            )
        )
        rows = load_dataset("target.npz", Sizes(image_size=16, vector_size=2, action_size=2))
        assert (
            len(rows["action"]) == 400
            and {0, 200} <= set(rows["is_first"].nonzero()[0].tolist())
            and rows["vector"].std() > 0.05
        )
        call(
            redraw_adapt,
            *ADAPT,
            "--checkpoint",
            "source/draw.pt",
            "--dataset",
            "target.npz",
            "--run-dir",
            "adapted",
            "--length",
            16,
            "--holdout",
            0.5,
        )
        call(
            train_policy,
            *POLICY,
            "--checkpoint",
            "adapted/best.pt",
            "--dataset",
            "target.npz",
            "--run-dir",
            "policy",
            "--eval-env-ids",
            target,
        )
        assert load_policy("policy/policy.pt").sizes.image_size == 16
        capsys.readouterr()
        deploy.main(deploy.Args(checkpoint="policy/policy.pt", max_seconds=5.0))
        out = capsys.readouterr().out
        assert (
            "50 steps, 10.00 a second, 0 overruns" in out
            and "reward per step" in out
            and "laps" in out
        )

    def test_expert_drives_through_the_loop(capsys, tmp_path):
        deploy.main(
            deploy.Args(
                drive="expert", max_seconds=40.0, max_slew=2.0, record=str(tmp_path / "out.npz")
            )
        )
        words = capsys.readouterr().out.split()
        assert float(words[words.index("laps") - 1]) > 0.2
        assert float(words[words.index("step") + 1].strip(";")) > 0.1 and "0.0%" in words
        sizes = Sizes(image_size=64, vector_size=2, action_size=2)
        rows = load_dataset(tmp_path / "out.npz", sizes)
        # What the loop does to the simulator is what the environment's own step does.
        env = gym.make(SOURCE)
        env.reset(seed=1)
        vectors = [env.step(action)[0]["vector"] for action in rows["action"][:50]]
        assert np.allclose(vectors, rows["vector"][1:51], atol=1e-3)

    def test_disturbed_expert_shows_all_speeds_and_stays_on_the_road(tmp_path, capsys):
        arguments = deploy.Args(
            drive="expert",
            disturbed=True,
            env_id="redraw/DuckietownReversed-v0",
            max_seconds=60.0,
            record=str(tmp_path / "out.npz"),
            image_size=16,
        )
        deploy.main(arguments)
        assert "off the road 0.0%" in capsys.readouterr().out
        sizes = Sizes(image_size=16, vector_size=2, action_size=2)
        speed = load_dataset(tmp_path / "out.npz", sizes)["action"][:, 0]
        # The target's actions are reversed. A quarter of the rows lies in each quarter, roughly.
        assert np.histogram(speed, 4, (-1.0, 0.0))[0].min() > 0.1 * len(speed)

    def test_random_drives_are_put_back_on_the_road(tmp_path):
        deploy.main(
            deploy.Args(
                drive="random", max_seconds=60.0, record=str(tmp_path / "out.npz"), image_size=16
            )
        )
        sizes = Sizes(image_size=16, vector_size=2, action_size=2)
        starts = load_dataset(tmp_path / "out.npz", sizes)["is_first"].nonzero()[0]
        assert len(starts) > 4 and {0, 200, 400} <= set(starts) and (np.diff(starts) >= 10).all()

    @pytest.mark.timing
    def test_robot_that_sees_the_simulator(tmp_path, monkeypatch):
        """The robot's loop, with fisheye pictures that the simulator drew and a real policy"""
        env, pictures = gym.make(SOURCE, distortion=True), []
        env.reset(seed=0)
        for _ in range(13):  # every third is seen, so all of them in turn
            env.step(np.array([1.0, 0.1]))
            picture = cv2.imencode(".jpg", env.unwrapped.sim.render_obs()[..., ::-1])[1]
            pictures.append(base64.b64encode(picture.tobytes()).decode())
        policy = Policy(
            Sizes(
                image_size=16,
                vector_size=2,
                action_size=2,
                S=2,
                K=2,
                cnn_depth=2,
                vector_units=4,
                vector_layers=1,
                units=4,
                actor_units=4,
            )
        )
        save_checkpoint(
            tmp_path / "policy.pt",
            stage="train_policy",
            args={},
            sizes=vars(policy.sizes),
            policy=policy.state_dict(),
        )
        read, write = os.pipe()
        monkeypatch.setattr(sys, "stdin", os.fdopen(read))
        os.write(write, b"arm\n")
        out = str(tmp_path / "out.npz")
        with FakeRobot(pictures) as robot:
            flags = {"robot": f"127.0.0.1:{robot.port}", "vehicle": "duckie"}
            flags |= {"kinematics": "default", "checkpoint": str(tmp_path / "policy.pt")}
            deploy.main(deploy.Args(**flags, max_seconds=3.0, record=out))
            assert robot.moving() and robot.motors == (0, 0)
        maps = deploy.undistortion(None)
        expected = np.array([deploy.picture(data, maps, 16) for data in pictures])
        seen = load_dataset(out, policy.sizes)["image"]
        numbers = [np.flatnonzero((expected == image).all((1, 2, 3))) for image in seen]
        assert len(seen) >= 25 and all(len(n) for n in numbers) and len({n[0] for n in numbers}) > 5
        sky, road = seen[:, :3].mean((0, 1, 2)), seen[:, 12:].mean((0, 1, 2))
        assert (
            sky[2] > sky[0] + 50 and abs(road[2] - road[0]) < 40
        )  # a blue sky above, a grey road below

    def test_video(tmp_path, capsys):
        video = tmp_path / "drive.gif"
        deploy.main(deploy.Args(drive="expert", max_seconds=3.0, video=str(video)))
        frames = imageio.mimread(video)
        assert len(frames) == 30 and frames[0].shape[:2] == (120, 160)
        assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 3

    def test_simulator_in_real_time(capsys):
        deploy.main(deploy.Args(drive="expert", max_seconds=2.0, realtime=True))
        out = capsys.readouterr().out
        assert " 9.9" in out or " 10.0" in out
