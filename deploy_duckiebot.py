"""Stage 4: drive a Duckiebot with a policy of stage 3, or record the data of stage 2.

Robot or simulator, the same loop, ten times a second:

    newest picture -> undistorted, L x L -> encoder, posterior, actor -> action (speed, turning)
        -> caps -> wheel kinematics -> duties of the two motors

    python deploy_duckiebot.py --robot NAME.local --kinematics NAME.yaml --checkpoint policy.pt

Read docs/duckiebot.md before the first drive: a daffy robot goes on with its last command for ever.
Four things stop it: `drive`, which leaves the robot standing whatever happened; `Duckiebot.check`,
which judges the robot before each command; `watchdog`, a process that outlives this one; and
docs/duckiebot_guard.py, which runs on the robot. This machine needs no ROS.

The simulator's task for all stages is here too, "deploy_duckiebot:redraw/Duckietown-v0".
"""

import base64
import contextlib
import functools
import gc
import importlib
import inspect
import io
import json
import logging
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import gymnasium as gym
import imageio
import numpy as np
import torch
import tyro
import yaml
from websockets.sync.client import connect

from common import (
    UserError,
    check_range,
    explained,
    held_noise,
    load_policy,
    save_dataset,
    seed_everything,
    write_atomically,
)

try:
    import termios
    import tty
except ImportError:  # on Windows, which can show --help and --export
    termios = None

ENV_IDS = [f"redraw/Duckietown{variant}-v0" for variant in ("", "Reversed", "Miscalibrated")]


@dataclass
class Args:
    robot: str = "sim"  # sim, or the robot's host name or address, HOST or HOST:PORT
    vehicle: str | None = None  # the robot's name, in its topics (default: the host up to a dot)
    port: int = 9001  # of rosbridge on the robot
    env_id: Literal[tuple(ENV_IDS)] = ENV_IDS[0]  # what the simulator simulates
    seed: int = 1  # of the simulator, of random driving and of the policy's sampling

    # What drives. random: mostly forwards; keyboard: w a s d; joystick: Linux only; expert:
    # simulator only
    drive: Literal["policy", "random", "keyboard", "joystick", "expert"] = "policy"
    checkpoint: str | None = None  # policy.pt of train_policy.py
    disturbed: bool = False  # the expert at all speeds and swerving: its data hold more actions
    hold: float = 5.0  # mean number of steps that a random action stays; more: longer curves
    # The joystick's device: axis 1 drives, axis 0 turns, any button stops. A wireless one whose
    # battery dies may keep its last position, so stay near the robot.
    joystick: str = "/dev/input/js0"
    max_seconds: float = 60.0  # the drive ends after this time

    # What is kept
    image_size: int = 64  # side of the recorded pictures, the world model's; a policy has its own
    record: str | None = None  # write what was seen and done to this .npz, for redraw_adapt.py
    video: str | None = None  # film a drive in the simulator into this .gif file
    dry_run: bool = False  # do everything but arm: not one message is sent to the motors
    realtime: bool = False  # let the simulator wait for the clock, as a robot does
    export: str | None = None  # only write the policy as TorchScript, for a program on the robot

    # The wheels' calibration, the robot's kinematics/NAME.yaml; 'default': stock numbers
    kinematics: str | None = None
    # The camera's, camera_intrinsic/NAME.yaml (default: a fisheye with the authors' numbers)
    camera: str | None = None

    # Caps. They only lower what actions of 1 command: 0.25 m/s, 8 rad/s.
    max_speed: float | None = None  # m/s (default: 0.25 with a guard on the robot, 0.15 without)
    max_turn: float = 8.0  # rad/s; less makes wider curves
    max_duty: float = 0.8  # most duty of a motor, of 1
    max_slew: float = 0.4  # most change of a duty in a step; less: gentler, slower to brake


HZ = 10.0  # steps per second (authors)
SPEED = 0.25  # m/s that action[0] = 1 commands; this project's choice: safe indoors
TURN = 8.0  # rad/s to the left that action[1] = 1 commands; the simulated robot makes 3.5 of them
UNGUARDED_SPEED = 0.15  # m/s, the cap where nothing on the robot itself would stop it
MAX_VELOCITY = 0.6  # m/s that `vector` calls 1 (authors)
MAX_YAW_RATE = np.deg2rad(159.0)  # rad/s that `vector` calls 1 (authors)
LANE_HALF = 0.07  # m from the lane's centre that still pay (authors)
# Speed along the lane that pays 1 (authors). We read it as m/s, but it is probably progress per
# control tick: rewards here are not those of the paper, whose best is 0.38.
PATH_SPEED = 0.62
# The robot's own defaults: gain and trim without unit, m, m, rad/s at full duty, most duty
CALIBRATION = {"gain": 1.0, "trim": 0.0, "baseline": 0.1, "radius": 0.0318, "k": 27.0, "limit": 1.0}
DEAD_ZONE = {"daffy": 0.05, "ente": 0.2}  # duty at which a wheel may stand still

STALE = 0.25  # s without a picture, a new picture or ticks, until a stop; a picture's largest age
SILENT = 0.3  # s without an acknowledgement, or of a step that hangs, until a stop
STALLED = 1.0  # s without a tick of a wheel that is driven, until a stop
UNGUARDED = 1.0  # s without a word of the guard that was there when the robot was armed
FOREIGN = 3  # commands executed within a second that were not sent from here, until a stop

# s; the authors end a sequence where a step, or the time from picture to action, is out of bounds.
STEP_BOUNDS = (0.08, 0.12)
LAG_BOUND = 0.022
# So a command goes out LAG after its picture came, whatever drives: the delay is a part of the
# dynamics. After a late picture it goes out sooner, so that the step is not longer than LONGEST.
LAG = 0.02
SHORTEST = 0.081  # a picture that would make a shorter step is passed over
LONGEST = 0.118
PATIENCE = 0.15  # if no picture has come by then, the step takes the last one
USABLE = 32  # rows: shorter sequences are of little use for stage 2

NOT_CONFIRMED = "NOT CONFIRMED: lift the robot! The watchdog tries on until it has stopped it."
STOPPING = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


class Stop(BaseException):
    """Ends the drive; with a fault the emergency stop is set too. Like KeyboardInterrupt it is no
    Exception: signals raise it anywhere, and a library might swallow an Exception."""

    def __init__(self, reason, fault=True, cause=None):
        super().__init__(reason)
        self.fault = fault
        self.cause = cause  # a mistake in a program, or what was wrong before arming
        self.confirmed = True  # the robot acknowledged that it stands


class Seen(NamedTuple):
    """What a step begins with"""

    image: np.ndarray  # uint8 (L, L, 3)
    received: float  # s, this machine's clock
    stamp: float  # s, the robot's clock
    v: float = 0.0  # measured speed, m/s
    omega: float = 0.0  # measured turning to the left, rad/s
    is_first: bool = False  # an episode begins


