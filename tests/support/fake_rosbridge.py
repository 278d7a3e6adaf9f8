"""A Duckiebot behind the rosbridge protocol, on loopback: it serves pictures and encoder ticks,
obeys and notes commands, and can be broken. `Air` is the network before it, which can be cut.

As on the real robot: the motors hold their last duties until the next command; the emergency stop
is only a flag that makes the commands AFTER it zero; wheels_cmd_executed has what was executed;
tick messages tell the encoder's resolution. As the real rosbridge: a client whose network is full
blocks the topic for all others, but where it subscribed with a queue; Nagle's algorithm is on; a
topic that was just advertised loses its first messages; rosapi answers questions.
"""

import asyncio
import base64
import contextlib
import json
import select
import socket
import struct
import threading
import time

import cv2
import numpy as np
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

NAME = "duckie"
WHEELS, EXECUTED, ESTOP = (
    f"/{NAME}/wheels_driver_node/{t}"
    for t in ("wheels_cmd", "wheels_cmd_executed", "emergency_stop")
)
CAMERA = f"/{NAME}/camera_node/image/compressed"
GUARD = f"/{NAME}/redraw_guard"
SIDES = ("left", "right")
CLOCK = -5e8  # s, the robot's clock is not ours


def jpegs(width, height, n=8):
    """n noisy pictures, base64"""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (12, 16, 3), np.uint8)
    scene = cv2.resize(scene, (width, height), interpolation=cv2.INTER_CUBIC)
    noisy = [scene + rng.normal(0, 3, scene.shape) for _ in range(n)]
    noisy = [np.clip(image, 0, 255).astype(np.uint8) for image in noisy]
    return [base64.b64encode(cv2.imencode(".jpg", im)[1].tobytes()).decode() for im in noisy]


JPEGS, SMALL = jpegs(640, 480), jpegs(320, 240)
GARBAGE = ["", "]{", "[]", "null", '"op"', '{"op": 1}', '{"op": "publish"}']
GARBAGE.append(json.dumps({"op": "publish", "topic": CAMERA, "msg": {}}))


