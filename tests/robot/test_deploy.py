"""Driving a robot: what it sends, what it records, and that it stops.
The robot is fake_rosbridge.py's."""

import base64
import os
import pty
import signal
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fake_rosbridge import GUARD, JPEGS, Air, FakeRobot
from helpers import TINY, user_error

import deploy_duckiebot as deploy
from common import Policy, Sizes, UserError, load_dataset, load_policy, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(**{**vars(TINY), "action_size": 2})


class Script:
    """In the place of a policy: always the same action, and something else in its n-th call (the
    first three are the check before arming)"""

    sizes = SIZES

    def __init__(self, action=(0.8, 0.1), n=0, surprise=None):
        self.action, self.n, self.surprise, self.calls, self.images, self.vectors = (
            action,
            n,
            surprise,
            0,
            [],
            [],
        )

    def __call__(self, image, vector):
        self.calls += 1
        self.images.append(image[0])
        self.vectors.append(vector[0])
        action = self.surprise() if self.calls == self.n else None
        return np.array([self.action if action is None else action], np.float32)


@pytest.fixture
def robot():
    """With a guard that says that it is there, so that the speed is capped at 0.25 m/s"""
    with FakeRobot() as fake:
        fake.guard = True
        yield fake


@pytest.fixture
def drive(robot, monkeypatch):
    """Function that drives the fake robot in this process and returns what main raised; the
    fixture's pipe is the terminal."""
    popen, watchdogs = subprocess.Popen, []
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: watchdogs.append(popen(*a, **k)) or watchdogs[-1]
    )
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))

    def run(script=None, typed="arm\n", **flags):
        os.write(write, typed.encode())
        if script is not None:
            monkeypatch.setattr(deploy, "load_policy", lambda path: script)
        flags = {
            "robot": "127.0.0.1",
            "vehicle": "duckie",
            "port": robot.port,
            "kinematics": "default",
            "checkpoint": "x",
            "max_seconds": 8.0,
        } | flags
        try:
            deploy.main(deploy.Args(**flags))
        except BaseException as e:
            return e

    run.terminal = write
    yield run
    sys.stdin.close()
    for watchdog in watchdogs:  # one whose robot never answers would go on for ever
        watchdog.kill()


def wait_for(what, seconds=10.0):
    """Until what() is true"""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    assert what()


def check_stopped(robot, fault_time=None, estop=True):
    """It drove, and within 0.5 s of the fault it stood still for good."""
    fault_time = fault_time or robot.fault_time
    assert fault_time and robot.moving(), "never drove, or no fault came"
    time.sleep(max(0.0, fault_time + 0.5 - time.monotonic()))
    assert robot.motors == (0, 0) and robot.commands[-1][1:3] == (0, 0), (
        "still driving 0.5 s after the fault"
    )
    time.sleep(1.0)
    last = max(c[0] for c in robot.moving())
    zeros = [c for c in robot.commands if c[0] > last and c[1:3] == (0, 0)]
    assert last < fault_time + 0.5 and len(zeros) >= 5
    if estop:
        flags = [s for s in robot.stops if s[1]]
        assert flags and flags[0][0] <= zeros[-5][0], "the emergency stop must be followed by zeros"
        assert robot.flag
    return zeros


# ---- Driving ----


def test_drives_at_ten_hertz_and_ends_with_zeros(robot, drive, capsys):
    assert drive(Script(), max_seconds=3.0) is None
    moving = robot.moving()
    period = np.diff([c[0] for c in moving])
    assert 29 <= len(moving) <= 32 and np.median(period) == pytest.approx(0.1, abs=0.005)
    # v = 0.2 m/s, omega = 0.8 rad/s with the stock calibration
    assert moving[-1][1:3] == pytest.approx(
        ((0.2 - 0.04) / (0.0318 * 27), (0.2 + 0.04) / (0.0318 * 27))
    )
    assert len([c for c in robot.commands if c[0] > moving[-1][0]]) >= 5 and robot.motors == (0, 0)
    assert [s[1] for s in robot.stops] == [False]  # cleared when armed, not set by a normal end
    assert {c[3] for c in moving} == {0}  # all from one connection; the watchdog's only watches
    out = capsys.readouterr().out
    assert (
        f"{len(moving)} steps" in out
        and "stopped: --max-seconds are over" in out
        and "percentile" in out
    )


@pytest.mark.parametrize("resolution, radius", [(135, 0.0318), (270, 0.05)])
def test_measured_velocity_is_that_of_the_wheels(robot, drive, tmp_path, resolution, radius):
    """By the resolution that the robot tells and the radius in its file: 27 rad/s per duty."""
    robot.resolution = resolution
    (tmp_path / "wheels.yaml").write_text(
        f"{{gain: 1, trim: 0, baseline: 0.1, radius: {radius}, k: 27, limit: 1}}"
    )
    script = Script(action=(0.8, 0.2))
    assert drive(script, max_seconds=3.0, kinematics=str(tmp_path / "wheels.yaml")) is None
    measured = np.mean(script.vectors[-15:], 0) * [deploy.MAX_YAW_RATE, deploy.MAX_VELOCITY]
    assert measured == pytest.approx([1.6, 0.2], rel=0.08)
    assert not np.any(script.vectors[:3])  # and zero before it drove


@pytest.mark.parametrize("vector_size", [0, 2])
def test_a_policy_without_a_vector_drives(robot, drive, vector_size):
    script = Script()
    script.sizes = Sizes(**{**vars(SIZES), "vector_size": vector_size})
    assert drive(script, max_seconds=1.0) is None
    assert script.vectors[-1].shape == (vector_size,)


def test_the_other_generation_of_robots(drive, robot, monkeypatch):
    """Its encoders have other names, which rosbridge is asked for."""
    with FakeRobot(ente=True) as ente:
        script = Script(action=(1.0, 0.0))
        assert (
            drive(script, port=ente.port, max_seconds=1.5, max_speed=0.25, kinematics="default")
            is None
        )
        assert script.vectors[-1][1] * deploy.MAX_VELOCITY == pytest.approx(0.25, rel=0.1)
        assert ente.moving()
        os.write(drive.terminal, b"arm\n")