# ---- The drive -----------------------------------------------------------------------------------


def main(args):
    check_args(args)
    seed_everything(args.seed)
    torch.set_num_threads(1)  # one picture at a time: more threads only add jitter
    policy = policy_of(args)
    if args.export:
        return export(policy, args.export)

    keys = Keys(args)
    log = Log(args)
    size = policy.sizes.image_size if policy else args.image_size
    again = True
    while again:
        robot = (SimulatedRobot if args.robot == "sim" else Duckiebot)(args, size, keys)
        end = drive(args, policy, robot, log)
        if end.confirmed and end.cause:
            raise end.cause
        print(f"stopped: {end}")
        again = end.fault and end.confirmed and keys.again()
    log.report()
    if not end.confirmed:
        if end.cause:
            sys.excepthook(type(end.cause), end.cause, end.cause.__traceback__)
        print(NOT_CONFIRMED, file=sys.stderr)
        raise SystemExit(3)
    if end.fault:
        raise UserError(f"stopped: {end}")


def drive(args, policy, robot, log):
    """Arms the robot and drives it. Whatever ends that, the robot is stopped. -> Stop, why"""
    handlers = {number: signal.signal(number, interrupt) for number in STOPPING}
    end = Stop("--max-seconds are over", fault=False)
    try:
        gc.collect()
        gc.freeze()  # else each collection looks through all of PyTorch, for a tenth of a second
        driver = make_driver(args, policy, robot)
        robot.arm(driver)
        robot.keys.start()
        control(args, robot, driver, log)
    except Stop as stop:
        end = stop
    except BaseException as e:
        end = Stop(repr(e), cause=e)
    finally:  # first the robot stands, then all else
        with contextlib.suppress(Stop):  # of a signal that comes in just now
            ignore_signals()
        try:
            end.confirmed = robot.stop(end.fault)
        finally:
            robot.keys.stop()
            gc.unfreeze()
            log.save()  # before Ctrl-C counts again: it must not cost the recording
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return end


def control(args, robot, driver, log):
    """The loop: what is seen -> action -> capped duties.

    A robot, real or simulated: arm(driver) or UserError; observe() -> Seen, or Stop;
    command(duties) -> when it was sent; wait() until the next step; stop(fault) -> whether it
    stands; now(), keys, kinematics, max_speed (m/s).
    """
    duties = np.zeros(2)
    end = robot.now() + args.max_seconds - len(log.rows) / HZ
    while robot.now() < end - 1e-6:  # simulated time is a sum of tenths
        seen = robot.observe()
        action = np.asarray(driver(seen), np.float64)  # (2,)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise Stop(f"the driver asked for {action}")
        duties = capped(action, duties, args, robot)
        ready = robot.now()
        sent = robot.command(duties)
        log.add(seen, action, duties, ready, sent)
        robot.wait()


def capped(action, duties, args, robot):
    """Action asked for, last duties -> duties (left, right): the caps, one after the other"""
    v = np.clip(action[0] * SPEED, -robot.max_speed, robot.max_speed)
    omega = np.clip(action[1] * TURN, -args.max_turn, args.max_turn)
    wanted = wheel_duties(v, omega, robot.kinematics).clip(-args.max_duty, args.max_duty)
    return duties + np.clip(wanted - duties, -args.max_slew, args.max_slew)


def ignore_signals():
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def interrupt(number, _):
    ignore_signals()  # a second Ctrl-C must not interrupt the stop
    raise Stop(signal.Signals(number).name, fault=False)


def check_args(args):
    """Mistakes that can be known before anything moves: UserError. Completes file names."""
    check_range(args, 1e-9, 10**9, "max_seconds", "hold", "max_slew")
    check_range(args, 1e-9, SPEED, "max_speed")
    check_range(args, 1e-9, TURN, "max_turn")
    check_range(args, 1e-9, 1.0, "max_duty")
    if args.image_size < 16 or args.image_size & (args.image_size - 1):
        raise UserError(f"--image-size must be 16, 32, 64, ..., it is {args.image_size}")
    if args.robot == "sim" and args.dry_run:
        raise UserError("--dry-run is for robots; the simulator has no motors to be armed")
    if args.robot != "sim" and args.video:
        raise UserError("--video films the simulator; on a robot, --record keeps the pictures")
    if args.robot != "sim" and args.drive == "expert":
        raise UserError("--drive expert needs --robot sim: it reads the true place in the lane")
    if args.disturbed and args.drive != "expert":
        raise UserError("--disturbed is for --drive expert alone")
    if sys.platform == "win32" and not args.export:
        raise UserError("stage 4 drives from Linux and macOS; on Windows, use WSL")
    if args.record and not args.record.endswith(".npz"):
        args.record += ".npz"  # what --dataset FOLDER looks for
    if args.video and not args.video.endswith(".gif"):
        args.video += ".gif"
    for path in filter(None, (args.record, args.video, args.export)):
        if Path(path).exists():
            raise UserError(f"{path} exists already; choose another name")
        write_atomically(path, lambda file: None)  # what can't be written is found now
        Path(path).unlink()


def policy_of(args):
    """The policy that drives or is exported, None if there is none"""
    if args.drive != "policy" and not args.export:
        return None
    if args.checkpoint is None:
        raise UserError("give --checkpoint, a policy.pt of train_policy.py, or another --drive")
    policy = load_policy(args.checkpoint)
    sizes = policy.sizes
    if sizes.channels != 3:
        raise UserError(f"{args.checkpoint} sees {sizes.channels} channels; the camera gives 3")
    if sizes.vector_size not in (0, 2) or sizes.action_size != 2:
        raise UserError(
            f"{args.checkpoint} is for vector and action sizes {sizes.vector_size} and "
            f"{sizes.action_size}; a Duckiebot has 2 (or 0) and 2"
        )
    return policy


# ---- What drives ---------------------------------------------------------------------------------


def make_driver(args, policy, robot):
    """-> function Seen -> action (2,): speed and turning, in shares of SPEED and TURN"""
    noise = np.zeros((1, 2), np.float32)

    def think(seen):
        vector = vector_of(seen.v, seen.omega)[: policy.sizes.vector_size]
        return policy(seen.image[None], vector[None])[0]

    def wander(_):
        noise[:] = held_noise(noise, args.hold)
        return 0.5 * noise[0] + [0.5, 0.0]  # from standstill to full speed, half of the turning

    def steer(_):
        # rad/s: 30 per m off the lane's centre, 8 per rad off its direction; off the road it stands
        turn = (30 * robot.info["dist"] + 8 * robot.info["angle"]) / TURN
        speed = 1.0
        if args.disturbed:
            noise[:] = held_noise(noise, args.hold)
            speed = 0.5 + 0.5 * noise[0, 0]
            turn += 0.3 * noise[0, 1]
        action = [speed, np.clip(turn, -1, 1)] if np.isfinite(turn) else [0.0, 0.0]
        return robot.env.unwrapped.sign * np.array(action)

    if args.drive == "joystick":
        return open_joystick(args.joystick)
    drivers = {"policy": think, "random": wander, "expert": steer}
    return drivers.get(args.drive) or robot.keys.action


