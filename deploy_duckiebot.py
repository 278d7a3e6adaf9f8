"""Stage 4: drive a Duckiebot (daffy) with a policy of stage 3, or record the data of stage 2. Robot or simulator, one loop:

    newest frame -> undistort -> L x L -> encoder, posterior, actor -> caps -> kinematics -> duties of the wheels, 10 times a second

    python deploy_duckiebot.py --robot duckie.local --kinematics duckie.yaml --drive keyboard --image-size 32 --max-seconds 500 --record target/hand.npz
    python redraw_adapt.py ... --dataset target            # then train_policy.py; see docs/duckiebot.md
    python deploy_duckiebot.py --robot duckie.local --kinematics duckie.yaml --checkpoint runs/policy/policy.pt
    python deploy_duckiebot.py --robot sim --checkpoint runs/policy/policy.pt --max-seconds 200

The robot needs rosbridge (daffy has it), this machine no ROS, and no simulator. Read docs/duckiebot.md before the first drive:
the robot itself has NO command timeout. What stops it is in `Duckiebot`, in `watchdog` and at the end of `main`.

This file also holds the simulator's task, "deploy_duckiebot:redraw/Duckietown-v0" (`make duckietown-install`), for all stages.
"""

import base64
import contextlib
import gc
import importlib
import inspect
import io
import logging
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import tty
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro
import yaml

from common import UserError, check_range, held_noise, load_policy, sample_onehot, save_dataset, seed_everything, write_atomically


@dataclass
class Args:
    robot: str = "sim"
    """sim, or the robot's host name or address"""
    vehicle: Optional[str] = None
    """the robot's name, which its topics begin with (default: the host name up to the first dot)"""
    port: int = 9001
    """of rosbridge; 9001 on daffy"""
    env_id: Literal["redraw/Duckietown-v0", "redraw/DuckietownReversed-v0", "redraw/DuckietownMiscalibrated-v0"] = "redraw/Duckietown-v0"
    """of the simulator"""
    seed: int = 1

    # what drives
    drive: Literal["policy", "random", "keyboard", "joystick", "expert"] = "policy"
    """policy; random: forwards on average, held actions; keyboard: w a s d; joystick: Linux, axes 1 and 0; expert: simulator only"""
    checkpoint: Optional[str] = None
    """policy.pt of train_policy.py"""
    hold: float = 5.0
    """mean number of steps that a random action is held"""
    joystick: str = "/dev/input/js0"
    max_seconds: float = 60.0
    """stop after this time"""
    image_size: int = 64
    """pixels of what is recorded; with a policy, its own size counts"""
    record: Optional[str] = None
    """write what was seen and done to this .npz file, a dataset for redraw_adapt.py"""
    dry_run: bool = False
    """do everything but arm: not one message is sent to the motors"""
    realtime: bool = False
    """let the simulator wait for the clock, as a robot does"""
    export: Optional[str] = None
    """write the policy of --checkpoint as TorchScript to this file, check it, and end; for robots that run it on board"""

    # the robot
    kinematics: Optional[str] = None
    """calibration of the wheels, data/config/calibrations/kinematics/NAME.yaml of the robot, or 'default' for stock numbers"""
    camera: Optional[str] = None
    """calibration of the camera, .../camera_intrinsic/NAME.yaml (default: a fisheye with the authors' numbers)"""
    velocity: Literal["encoders", "kinematics"] = "encoders"
    """where the measured velocity comes from; the kinematics node only repeats what was commanded"""
    max_speed: float = 0.25
    """cap on the commanded speed, m/s"""
    max_turn: float = 8.0
    """cap on the commanded turning rate, rad/s"""
    max_duty: float = 0.8
    """cap on the duty of each wheel, of 1"""
    max_slew: float = 0.4
    """most that a duty changes from one step to the next"""


HZ = 10.0  # steps per second (authors)
SPEED = 0.25  # m/s that action[0] = 1 commands; this project's choice: the cap that is safe indoors
TURN = 8.0  # rad/s that action[1] = 1 commands, to the left; the simulated robot then turns at 3.5 rad/s
MAX_VELOCITY, MAX_YAW_RATE = 0.6, np.deg2rad(159.0)  # m/s and rad/s that `vector` calls 1 (authors)
LANE_HALF, PATH_SPEED = 0.07, 0.62  # m off the centre that still pay, and m/s that pays 1 (authors; their unit is not certain)
CALIBRATION = {"gain": 1.0, "trim": 0.0, "baseline": 0.1, "radius": 0.0318, "k": 27.0, "limit": 1.0}  # daffy's defaults: -, -, m, m, rad/s, -
WHEEL_RADIUS, TICKS = 0.0335, 135  # m, and encoder ticks a turn (daffy)
FRESH = 0.004  # s from a picture's being ready to the step that sees it; the steps' clock is shifted to it
HOLD = 0.01  # s from a step's begin to its command: the same delay whether a person drives, while recording, or a network that takes its time
STALE, FROZEN, UNACKNOWLEDGED, SILENT = 0.25, 0.25, 0.3, 0.3  # s until a stop: no frame, equal frames, no acknowledgement, hung loop
STEP_BOUNDS, LAG_BOUND = (0.08, 0.12), 0.022  # s between two rows of a sequence, and between an image and its action (authors)


class Stop(BaseException):
    """Ends the drive; fault: something is wrong, so that the emergency stop is set too. Like KeyboardInterrupt no Exception, because signals raise it
    anywhere, and a library that is being called might swallow those."""

    def __init__(self, reason, fault=True):
        super().__init__(reason)
        self.fault = fault