def test_a_robot_that_answers_no_questions_is_taken_for_daffy(robot, drive):
    robot.fault.add("no rosapi")
    assert drive(Script(), max_seconds=1.0) is None and robot.moving()


@pytest.mark.parametrize(
    "address, words",
    [
        ("127.0.0.1:{}", None),
        ("127.0.0.1:1", "rosbridge"),
        ("http://duckie", "HOST:PORT"),
        ("", "HOST:PORT"),
    ],
)
def test_address_with_a_port(robot, drive, address, words):
    error = drive(
        Script(), typed="", robot=address.format(robot.port), port=2, max_seconds=1.0, dry_run=True
    )
    assert error is None if words is None else words in str(error) and "\n" not in str(error)


def test_help_works_without_a_terminal_library():
    """On Windows there is no termios; stage 4 does not drive from there, and says so."""
    source = "import signal, sys; sys.modules['termios'] = None; del signal.SIGHUP; "
    source += "import tyro, deploy_duckiebot as d; sys.platform = 'win32'; d.main(tyro.cli(d.Args))"
    for flags, code, words in ((["--help"], 0, "--robot"), (["--drive", "random"], 1, "Linux")):
        done = subprocess.run(
            [sys.executable, "-c", source, *flags], cwd=ROOT, capture_output=True, text=True
        )
        assert (
            done.returncode == code
            and words in done.stdout + done.stderr
            and "Traceback" not in done.stderr
        ), done


@pytest.mark.parametrize(
    "cap, value, bound",
    [
        ("max_speed", 0.1, 0.1 / (0.0318 * 27)),
        ("max_duty", 0.05, 0.05),
        ("max_turn", 1.0, (0.25 + 0.05) / (0.0318 * 27)),
    ],
)
def test_caps(robot, drive, cap, value, bound):
    action = (1.0, 1.0) if cap == "max_turn" else (1.0, 0.0)
    drive(Script(action=action), max_seconds=1.0, max_slew=2.0, **{cap: value})
    most = max(abs(c[2]) for c in robot.moving())
    assert most == pytest.approx(bound, rel=1e-4)


def test_actions_beyond_one_are_capped_too(robot, drive):
    drive(Script(action=(50.0, 0.0)), max_seconds=1.0)
    assert max(c[1] for c in robot.moving()) == pytest.approx(0.25 / (0.0318 * 27))


def test_slew_limit(robot, drive):
    drive(
        Script(action=(1.0, 0.0), n=9, surprise=lambda: (-1.0, 0.0)), max_seconds=1.5, max_slew=0.1
    )
    duties = np.array([(0.0, 0.0)] + [c[1:3] for c in robot.moving()])
    steps = np.abs(np.diff(duties, axis=0))
    assert steps.max() == pytest.approx(0.1, abs=1e-9) and (steps > 0.09).sum() > 6


@pytest.mark.parametrize("guard", [True, False])
def test_dry_run_sends_nothing(robot, drive, capsys, guard):
    script, robot.guard = Script(), guard
    assert drive(script, typed="", max_seconds=1.5, dry_run=True) is None
    assert script.calls > 12 and not robot.commands and not robot.stops and not robot.advertised
    out = capsys.readouterr().out
    assert ("NO GUARD" in out) == (not guard) and ("a guard on the robot" in out) == guard
    assert "a recording would have" in out and "rows are usable" in out and "longest" in out


# ---- Arming ----


@pytest.mark.parametrize("typed", ["no\n", "\n", "arm"])
def test_no_motion_without_arming(robot, drive, typed):
    if typed == "arm":  # without Enter, and the terminal is gone
        os.write(drive.terminal, b"arming\n")
        typed = ""
    error = drive(Script(), typed=typed)
    assert isinstance(error, SystemExit) and "not armed" in str(error)
    time.sleep(0.5)
    assert not robot.moving() and not robot.stops


@pytest.mark.parametrize(
    "fault, words",
    [
        ("no frames", "camera_node"),
        ("corrupt frames", "JPEG"),
        ("small frames", "640x480"),
        ("frozen frames", "changed"),
        ("garbage", "camera_node"),
        ("old frames", "1.0"),
        ("no ticks", "encoder"),
        ("no acknowledgements", "wheels_cmd_executed"),
        ("late acknowledgements", "late"),
    ],
)
def test_robot_that_is_not_fit_is_not_armed(robot, drive, capsys, fault, words):
    robot.fault.add(fault)
    error = drive(Script())
    assert isinstance(error, SystemExit) and words in str(error) and "\n" not in str(error)
    assert not robot.moving() and "Type arm" not in capsys.readouterr().out