class Keys:
    """The terminal: the lines that are typed, the keys that steer, and any other key as the
    emergency stop. A simulation without a terminal is not watched: it only waits."""

    STEER = {b"w": (1.0, 0.0), b"a": (0.5, 0.3), b"d": (0.5, -0.3), b"s": (-0.5, 0.0)}  # actions

    def __init__(self, args):
        self.steer = args.drive == "keyboard"
        watched = args.robot != "sim" or self.steer or sys.stdin.isatty()
        self.fds = [sys.stdin.fileno()] if watched else []
        self.tty = watched and sys.stdin.isatty()
        self.saved = None
        self.pressed = (0.0, 0.0)
        self.pressed_at = 0.0

    def line(self):
        text = b""
        while not text.endswith(b"\n"):
            byte = os.read(self.fds[0], 1)
            if not byte:
                return ""
            text += byte
        return text.decode(errors="replace").strip()

    def again(self):
        """Whether the person at the terminal, if there is one, wants to drive on"""
        if not self.tty:
            return False
        print("Drive on, into the same recording? Type y and Enter; Enter alone ends:", flush=True)
        termios.tcflush(self.fds[0], termios.TCIFLUSH)  # keys that were still held down
        with contextlib.suppress(KeyboardInterrupt):
            return self.line() == "y"

    def start(self):
        """Keys without Enter from here on; no key that was pressed is lost"""
        if self.tty:
            self.saved = termios.tcgetattr(self.fds[0])
            tty.setcbreak(self.fds[0], termios.TCSANOW)

    def stop(self):
        if self.saved:
            termios.tcsetattr(self.fds[0], termios.TCSADRAIN, self.saved)

    def wait(self, deadline):
        """Until the deadline (monotonic, s), or a key"""
        while select.select(self.fds, [], [], max(0.0, deadline - time.monotonic()))[0]:
            key = os.read(self.fds[0], 1)
            if not key:
                raise Stop("the terminal is gone, so no key could stop the robot")
            if not self.steer or key not in self.STEER:
                raise Stop("a key was pressed")
            self.pressed = self.STEER[key]
            self.pressed_at = time.monotonic()

    def action(self, _):
        """That of the key of the last 0.5 s (it repeats while it is held), else standstill"""
        return np.array(self.pressed if time.monotonic() - self.pressed_at < 0.5 else (0.0, 0.0))


def open_joystick(path):
    """Linux's joystick device -> function -> action. A button or a pulled plug stops."""
    with explained(f"no joystick at {path}", OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    axes = {0: 0.0, 1: 0.0}

    def action(_):
        while select.select([fd], [], [], 0)[0]:
            event = b""
            with contextlib.suppress(OSError):
                event = os.read(fd, 8)
            if len(event) < 8:
                raise Stop("the joystick is gone")
            _, value, kind, number = struct.unpack("IhBB", event)
            if kind == 1 and value:
                raise Stop("a button of the joystick was pressed")
            if kind & 2:  # an axis; kind & 128 marks the state at the start
                axes[number] = -value / 32767
        return np.array([axes[1], axes[0]])

    return action


# ---- Geometry: what robot and simulator have in common -------------------------------------------


def wheel_duties(v, omega, calibration):
    """v (m/s), omega (rad/s to the left) -> duties (left, right), as the robot's own node does"""
    c = calibration
    left = (c["gain"] - c["trim"]) * (v - omega * c["baseline"] / 2) / (c["radius"] * c["k"])
    right = (c["gain"] + c["trim"]) * (v + omega * c["baseline"] / 2) / (c["radius"] * c["k"])
    return np.clip([left, right], -c["limit"], c["limit"])


def vector_of(v, omega):
    """m/s, rad/s -> the vector observation (2,), in shares of what the authors take for the most"""
    return np.clip([omega / MAX_YAW_RATE, v / MAX_VELOCITY], -1, 1).astype(np.float32)


def read_calibration(path, what, needed):
    """A calibration file as a dict. It must hold one of the keys `needed` at least."""
    with explained(f"{path} is no calibration of the {what}", Exception):
        data = yaml.safe_load(Path(path).read_text())
        if not isinstance(data, dict) or not data.keys() & needed:
            raise ValueError(f"it must hold {', '.join(needed)}")
        return data


def read_kinematics(path):
    """The wheels' calibration, with the keys of CALIBRATION, which fills in for what is missing as
    the robot's own node does"""
    if path is None:
        raise UserError("--kinematics is needed: the robot's file, or 'default' if it has none")
    data = CALIBRATION
    if path != "default":
        data = read_calibration(path, "wheels", CALIBRATION)
    missing = [key for key in CALIBRATION if key not in data]
    if missing:
        print(f"warning: {path} lacks {', '.join(missing)}; the robot's defaults are taken")
    with explained(f"{path} is no calibration of the wheels", (TypeError, ValueError)):
        c = {key: float(data.get(key, CALIBRATION[key])) for key in CALIBRATION}
        positive = (c["gain"] - abs(c["trim"]), c["baseline"], c["radius"], c["k"], c["limit"])
        if not np.isfinite(positive).all() or min(positive) <= 0:
            raise ValueError("gain must be above trim, all others above 0")
    return c


def undistortion(path):
    """Maps for cv2.remap from the camera's 640x480 picture, read at half its size, to the pinhole
    camera that the simulator has"""
    pinhole = np.array([[307.976, 0, 320], [0, 307.889, 240], [0, 0, 1]])  # pixels (authors)
    K = pinhole
    D = np.zeros(4)
    kind = "equidistant"
    if path is not None:
        data = read_calibration(path, "camera", ["camera_matrix"])
        with explained(f"{path} is no calibration of the camera", Exception):
            K = np.array(data["camera_matrix"]["data"], float).reshape(3, 3)
            D = np.array(data["distortion_coefficients"]["data"], float)
            kind = data.get("distortion_model", "plumb_bob")
            if (data["image_width"], data["image_height"]) != (640, 480):
                raise ValueError("it must be for 640x480")
            if len(D) not in (4, 5, 8) or not np.isfinite([*K.flat, *D]).all():
                raise ValueError("it must have 4, 5 or 8 finite distortion coefficients")
            if min(K[0, 0], K[1, 1]) <= 0:
                raise ValueError("the focal lengths in camera_matrix must be above 0")
    # Pixel u of the whole picture is (u + 0.5) / 2 - 0.5 of the half.
    half = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]])
    rest = (np.eye(3), half @ pinhole, (320, 240), cv2.CV_16SC2)
    if kind in ("equidistant", "fisheye"):
        return cv2.fisheye.initUndistortRectifyMap(half @ K, D[:4], *rest)
    return cv2.initUndistortRectifyMap(half @ K, D, *rest)


