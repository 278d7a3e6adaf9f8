"""An environment that renders in no time, and how a user brings one of their own: by the id "toy_env:Toy-v0".

A point on a line moves by 0.2 * action. The image shows it as a white column, vector = (last displacement,
position), the reward is the new position, and an episode ends at position 1 or after 10 steps. So every row of
recorded data can be checked: vector[t+1, 0] == 0.2 * action[t] and reward[t] == vector[t, 1].
"""

import time

import gymnasium as gym
import numpy as np

IMAGE = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
VECTOR = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Toy(gym.Env):
    def __init__(self, sign=1.0, seconds=0.0, **spaces):
        self.sign, self.seconds = sign, seconds
        self.observation_space = spaces.get("observation_space", gym.spaces.Dict(image=IMAGE, vector=VECTOR))
        self.action_space = spaces.get("action_space", gym.spaces.Box(-1.0, 1.0, (1,), np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-0.5, 0.5)
        return self.observe(0.0), {}

    def step(self, action):
        time.sleep(self.seconds)
        move = 0.2 * self.sign * float(action[0])
        self.position += move
        return self.observe(move), self.position, self.position >= 1.0, False, {}

    def observe(self, move):
        image = np.zeros((16, 16, 3), np.uint8)
        image[:, int(np.clip(8 + 4 * self.position, 0, 15))] = 255
        return {"image": image, "vector": np.array([move, self.position], np.float32)}


def register(name, **kwargs):
    gym.register(f"{name}-v0", Toy, kwargs=kwargs, max_episode_steps=10, disable_env_checker=True)


register("Toy")
register("ToyReversed", sign=-1.0)
register("ToySlow", seconds=0.1)
# Spaces that DRAW can't use
register("ToyDiscrete", action_space=gym.spaces.Discrete(3))
register("ToyWideActions", action_space=gym.spaces.Box(-2.0, 2.0, (1,), np.float32))
register("ToyNoVector", observation_space=gym.spaces.Dict(image=IMAGE))
register("ToyFloatImage", observation_space=gym.spaces.Dict(image=gym.spaces.Box(0, 1, (16, 16, 3), np.float32), vector=VECTOR))
register("ToyOddImage", observation_space=gym.spaces.Dict(image=gym.spaces.Box(0, 255, (24, 24, 3), np.uint8), vector=VECTOR))
register("ToyDoubleVector", observation_space=gym.spaces.Dict(image=IMAGE, vector=gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)))