def test_mistakes_before_the_motors_are_armed(robot, drive, tmp_path):
    bad, not_camera = tmp_path / "bad.yaml", tmp_path / "camera.yaml"
    bad.write_text("gain: 1.0\ntrim: 0.0\n")
    camera = "image_width: {}\nimage_height: {}\ncamera_matrix: {{data: [{},0,0,0,1,0,0,0,1]}}\n"
    camera += "distortion_coefficients: {{data: [0,0,0,0]}}\n"
    not_camera.write_text(camera.format(320, 240, 1))
    bent = tmp_path / "bent.yaml"
    bent.write_text("{gain: 1, trim: 0, baseline: 0, radius: 0.03, k: 27, limit: 1}")
    trim, empty, zero = tmp_path / "trim.yaml", tmp_path / "empty.yaml", tmp_path / "zero.yaml"
    trim.write_text("{gain: 0.2, trim: -0.3}")
    empty.write_text("")
    zero.write_text(camera.format(640, 480, 0))
    wrong = tmp_path / "policy.pt"
    save_checkpoint(
        wrong, stage="train_policy", args={}, sizes=vars(TINY), policy=Policy(TINY).state_dict()
    )
    none, stick = str(tmp_path / "none.yaml"), str(tmp_path / "js")
    for flags, words in (
        ({"kinematics": None}, "--kinematics"),
        ({"kinematics": none}, "none.yaml"),
        ({"kinematics": str(not_camera)}, "baseline"),
        ({"kinematics": str(bent)}, "above 0"),
        ({"kinematics": str(trim)}, "trim"),
        ({"kinematics": str(empty)}, "gain"),
        ({"camera": none}, "none.yaml"),
        ({"camera": str(empty)}, "camera_matrix"),
        ({"camera": str(bad)}, "camera_matrix"),
        ({"camera": str(not_camera)}, "640x480"),
        ({"camera": str(zero)}, "focal"),
        ({"port": 1}, "rosbridge"),
        ({"vehicle": "other"}, "--vehicle"),
        ({"drive": "expert"}, "sim"),
        ({"disturbed": True}, "--disturbed"),
        ({"video": "x"}, "--video"),
        ({"drive": "joystick", "joystick": stick}, "joystick"),
        ({"max_speed": -1.0}, "max-speed"),
        ({"max_speed": 0.3}, "max-speed"),  # a cap can't raise what an action of 1 commands
        ({"max_turn": 9.0}, "max-turn"),
        ({"max_duty": 1.1}, "max-duty"),
        ({"image_size": 48}, "--image-size"),
        ({"robot": "sim", "dry_run": True}, "--dry-run"),
    ):
        error = drive(Script(), typed="", **flags)
        assert isinstance(error, SystemExit) and words in str(error) and "\n" not in str(error), (
            flags,
            error,
        )
    grey = Script()
    grey.sizes = types.SimpleNamespace(**{**vars(SIZES), "channels": 9})
    assert "9 channels" in str(drive(grey, typed=""))
    for path, words in (
        (str(wrong), "2 (or 0) and 2"),
        (str(tmp_path / "no.pt"), "no.pt"),
        (None, "--checkpoint"),
    ):
        deploy.load_policy = load_policy
        error = drive(typed="", checkpoint=path)
        assert isinstance(error, SystemExit) and words in str(error) and "\n" not in str(error)
    assert not robot.moving() and not robot.stops


# ---- Stopping: each fault comes after ten commands that move ----


@pytest.mark.parametrize(
    "fault, words",
    [
        ("no frames", "no camera frame"),
        ("frozen frames", "not changed"),
        ("late frames", "no camera frame"),
        ("old frames", "old"),
        ("corrupt frames", "JPEG"),
        ("small frames", "JPEG of 640x480"),
        ("garbage", "no camera frame"),
        ("no ticks", "no ticks of the left"),
        ("no acknowledgements", "no acknowledgement"),
        ("late acknowledgements", "no acknowledgement"),
    ],
)
def test_faults_of_the_robot_stop_it(robot, drive, fault, words):
    robot.when(10, fault)
    error = drive(Script())
    if error.code == 3:  # without acknowledgements the robot stands, but nobody here can know
        assert "acknowledgements" in fault
        return check_stopped(robot)
    assert (
        isinstance(error, SystemExit)
        and str(error).startswith("error: stopped: ")
        and words in str(error)
        and "\n" not in str(error)
    )
    check_stopped(robot)


def test_broken_connection_of_the_driver(robot, drive):
    robot.when(10, lambda: robot.disconnect([0]))
    error = drive(Script())
    assert "connection" in str(error)
    zeros = check_stopped(robot)
    assert {c[3] for c in zeros} == {1}  # the watchdog's connection, which came second


def test_broken_connection_of_the_watchdog(robot, drive):
    """Without its second line the driver does not go on."""
    robot.when(10, lambda: robot.disconnect([1]))
    error = drive(Script())
    assert "watchdog" in str(error)
    check_stopped(robot)


def test_connection_that_breaks_just_before_the_end(robot, drive, monkeypatch):
    """The end of the drive is no fault, but its zeros would be lost: the watchdog sends them."""
    stop = deploy.Duckiebot.stop

    def cut_and_stop(self, fault):
        assert not fault and robot.motors != (0, 0)
        robot.fault_time = time.monotonic()
        robot.disconnect([0])
        time.sleep(0.05)
        return stop(self, fault)

    monkeypatch.setattr(deploy.Duckiebot, "stop", cut_and_stop)
    assert drive(Script(), max_seconds=1.5) is None
    assert {c[3] for c in check_stopped(robot)} == {1}


@pytest.mark.parametrize("outage, confirmed", [(0.6, True), (2.0, None), (6.0, False)])
def test_network_that_swallows_packets(robot, drive, capsys, outage, confirmed):
    """No connection is reset, and those from before stay dead. The watchdog dials anew until its
    zeros are acknowledged; the driver says whether they were."""
    back = []

    def cut():
        air.cut()
        threading.Timer(outage, lambda: back.append(air.restore())).start()

    with Air(robot.port) as air:
        robot.when(10, cut)
        error = drive(Script(), port=air.port)
        err = capsys.readouterr().err
        wait_for(lambda: back)
        wait_for(lambda: robot.motors == (0, 0) and robot.flag)
        time.sleep(1.0)
    zeros = [c for c in robot.commands if c[0] > back[0] and c[1:3] == (0, 0)]
    assert zeros[0][0] < back[0] + 1.0 and len(zeros) >= 10 and robot.motors == (0, 0)
    assert max(c[0] for c in robot.moving()) < back[0]  # and no old command is delivered
    if confirmed is not None:
        assert (error.code == 3) == (not confirmed) and (
            "NOT CONFIRMED: lift the robot" in err
        ) == (not confirmed)
    if error.code != 3:
        assert str(
            error
        ) == "error: stopped: no camera frame for 0.25 s" or "acknowledgement" in str(error)


def test_network_that_dies_at_the_normal_end(robot, drive, monkeypatch):
    """The zeros of an end without a fault are lost, too: the driver must not believe its writes."""
    stop = deploy.Duckiebot.stop

    def cut_and_stop(self, fault):
        assert not fault and robot.motors != (0, 0)
        air.cut()
        threading.Timer(1.5, air.restore).start()
        return stop(self, fault)

    monkeypatch.setattr(deploy.Duckiebot, "stop", cut_and_stop)
    with Air(robot.port) as air:
        error = drive(Script(), port=air.port, max_seconds=1.5)
        wait_for(lambda: robot.motors == (0, 0) and robot.flag)
    assert error is None or error.code == 3