def picture(data, maps, size):
    """base64 of a JPEG -> undistorted RGB uint8 (size, size, 3); None if it is no such picture"""
    image = None
    with contextlib.suppress(ValueError, TypeError, cv2.error):
        data = np.frombuffer(base64.b64decode(data), np.uint8)
        # At half the size, which is more than 64x64 pixels show, for half of the work
        image = cv2.imdecode(data, cv2.IMREAD_REDUCED_COLOR_2)
    if image is None or image.shape != (240, 320, 3):
        return None
    image = cv2.remap(image, *maps, cv2.INTER_LINEAR)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)[..., ::-1].copy()


# ---- The robot, over rosbridge -------------------------------------------------------------------

# Link and watchdog also run as text in another process (start_watchdog). There they have nothing
# of this file but each other, and only the modules that are imported there.


class Link:
    """A connection to the robot's rosbridge, and through it to its wheels. What is sent goes out
    now or never; a thread of its own hands on what comes."""

    def __init__(self, host, port, vehicle, reach, mute=False):
        sock = socket.create_connection((host, port), reach)
        # Closing drops what the network did not take: no old command may be delivered later.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.settimeout(None)
        self.peer = socket.getnameinfo(sock.getpeername(), socket.NI_NUMERICHOST)[0]
        name = f"[{host.split('%')[0]}]" if ":" in host else host
        options = {"compression": None, "ping_interval": None, "max_size": None, "proxy": None}
        dialled = connect(f"ws://{name}:{port}", sock=sock, open_timeout=2, **options)
        self.ws = dialled.__enter__()
        self.mute = mute  # it publishes nothing
        self.lost = False
        self.stood = 0  # zeros in a row that the robot executed
        self.handlers = {}
        self.answers = {}
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.wheels = f"/{vehicle}/wheels_driver_node/wheels_cmd"
        self.estop = f"/{vehicle}/wheels_driver_node/emergency_stop"
        if not mute:
            self.send(op="advertise", topic=self.wheels, type="duckietown_msgs/WheelsCmdStamped")
            self.send(op="advertise", topic=self.estop, type="duckietown_msgs/BoolStamped")
        executed = f"{self.wheels}_executed"
        self.subscribe(executed, "duckietown_msgs/WheelsCmdStamped", self.on_executed)

    def subscribe(self, topic, kind, handler):
        self.handlers.setdefault(topic, []).append(handler)
        # With a queue of its own: else one client that is cut off holds up the others.
        self.send(op="subscribe", topic=topic, type=kind, queue_length=1)

    def on_executed(self, message):
        moves = message["vel_left"] or message["vel_right"]
        self.stood = 0 if moves else self.stood + 1

    def read(self):
        with contextlib.suppress(Exception):  # it ends with the connection
            for text in self.ws:
                with contextlib.suppress(Exception):  # what can't be read has not come
                    message = json.loads(text)
                    if message["op"] == "service_response":
                        self.answers[message["id"]] = message["values"]
                    for handler in self.handlers.get(message.get("topic"), []):
                        handler(message["msg"])
        self.lost = True

    def send(self, **message):
        try:
            self.ws.send(json.dumps(message))
        except Exception:
            self.lost = True

    def ask(self, service, key, **args):
        """What a service of the robot lists under the key; nothing if it is silent for 3 s"""
        self.send(op="call_service", service=service, id=service, args=args)
        end = time.monotonic() + 3
        while service not in self.answers and time.monotonic() < end:
            time.sleep(0.005)
        with contextlib.suppress(KeyError, TypeError):
            return self.answers.pop(service)[key]
        return []

    def publish(self, topic, **message):
        if not self.mute:
            self.send(op="publish", topic=topic, msg=message)

    def halt(self, fault, seconds, beat=lambda: None):
        """Ten zeros, and more until the robot executed three in a row. -> whether it did"""
        self.stood = 0
        end = time.monotonic() + seconds
        sent = 0
        while not self.lost and time.monotonic() < end and (sent < 10 or self.stood < 3):
            if fault:  # only a flag: the motors stop at the next command, which it makes a zero
                self.publish(self.estop, data=True)
            self.publish(self.wheels, vel_left=0.0, vel_right=0.0)
            beat()
            sent += 1
            time.sleep(0.02)
        return self.stood >= 3


def watchdog(host, port, vehicle):
    """Stops the robot when the driver is silent, hung or killed: another process, another link.

    stdin: any byte is a heartbeat, "x" asks for a stop, "q" ends; the driver's death closes it. The
    first heartbeat arms. It never drives, and believes only what the robot acknowledges: without
    that it dials anew, for as long as it takes.
    """
    link = Link(host, port, vehicle, 5)
    print("ready", flush=True)
    armed = False
    while True:
        heard = select.select([sys.stdin], [], [], 0.3 if armed else None)[0]  # s, SILENT
        data = os.read(0, 4096) if heard else b""
        if b"x" in data or (armed and not data):
            break
        if b"q" in data or not data:
            os._exit(0)
        armed = True
        if link.lost:
            os.close(0)  # this tells the driver
            break
    begun = time.monotonic()
    patience = 0.5  # s; later more, for a bridge that was just started needs some time
    while not link.halt(True, patience):
        link.ws.close_socket()
        time.sleep(0.05)
        with contextlib.suppress(Exception):
            link = Link(host, port, vehicle, 0.5)
            patience = min(2.0, patience * 1.5)
    after = time.monotonic() - begun
    with contextlib.suppress(OSError):
        print("stopped", flush=True)
    if after > 2:  # the driver has given up
        print(f"watchdog: the robot stands, as it says after {after:.0f} s", file=sys.stderr)
    os._exit(0)


