"""Environments that a stage must refuse or survive, each wrong in one way: "bad_env:NAME-v0". The
rest of each is toy_env's."""

import gymnasium as gym
import numpy as np
from toy_env import IMAGE, VECTOR, Toy, register

Box, Dict = gym.spaces.Box, gym.spaces.Dict


class Bad(Toy):
    """Does or returns something bad at one time.

    Args:
        at: number of the step of a life, counted over its episodes, after which it is bad.
        change: function (obs, reward) -> (obs, reward).
    """

    def __init__(self, at, change):
        super().__init__()
        self.at = at
        self.change = change
        self.steps = 0

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.steps += 1
        if self.steps == self.at:
            obs, reward = self.change(obs, reward)
        return obs, reward, *rest


class Unmade(Toy):
    def __init__(self):
        raise OSError("the licence server\ndoes not answer")


class Quits(Toy):
    def __init__(self):
        raise KeyError("no such robot")


class Once(Toy):
    """Holds a port, or a robot: a second one can't be made before the first is closed."""

    held = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if Once.held:
            raise OSError("address already in use")
        Once.held = True
        self.mine = True

    def close(self):
        if getattr(self, "mine", False):
            Once.held = self.mine = False


class Infos(Toy):
    """Infos whose arrays change their length, and whose values change their type"""

    def info(self):
        n = int(self.np_random.integers(0, 4))
        return {"contacts": np.zeros(n, np.float32), "success": None if n else 1.5, "at": "start"}

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs, self.info()

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, self.info()


class Careless(Toy):
    """Breaks its own spaces, or gymnasium's five values: change(values of step) -> values."""

    def __init__(self, change, reset=None):
        super().__init__()
        self.change = change
        self.change_reset = reset or (lambda obs: obs)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return self.change_reset(obs), info

    def step(self, action):
        return self.change(super().step(action))


def add(name, make=Toy, limit=10, **kwargs):
    register(name, limit, make, **kwargs)


nan = np.float32(np.nan)


def with_image(obs, image):
    return {"image": image, "vector": obs["vector"]}


def float_image(obs):
    return with_image(obs, (obs["image"] / 255).astype(np.float32))


# what happens, and when
add("LateNaN", Bad, at=7, change=lambda obs, r: (obs | {"vector": obs["vector"] * nan}, r))
add("LateRewardNaN", Bad, at=7, change=lambda obs, r: (obs, float("nan")))
add("LateRewardInf", Bad, at=7, change=lambda obs, r: (obs, -np.inf))
add("Unmade", Unmade)
add("Quits", Quits)
add("Endless", Toy, limit=None)
add("EndlessGoal", Toy, limit=None, goal=50)
add("Once", Once)
add("Infos", Infos)
# its own spaces, broken
add("FloatImage", Careless, change=lambda v: v, reset=float_image)
add("LaterFloatImage", Careless, change=lambda v: (float_image(v[0]), *v[1:]))
add("FewerColumns", Careless, change=lambda v: (with_image(v[0], v[0]["image"][:, :8]), *v[1:]))
add("FourValues", Careless, change=lambda v: (*v[:2], v[2] or v[3], v[4]))
add("RewardArray", Careless, change=lambda v: (v[0], np.array([v[1]], np.float32), *v[2:]))
add(
    "Vector64",
    Careless,
    change=lambda v: v,
    reset=lambda obs: obs | {"vector": obs["vector"].astype(np.float64)},
)
# spaces
add("NoDict", observation_space=IMAGE)
add("Tuple", observation_space=gym.spaces.Tuple((IMAGE, VECTOR)))
add("Nested", observation_space=Dict(image=Dict(left=IMAGE), vector=VECTOR))
add("More", observation_space=Dict(image=IMAGE, vector=VECTOR, depth=IMAGE))
add("NoImage", observation_space=Dict(vector=VECTOR))
add("DiscreteVector", observation_space=Dict(image=IMAGE, vector=gym.spaces.Discrete(3)))
add("TinyImage", observation_space=Dict(image=Box(0, 255, (8, 8, 3), np.uint8), vector=VECTOR))
add("WideImage", observation_space=Dict(image=Box(0, 255, (16, 32, 3), np.uint8), vector=VECTOR))
add("FlatImage", observation_space=Dict(image=Box(0, 255, (16, 16), np.uint8), vector=VECTOR))
add("NoAction", action_space=Box(-1, 1, (0,), np.float32))
add("WholeActions", action_space=Box(-1, 1, (1,), np.int8))
add("TableOfActions", action_space=Box(-1, 1, (2, 2), np.float32))
add("MultiDiscrete", action_space=gym.spaces.MultiDiscrete([3, 3]))
add("TwoActions", action_space=Box(-1, 1, (2,), np.float32))