def test_rosbridge_that_was_away(robot, drive):
    """It refuses for 4 s, and then a topic loses what comes in the first 0.5 s"""

    def cut():
        robot.fault.add("refuse")
        robot.disconnect()

    robot.when(10, cut)
    error = drive(Script())
    assert error.code == 3 and robot.motors != (0, 0)  # nobody could reach it
    time.sleep(1.5)
    robot.advertised.clear()
    robot.registration = 0.5
    robot.fault.clear()
    back = time.monotonic()
    wait_for(lambda: robot.motors == (0, 0) and robot.flag, 5)
    assert max(c[0] for c in robot.moving()) < back
    time.sleep(1.5)
    assert (
        len([c for c in robot.commands if c[0] > back]) >= 3
        and robot.commands[-1][0] < time.monotonic() - 0.3
    )  # it ended


def test_guard_on_the_robot_stops_it_while_the_network_is_dead(robot, drive, monkeypatch):
    """The script itself, with a stand-in for rospy: its node lives beside the robot's own."""
    robot.guard = False
    guard = run_guard(robot, monkeypatch)
    with Air(robot.port) as air:
        robot.when(10, air.cut)
        error = drive(Script(), port=air.port)
        assert error.code == 3
        last = robot.moving()[-1][0]
        zeros = [c for c in robot.commands if c[3] == "elsewhere"]
        assert 0.5 < zeros[0][0] - last < 0.7 and len(zeros) == 10 and robot.motors == (0, 0)
        assert max(c[1] for c in robot.moving()) > 0.15 / (
            0.0318 * 27
        )  # it had said that it is there, so the cap was the higher one
        air.restore()
        wait_for(lambda: robot.flag)
    guard.set()


def run_guard(robot, monkeypatch):
    """docs/duckiebot_guard.py in a thread"""
    end, callbacks = threading.Event(), []

    class Publisher:
        def __init__(self, topic, kind, queue_size):
            assert topic in robot.types, topic
            self.topic = topic

        def publish(self, message):
            if self.topic == GUARD:
                robot.announce_guard()
            else:
                robot.from_elsewhere(message.vel_left, message.vel_right)

    class WheelsCmdStamped:
        vel_left = vel_right = 0.0

    def hear(left, right, number):
        callerid = "/redraw_guard" if number == "elsewhere" else "/rosbridge_websocket"
        message = types.SimpleNamespace(
            vel_left=left, vel_right=right, _connection_header={"callerid": callerid}
        )
        for callback in callbacks:
            callback(message)

    robot.listener = hear
    rospy = types.SimpleNamespace(
        Publisher=Publisher,
        Subscriber=lambda topic, kind, callback: callbacks.append(callback),
        get_name=lambda: "/redraw_guard",
        init_node=lambda name: None, is_shutdown=end.is_set,
    )  # fmt: skip
    messages = types.SimpleNamespace(WheelsCmdStamped=WheelsCmdStamped, Float32=float)
    for name, module in {
        "rospy": rospy,
        "duckietown_msgs": messages,
        "duckietown_msgs.msg": messages,
        "std_msgs": messages,
        "std_msgs.msg": messages,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["duckiebot_guard.py", "duckie"])
    source = compile(
        (ROOT / "docs" / "duckiebot_guard.py").read_text(), "duckiebot_guard.py", "exec"
    )
    threading.Thread(target=exec, args=(source, {"__name__": "__main__"}), daemon=True).start()
    return end


@pytest.mark.parametrize("max_speed, most", [(None, 0.15), (0.25, 0.25)])
def test_without_a_guard_the_cap_is_lower_unless_asked_for(robot, drive, capsys, max_speed, most):
    robot.guard = False
    assert drive(Script(action=(1.0, 0.0)), max_seconds=1.5, max_speed=max_speed) is None
    assert max(c[1] for c in robot.moving()) == pytest.approx(most / (0.0318 * 27), rel=1e-4)
    assert "NO GUARD" in capsys.readouterr().out


def test_a_guard_that_falls_silent_stops_the_drive(robot, drive):
    """The higher cap of speed counts on it."""
    robot.when(10, lambda: setattr(robot, "guard", False))
    assert "the guard on the robot fell silent" in str(drive(Script()))
    check_stopped(robot, robot.fault_time + deploy.UNGUARDED)


# ---- Somebody else stops or drives ----


@pytest.mark.parametrize("told", [True, False])
def test_emergency_stop_from_elsewhere(robot, drive, told):
    """And when it is released, the robot stays where it is."""
    robot.when(10, lambda: robot.press_stop(True, told))
    error = drive(Script())
    assert ("somebody set" in str(error)) == told and "emergency stop" in str(error)
    check_stopped(robot)
    robot.press_stop(False)
    time.sleep(1.0)
    assert robot.motors == (0, 0)


def test_emergency_stop_that_was_set_before(robot, drive, capsys):
    robot.flag = True
    assert drive(Script(), max_seconds=1.5) is None
    out = capsys.readouterr().out
    assert (
        "the robot's emergency stop is set; arming clears it" in out and len(robot.moving()) >= 12
    )
    assert [s[1] for s in robot.stops] == [False] and robot.stops[0][0] < robot.moving()[0][0]


def test_no_word_of_an_emergency_stop_that_is_not_set(robot, drive, capsys):
    assert drive(Script(), max_seconds=1.0) is None
    assert "emergency stop is set" not in capsys.readouterr().out


@pytest.mark.parametrize("hertz", [10, 30])
def test_another_program_that_begins_to_drive(robot, drive, capsys, hertz):
    """Its commands come between ours; it is named."""

    def begin():
        robot.publishers.append("/duckie/joy_mapper_node")
        threading.Thread(target=interfere).start()

    def interfere():
        for _ in range(2 * hertz):
            robot.from_elsewhere(0.5, 0.5)
            time.sleep(1 / hertz)

    robot.when(10, begin)
    error = drive(Script())
    assert (
        "another program drives" in str(error)
        and "/duckie/joy_mapper_node" in capsys.readouterr().out
    )
    # It can't be kept from driving; but the emergency stop is set, so nothing moves.
    time.sleep(2.5)
    assert (
        robot.flag
        and robot.motors == (0, 0)
        and max(c[0] for c in robot.moving() if c[3] == 0) < robot.fault_time + 0.6
    )