# ---- Geometry: what robot and simulator have in common -------------------------------------------


def wheel_duties(v, omega, calibration):
    """v (m/s forwards), omega (rad/s to the left) -> duties (left, right), the inverse kinematics of the robot's own node."""
    c, half = calibration, omega * calibration["baseline"] / 2
    duties = np.array([(c["gain"] - c["trim"]) * (v - half), (c["gain"] + c["trim"]) * (v + half)]) / (c["radius"] * c["k"])
    return np.clip(duties, -c["limit"], c["limit"])


def vector_of(v, omega):
    """m/s, rad/s -> the vector observation: [yaw rate, forward speed], each a share of what the authors take for the most"""
    return np.clip([omega / MAX_YAW_RATE, v / MAX_VELOCITY], -1, 1).astype(np.float32)


def read_yaml(path, keys):
    """A calibration file as a dict; UserError if it is missing, damaged or lacks one of the keys."""
    try:
        data = yaml.safe_load(Path(path).read_text())
        missing = [k for k in keys if k not in data]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as e:
        raise UserError(f"can't read the calibration {path} ({str(e).splitlines()[0]}); it is on the robot in /data/config/calibrations") from e
    if missing:
        raise UserError(f"{path} is not such a calibration: it lacks {', '.join(missing)}")
    return data


def read_kinematics(path):
    """The robot's wheel calibration, with the keys of CALIBRATION"""
    if path is None:
        raise UserError("--kinematics is needed: the robot's calibration file, or 'default' for an uncalibrated robot (it may pull to a side)")
    data = CALIBRATION if path == "default" else read_yaml(path, CALIBRATION)
    try:
        calibration = {k: float(data[k]) for k in CALIBRATION}
        if not np.isfinite(list(calibration.values())).all() or min(v for k, v in calibration.items() if k != "trim") <= 0:
            raise ValueError(f"all but trim must be above 0: {calibration}")
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} is not a calibration of the wheels: {e}") from e
    return calibration


def undistortion(path):
    """Maps for cv2.remap from the camera's 640x480 picture, read at half its size, to the pinhole camera that the simulator has."""
    K = pinhole = np.array([[307.976, 0, 320], [0, 307.889, 240], [0, 0, 1]])  # pixels (authors)
    D, model = np.zeros(4), "equidistant"
    if path is not None:
        data = read_yaml(path, ("camera_matrix", "distortion_coefficients", "image_width", "image_height"))
        try:
            K = np.array(data["camera_matrix"]["data"], float).reshape(3, 3)
            D, model = np.array(data["distortion_coefficients"]["data"], float), data.get("distortion_model", "plumb_bob")
            if (data["image_width"], data["image_height"]) != (640, 480) or len(D) not in (4, 5, 8) or not np.isfinite([*K.flat, *D]).all():
                raise ValueError("it must be for 640x480, with 4, 5 or 8 finite distortion coefficients")
        except (TypeError, KeyError, ValueError) as e:
            raise UserError(f"{path} is not a camera calibration: {e}") from e
    half = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]])  # pixel u of the whole is (u + 0.5) / 2 - 0.5 of the half
    if model in ("equidistant", "fisheye"):
        return cv2.fisheye.initUndistortRectifyMap(half @ K, D[:4], np.eye(3), half @ pinhole, (320, 240), cv2.CV_16SC2)
    return cv2.initUndistortRectifyMap(half @ K, D, None, half @ pinhole, (320, 240), cv2.CV_16SC2)


# ---- The simulator: duckietown-gym-daffy as a Gymnasium environment ------------------------------


def load_simulator():
    """Imports gym_duckietown, with its defects mended. Here, not above: a robot needs none of it."""
    for name in ("", ".spaces", ".utils", ".utils.seeding", ".envs", ".envs.registration"):  # it imports the older gym
        sys.modules.setdefault("gym" + name, importlib.import_module("gymnasium" + name))
    logging.disable(logging.WARNING)  # its packages log every import and every reset
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import contracts

            contracts.disable_all()  # with the checks below most of a step's time, and never violated
            import geometry
            from duckietown_world.world_duckietown import pwm_dynamics
            from gym_duckietown import randomization, simulator
    except ImportError as e:
        raise UserError(f"the Duckietown simulator does not load ({e}); make duckietown-install installs it") from e
    if not hasattr(randomization.Randomizer, "mended"):
        randomization.Randomizer.mended = True
        for module in [m for name, m in sys.modules.items() if name.startswith("geometry.") and hasattr(m, "assert_allclose")]:
            module.assert_allclose = lambda *_, **__: None
        # With NumPy >= 1.24 its physics pass arrays of size 1 where numbers are meant, and so does its randomiser.
        as_velocity = geometry.se2_from_linear_angular
        geometry.se2_from_linear_angular = lambda linear, angular: as_velocity([np.asarray(x).item() for x in linear], np.asarray(angular).item())
        draw = randomization.Randomizer.randomize
        scalars = ("camera_height", "camera_angle", "camera_fov_y", "horz_mode")
        randomization.Randomizer.randomize = lambda self, rng: {k: np.asarray(v).item() if k in scalars else v for k, v in draw(self, rng).items()}
    return simulator.Simulator, simulator.NotInLane, pwm_dynamics.get_DB18_nominal, geometry


