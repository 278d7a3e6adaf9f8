"""A Duckiebot behind the rosbridge protocol, on loopback: it serves pictures and encoder ticks, obeys and notes commands, and can be broken.

As on the real robot, the motors hold their last duties until the next command, and the emergency stop is only a flag that
makes the commands AFTER it zero. It uses another websocket library than the code under test.
"""

import asyncio
import base64
import json
import threading
import time

import cv2
import numpy as np
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

NAME = "duckie"
WHEELS, EXECUTED, ESTOP = (f"/{NAME}/wheels_driver_node/{t}" for t in ("wheels_cmd", "wheels_cmd_executed", "emergency_stop"))
CAMERA, KINEMATICS = f"/{NAME}/camera_node/image/compressed", f"/{NAME}/kinematics_node/velocity"
ENCODERS = {side: f"/{NAME}/{side}_wheel_encoder_node/tick" for side in ("left", "right")}
TYPES = {
    CAMERA: "sensor_msgs/CompressedImage", WHEELS: "duckietown_msgs/WheelsCmdStamped", EXECUTED: "duckietown_msgs/WheelsCmdStamped",
    ESTOP: "duckietown_msgs/BoolStamped", KINEMATICS: "duckietown_msgs/Twist2DStamped",
    **{topic: "duckietown_msgs/WheelEncoderStamped" for topic in ENCODERS.values()},
}  # fmt: skip
CLOCK = -5e8  # s, the robot's clock is not ours


def jpegs(width, height, n=8):
    """n noisy pictures, base64"""
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    noisy = [np.clip(scene + rng.normal(0, 3, scene.shape), 0, 255).astype(np.uint8) for _ in range(n)]
    return [base64.b64encode(cv2.imencode(".jpg", image)[1].tobytes()).decode() for image in noisy]


JPEGS, SMALL = jpegs(640, 480), jpegs(320, 240)


class FakeRobot:
    """with FakeRobot() as robot: robot.port. All times are time.monotonic(). pictures: JPEGs of 640x480 in base64, shown again and again.

    fault: set of "no frames", "frozen frames", "late frames", "old frames", "corrupt frames", "small frames", "garbage", "no acknowledgements",
    "no ticks", "refuse". `when(n, action)` calls action once, after the n-th command that moves; its time is `fault_time`.
    """

    def __init__(self, pictures=JPEGS):
        self.pictures = pictures
        self.commands, self.stops, self.advertised, self.errors = [], [], {}, []  # (time, left, right, client), (time, data, client)
        self.fault, self.fault_time, self.plan = set(), None, None
        self.motors, self.flag, self.turned, self.clients = (0.0, 0.0), False, {"left": 0.0, "right": 0.0}, {}
        self.number = 0

    def __enter__(self):
        self.started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.main()), daemon=True)
        self.thread.start()
        assert self.started.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.end.set)
        self.thread.join(10)
        assert not self.errors, self.errors

    def moving(self):
        return [c for c in self.commands if c[1] or c[2]]

    def when(self, n, action):
        """action: a function, or the name of a fault"""
        self.plan = (n, action if callable(action) else lambda: self.fault.add(action))

    def disconnect(self, which=None):
        """Cuts connections without a goodbye: all, or those (by number, in the order in which they came)"""

        def cut():
            for client, (number, _) in list(self.clients.items()):
                if which is None or number in which:
                    client.transport.abort()

        self.loop.call_soon_threadsafe(cut)

    async def main(self):
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        async with serve(self.talk, "127.0.0.1", 0, process_request=self.refuse) as server:
            self.port = server.sockets[0].getsockname()[1]
            feed = asyncio.create_task(self.feed())
            self.started.set()
            await self.end.wait()
            feed.cancel()
            for client in self.clients:  # a goodbye would wait for clients that are gone
                client.transport.abort()

    async def refuse(self, connection, request):
        return connection.respond(503, "no") if "refuse" in self.fault else None

    async def talk(self, client):
        number, self.number = self.number, self.number + 1
        self.clients[client] = (number, set())
        try:
            async for text in client:
                await self.handle(client, number, json.loads(text))
        except ConnectionClosed:
            pass
        except Exception as e:  # the code under test broke the protocol
            self.errors.append(repr(e))
        finally:
            del self.clients[client]

    async def handle(self, client, number, m):
        topic = m.get("topic")
        if m["op"] in ("subscribe", "advertise") and topic in TYPES:
            assert m["type"] == TYPES[topic], m
        if m["op"] == "subscribe":
            self.clients[client][1].add(topic)
        elif m["op"] == "advertise":
            self.advertised[topic] = number
        elif m["op"] == "publish" and topic == ESTOP:
            self.flag = bool(m["msg"]["data"])
            self.stops.append((time.monotonic(), self.flag, number))
        elif m["op"] == "publish" and topic == WHEELS:
            now, left, right = time.monotonic(), m["msg"]["vel_left"], m["msg"]["vel_right"]
            self.commands.append((now, left, right, number))
            self.motors = (0.0, 0.0) if self.flag else (left, right)
            if self.plan and len(self.moving()) >= self.plan[0]:
                (_, action), self.plan, self.fault_time = self.plan, None, now
                action()
            if "no acknowledgements" not in self.fault:
                executed = {"header": self.header(), "vel_left": self.motors[0], "vel_right": self.motors[1]}
                await self.publish(EXECUTED, executed)
                speeds = [duty * 0.0318 * 27 for duty in self.motors]  # m/s
                twist = {"v": sum(speeds) / 2, "omega": (speeds[1] - speeds[0]) / 0.1}
                await self.publish(KINEMATICS, {"header": self.header(), **twist})

    def header(self, age=0.0):
        t = time.monotonic() - age + CLOCK + 1e9
        return {"seq": 0, "stamp": {"secs": int(t), "nsecs": int(t % 1 * 1e9)}, "frame_id": ""}

    async def publish(self, topic, message):
        await self.send(json.dumps({"op": "publish", "topic": topic, "msg": message}), topic)

    async def send(self, text, topic):
        for client, (_, topics) in list(self.clients.items()):
            if topic in topics:
                try:
                    await client.send(text)
                except ConnectionClosed:
                    pass

    async def feed(self):
        """30 times a second a picture and the ticks of both wheels"""
        begun, k, last = time.monotonic(), 0, 0
        while True:
            k += 1
            await asyncio.sleep(max(0.0, begun + k / 30 - time.monotonic()))
            if "late frames" in self.fault and time.monotonic() < self.fault_time + 1:
                pass
            elif "garbage" in self.fault:
                for text in ("", "]{", "[]", "null", '"op"', '{"op": 1}', '{"op": "publish"}', json.dumps({"op": "publish", "topic": CAMERA, "msg": {}})):
                    await self.send(text, CAMERA)
                await self.publish(CAMERA, {"header": None, "data": 7})
            elif "no frames" not in self.fault:
                last = last if "frozen frames" in self.fault else (last + 1) % len(self.pictures)
                data = SMALL[last % len(SMALL)] if "small frames" in self.fault else self.pictures[last]
                data = f"{k:04d}" + data[4:200] if "corrupt frames" in self.fault else data
                await self.publish(CAMERA, {"header": self.header(0.5 if "old frames" in self.fault else 0.0), "format": "jpeg", "data": data})
            for side, duty in zip(ENCODERS, self.motors):
                self.turned[side] += duty * 27 / 30  # rad
                if "no ticks" not in self.fault:
                    ticks = int(self.turned[side] / (2 * np.pi) * 135)
                    await self.publish(ENCODERS[side], {"header": self.header(), "data": ticks, "resolution": 135, "type": 1})