def test_another_program_that_drives_already(robot, drive, capsys):
    end = threading.Event()

    def interfere():
        while not end.wait(0.1):
            robot.from_elsewhere(0.0, 0.5)

    robot.publishers.append("/duckie/joy_mapper_node")
    threading.Thread(target=interfere).start()
    error = drive(Script())
    end.set()
    assert "not armed: another program drives" in str(error) and "/duckie/joy_mapper_node" in str(
        error
    )
    assert {c[3] for c in robot.moving()} == {
        "elsewhere"
    } and "Type arm" not in capsys.readouterr().out


# ---- Encoders ----


def test_gaps_between_ticks_below_the_bound_do_not_stop(robot, drive):
    """0.133 s from one to the next; the bound is 0.25 s"""
    robot.fault.add("sparse ticks")
    script = Script(action=(0.8, 0.0))
    assert drive(script, max_seconds=3.0) is None
    assert np.mean(script.vectors[-10:], 0)[1] * deploy.MAX_VELOCITY == pytest.approx(0.2, rel=0.1)


def test_a_wheel_that_does_not_turn_stops_the_drive(robot, drive):
    robot.when(10, "stuck left wheel")
    error = drive(Script())
    assert "left wheel stalled" in str(error)
    last = max(c[0] for c in robot.moving())
    assert 0.9 < last - robot.fault_time < 1.4 and robot.motors == (0, 0)


def test_a_wheel_that_need_not_turn_is_no_fault(robot, drive):
    """Turning on the spot of one wheel: the other one gets a duty within the dead zone."""
    robot.fault.add("stuck left wheel")
    assert drive(Script(action=(0.2, 0.125)), max_seconds=2.5) is None
    assert robot.moving()[-1][1] < 0.01 < robot.moving()[-1][2]


@pytest.mark.parametrize("surprise", ["exception", "nan", "shape", "hang"])
def test_faults_of_the_policy(robot, drive, surprise):
    fault = []

    def happen():
        fault.append(time.monotonic())
        if surprise == "exception":
            raise RuntimeError("surprise")
        if surprise == "hang":
            time.sleep(1.2)
        return {"nan": (np.nan, 0.0), "shape": (0.1, 0.1, 0.1)}.get(surprise)

    error = drive(Script(n=12, surprise=happen))
    assert isinstance(error, RuntimeError if surprise == "exception" else SystemExit)
    if surprise == "hang":  # the watchdog stopped it long before the driver woke up
        first_zero = [c for c in robot.commands if c[0] > fault[0] and c[1:3] == (0, 0)][0]
        assert first_zero[0] < fault[0] + 0.5 and first_zero[3] == 1
        assert max(c[0] for c in robot.moving()) < fault[0] + 0.1
    check_stopped(robot, fault[0])


@pytest.mark.parametrize("key", ["space", "gone"])
def test_a_key_stops(robot, drive, key):
    robot.when(
        10, lambda: os.write(drive.terminal, b" ") if key == "space" else os.close(drive.terminal)
    )
    error = drive(Script())
    assert ("key was pressed" if key == "space" else "terminal is gone") in str(error)
    check_stopped(robot)
    assert max(c[0] for c in robot.moving()) <= robot.fault_time  # at once, not at the next step


def test_keyboard_steers_and_other_keys_stop(robot, drive):
    robot.when(25, lambda: os.write(drive.terminal, b"x"))

    def type_keys():  # someone at the keys
        wait_for(lambda: robot.stops, 30)
        for key in "wawwwwwwwwwwww":
            os.write(drive.terminal, key.encode())
            time.sleep(0.2)

    typist = threading.Thread(target=type_keys)
    typist.start()
    error = drive(drive="keyboard", checkpoint=None)
    check_stopped(robot)
    typist.join()
    assert "key was pressed" in str(error)
    left = [c for c in robot.moving() if c[2] > c[1] + 0.05]
    assert 1 <= len(left) < len(robot.moving())


def joystick_event(kind, number, value):
    return struct.pack("IhBB", 0, value, kind, number)


@pytest.mark.parametrize("end", ["button", "plug"])
def test_joystick_steers_and_its_button_or_plug_stops(robot, drive, tmp_path, end):
    os.mkfifo(tmp_path / "js")
    reader = os.open(
        tmp_path / "js", os.O_RDONLY | os.O_NONBLOCK
    )  # a pipe can't be written to before somebody reads
    stick = os.open(tmp_path / "js", os.O_WRONLY)
    os.write(
        stick, joystick_event(2 | 128, 1, -16384) + joystick_event(2, 0, -8192)
    )  # half forwards, a quarter to the left
    robot.when(
        10, lambda: os.write(stick, joystick_event(1, 3, 1)) if end == "button" else os.close(stick)
    )
    error = drive(drive="joystick", joystick=str(tmp_path / "js"), checkpoint=None)
    os.close(reader)
    assert ("button" if end == "button" else "joystick is gone") in str(error)
    check_stopped(robot)
    assert robot.moving()[5][1:3] == pytest.approx(
        ((0.125 - 0.1) / (0.0318 * 27), (0.125 + 0.1) / (0.0318 * 27)), rel=1e-3
    )


def test_death_of_the_watchdog_stops_the_driver(robot, drive, monkeypatch):
    processes, real = [], subprocess.Popen
    monkeypatch.setattr(
        deploy.subprocess, "Popen", lambda *a, **k: processes.append(real(*a, **k)) or processes[-1]
    )
    robot.when(10, lambda: processes[0].kill())
    error = drive(Script())
    assert "watchdog" in str(error)
    check_stopped(robot)