class FakeRobot:
    """with FakeRobot() as robot: robot.port. All times are time.monotonic().

    pictures: JPEGs of 640x480 in base64, shown again and again. ente: the other generation, with
    its own names, dead zone and command timeout. resolution: of the encoders. registration: s for
    which a topic that was just advertised loses its messages. delay: function k -> s that picture k
    is late (they keep their order).

    fault: set of "no frames", "frozen frames", "late frames", "old frames", "corrupt frames",
    "small frames", "garbage", "no acknowledgements", "late acknowledgements", "no ticks",
    "sparse ticks", "stuck left wheel", "no rosapi", "refuse". `when(n, action)` calls action once,
    after the n-th command that moves; its time is `fault_time`.
    """

    def __init__(
        self,
        pictures=JPEGS,
        ente=False,
        resolution=135,
        registration=0.0,
        delay=None,
        host="127.0.0.1",
    ):
        self.pictures, self.ente, self.resolution = pictures, ente, resolution
        self.registration, self.delay, self.host = registration, delay, host
        self.dead_zone = 0.2 if ente else 0.01
        node = "wheel_encoder_driver_node" if ente else "wheel_encoder_node"
        self.encoders = {side: f"/{NAME}/{side}_{node}/tick" for side in SIDES}
        wheels = "duckietown_msgs/WheelsCmdStamped"
        self.types = {
            CAMERA: "sensor_msgs/CompressedImage",
            WHEELS: wheels,
            EXECUTED: wheels,
            ESTOP: "duckietown_msgs/BoolStamped",
            GUARD: "std_msgs/Float32",
            **{topic: "duckietown_msgs/WheelEncoderStamped" for topic in self.encoders.values()},
        }
        self.publishers = ["/rosbridge_websocket", f"/{NAME}/kinematics_node"]
        self.commands, self.stops = [], []  # (time, left, right, client), (time, data, client)
        self.fault, self.fault_time, self.plan = set(), None, None
        self.motors, self.flag, self.guard = (0.0, 0.0), False, False
        self.turned = {"left": 0.0, "right": 0.0}
        self.clients, self.advertised, self.number, self.last = {}, {}, 0, 0.0
        self.errors = []
        self.listener = lambda left, right, number: None  # hears every command

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
        return [c for c in self.commands if abs(c[1]) > 0.01 or abs(c[2]) > 0.01]

    def when(self, n, action):
        """action: a function, or the name of a fault"""
        self.plan = (n, action if callable(action) else lambda: self.fault.add(action))

    def disconnect(self, which=None):
        """Cuts connections without a goodbye: all, or those (by number, in their order)"""

        def cut():
            for client, (number, _) in list(self.clients.items()):
                if which is None or number in which:
                    client.transport.abort()

        self.loop.call_soon_threadsafe(cut)

    def from_elsewhere(self, left, right):
        """Another node commands"""
        asyncio.run_coroutine_threadsafe(self.execute(left, right, "elsewhere"), self.loop)

    def announce_guard(self):
        asyncio.run_coroutine_threadsafe(self.publish(GUARD, {"data": 0.5}), self.loop)

    def press_stop(self, on, told=True):
        """Another node sets or clears the emergency stop; told: on its topic"""
        self.flag = on
        if told:
            message = {"header": self.header(), "data": on}
            asyncio.run_coroutine_threadsafe(self.publish(ESTOP, message), self.loop)

    async def main(self):
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        options = {"process_request": self.refuse, "ping_interval": None, "compression": None}
        async with serve(self.talk, self.host, 0, **options) as server:
            self.port = server.sockets[0].getsockname()[1]
            feeds = [asyncio.create_task(feed) for feed in (self.feed(), self.announce())]
            self.started.set()
            await self.end.wait()
            for feed in feeds:
                feed.cancel()
            for client in self.clients:  # a goodbye would wait for clients that are gone
                client.transport.abort()

    async def refuse(self, connection, request):
        return connection.respond(503, "no") if "refuse" in self.fault else None

    async def talk(self, client):
        number, self.number = self.number, self.number + 1
        sock = client.transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        self.clients[client] = (number, {})
        try:
            async for text in client:
                await self.handle(client, number, json.loads(text))
        except ConnectionClosed:
            pass
        except Exception as e:  # the code under test broke the protocol
            self.errors.append(repr(e))
        finally:
            for task, _ in self.clients.pop(client)[1].values():
                if task:
                    task.cancel()

    async def handle(self, client, number, m):
        topic, now = m.get("topic"), time.monotonic()
        if m["op"] in ("subscribe", "advertise") and topic in self.types:
            assert m["type"] == self.types[topic], m
        if m["op"] == "subscribe":
            queue = asyncio.Queue(m["queue_length"]) if m.get("queue_length") else None
            task = asyncio.create_task(self.hand_on(client, queue)) if queue else None
            self.clients[client][1][topic] = (task, queue)
        elif m["op"] == "advertise":
            self.advertised.setdefault(topic, now)
        elif m["op"] == "call_service":
            await self.answer(client, m)
        elif m["op"] == "publish" and now >= self.advertised[topic] + self.registration:
            if topic == ESTOP:
                self.flag = bool(m["msg"]["data"])
                self.stops.append((now, self.flag, number))
                await self.publish(ESTOP, m["msg"])
            elif topic == WHEELS:
                await self.execute(m["msg"]["vel_left"], m["msg"]["vel_right"], number)

    async def answer(self, client, m):
        topic = m["args"].get("topic")
        values = {
            "/rosapi/topics": {"topics": list(self.types), "types": list(self.types.values())},
            "/rosapi/topic_type": {"type": self.types.get(topic, "")},
            "/rosapi/publishers": {"publishers": self.publishers if topic == WHEELS else []},
        }.get(m["service"])
        if "no rosapi" in self.fault:
            values = None
        answer = {"op": "service_response", "service": m["service"], "id": m["id"]}
        failed = f"service {m['service']} does not exist"
        answer |= {"values": failed if values is None else values, "result": values is not None}
        await client.send(json.dumps(answer))

    async def execute(self, left, right, number):
        now = time.monotonic()
        self.commands.append((now, left, right, number))
        left, right = (0.0, 0.0) if self.flag else (left, right)
        self.motors = tuple(duty if abs(duty) > self.dead_zone else 0.0 for duty in (left, right))
        self.last = now
        self.listener(left, right, number)
        if self.plan and len(self.moving()) >= self.plan[0]:
            (_, action), self.plan, self.fault_time = self.plan, None, now
            action()
        if "late acknowledgements" in self.fault:
            self.loop.call_later(1.0, asyncio.ensure_future, self.acknowledge(left, right, 1.0))
        elif "no acknowledgements" not in self.fault:
            await self.acknowledge(left, right)

    async def acknowledge(self, left, right, age=0.0):
        left, right = float(np.float32(left)), float(np.float32(right))
        message = {"header": self.header(age), "vel_left": left, "vel_right": right}
        await self.publish(EXECUTED, message)

    def header(self, age=0.0):
        t = time.monotonic() - age + CLOCK + 1e9
        return {"seq": 0, "stamp": {"secs": int(t), "nsecs": int(t % 1 * 1e9)}, "frame_id": ""}

    async def publish(self, topic, message):
        await self.send(json.dumps({"op": "publish", "topic": topic, "msg": message}), topic)

    async def send(self, text, topic):
        for client, (_, topics) in list(self.clients.items()):
            if topic in topics:
                _, queue = topics[topic]
                if queue is None:  # and all others wait while its network is full
                    with contextlib.suppress(ConnectionClosed):
                        await client.send(text)
                    continue
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(text)

    async def hand_on(self, client, queue):
        with contextlib.suppress(ConnectionClosed):
            while True:
                await client.send(await queue.get())

    async def announce(self):
        while True:
            await asyncio.sleep(0.2)
            if self.guard:
                await self.publish(GUARD, {"data": 0.5})
            if self.ente and time.monotonic() > self.last + 1:
                self.motors = (0.0, 0.0)

    async def feed(self):
        """30 times a second a picture and the ticks of both wheels"""
        begun, k, last, due = time.monotonic(), 0, 0, 0.0
        while True:
            k += 1
            await asyncio.sleep(max(0.0, begun + k / 30 - time.monotonic()))
            if "garbage" in self.fault:
                for text in GARBAGE:
                    await self.send(text, CAMERA)
                await self.publish(CAMERA, {"header": None, "data": 7})
            elif "no frames" not in self.fault and not self.late():
                last = last if "frozen frames" in self.fault else (last + 1) % len(self.pictures)
                data = self.pictures[last]
                if "small frames" in self.fault:
                    data = SMALL[last % len(SMALL)]
                if "corrupt frames" in self.fault:
                    data = f"{k:04d}" + data[4:200]
                age = 1.0 if "old frames" in self.fault else 0.0
                message = {"header": self.header(age), "format": "jpeg", "data": data}
                due = max(due, self.loop.time() + (self.delay(k) if self.delay else 0.0))
                if self.delay:
                    frame = self.publish(CAMERA, message)
                    self.loop.call_at(due, asyncio.ensure_future, frame)
                else:
                    await self.publish(CAMERA, message)
            await self.tick(k)

    def late(self):
        return "late frames" in self.fault and time.monotonic() < self.fault_time + 1

    async def tick(self, k):
        for side, duty in zip(SIDES, self.motors, strict=True):
            if f"stuck {side} wheel" not in self.fault:
                self.turned[side] += duty * 27 / 30  # rad
            if "no ticks" in self.fault or ("sparse ticks" in self.fault and k % 4):
                continue
            ticks = int(self.turned[side] / (2 * np.pi) * self.resolution)
            message = {"data": ticks, "resolution": self.resolution, "type": 1}
            await self.publish(self.encoders[side], {"header": self.header(), **message})


class Air:
    """A network: with Air(robot.port) as air: air.port. After `cut()` nothing gets through, and no
    connection is reset; `restore()` ends that for new connections. Those from before stay dead, as
    TCP waits the longer the longer an outage was; revive=True: they go on at once."""

    def __init__(self, port):
        self.target, self.up, self.era, self.dead = port, True, 0, set()

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.listener.settimeout(0.05)
        self.port = self.listener.getsockname()[1]
        self.open = True
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.open = False
        self.listener.close()

    def cut(self):
        self.up = False
        self.cut_at = time.monotonic()

    def restore(self, revive=False):
        if not revive:
            self.dead.add(self.era)
        self.era += 1
        self.up = True
        return time.monotonic()

    def accept(self):
        while self.open:
            with contextlib.suppress(OSError):
                if not self.up:
                    time.sleep(0.005)
                    continue
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=(*pair, self.era), daemon=True).start()

    def pump(self, source, sink, era):
        for sock in (source, sink):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError, ValueError):
            while self.open:
                if not self.up or era in self.dead:
                    time.sleep(0.005)
                elif select.select([source], [], [], 0.02)[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        break
                    sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