class DuckietownEnv(gym.Env):
    """Lane following in the simulator, at 10 Hz.

    Observation: Dict(image: uint8 (image_size, image_size, 3), the 4:3 camera picture squeezed; vector: float32 [yaw rate, forward
    speed], true, see vector_of). Action: [velocity, turning] in [-1, 1], of SPEED and TURN, through the stock wheel kinematics; the
    simulated motors make of 0.25 m/s about 0.175 m/s. Reward: speed along the lane (m/s, at least -2) / 0.62 while the middle
    of the axle is within 7 cm of the lane's centre, else -1; less 0.5 |vector[0]| when |vector[1]| > 0.2. Never terminal, also off the
    road, so that nothing is gained by a crash; 200 steps (20 s) through gymnasium.make. info: dist (m right of the lane's
    centre, NaN off the road), angle (rad that it points to the right of the lane's direction), position (m from the map's middle).

    Args:
        map_name: of the simulator, e.g. small_loop, loop_empty, udem1, zigzag_dists.
        reverse_actions: apply -a instead of a.
        gain, trim: the duties of the left and right motor are multiplied by gain - trim and gain + trim.
        delay: s from a command to its effect, felt in ticks of 1/30 s: with 0.05 the first third of a step still has the last command.
        domain_rand: new colours, lights and camera pose in each episode.
        physics_rand: each episode scales speed and turning by draws from N(1, 0.316), each step by N(1, 0.1) more.
        distortion: the robot's fisheye picture instead of a pinhole camera's (four times slower).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, map_name="small_loop", reverse_actions=False, gain=1.0, trim=0.0, delay=0.05, domain_rand=False, physics_rand=False,
                 distortion=False, image_size=64, render_mode="rgb_array"):  # fmt: skip
        simulator, self.not_in_lane, self.dynamics, self.geometry = load_simulator()
        self.sign, self.motors = -1.0 if reverse_actions else 1.0, np.array([gain - trim, gain + trim])
        self.delay, self.physics_rand, self.image_size, self.render_mode = delay, physics_rand, image_size, render_mode
        width, height = (640, 480) if distortion else (160, 120)  # distortion works at 640x480 only
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.sim = simulator(map_name=map_name, domain_rand=domain_rand, distortion=distortion, camera_width=width,
                                     camera_height=height, frame_rate=30, max_steps=np.inf, seed=0)  # fmt: skip
        except Exception as e:
            raise UserError(f"the simulator has no map {map_name}; small_loop, loop_empty and udem1 are some that it has") from e
        from pyglet import gl

        self.gl = gl
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8), vector=gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sim.shadow_window.switch_to()  # each copy has an OpenGL context of its own
        self.gl.glLoadIdentity()  # else its light would hang where the last episode's camera was, and no reset were like another
        self.sim.seed(int(self.np_random.integers(2**31)))
        with contextlib.redirect_stdout(io.StringIO()):
            self.sim.reset()
        self.sim.state = self.dynamics(delay=self.delay).initialize(c0=self.sim.state.TSE2_from_state(), t0=0)
        self.scale = self.np_random.normal(1, 0.316, 2).clip(0.1, 2) if self.physics_rand else np.ones(2)
        return self.observe(), self.info()

    def step(self, action):
        action = self.sign * np.clip(np.asarray(action, np.float64), -1, 1)
        return self.drive(wheel_duties(action[0] * SPEED, action[1] * TURN, CALIBRATION))

    def drive(self, duties):
        """One step of 0.1 s with duties (left, right) instead of an action, as deploy sends them"""
        forward, turn = np.array([duties[1] + duties[0], duties[1] - duties[0]]) / 2
        if self.physics_rand:
            forward, turn = np.array([forward, turn]) * self.scale * self.np_random.normal(1, 0.1, 2)
        for _ in range(3):  # of 1/30 s
            self.sim.update_physics(np.clip(self.motors * [forward - turn, forward + turn], -1, 1))
        obs, info = self.observe(), self.info()
        v, _ = self.velocity()
        reward = np.clip(v * np.cos(info["angle"]), -2, PATH_SPEED) / PATH_SPEED if abs(info["dist"]) < LANE_HALF else -1.0
        reward -= 0.5 * abs(obs["vector"][0]) * (abs(obs["vector"][1]) > 0.2)
        return obs, float(reward), False, False, info

    def velocity(self):
        """True (forward speed m/s, yaw rate rad/s)"""
        linear, angular = self.geometry.linear_angular_from_se2(self.sim.state.TSE2_from_state()[1])
        return float(linear[0]), float(angular)

    def info(self):
        try:
            lane = self.sim.get_lane_pos2(self.sim.cur_pos, self.sim.cur_angle)
            dist, angle = float(lane.dist), float(lane.angle_rad)
        except self.not_in_lane:
            dist = angle = float("nan")
        x, _, z = self.sim.cur_pos
        size = self.sim.road_tile_size
        return {"dist": dist, "angle": angle, "position": (float(x - self.sim.grid_width * size / 2), float(z - self.sim.grid_height * size / 2))}

    def observe(self):
        return {"image": self.render(), "vector": vector_of(*self.velocity())}

    def render(self):
        return cv2.resize(self.sim.render_obs(), (self.image_size, self.image_size), interpolation=cv2.INTER_AREA)

    def close(self):
        self.sim.shadow_window.close()


for name, changes in (("Duckietown", {}), ("DuckietownReversed", {"reverse_actions": True}),
                      ("DuckietownMiscalibrated", {"gain": 1.4, "trim": 0.1, "delay": 0.15})):  # fmt: skip
    if f"redraw/{name}-v0" not in gym.registry:  # this file may be __main__ and a module at once
        gym.register(f"redraw/{name}-v0", DuckietownEnv, kwargs=changes, max_episode_steps=200, disable_env_checker=True)


# ---- The two robots: the simulated one, and the real one over rosbridge ---------------------------


class SimulatedRobot:
    """The environment behind the calls that a Duckiebot has: arm, observe, command, wait, stop."""

    def __init__(self, args, image_size, keys):
        self.env = gym.make(args.env_id, image_size=image_size)
        self.keys, self.kinematics, self.duties = keys, CALIBRATION, np.zeros(2)
        self.age, self.period, self.decoding, self.held = FRESH, 1 / 30, 0.0, 0.0
        self.simulated = None if args.realtime or args.drive in ("keyboard", "joystick") else 0.0
        self.rewards, self.offsets, self.turned, self.is_first = [], [], 0.0, True
        self.put_back = args.record and args.drive == "random"
        self.obs, self.info = self.env.reset(seed=args.seed)

    def now(self):
        """s; simulated, unless --realtime"""
        return time.monotonic() if self.simulated is None else self.simulated

    def arm(self, try_driver):
        try_driver(*self.observe()[:3])

    def observe(self):
        """-> image, v (m/s), omega (rad/s), time of the image (s), its stamp, whether an episode begins"""
        v, omega = self.env.unwrapped.velocity()
        return self.obs["image"], v, omega, self.now(), len(self.rewards) / HZ, self.is_first

    def command(self, duties):
        self.duties = duties

    def wait(self, deadline):
        """Drives for a step, with the duties of the last command"""
        env, angle = self.env.unwrapped, np.arctan2(*self.info["position"])
        self.obs, reward, _, _, self.info = env.drive(env.sign * self.duties)
        self.rewards.append(reward)
        self.offsets.append(self.info["dist"])
        self.turned += (np.arctan2(*self.info["position"]) - angle + np.pi) % (2 * np.pi) - np.pi  # around the map's middle
        lost = self.put_back and np.isnan(self.offsets[-10:]).all()  # off the road for 1 s: a person would put the robot back
        self.is_first = lost or len(self.rewards) % self.env.spec.max_episode_steps == 0
        if self.is_first:
            self.obs, self.info = self.env.reset()
        if self.simulated is not None:
            self.simulated += 1 / HZ
        self.keys.wait(deadline if self.simulated is None else 0.0)

    def stop(self, fault):
        self.env.close()
        if len(offset := np.abs(self.offsets)):
            centre = np.mean(offset[np.isfinite(offset)]) if np.isfinite(offset).any() else np.nan
            print(f"reward per step {np.mean(self.rewards):.3f}; off the road {np.isnan(offset).mean():.1%} of the steps, else {centre:.3f} m from the "
                  f"lane's centre; {abs(self.turned) / 2 / np.pi:.2f} laps")  # fmt: skip


def watchdog(host, port, vehicle):
    """Stops the robot when the driver is silent, hung or killed: a process of its own, with a connection of its own.

    stdin: any byte is a heartbeat, "x" asks for a stop, "q" ends; the driver's death closes it. The first heartbeat arms.
    It imports nothing of this file, so that it is up at once. It never drives, and what it did is not undone by the driver's return.
    """
    import logging
    import os
    import select
    import sys
    import time

    import roslibpy

    logging.getLogger("roslibpy").setLevel(logging.CRITICAL)
    ros = roslibpy.Ros(host, port, transport="asyncio")
    ros.factory.set_initial_delay(0.2)  # s between attempts to connect again
    ros.factory.set_max_delay(0.5)
    wheels = roslibpy.Topic(ros, f"/{vehicle}/wheels_driver_node/wheels_cmd", "duckietown_msgs/WheelsCmdStamped", queue_size=1)
    stop = roslibpy.Topic(ros, f"/{vehicle}/wheels_driver_node/emergency_stop", "duckietown_msgs/BoolStamped", queue_size=1)
    ros.run(timeout=10)
    wheels.advertise()
    stop.advertise()
    print("ready", flush=True)
    armed = False
    while True:
        alive = select.select([sys.stdin], [], [], 0.3 if armed else None)[0]
        data = os.read(sys.stdin.fileno(), 4096) if alive else b""
        if b"x" in data or (not data and armed):
            break
        if b"q" in data or not data:
            os._exit(0)
        armed = True
        if not ros.is_connected:  # no second line any more: the closed pipe tells the driver
            os.close(sys.stdin.fileno())
            break
    sent, enough, end = 0, 10, time.monotonic() + 60
    while sent < enough and time.monotonic() < end:
        if ros.is_connected:  # the flag alone does not stop the motors, the zeros do
            stop.publish({"data": True})
            wheels.publish({"vel_left": 0.0, "vel_right": 0.0})
            sent += 1
        else:  # whenever the connection comes back, all of them again, for 1.5 s, because a bridge may lose the first ones
            sent, enough = 0, 75
        time.sleep(0.02)
    time.sleep(0.1)
    os._exit(0)


class Duckiebot:
    """A daffy Duckiebot over rosbridge. Callbacks run in the network's thread and only decode and store what came, with the LOCAL time of receipt:
    the robot's clock is another one. `observe` judges it in the driver's thread.

    Raises UserError before arming, Stop after it.
    """

    def __init__(self, args, image_size, keys):
        import roslibpy

        logging.getLogger("roslibpy").setLevel(logging.CRITICAL)  # it prints a traceback for each message it can't read
        self.args, self.image_size, self.keys, self.dry_run = args, image_size, keys, args.dry_run
        self.vehicle = args.vehicle or args.robot.split(".")[0]
        self.kinematics, self.maps = read_kinematics(args.kinematics), undistortion(args.camera)
        self.now, self.lost, self.watchdog = time.monotonic, False, None
        self.least, self.period = np.inf, 1 / 30
        self.frame, self.shown, self.changed, self.acknowledged, self.kinematic = None, None, 0.0, None, None
        self.ticks = {"left": deque(maxlen=64), "right": deque(maxlen=64)}  # (received, stamp, ticks)
        self.beat = self.first_command = None
        self.ros = roslibpy.Ros(args.robot, args.port, transport="asyncio")
        self.ros.factory.set_max_retries(0)  # a connection that broke is not taken up again: no automatic resume
        self.ros.on("close", lambda _: setattr(self, "lost", True))
        try:
            self.ros.run(timeout=5)
        except Exception as e:
            raise UserError(f"no rosbridge answers at {args.robot}:{args.port}; is the robot on, and in this network?") from e

        def topic(name, kind, callback=None):
            made = roslibpy.Topic(self.ros, f"/{self.vehicle}/{name}", kind, queue_length=1, queue_size=1, reconnect_on_close=False)
            made.subscribe(callback) if callback else None
            return made

        self.wheels = topic("wheels_driver_node/wheels_cmd", "duckietown_msgs/WheelsCmdStamped")
        self.estop = topic("wheels_driver_node/emergency_stop", "duckietown_msgs/BoolStamped")
        topic("wheels_driver_node/wheels_cmd_executed", "duckietown_msgs/WheelsCmdStamped", lambda _: setattr(self, "acknowledged", time.monotonic()))
        topic("camera_node/image/compressed", "sensor_msgs/CompressedImage", self.on_image)
        if args.velocity == "kinematics":
            topic("kinematics_node/velocity", "duckietown_msgs/Twist2DStamped", self.on_velocity)
        else:
            for side in self.ticks:
                topic(f"{side}_wheel_encoder_node/tick", "duckietown_msgs/WheelEncoderStamped", lambda m, s=side: self.on_tick(s, m))

    @staticmethod
    def stamp(message):
        t = message["header"]["stamp"]
        return t["secs"] + 1e-9 * t["nsecs"]

    def on_image(self, message):
        now, stamp, data = time.monotonic(), self.stamp(message), message["data"]
        self.least = min(self.least, now - stamp)  # the clocks' difference, and the shortest way
        if self.frame and 0.01 < stamp - self.frame[1] < 0.2:
            self.period += 0.1 * (stamp - self.frame[1] - self.period)  # s between pictures
        if data != self.shown:  # a camera's noise makes every frame another one
            self.shown, self.changed = data, now
        self.frame = (now, stamp, self.picture(data), time.monotonic())  # made ready here, so that a step finds it done

    def on_velocity(self, message):
        self.kinematic = (float(message["v"]), float(message["omega"]), time.monotonic())

    def on_tick(self, side, message):
        self.ticks[side].append((time.monotonic(), self.stamp(message), int(message["data"])))

    def velocity(self):
        """(v m/s, omega rad/s, local time of receipt); None if nothing came yet"""
        if self.args.velocity == "kinematics":
            return self.kinematic
        speed = {}
        for side, ticks in self.ticks.items():
            recent = [t for t in list(ticks) if t[1] > ticks[-1][1] - 0.11] if ticks else []  # the last 0.1 s by the robot's clock
            if len(recent) < 2:
                return None
            (_, t0, n0), (_, t1, n1) = recent[0], recent[-1]
            speed[side] = (n1 - n0) * 2 * np.pi * WHEEL_RADIUS / TICKS / max(t1 - t0, 0.02)
        received = min(ticks[-1][0] for ticks in self.ticks.values())
        return (speed["right"] + speed["left"]) / 2, (speed["right"] - speed["left"]) / self.kinematics["baseline"], received

    def picture(self, data):
        """base64 of a JPEG -> undistorted RGB uint8 (L, L, 3), or None if it is no JPEG of 640x480"""
        try:
            # At half the size, 320x240, which is more than 64x64 pixels show, for half of the work
            image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_REDUCED_COLOR_2)
        except (ValueError, TypeError, cv2.error):
            return None
        if image is None or image.shape != (240, 320, 3):
            return None
        image = cv2.remap(image, *self.maps, cv2.INTER_LINEAR)
        return cv2.resize(image, (self.image_size, self.image_size), interpolation=cv2.INTER_AREA)[..., ::-1].copy()

    def observe(self):
        """As SimulatedRobot's; Stop if the frame, the velocity, the acknowledgements or the connection are not what they must be."""
        frame, velocity, now = self.frame, self.velocity(), time.monotonic()
        if self.lost or not self.ros.is_connected:
            raise Stop("the connection to the robot broke")
        if frame is None or now - frame[0] > STALE:
            raise Stop(f"no camera frame for {STALE} s")
        if frame[0] - frame[1] - self.least > STALE:
            raise Stop(f"the camera's pictures come more than {STALE} s late")
        if now - self.changed > FROZEN:
            raise Stop(f"the camera's picture has not changed for {FROZEN} s")
        if frame[2] is None:
            raise Stop("the camera sent something that is no JPEG of 640x480")
        first = self.first_command or now  # what only follows commands can't be late before the first one
        if velocity is None or now - max(velocity[2], first) > STALE:
            raise Stop(f"no velocity from the {self.args.velocity} for {STALE} s")
        if not self.dry_run and now - max(self.acknowledged or 0.0, first) > UNACKNOWLEDGED:
            raise Stop(f"no acknowledgement (wheels_cmd_executed) for {UNACKNOWLEDGED} s")
        self.begun, self.age, self.decoding = now, now - frame[3], frame[3] - frame[0]
        return frame[2], velocity[0], velocity[1], frame[0], frame[1], False

    def send(self, topic, message):
        if self.ros.is_connected and not self.dry_run:  # never queued: roslibpy would send it when the connection returns
            topic.publish({"header": {"seq": 0, "stamp": {"secs": 0, "nsecs": 0}, "frame_id": ""}, **message})

    def command(self, duties):
        """duties (left, right) in [-1, 1], HOLD after the step began, and a heartbeat to the watchdog"""
        ready = time.monotonic()
        time.sleep(max(0.0, self.begun + HOLD - ready))
        now = time.monotonic()
        self.held = now - ready
        self.first_command = self.first_command or now
        if self.dry_run:
            return
        if self.watchdog.poll() is not None:
            raise Stop("the watchdog process ended")
        if self.beat and now - self.beat > SILENT:  # by now the watchdog has stopped the robot
            raise Stop(f"a step took {now - self.beat:.2f} s")
        self.beat = now
        try:
            self.watchdog.stdin.write(b"h")
        except BrokenPipeError as e:
            raise Stop("the watchdog process lost its connection to the robot, or ended") from e
        self.send(self.wheels, {"vel_left": float(duties[0]), "vel_right": float(duties[1])})

    def arm(self, try_driver):
        """Looks at everything that can be wrong while the motors are off; then the watchdog stands, and a person says so. Raises UserError."""
        needs = {"camera_node/image/compressed": lambda: self.frame, f"the {self.args.velocity}": self.velocity}
        if not self.dry_run:
            needs["wheels_driver_node/wheels_cmd_executed"] = lambda: self.acknowledged
        end = time.monotonic() + 5
        while missing := [name for name, value in needs.items() if value() is None]:
            if time.monotonic() > end or self.lost:
                raise UserError(f"nothing comes from {', '.join(missing)} of /{self.vehicle}; is --vehicle right?")
            self.send(self.wheels, {"vel_left": 0.0, "vel_right": 0.0})  # a zero moves nothing, and is acknowledged
            time.sleep(0.1)
        time.sleep(FROZEN + 0.1)  # so long that a frozen picture shows
        try:
            for _ in range(3):  # the first calls of a network are slow
                try_driver(*self.observe()[:3])
        except Stop as e:
            raise UserError(f"not armed: {e}") from e
        if self.dry_run:
            return print("dry run: nothing is sent to the motors")
        source = f"{inspect.getsource(watchdog)}\nwatchdog({self.args.robot!r}, {self.args.port}, {self.vehicle!r})"
        self.watchdog = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                         start_new_session=True)  # so that Ctrl-C reaches only the driver  # fmt: skip
        if not select.select([self.watchdog.stdout], [], [], 15)[0] or self.watchdog.stdout.readline() != b"ready\n":
            raise UserError("not armed: the watchdog process could not connect to the robot")
        print(f"{self.vehicle}: at most {self.args.max_speed} m/s, {self.args.max_seconds} s. Robot on the road, way clear, hand near it? While it "
              "drives, ANY key but those that steer stops it.\nType arm and Enter:", flush=True)  # fmt: skip
        if self.keys.line() != "arm":
            raise UserError("not armed")
        self.send(self.estop, {"data": False})
        seen, end = self.frame, time.monotonic() + STALE
        while self.frame is seen and time.monotonic() < end:  # so that the first step comes right after a picture
            time.sleep(0.001)

    def wait(self, deadline):
        self.keys.wait(deadline)

    def stop(self, fault):
        """Zeros, ten times over 0.2 s; with a fault also the emergency stop, and the watchdog does the same over its own connection."""
        begun = time.monotonic()
        for _ in range(10 if self.beat else 0):
            fault = fault or self.lost or not self.ros.is_connected
            with contextlib.suppress(OSError):
                self.watchdog.stdin.write(b"x" if fault else b"h")  # without a fault it is not to take these 0.2 s for silence
            with contextlib.suppress(Exception):  # of a connection that breaks at this moment; the watchdog has its own
                if fault:
                    self.send(self.estop, {"data": True})
                self.send(self.wheels, {"vel_left": 0.0, "vel_right": 0.0})
            time.sleep(0.02)
        if self.watchdog:
            with contextlib.suppress(OSError):
                heard = not self.beat or (self.acknowledged or 0.0) > begun  # else the zeros may be lost
                self.watchdog.stdin.write(b"q" if heard else b"x")
            self.watchdog.stdin.close()
        with contextlib.suppress(Exception):
            self.ros.terminate()