def test_no_arming_without_a_watchdog(robot, drive, monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(
        deploy.subprocess, "Popen", lambda command, **k: real([sys.executable, "-c", "pass"], **k)
    )
    error = drive(Script())
    assert "watchdog" in str(error) and not robot.moving()


def start_watchdog(robot):
    link = types.SimpleNamespace(peer="127.0.0.1")
    duckiebot = types.SimpleNamespace(link=link, port=robot.port, vehicle="duckie")
    duckiebot.watchdog_says = lambda seconds: duckiebot.watchdog.stdout.readline()
    deploy.Duckiebot.start_watchdog(duckiebot)
    return duckiebot.watchdog


def test_watchdog_believes_only_acknowledgements(robot):
    """As long as none come it sends zeros, over one connection after the other; then it ends."""
    robot.fault.add("no acknowledgements")
    dog = start_watchdog(robot)
    dog.stdin.write(b"hx")
    time.sleep(5)
    assert (
        dog.poll() is None
        and robot.commands[-1][0] > time.monotonic() - 0.5
        and len({c[3] for c in robot.commands}) >= 3
    )
    assert all(c[1:3] == (0, 0) for c in robot.commands) and robot.flag
    robot.fault.clear()
    assert dog.stdout.readline() == b"stopped\n" and dog.wait(5) == 0


@pytest.mark.parametrize("said, zeros", [(b"xq", True), (b"q", False), (b"", True), (None, True)])
def test_watchdog_alone(robot, said, zeros):
    """Armed by a heartbeat, then: a stop and an end at once, an end, the driver's death, silence"""
    dog = start_watchdog(robot)
    for _ in range(5):
        dog.stdin.write(b"h")
        time.sleep(0.1)
    assert not robot.commands and not robot.stops  # as long as the heart beats it does nothing
    if said is not None:
        dog.stdin.write(said) if said else dog.stdin.close()
    time.sleep(0.5)
    assert (
        (len(robot.commands) >= 5 and robot.flag)
        if zeros
        else (not robot.commands and not robot.stops)
    )
    assert all(c[1:3] == (0, 0) for c in robot.commands) and dog.wait(5) == 0


def start_driver(robot, tmp_path, *flags, terminal=None):
    """The script as a user runs it, armed, with a real policy file"""
    policy = Policy(SIZES)
    with torch.no_grad():  # forwards, a little to the left, with the least noise
        policy.actor.net[-1].weight.zero_()
        policy.actor.net[-1].bias.copy_(torch.tensor([1.0, 0.1, -9.0, -9.0]))
    save_checkpoint(
        tmp_path / "policy.pt",
        stage="train_policy",
        args={},
        sizes=vars(SIZES),
        policy=policy.state_dict(),
    )
    command = [
        sys.executable,
        str(ROOT / "deploy_duckiebot.py"),
        "--robot",
        "127.0.0.1",
        "--vehicle",
        "duckie",
        "--port",
        str(robot.port),
    ]
    command += ["--kinematics", "default", "--checkpoint", str(tmp_path / "policy.pt"), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if terminal is not None:
        return subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=env,
            start_new_session=True,
        )
    driver = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    driver.stdin.write("arm\n")
    driver.stdin.flush()
    return driver


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL", "SIGSTOP"])
def test_signals(robot, tmp_path, name):
    driver = start_driver(robot, tmp_path, "--record", str(tmp_path / "out.npz"))
    robot.when(10, lambda: driver.send_signal(getattr(signal, name)))
    end = time.monotonic() + 60
    while robot.fault_time is None and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert robot.fault_time, driver.communicate()
    hard = name in ("SIGKILL", "SIGSTOP")
    zeros = check_stopped(robot, estop=hard)
    if hard:
        assert {c[3] for c in zeros} == {1}  # from the watchdog
    if name == "SIGSTOP":  # it goes on where it was: no motion
        driver.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        assert max(c[0] for c in robot.moving()) < robot.fault_time + 0.5 and robot.motors == (0, 0)
    out, err = driver.communicate(timeout=30)
    if name == "SIGSTOP":
        assert (
            driver.returncode == 1
            and err.strip().startswith("error: stopped: ")
            and "\n" not in err.strip()
        )
    elif not hard:
        assert driver.returncode == 0 and f"stopped: {name}" in out and err == ""
        assert (
            len(load_dataset(tmp_path / "out.npz", SIZES)["action"]) >= 10
        )  # what was recorded is kept


# ---- Recording ----


def test_recording(robot, drive, tmp_path):
    script = Script()
    assert drive(script, max_seconds=2.5, record=str(tmp_path / "out"), max_speed=0.1) is None
    data = load_dataset(tmp_path / "out.npz", SIZES)  # the name that --dataset FOLDER finds
    assert 24 <= len(data["action"]) <= 27 and np.allclose(
        data["action"], (0.8, 0.1)
    )  # what was asked for, before the caps
    assert np.array_equal(data["image"], np.array(script.images[3:])) and np.array_equal(
        data["vector"], np.array(script.vectors[3:])
    )
    assert data["is_last"][-1] and data["is_first"][0] and not data["is_terminal"].any()
    with np.load(tmp_path / "out.npz") as npz:
        lag = npz["time_action"] - npz["time_image"]
        assert (lag > 0).all() and np.median(lag) < 0.04
        assert np.diff(npz["stamp_image"]).mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("fault", ["a bug", "a broken connection", "a full disk"])
def test_no_fault_loses_what_was_recorded(robot, drive, tmp_path, monkeypatch, capsys, fault):
    """The robot stands first, then the rows are written; where that fails, elsewhere."""
    given, elsewhere, stood, write = (
        tmp_path / "out.npz",
        tmp_path / "elsewhere",
        [],
        deploy.save_dataset,
    )

    def save(path, data):
        stood.append(robot.motors == (0, 0) and robot.commands[-1][1:3] == (0, 0))
        for number in deploy.STOPPING:  # an impatient Ctrl-C must not cost the recording
            stood.append(signal.getsignal(number) == signal.SIG_IGN)
        if fault == "a full disk" and path == given:
            raise UserError(f"can't write {path}: No space left on device")
        write(path, data)

    def bug():
        raise RuntimeError("surprise")

    monkeypatch.setattr(deploy, "save_dataset", save)
    monkeypatch.setattr(deploy.tempfile, "tempdir", str(elsewhere))
    robot.when(
        10, (lambda: robot.disconnect([0])) if fault == "a broken connection" else lambda: None
    )
    error = drive(
        Script(n=14, surprise=bug) if fault == "a bug" else Script(),
        record=str(given),
        max_seconds=2.0,
    )
    assert {
        "a bug": isinstance(error, RuntimeError),
        "a broken connection": "connection" in str(error),
        "a full disk": error is None,
    }[fault]
    assert stood and all(stood)
    files = list(elsewhere.glob("*.npz")) if fault == "a full disk" else [given]
    data = load_dataset(files[0], SIZES)
    # The row of the last step that was not finished is missing, no other one.
    assert (
        len(files) == 1
        and len(data["action"]) == (10 if fault == "a bug" else len(robot.moving()))
        and np.allclose(data["action"], (0.8, 0.1))
    )
    out = capsys.readouterr().out
    assert f"wrote {files[0]}" in out and ("No space left" in out) == (fault == "a full disk")


def test_sequences_are_split_where_the_timing_broke():
    times = np.array([0.0, 0.1, 0.2, 0.35, 0.45, 0.52, 0.62, 0.72, 0.82])
    lag = np.full(9, 0.01)
    lag[7] = 0.03
    first = np.zeros(9, bool)
    first[2] = True  # an episode of the simulator
    rows = [
        {"time_action": t, "time_image": t - d, "is_first": f}
        for t, d, f in zip(times, lag, first, strict=True)
    ]
    data = deploy.dataset_of(rows)
    #                                             0.15 s       0.07 s    late, and after it
    assert data["is_first"].tolist() == [True, False, True, True, False, True, False, True, True]
    assert data["is_last"].tolist() == [False, True, True, False, True, False, True, True, True]


def test_recording_stays_whole_when_pictures_come_late(drive, tmp_path, capsys):
    """Delays with median 7, 90th percentile 12 and 99th 43 ms, as were measured through a proxy"""
    rng = np.random.default_rng(0)
    normal = np.sort(rng.normal(size=1 << 16))
    scores = np.interp([0.5, 0.9, 0.99], np.linspace(0, 1, len(normal)), normal)
    points = np.log([4, 7, 12, 43, 70])
    delays = np.exp(np.interp(rng.normal(size=4096), [-2.5, *scores, 2.8], points)) / 1e3
    assert np.quantile(delays, (0.5, 0.9, 0.99)) * 1e3 == pytest.approx([7, 12, 43], rel=0.15)
    with FakeRobot(delay=lambda k: delays[k % len(delays)]) as robot:
        assert (
            drive(Script(), port=robot.port, max_seconds=40.0, record=str(tmp_path / "out.npz"))
            is None
        )
    with np.load(tmp_path / "out.npz") as npz:
        lengths = np.diff(np.append(npz["is_first"].nonzero()[0], len(npz["is_first"])))
        step, lag = np.diff(npz["time_action"]), npz["time_action"] - npz["time_image"]
    share = lengths[lengths >= 32].sum() / lengths.sum()
    assert 385 <= lengths.sum() <= 410 and share >= 0.8, (share, lengths)
    assert np.mean(lag > 0.022) < 0.03 and np.mean((step < 0.08) | (step > 0.12)) < 0.05
    out = capsys.readouterr().out
    assert (
        f"{lengths.sum()} rows in {len(lengths)} sequences, the longest {lengths.max()}" in out
        and f"{share:.0%} of the rows are usable" in out
    )


def test_a_drive_that_stopped_goes_on_in_the_same_recording(robot, tmp_path):
    """At a terminal: armed, a short gap of pictures, y, armed again; the time limit counts both."""
    driver, terminal, said = start_at_terminal(
        robot, tmp_path, "--record", str(tmp_path / "out.npz"), "--max-seconds", "4"
    )
    robot.when(15, "late frames")
    os.write(terminal, b"arm\n")
    wait_for(lambda: b"Drive on" in said(), 60)
    assert robot.motors == (0, 0) and robot.flag and b"no camera frame" in said()
    n = len(load_dataset(tmp_path / "out.npz", SIZES)["action"])  # kept before anything is asked
    time.sleep(0.5)
    robot.fault.clear()
    os.write(terminal, b"y\n")
    wait_for(lambda: said().count(b"Type arm") == 2, 20)
    time.sleep(0.5)
    os.write(terminal, b"arm\n")
    assert driver.wait(20) == 0
    data = load_dataset(tmp_path / "out.npz", SIZES)
    assert (
        10 <= n <= 18
        and 36 <= len(data["action"]) <= 42
        and data["is_first"][n]
        and robot.motors == (0, 0)
    )
    os.close(terminal)


def test_a_key_stops_and_enter_ends(robot, tmp_path):
    driver, terminal, said = start_at_terminal(robot, tmp_path)
    robot.when(10, lambda: os.write(terminal, b" "))
    os.write(terminal, b"arm\n")
    wait_for(lambda: b"Drive on" in said(), 60)
    check_stopped(robot)
    os.write(terminal, b"\n")
    assert driver.wait(10) == 1 and b"error: stopped: a key was pressed" in said()
    os.close(terminal)


def start_at_terminal(robot, tmp_path, *flags):
    """-> the driver's process, its terminal, and function () -> all that it said there so far"""
    terminal, end = pty.openpty()
    driver = start_driver(robot, tmp_path, *flags, terminal=end)
    os.close(end)
    text = []

    def listen():
        try:
            while True:
                text.append(os.read(terminal, 4096))
        except OSError:  # closed
            pass

    threading.Thread(target=listen, daemon=True).start()
    wait_for(lambda: b"Type arm" in b"".join(text), 60)
    return driver, terminal, lambda: b"".join(text)


def test_random_driving_goes_forwards_and_is_correlated():
    drive = deploy.make_driver(deploy.Args(drive="random", hold=5.0), None, None)
    actions = np.array([drive(None) for _ in range(3000)])
    assert (
        (actions[:, 0] >= 0).all()
        and actions[:, 0].mean() == pytest.approx(0.5, abs=0.05)
        and abs(actions[:, 1].mean()) < 0.05
    )
    assert np.abs(actions[:, 1]).max() > 0.45 and (actions[1:] == actions[:-1]).all(
        1
    ).mean() == pytest.approx(0.8, abs=0.03)


# ---- Geometry ----


def test_kinematics_with_a_calibration():
    calibration = {
        "gain": 1.2,
        "trim": 0.1,
        "baseline": 0.1,
        "radius": 0.03,
        "k": 25.0,
        "limit": 0.5,
    }
    assert deploy.wheel_duties(0.15, 1.0, calibration) == pytest.approx(
        [1.1 * 0.1 / 0.75, 1.3 * 0.2 / 0.75]
    )
    assert deploy.wheel_duties(9.0, 0.0, calibration).tolist() == [0.5, 0.5]


def test_undistortion_makes_a_pinhole_camera():
    # A ray 30 degrees to the right: the fisheye has it at f angle, the pinhole at f tan(angle).
    angle = np.deg2rad(30)
    picture = np.zeros((480, 640), np.uint8)
    cv2.circle(picture, (round(320 + 307.976 * angle), 240), 4, 255, -1)
    picture = cv2.resize(picture, (320, 240), interpolation=cv2.INTER_AREA)
    y, x = np.nonzero(cv2.remap(picture, *deploy.undistortion(None), cv2.INTER_LINEAR) > 128)
    assert (x.mean(), y.mean()) == pytest.approx((160 + 307.976 * np.tan(angle) / 2, 120), abs=0.5)


def test_picture_has_its_colours_and_sides():
    image = np.zeros((480, 640, 3), np.uint8)  # red, green, blue
    image[:, :320, 0], image[:, 320:, 2], image[240:, :, 1] = (
        200,
        200,
        100,
    )  # red on the left, blue on the right, greener below
    data = base64.b64encode(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()).decode()
    seen = deploy.picture(data, deploy.undistortion(None), 16)
    quarters = seen[[2, 2, 13, 13], [2, 13, 2, 13]]  # two above, two below
    assert np.allclose(
        quarters, [(200, 0, 0), (0, 0, 200), (200, 100, 0), (0, 100, 200)], atol=12
    ), quarters


def test_picture_at_half_the_size_is_that_at_the_whole():
    K = np.array([[307.976, 0, 320], [0, 307.889, 240], [0, 0, 1]])
    maps = cv2.fisheye.initUndistortRectifyMap(
        K, np.zeros(4), np.eye(3), K, (640, 480), cv2.CV_32FC1
    )
    whole = cv2.remap(
        cv2.imdecode(np.frombuffer(base64.b64decode(JPEGS[0]), np.uint8), cv2.IMREAD_COLOR),
        *maps,
        cv2.INTER_LINEAR,
    )
    whole = cv2.resize(whole, (64, 64), interpolation=cv2.INTER_AREA)[..., ::-1].astype(int)
    seen = deploy.picture(JPEGS[0], deploy.undistortion(None), 64)
    assert (
        np.abs(seen - whole).mean() < 1 < np.abs(seen - np.roll(whole, 1, 1)).mean()
    )  # levels of 255; and by a pixel beside it


def test_camera_calibration_file(tmp_path):
    text = """image_width: 640\nimage_height: 480\ncamera_name: duckie\ndistortion_model: {}
camera_matrix: {{rows: 3, cols: 3, data: [307.976, 0, 320, 0, 307.889, 240, 0, 0, 1]}}
distortion_coefficients: {{rows: 1, cols: 5, data: {}}}\n"""
    (tmp_path / "straight.yaml").write_text(text.format("plumb_bob", "[0, 0, 0, 0, 0]"))
    (tmp_path / "barrel.yaml").write_text(text.format("plumb_bob", "[-0.2, 0, 0, 0, 0]"))
    (tmp_path / "fisheye.yaml").write_text(text.format("equidistant", "[0, 0, 0, 0]"))
    straight, barrel, fisheye = (
        deploy.undistortion(tmp_path / f"{n}.yaml")[0] for n in ("straight", "barrel", "fisheye")
    )
    x, y = np.meshgrid(np.arange(320), np.arange(240))
    assert np.abs(straight - np.stack([x, y], -1)).max() <= 1
    assert barrel[120, 300, 0] == pytest.approx(160 + 140 * (1 - 0.2 * (280 / 307.976) ** 2), abs=1)
    assert np.array_equal(fisheye, deploy.undistortion(None)[0])


# ---- Export ----


def test_export_acts_as_the_policy_does(tmp_path):
    policy = Policy(SIZES).requires_grad_(False)
    save_checkpoint(
        tmp_path / "policy.pt",
        stage="train_policy",
        args={},
        sizes=vars(SIZES),
        policy=policy.state_dict(),
    )
    deploy.main(
        deploy.Args(checkpoint=str(tmp_path / "policy.pt"), export=str(tmp_path / "board.pt"))
    )
    board = torch.jit.load(tmp_path / "board.pt")
    image, vector = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8), torch.randn(5, 2)
    torch.manual_seed(1)
    actions = board(image, vector).numpy()
    torch.manual_seed(1)
    assert (
        np.allclose(actions, policy(image.numpy(), vector.numpy()), atol=1e-5)
        and actions.std() > 0.1
    )


@pytest.mark.parametrize("flag", ["record", "export"])
def test_nothing_is_overwritten(tmp_path, flag):
    """Said before the drive: the robot's address, which nothing answers at, is never tried"""
    (tmp_path / "taken.npz").write_text("mine")
    save_checkpoint(
        tmp_path / "policy.pt",
        stage="train_policy",
        args={},
        sizes=vars(SIZES),
        policy=Policy(SIZES).state_dict(),
    )
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / "taken.npz", "exists already"),
        (tmp_path / "file" / "out", "can't write"),
    ):
        with user_error(words):
            deploy.main(
                deploy.Args(
                    robot="127.0.0.1",
                    port=1,
                    checkpoint=str(tmp_path / "policy.pt"),
                    **{flag: str(path)},
                )
            )
    assert (tmp_path / "taken.npz").read_text() == "mine"


def test_export_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda path: lambda image, vector: torch.full((1, 2), 2))
    with user_error("differs"):
        deploy.export(Policy(SIZES).requires_grad_(False), tmp_path / "board.pt")
    assert not (tmp_path / "board.pt").exists()