class Duckiebot:
    """A Duckiebot over rosbridge. The link's thread stores what comes, with the LOCAL time of its
    receipt; `check` judges it in the driver's. UserError before arming, Stop after it."""

    now = staticmethod(time.monotonic)

    def __init__(self, args, image_size, keys):
        self.args = args
        self.keys = keys
        self.kinematics = read_kinematics(args.kinematics)
        self.maps = undistortion(args.camera)
        self.image_size = image_size
        self.watchdog = None
        self.frame = None  # Seen, the newest picture
        self.jpeg = None  # as it came, to see whether it changes
        self.changed = 0.0
        self.clock = np.inf  # s that this machine's clock is ahead of the robot's, at most
        self.ticks = {"left": deque(maxlen=64), "right": deque(maxlen=64)}  # (received, stamp, rad)
        self.moved = {"left": 0.0, "right": 0.0}  # when a wheel last turned, or had no reason to
        self.sent = deque(maxlen=20)  # (left, right) that were not acknowledged yet
        self.executed = None  # when the robot executed its last command
        self.obeyed = False  # it executed something that was sent from here
        self.foreign = deque(maxlen=FOREIGN)  # (received, left, right) that were not
        self.flagged = False  # somebody set the emergency stop
        self.guarded = 0.0  # when the guard on the robot was last heard
        self.counts_on_guard = False  # since it was armed
        self.max_speed = args.max_speed
        self.first = None  # time of the first command; none is sent in a dry run
        self.commanded = None  # time of the last one
        self.find()

    def find(self):
        """Connects and subscribes. Generations differ in their encoders, so the robot is asked."""
        match = re.fullmatch(r"(\[[^]]+\]|[^:/\s]+)(?::(\d{1,5}))?", self.args.robot)
        if not match:
            raise UserError(f"--robot takes HOST or HOST:PORT, not {self.args.robot}")
        host = match[1].strip("[]")
        self.port = int(match[2] or self.args.port)
        self.vehicle = self.args.vehicle or host.split(".")[0]
        with explained(f"no rosbridge answers at {host}:{self.port}; is the robot on, and near?"):
            self.link = Link(host, self.port, self.vehicle, 5, mute=self.args.dry_run)
        root = f"/{self.vehicle}"
        names = self.link.ask("/rosapi/topics", "topics")
        ente = f"{root}/left_wheel_encoder_driver_node/tick" in names
        node = "wheel_encoder_driver_node" if ente else "wheel_encoder_node"
        self.dead_zone = DEAD_ZONE["ente" if ente else "daffy"]
        self.encoders = {side: f"{root}/{side}_{node}/tick" for side in self.ticks}
        self.camera = f"{root}/camera_node/image/compressed"
        subscribe = self.link.subscribe
        subscribe(self.camera, "sensor_msgs/CompressedImage", self.on_image)
        for side, topic in self.encoders.items():
            on_tick = functools.partial(self.on_tick, side)
            subscribe(topic, "duckietown_msgs/WheelEncoderStamped", on_tick)
        executed = f"{self.link.wheels}_executed"
        subscribe(executed, "duckietown_msgs/WheelsCmdStamped", self.on_executed)
        subscribe(self.link.estop, "duckietown_msgs/BoolStamped", self.on_estop)
        subscribe(f"{root}/redraw_guard", "std_msgs/Float32", self.on_guard)

    def on_time(self, message):
        """-> when it came, its stamp. The quickest messages tell how far the clocks are apart."""
        now = time.monotonic()
        stamp = message["header"]["stamp"]["secs"] + 1e-9 * message["header"]["stamp"]["nsecs"]
        # Clocks drift: with some 100 messages a second, this forgets 0.2 ms a second.
        self.clock = min(self.clock + 2e-6, now - stamp)
        return now, stamp

    def on_image(self, message):
        now, stamp = self.on_time(message)
        if message["data"] != self.jpeg:  # a camera's noise makes every picture another one
            self.jpeg = message["data"]
            self.changed = now
        image = picture(self.jpeg, self.maps, self.image_size)  # here, so that a step finds it done
        self.frame = Seen(image, now, stamp)

    def on_tick(self, side, message):
        now, stamp = self.on_time(message)
        angle = message["data"] * 2 * np.pi / message["resolution"]
        if not self.ticks[side] or angle != self.ticks[side][-1][2]:
            self.moved[side] = now
        self.ticks[side].append((now, stamp, angle))

    def on_executed(self, message):
        """What was sent comes back in its order; else somebody else sent it, or made it a zero"""
        now, stamp = self.on_time(message)
        self.executed = min(now, stamp + self.clock)
        duties = (message["vel_left"], message["vel_right"])
        for number, own in enumerate(list(self.sent)):
            if np.allclose(duties, own, rtol=0, atol=1e-5):
                for _ in range(number + 1):
                    self.sent.popleft()
                self.obeyed = True
                return
        self.foreign.append((now, *duties))

    def on_estop(self, message):
        self.flagged = bool(message["data"])

    def on_guard(self, _):
        self.guarded = time.monotonic()

    def check(self):
        """The newest picture. Stop if anything is not as it must be to drive on."""
        if self.first:
            self.tell_watchdog(b"h")
        now = time.monotonic()
        started = self.first or now  # what follows commands can't be late before the first one
        frame = self.frame
        age = frame.received - frame.stamp - self.clock
        crowd = len(self.foreign) == FOREIGN and now - self.foreign[0][0] < 1
        unanswered = now - max(self.executed or 0.0, started)
        faults = {
            "the connection to the robot broke": self.link.lost,
            f"no camera frame for {STALE} s": now - frame.received > STALE,
            f"the camera's pictures are {age:.2f} s old when they come": age > STALE,
            f"the camera's picture has not changed for {STALE} s": now - self.changed > STALE,
            "the camera sent something that is no JPEG of 640x480": frame.image is None,
            "somebody set the robot's emergency stop": self.flagged,
            "the guard on the robot fell silent": self.counts_on_guard
            and now - self.guarded > UNGUARDED,
            "another program drives the robot, or set its emergency stop: it executes what was "
            "not sent from here": crowd,
            f"no acknowledgement of the commands for {SILENT} s": unanswered > SILENT,
        }
        for side, ticks in self.ticks.items():
            still = now - max(self.moved[side], started)
            faults[f"no ticks of the {side} wheel for {STALE} s"] = now - ticks[-1][0] > STALE
            faults[f"the {side} wheel stalled: no tick for {STALLED} s"] = still > STALLED
        for words, found in faults.items():
            if found:
                raise Stop(words)
        return frame

    def observe(self):
        frame = self.check()
        speed = {}
        for side, ticks in self.ticks.items():
            # Over the last 0.1 s by the robot's clock; two ticks at least, however far apart
            *older, (_, t1, rad1) = list(ticks)
            _, t0, rad0 = next((tick for tick in older if tick[1] > t1 - 0.11), older[-1])
            speed[side] = (rad1 - rad0) * self.kinematics["radius"] / max(t1 - t0, 0.02)
        v = (speed["right"] + speed["left"]) / 2
        omega = (speed["right"] - speed["left"]) / self.kinematics["baseline"]
        self.seen = frame._replace(v=v, omega=omega)
        return self.seen

    def command(self, duties):
        """Sends duties (left, right) when it is time, and a heartbeat. -> that time"""
        last = self.commanded or np.inf  # before the first command no step can be late
        self.keys.wait(min(self.seen.received + LAG, last + LONGEST))
        now = time.monotonic()
        if now - last > SILENT:  # too late for this picture; the watchdog may have stopped
            raise Stop(f"a step took {now - last:.2f} s")
        if self.watchdog:
            self.tell_watchdog(b"h")
            self.first = self.first or now
        self.send(*map(float, duties))
        for side, duty in zip(self.moved, duties, strict=True):
            if abs(duty) <= self.dead_zone or not self.first:
                self.moved[side] = now
        self.commanded = now
        return now

    def send(self, left, right):
        self.sent.append((left, right))
        self.link.publish(self.link.wheels, vel_left=left, vel_right=right)

    def wait(self):
        """Until the next step's picture comes, or it is too late to wait longer; a key stops"""
        # The next command follows its picture by LAG.
        ripe = self.commanded + SHORTEST - LAG
        late = self.commanded + PATIENCE - LAG
        while self.frame.received < ripe and time.monotonic() < late:
            self.keys.wait(time.monotonic() + 0.001)

    def stop(self, fault):
        """Stops the robot over both links. -> whether it acknowledged that it stands"""

        def say(byte):
            with contextlib.suppress(Stop):
                self.tell_watchdog(byte)

        confirmed = True
        crowd = len(self.foreign) == FOREIGN
        if self.first:
            fault = fault or self.link.lost
            say(b"x" if fault else b"h")
            # Without a fault the watchdog must not take this time for silence.
            confirmed = self.link.halt(fault, 0.5, lambda: say(b"h"))
            say(b"q" if confirmed and not fault else b"x")
            confirmed = confirmed or self.watchdog_says(2) == b"stopped\n"
            if not confirmed:
                print(NOT_CONFIRMED, file=sys.stderr, flush=True)
            elif crowd:
                print(f"these can drive the robot, too: {self.others() or 'nobody is known'}")
        elif self.watchdog:
            say(b"q")
        self.link.ws.close_socket()
        self.link.reader.join(2)  # Python can't end well while it decodes a picture
        return confirmed

    def others(self):
        """The other nodes that can drive: they publish wheels_cmd, as rosbridge does for us"""
        names = self.link.ask("/rosapi/publishers", "publishers", topic=self.link.wheels)
        return ", ".join(name for name in names if "rosbridge" not in name)

    def tell_watchdog(self, byte):
        try:
            self.watchdog.stdin.write(byte)
        except OSError as e:
            raise Stop("the watchdog stopped the robot, lost its connection, or ended") from e

    def watchdog_says(self, seconds):
        heard = select.select([self.watchdog.stdout], [], [], seconds)[0]
        return self.watchdog.stdout.readline() if heard else b""

    def look(self, driver):
        """Looks at all that can be wrong while the motors are off. UserError"""
        begun = time.monotonic()
        complete = None
        while not complete or time.monotonic() < complete + 0.5:  # a still picture shows in 0.25 s
            came = {self.camera: self.frame, f"{self.link.wheels}_executed": self.executed}
            came |= {topic: self.ticks[side] for side, topic in self.encoders.items()}
            missing = [topic for topic, what in came.items() if not what]
            if self.args.dry_run:
                missing = [topic for topic in missing if "executed" not in topic]
            if missing and time.monotonic() > begun + 5:
                raise UserError(f"nothing comes from {', '.join(missing)}; is --vehicle right?")
            if not missing:
                complete = complete or time.monotonic()
            # Too little for any motor, but the answer tells what the robot makes of commands. A
            # new duty each time, so that an answer is known for this one's.
            duty = 1e-4 * (1 + int(10 * (time.monotonic() - begun)))
            self.send(duty, duty)
            time.sleep(0.1)
        if not self.args.dry_run and time.monotonic() - self.executed > SILENT:
            raise UserError(f"not armed: the robot executes commands more than {SILENT} s late")
        moved = any(abs(left) + abs(right) > 0.01 for _, left, right in self.foreign)
        if moved or (self.obeyed and len(self.foreign) == FOREIGN):
            raise UserError(f"not armed: another program drives, likely of {self.others()}; end it")
        self.foreign.clear()
        self.flagged = False  # an emergency stop from before is no fault: arming clears it
        try:
            for _ in range(3):  # the first calls of a network are slow
                driver(self.observe())
        except Stop as e:
            raise UserError(f"not armed: {e}") from e

    def arm(self, driver):
        """Looks, says what a person should know, and waits for that person's word. UserError"""
        self.look(driver)
        self.counts_on_guard = time.monotonic() - self.guarded < UNGUARDED
        own = SPEED if self.counts_on_guard else UNGUARDED_SPEED
        self.max_speed = self.args.max_speed or own
        if self.counts_on_guard:
            print("a guard on the robot stops it when the commands cease")
        else:
            print("warning: NO GUARD runs on the robot (docs/duckiebot_guard.py): if the network")
            print("dies while it moves, nothing can stop it")
        print(f"end joysticks and lane following; these can drive it, too: {self.others() or '-'}")
        if self.args.dry_run:
            return print("dry run: nothing is sent to the motors")
        self.start_watchdog()
        if not self.obeyed:  # it executed zeros in the place of the probes
            print("the robot's emergency stop is set; arming clears it")
        print(f"{self.vehicle}: at most {self.max_speed} m/s, {self.args.max_seconds} s. Robot on")
        print("the road, way clear, hand near it? While it drives, ANY key but those that steer")
        print("stops it. Type arm and Enter:", flush=True)
        if self.keys.line() != "arm":
            raise UserError("not armed")
        if self.flagged:
            raise UserError("not armed: somebody set the robot's emergency stop meanwhile")
        self.link.publish(self.link.estop, data=False)
        self.foreign.clear()
        self.sent.clear()
        seen = self.frame
        while self.frame is seen and time.monotonic() < seen.received + STALE:
            time.sleep(0.001)  # the first step comes right after a picture

    def start_watchdog(self):
        source = "import contextlib, json, os, select, socket, struct, sys, threading, time\n"
        source += "from websockets.sync.client import connect\n"
        source += inspect.getsource(Link) + inspect.getsource(watchdog)
        source += f"watchdog({self.link.peer!r}, {self.port}, {self.vehicle!r})"
        # On a terminal it may have the last word; a pipe would wait for its end.
        errors = None if sys.stderr.isatty() else subprocess.DEVNULL
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        command = [sys.executable, "-c", source]
        # In a session of its own Ctrl-C does not reach it.
        self.watchdog = subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)
        if self.watchdog_says(15) != b"ready\n":
            raise UserError("not armed: the watchdog process could not connect to the robot")