# ---- What drives ---------------------------------------------------------------------------------


class Keys:
    """The terminal: the arming line, the keys that steer, and any other key as the emergency stop. Unwatched, it only waits."""

    STEER = {b"w": (1.0, 0.0), b"a": (0.5, 0.3), b"d": (0.5, -0.3), b"s": (-0.5, 0.0)}  # actions

    def __init__(self, steer, watched):
        self.steer, self.saved, self.pressed = steer, None, (0.0, (0.0, 0.0))
        self.fd = sys.stdin.fileno() if watched else None

    def line(self):
        text = b""
        while (byte := os.read(self.fd, 1)) not in (b"\n", b""):
            text += byte
        return text.decode(errors="replace").strip()

    def start(self):
        """Keys without Enter from here on"""
        if self.fd is not None and os.isatty(self.fd):
            self.saved = termios.tcgetattr(self.fd)
            tty.setcbreak(self.fd, termios.TCSANOW)  # and no key that was pressed is lost

    def stop(self):
        if self.saved:
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self.saved)

    def wait(self, deadline):
        """Until the deadline (monotonic s), or a key"""
        while select.select([] if self.fd is None else [self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            key = os.read(self.fd, 1)
            if not (self.steer and key in self.STEER):
                raise Stop("a key was pressed" if key else "the terminal is gone, so no key could stop the robot")
            self.pressed = (time.monotonic(), self.STEER[key])

    def action(self, *_):
        """The action of the key that was pressed in the last 0.5 s (it repeats while it is held), else standstill"""
        return np.array(self.pressed[1] if time.monotonic() - self.pressed[0] < 0.5 else (0.0, 0.0))


def open_joystick(path):
    """Linux's joystick device -> function () -> action: axis 1 forwards, axis 0 to the left; a button or a pulled plug stops."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as e:
        raise UserError(f"no joystick at {path} ({e.strerror})") from e
    axes = {0: 0.0, 1: 0.0}

    def action(*_):
        while True:
            try:
                event = os.read(fd, 8)
            except BlockingIOError:  # that was all
                return np.array([axes[1], axes[0]])
            except OSError:
                event = b""
            if len(event) < 8:
                raise Stop("the joystick is gone")
            _, value, kind, number = struct.unpack("IhBB", event)
            if kind == 1 and value:
                raise Stop("a button of the joystick was pressed")
            if kind & 2:  # an axis; kind & 128 marks the state at the start
                axes[number] = -value / 32767

    return action


def export(policy, path):
    """Writes the policy as TorchScript, image uint8 (n, L, L, 3) and vector float32 (n, 2) -> sampled actions (n, 2), and compares the file's
    actions with the policy's own, drawn with the same seeds."""

    def act(image, vector):  # Policy.__call__ with tensors
        z = sample_onehot(policy.posterior(policy.encoder(image, vector)).exp())
        return policy.actor(z).sample().clamp(-1, 1)

    L, rng = policy.sizes.image_size, np.random.default_rng(0)
    images, vectors = rng.integers(0, 256, (32, 1, L, L, 3), np.uint8), rng.uniform(-1, 1, (32, 1, 2)).astype(np.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing's age, and of random numbers, which the check below sees to
        script = torch.jit.trace(act, (torch.from_numpy(images[0]), torch.from_numpy(vectors[0])), check_trace=False)
        write_atomically(path, lambda file: torch.jit.save(script, file))
        board, worst = torch.jit.load(path), 0.0
        for seed, (image, vector) in enumerate(zip(images, vectors)):
            torch.manual_seed(seed)
            expected = policy(image, vector)
            torch.manual_seed(seed)
            worst = max(worst, np.abs(board(torch.from_numpy(image), torch.from_numpy(vector)).numpy() - expected).max())
    if not worst < 1e-5:
        Path(path).unlink()
        raise UserError(f"the exported policy differs from the original by {worst:.2g}; {path} was removed")
    print(f"wrote {path}: (image uint8 (n, {L}, {L}, 3), vector float32 (n, 2)) -> actions (n, 2); differs by {worst:.1g} at most in 32 cases")


# ---- The drive -----------------------------------------------------------------------------------


def make_driver(args, policy, keys, robot):
    """-> function (image, v, omega) -> action (2,)"""
    noise = np.zeros((1, 2), np.float32)

    def steer(*_):
        """Towards the lane's centre and along it: rad/s, 30 per m of offset and 8 per rad of heading. Stands still off the road."""
        turn = (30 * robot.info["dist"] + 8 * robot.info["angle"]) / TURN
        return robot.env.unwrapped.sign * (np.array([1.0, np.clip(turn, -1, 1)]) if np.isfinite(turn) else np.zeros(2))

    def wander(*_):
        noise[:] = held_noise(noise, args.hold)
        return np.array([0.5 + 0.5 * noise[0, 0], 0.5 * noise[0, 1]])  # the speed from 0 to full, half of the turning

    if args.drive == "expert" and not isinstance(robot, SimulatedRobot):
        raise UserError("--drive expert needs --robot sim: it reads the true place in the lane")
    if args.drive == "joystick":
        return open_joystick(args.joystick)
    if args.drive == "policy":
        return lambda image, v, omega: policy(image[None], vector_of(v, omega)[None])[0]
    return {"random": wander, "expert": steer, "keyboard": keys and keys.action}[args.drive]


def dataset_of(rows):
    """Recorded rows -> arrays as in common.load_dataset, with the raw times beside them (ignored there). A sequence ends where a step or the
    time between an image and its action is out of the authors' bounds."""
    data = {k: np.array([row[k] for row in rows]) for k in rows[0]}
    step, late = np.diff(data["time_action"]), data["time_action"] - data["time_image"] > LAG_BOUND
    broken = (step < STEP_BOUNDS[0]) | (step > STEP_BOUNDS[1]) | late[1:] | late[:-1]
    data["is_first"] = np.append(True, data["is_first"][1:] | broken)
    data["is_last"] = np.append(data["is_first"][1:], True)
    data["is_terminal"] = np.zeros(len(rows), bool)
    return data


def write_rows(path, rows):
    """The recording as a dataset. If it can't be written there (any more), then to the folder for temporary files: nobody drives 1,000 s twice."""
    data, path = dataset_of(rows), Path(path)
    try:
        save_dataset(path, data)
    except UserError as e:
        path = Path(tempfile.gettempdir()) / f"{path.stem}-{time.time_ns()}.npz"
        save_dataset(path, data)
        print(f"warning: {str(e).removeprefix('error: ')}")
    late = np.mean(data["time_action"] - data["time_image"] > LAG_BOUND)
    print(f"wrote {path}: {len(rows)} rows in {data['is_first'].sum()} sequences; {late:.0%} of the actions came more than {LAG_BOUND * 1e3:.0f} ms after their picture")


def main(args):
    check_range(args, 1e-9, 10**9, "max_seconds", "hold", "max_speed", "max_turn", "max_duty", "max_slew")
    if args.image_size < 16 or args.image_size & (args.image_size - 1):
        raise UserError(f"--image-size must be that of the world model, 16, 32, 64, ..., it is {args.image_size}")
    if args.dry_run and args.robot == "sim":
        raise UserError("--dry-run is for robots; the simulator has no motors to be armed")
    for path in filter(None, (args.record, args.export)):  # before the drive, not after it
        if Path(path).exists():
            raise UserError(f"{path} exists already; choose another name")
        write_atomically(path, lambda file: None)
        Path(path).unlink()
    seed_everything(args.seed)
    torch.set_num_threads(1)  # one image at a time: more threads only add jitter
    policy = None
    if args.drive == "policy" or args.export:
        if args.checkpoint is None:
            raise UserError("give --checkpoint, a policy.pt of train_policy.py, or another --drive")
        policy = load_policy(args.checkpoint)
        if (policy.sizes.vector_size, policy.sizes.action_size) != (2, 2):
            raise UserError(f"{args.checkpoint} is for vector and action sizes {policy.sizes.vector_size} and {policy.sizes.action_size}; a Duckiebot has 2 and 2")
    if args.export:
        return export(policy, args.export)
    watched = args.robot != "sim" or args.drive == "keyboard" or sys.stdin.isatty()  # a simulated robot also drives unwatched
    keys = Keys(args.drive == "keyboard", watched)
    robot = (SimulatedRobot if args.robot == "sim" else Duckiebot)(args, policy.sizes.image_size if policy else args.image_size, keys)
    driver = make_driver(args, policy, keys, robot)

    def interrupt(number, _):
        for n in handlers:
            signal.signal(n, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the stop
        raise Stop(signal.Signals(number).name, fault=False)

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    rows, compute, lags, overruns, distance, duties = [], [], [], 0, 0.0, np.zeros(2)
    reason, fault, surprise = "--max-seconds are over", False, None
    try:
        gc.collect()
        gc.freeze()  # else collections would look through all that PyTorch has made, each for a tenth of a second
        robot.arm(driver)
        keys.start()
        start = deadline = robot.now()
        while robot.now() - start < args.max_seconds - 1e-6:
            tick = time.monotonic()
            image, v, omega, seen, stamp, is_first = robot.observe()
            action = np.asarray(driver(image, v, omega), np.float64)  # (2,)
            if action.shape != (2,) or not np.isfinite(action).all():
                raise Stop(f"the driver asked for {action}")
            # Caps on speed, turning rate, duty, and the change of the duty.
            wanted = np.clip(action * [SPEED, TURN], [-args.max_speed, -args.max_turn], [args.max_speed, args.max_turn])
            wanted = wheel_duties(*wanted, robot.kinematics).clip(-args.max_duty, args.max_duty)
            duties = duties + np.clip(wanted - duties, -args.max_slew, args.max_slew)
            robot.command(duties)
            sent = robot.now()
            compute.append(robot.decoding + time.monotonic() - tick - robot.held)
            lags.append(sent - seen)
            distance += abs(v) / HZ
            # The action that was asked for, before the caps: they are a part of the dynamics that stage 2 learns.
            rows.append({"image": image, "vector": vector_of(v, omega), "action": action.astype(np.float32), "is_first": is_first,
                         "time_action": sent, "time_image": seen, "stamp_image": stamp} if args.record else {"time_action": sent})  # fmt: skip
            if len(rows) % int(HZ) == 1 and args.robot != "sim":
                print(f"{len(rows) / HZ:5.0f} s  action {action[0]:+.2f} {action[1]:+.2f}  duties {duties[0]:+.2f} {duties[1]:+.2f}  speed {v:.2f} m/s")
            # Shifted by at most 1 ms, so that steps come to lie FRESH after a picture, not 33 ms. One that is nearly that old is
            # not to be brought back to: the next one is late, and to be waited for.
            late = FRESH - robot.age if robot.age < FRESH + robot.period / 2 else FRESH + robot.period - robot.age
            deadline += 1 / HZ + np.clip(0.1 * late, -0.001, 0.001)
            if robot.now() > deadline:  # too late for the next step: it begins now, and none is made up for
                overruns, deadline = overruns + 1, robot.now()
            robot.wait(deadline)
    except Stop as stop:
        reason, fault = str(stop), stop.fault
    except BaseException as e:  # a mistake in a program, or not armed yet
        surprise, fault = e, True
    finally:  # whatever happened: first the robot stands, then all else
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        try:
            robot.stop(fault)
        finally:
            keys.stop()
            gc.unfreeze()
            if args.record and rows:
                write_rows(args.record, rows)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if surprise:
        raise surprise
    print(f"stopped: {reason}")
    if len(rows) > 1:
        times = np.array([row["time_action"] for row in rows])
        print(f"{len(rows)} steps, {(len(rows) - 1) / (times[-1] - times[0]):.2f} a second, {overruns} overruns, {distance:.1f} m")
        for name, values in (("computing", compute), ("image received to command", lags)):
            print(f"{name}: median {np.median(values) * 1e3:.1f} ms, 99th percentile {np.percentile(values, 99) * 1e3:.1f} ms")
    if fault:
        raise UserError(f"stopped: {reason}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
