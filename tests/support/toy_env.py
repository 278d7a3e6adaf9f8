"""An environment that renders in no time, and how a user brings one of their own: by the id
"toy_env:Toy-v0".

A point on a line moves by 0.2 * action. The image shows it as a white column, vector = (last
displacement, position), the reward is the new position, and an episode ends at position 1 or after
10 steps. So every row of recorded data can be checked: vector[t+1, 0] == 0.2 * action[t] and
reward[t] == vector[t, 1].
"""

import time

import gymnasium as gym
import numpy as np

Box = gym.spaces.Box
IMAGE = Box(0, 255, (16, 16, 3), np.uint8)
VECTOR = Box(-np.inf, np.inf, (2,), np.float32)


class Toy(gym.Env):
    """Args:
    sign: of the displacement; seconds: that a step takes; channels: of the image; vector: whether
        there is one; goal: instead of the position 1 is paid from this step of an episode on.
    """

    def __init__(self, sign=1.0, seconds=0.0, channels=3, vector=True, goal=None, **spaces):
        self.sign = sign
        self.seconds = seconds
        self.vector = vector
        self.goal = goal
        self.image_shape = (16, 16, channels)
        seen = {"image": Box(0, 255, self.image_shape, np.uint8)}
        if vector:
            seen["vector"] = VECTOR
        self.observation_space = spaces.get("observation_space", gym.spaces.Dict(seen))
        self.action_space = spaces.get("action_space", Box(-1.0, 1.0, (1,), np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-0.5, 0.5)
        self.t = 0
        return self.observe(0.0), {}

    def step(self, action):
        time.sleep(self.seconds)
        self.t += 1
        move = 0.2 * self.sign * float(action[0])
        self.position += move
        if self.goal is not None:
            return self.observe(move), float(self.t >= self.goal), False, False, {}
        return self.observe(move), self.position, self.position >= 1.0, False, {}

    def observe(self, move):
        image = np.zeros(self.image_shape, np.uint8)
        image[:, int(np.clip(8 + 4 * self.position, 0, 15))] = 255
        obs = {"image": image}
        if self.vector:
            obs["vector"] = np.array([move, self.position], np.float32)
        return obs


def register(name, limit=10, make=Toy, **kwargs):
    more = {"max_episode_steps": limit, "disable_env_checker": True}
    gym.register(f"{name}-v0", make, kwargs=kwargs, **more)


register("Toy")
register("ToyReversed", sign=-1.0)
register("ToySlow", seconds=0.1)
register("ToyGoal", limit=60, goal=50)
for name, kwargs in {
    "Grey": {"channels": 1},
    "Stack": {"channels": 9},
    "Images": {"vector": False},
    "GreyImages": {"channels": 1, "vector": False},
}.items():
    register(f"Toy{name}", **kwargs)
    register(f"Toy{name}Reversed", sign=-1.0, **kwargs)
# Spaces that DRAW can't use
register("ToyDiscrete", action_space=gym.spaces.Discrete(3))
register("ToyWideActions", action_space=Box(-2.0, 2.0, (1,), np.float32))
FLOATS = Box(0, 1, (16, 16, 3), np.float32)
register("ToyFloatImage", observation_space=gym.spaces.Dict(image=FLOATS, vector=VECTOR))
ODD = Box(0, 255, (24, 24, 3), np.uint8)
register("ToyOddImage", observation_space=gym.spaces.Dict(image=ODD, vector=VECTOR))
DOUBLES = Box(-np.inf, np.inf, (2,), np.float64)
register("ToyDoubleVector", observation_space=gym.spaces.Dict(image=IMAGE, vector=DOUBLES))