# ---- The simulator -------------------------------------------------------------------------------


@functools.cache
def load_simulator():
    """Imports gym_duckietown with its defects mended. Here, not above: a robot needs none of it."""
    for name in ("", ".spaces", ".utils", ".utils.seeding", ".envs", ".envs.registration"):
        # It imports the older gym.
        sys.modules.setdefault("gym" + name, importlib.import_module("gymnasium" + name))
    logging.disable(logging.WARNING)  # its packages log every import and every reset
    words = "the Duckietown simulator does not load; make duckietown-install installs it"
    with explained(words, ImportError), quiet():
        import contracts

        # Its checks, and those below, never fail and take most of a step's time.
        contracts.disable_all()
        import geometry
        from duckietown_world.world_duckietown import pwm_dynamics
        from gym_duckietown import randomization, simulator
    for name, module in list(sys.modules.items()):
        if name.startswith("geometry.") and hasattr(module, "assert_allclose"):
            module.assert_allclose = lambda *_, **__: None

    # With NumPy >= 1.24 its physics and its randomiser give arrays of size 1 where numbers are due.
    as_velocity = geometry.se2_from_linear_angular
    draw = randomization.Randomizer.randomize
    scalars = ("camera_height", "camera_angle", "camera_fov_y", "horz_mode")

    def velocity(linear, angular):
        return as_velocity([np.asarray(x).item() for x in linear], np.asarray(angular).item())

    def randomize(self, rng):
        drawn = draw(self, rng)
        return drawn | {key: np.asarray(drawn[key]).item() for key in scalars if key in drawn}

    geometry.se2_from_linear_angular = velocity
    randomization.Randomizer.randomize = randomize
    return simulator.Simulator, simulator.NotInLane, pwm_dynamics.get_DB18_nominal, geometry


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class DuckietownEnv(gym.Env):
    """Lane following in the simulator at 10 Hz. Never terminal, also off the road, so that nothing
    is gained by a crash. Observation: image uint8 (image_size, image_size, 3), the 4:3 picture
    squeezed, and vector float32 (2,), true, see `vector_of`. Action: [speed, turning] in shares of
    SPEED and TURN. info: dist (m right of the lane's centre, NaN off the road), angle (rad that it
    points to the right), position (m from the map's middle).

    reverse_actions: apply -a instead of a. gain, trim: duties are multiplied by gain - trim (left)
    and gain + trim (right). delay: s from a command to its effect, in ticks of 1/30 s.
    physics_rand: an episode scales speed and turning by N(1, 0.316), a step by N(1, 0.1) more.
    looks: the simulator's own map_name, domain_rand (colours, lights, camera pose) and distortion
    (the robot's fisheye picture, four times slower).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def __init__(
        self, image_size=64, reverse_actions=False, gain=1.0, trim=0.0, delay=0.05, **looks
    ):
        simulator, self.not_in_lane, self.dynamics, self.geometry = load_simulator()
        self.image_size = image_size
        self.sign = -1.0 if reverse_actions else 1.0
        self.motors = np.array([gain - trim, gain + trim])
        self.delay = delay
        self.physics_rand = looks.pop("physics_rand", False)
        looks = {"map_name": "small_loop", "domain_rand": False, "distortion": False} | looks
        # Distortion works at 640x480 only.
        width, height = (640, 480) if looks["distortion"] else (160, 120)
        looks |= {"camera_width": width, "camera_height": height, "frame_rate": 30}
        words = f"the simulator can't show {looks}; small_loop, loop_empty, udem1 are some maps"
        with explained(words), quiet():
            self.sim = simulator(max_steps=np.inf, seed=0, **looks)
        image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        vector = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gym.spaces.Dict(image=image, vector=vector)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        from pyglet import gl

        super().reset(seed=seed)
        self.sim.shadow_window.switch_to()  # each copy has an OpenGL context of its own
        gl.glLoadIdentity()  # else its light would hang where the last episode's camera was
        self.sim.seed(int(self.np_random.integers(2**31)))
        with quiet():
            self.sim.reset()
        start = self.sim.state.TSE2_from_state()
        self.sim.state = self.dynamics(delay=self.delay).initialize(c0=start, t0=0)
        scale = self.np_random.normal(1, 0.316, 2).clip(0.1, 2)
        self.scale = scale if self.physics_rand else np.ones(2)
        return self.observe(), self.info()

    def step(self, action):
        action = self.sign * np.clip(np.asarray(action, np.float64), -1, 1)
        return self.drive(wheel_duties(action[0] * SPEED, action[1] * TURN, CALIBRATION))

    def drive(self, duties):
        """A step of 0.1 s with duties (left, right) in the place of an action"""
        motion = np.array([duties[1] + duties[0], duties[1] - duties[0]]) / 2  # forwards, turning
        if self.physics_rand:
            motion = motion * self.scale * self.np_random.normal(1, 0.1, 2)
        for _ in range(3):  # of 1/30 s
            motors = self.motors * [motion[0] - motion[1], motion[0] + motion[1]]
            self.sim.update_physics(np.clip(motors, -1, 1))
        obs = self.observe()
        info = self.info()
        reward = -1.0
        if abs(info["dist"]) < LANE_HALF:
            along = self.velocity()[0] * np.cos(info["angle"])
            reward = np.clip(along, -2, PATH_SPEED) / PATH_SPEED
        yaw_rate, speed = np.abs(obs["vector"])
        if speed > 0.2:
            reward -= 0.5 * yaw_rate
        return obs, float(reward), False, False, info

    def velocity(self):
        """True (forward speed m/s, yaw rate rad/s)"""
        motion = self.sim.state.TSE2_from_state()[1]
        linear, angular = self.geometry.linear_angular_from_se2(motion)
        return float(linear[0]), float(angular)

    def info(self):
        dist = angle = np.nan
        with contextlib.suppress(self.not_in_lane):
            lane = self.sim.get_lane_pos2(self.sim.cur_pos, self.sim.cur_angle)
            dist, angle = float(lane.dist), float(lane.angle_rad)
        middle = np.array([self.sim.grid_width, self.sim.grid_height]) * self.sim.road_tile_size / 2
        x, z = self.sim.cur_pos[[0, 2]] - middle
        return {"dist": dist, "angle": angle, "position": (float(x), float(z))}

    def observe(self):
        return {"image": self.render(), "vector": vector_of(*self.velocity())}

    def render(self):
        self.picture = self.sim.render_obs()
        size = (self.image_size, self.image_size)
        return cv2.resize(self.picture, size, interpolation=cv2.INTER_AREA)

    def close(self):
        self.sim.shadow_window.close()


for env_id, changes in zip(
    ENV_IDS, ({}, {"reverse_actions": True}, {"gain": 1.4, "trim": 0.1, "delay": 0.15}), strict=True
):
    if env_id not in gym.registry:  # this file may be __main__ and a module at once
        gym.register(
            env_id, DuckietownEnv, kwargs=changes, max_episode_steps=200, disable_env_checker=True
        )


class SimulatedRobot:
    """The environment behind the calls that a Duckiebot has"""

    def __init__(self, args, image_size, keys):
        self.args = args
        self.keys = keys
        self.kinematics = CALIBRATION
        self.max_speed = args.max_speed or SPEED
        self.waits = args.realtime or args.drive in ("keyboard", "joystick")
        self.clock = 0.0  # s, simulated
        self.rewards = []
        self.offsets = []
        self.film = []
        self.turned = 0.0  # rad around the map's middle
        self.is_first = True
        self.env = gym.make(args.env_id, image_size=image_size)
        self.obs, self.info = self.env.reset(seed=args.seed)

    def now(self):
        return time.monotonic() if self.waits else self.clock

    def arm(self, driver):
        driver(self.observe())

    def observe(self):
        self.deadline = self.now() + 1 / HZ
        v, omega = self.env.unwrapped.velocity()
        return Seen(self.obs["image"], self.now(), self.clock, v, omega, self.is_first)

    def command(self, duties):
        self.duties = duties
        return self.now()

    def wait(self):
        """Drives for a step, with the duties of the last command"""
        env = self.env.unwrapped
        if self.args.video:
            self.film.append(env.picture)
        before = np.arctan2(*self.info["position"])
        self.obs, reward, _, _, self.info = env.drive(env.sign * self.duties)
        angle = np.arctan2(*self.info["position"]) - before
        self.turned += (angle + np.pi) % (2 * np.pi) - np.pi
        self.rewards.append(reward)
        self.offsets.append(self.info["dist"])
        self.clock += 1 / HZ
        # Where random driving is off the road for 1 s, a person would put the robot back.
        lost = self.args.record and self.args.drive == "random"
        lost = lost and np.isnan(self.offsets[-10:]).all()
        self.is_first = lost or len(self.rewards) % self.env.spec.max_episode_steps == 0
        if self.is_first:
            self.obs, self.info = self.env.reset()
        self.keys.wait(self.deadline if self.waits else 0.0)

    def stop(self, fault):
        self.env.close()
        if self.film:
            write = functools.partial(imageio.mimwrite, ims=self.film, format="gif", duration=100)
            write_atomically(self.args.video, write)
        if self.rewards:
            offset = np.abs(self.offsets)
            off_road = np.isnan(offset)
            centre = np.mean(offset[~off_road]) if not off_road.all() else np.nan
            print(f"reward per step {np.mean(self.rewards):.3f}; ", end="")
            print(f"off the road {off_road.mean():.1%} of the steps, else {centre:.3f} m ", end="")
            print(f"from the lane's centre; {abs(self.turned) / 2 / np.pi:.2f} laps")
        return True


# ---- What a drive leaves behind ------------------------------------------------------------------


class Log:
    """The recording, and how well the drive kept time"""

    def __init__(self, args):
        self.args = args
        self.rows = []
        self.computing = []

    def add(self, seen, action, duties, ready, sent):
        if len(self.rows) % int(HZ) == 0 and self.args.robot != "sim":
            words = "{:5.0f} s  action {:+.2f} {:+.2f}  duties {:+.2f} {:+.2f}  speed {:.2f} m/s"
            print(words.format(len(self.rows) / HZ, *action, *duties, seen.v))
        self.computing.append(ready - seen.received)
        row = {
            "image": seen.image,
            "vector": vector_of(seen.v, seen.omega),
            # What was asked for, before the caps: they are a part of the dynamics to be learnt.
            "action": action.astype(np.float32),
            "is_first": seen.is_first,
            "time_action": sent,
            "time_image": seen.received,
            "stamp_image": seen.stamp,
        }
        self.rows.append(row)

    def save(self):
        """Writes the recording; where that is impossible, into the folder for temporary files:
        nobody drives 1,000 s twice"""
        if not self.args.record or not self.rows:
            return
        path = Path(self.args.record)
        data = dataset_of(self.rows)
        try:
            save_dataset(path, data)
        except UserError as e:
            path = Path(tempfile.gettempdir()) / f"{path.stem}-{time.time_ns()}.npz"
            save_dataset(path, data)
            print(f"warning: {str(e).removeprefix('error: ')}")
        print(f"wrote {path}: {usable(data)}")

    def report(self):
        if len(self.rows) < 2:
            return
        if self.args.dry_run:
            print(f"a recording would have {usable(dataset_of(self.rows))}")
        times = np.array([row["time_action"] for row in self.rows])
        lags = times - [row["time_image"] for row in self.rows]
        steps = np.diff(times)
        overruns = np.sum(steps > STEP_BOUNDS[1])
        rate = 1 / np.mean(steps[steps < 1])  # without the pause before it was armed again
        metres = sum(abs(row["vector"][1]) for row in self.rows) * MAX_VELOCITY / HZ
        print(f"{len(times)} steps, {rate:.2f} a second, {overruns} overruns, {metres:.1f} m")
        for name, values in (("computing", self.computing), ("picture to command", lags)):
            middle, most = np.percentile(values, (50, 99)) * 1e3
            print(f"{name}: median {middle:.1f} ms, 99th percentile {most:.1f} ms")


def dataset_of(rows):
    """Recorded rows -> arrays as in common.load_dataset, with the raw times beside them (ignored
    there). A sequence ends where a step, or the time from picture to action, is out of bounds."""
    data = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    step = np.diff(data["time_action"])
    late = data["time_action"] - data["time_image"] > LAG_BOUND
    broken = (step < STEP_BOUNDS[0]) | (step > STEP_BOUNDS[1]) | late[1:] | late[:-1]
    data["is_first"] = np.append(True, data["is_first"][1:] | broken)
    data["is_last"] = np.append(data["is_first"][1:], True)
    data["is_terminal"] = np.zeros(len(rows), bool)
    return data


def usable(data):
    """How much of a recording stage 2 can use, in words"""
    n = len(data["is_first"])
    lengths = np.diff(np.append(np.flatnonzero(data["is_first"]), n))
    share = lengths[lengths >= USABLE].sum() / n
    longest = ", ".join(map(str, sorted(lengths, reverse=True)[:3]))
    return (
        f"{n} rows in {len(lengths)} sequences, the longest {longest}; "
        f"{share:.0%} of the rows are usable, in sequences of {USABLE} or more"
    )


def export(policy, path):
    """Writes the policy as TorchScript, image uint8 (n, L, L, 3) and vector float32 (n, V) ->
    actions (n, 2), and compares its actions with the policy's own from the same seeds."""

    def act(image, vector):  # a method of a module can't be traced
        return policy.act(image, vector)

    L = policy.sizes.image_size
    V = policy.sizes.vector_size
    images = torch.randint(0, 256, (32, 1, L, L, 3), dtype=torch.uint8)
    vectors = torch.rand(32, 1, V) * 2 - 1
    differ = 0.0
    with torch.no_grad(), quiet():
        script = torch.jit.trace(act, (images[0], vectors[0]), check_trace=False)
        write_atomically(path, lambda file: torch.jit.save(script, file))
        board = torch.jit.load(path)
        for seed, (image, vector) in enumerate(zip(images, vectors, strict=True)):
            torch.manual_seed(seed)
            expected = policy(image.numpy(), vector.numpy())
            torch.manual_seed(seed)
            differ = max(differ, np.abs(board(image, vector).numpy() - expected).max())
    if not differ < 1e-5:
        Path(path).unlink()
        raise UserError(f"the exported policy differs from the original by {differ:.2g}")
    print(f"wrote {path}: image uint8 (n, {L}, {L}, 3), vector float32 (n, {V}) -> actions (n, 2);")
    print(f"its actions differ from the policy's own by {differ:.1g} at most in 32 cases")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
