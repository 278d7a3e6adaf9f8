"""Environments that a stage must refuse or survive, each wrong in one way: "bad_env:NAME-v0". The rest of each is toy_env's."""

import gymnasium as gym
import numpy as np
from toy_env import IMAGE, VECTOR, Toy

Box, Dict = gym.spaces.Box, gym.spaces.Dict


class Bad(Toy):
    """Does or returns something bad at one time.

    Args:
        at: number of the step of a life, counted over its episodes after which it is bad.
        change: function (obs, reward) -> (obs, reward).
    """

    def __init__(self, at, change):
        super().__init__()
        self.at, self.change, self.steps = at, change, 0

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.steps += 1
        return *(self.change(obs, reward) if self.steps == self.at else (obs, reward)), *rest


class Unmade(Toy):
    def __init__(self):
        raise OSError("the licence server\ndoes not answer")


class Quits(Toy):
    def __init__(self):
        raise KeyError("no such robot")


def register(name, make, limit=10, **kwargs):
    gym.register(f"{name}-v0", make, kwargs=kwargs, max_episode_steps=limit, disable_env_checker=True)


nan = np.float32(np.nan)

# what happens, and when
register("LateNaN", Bad, at=7, change=lambda obs, reward: (obs | {"vector": obs["vector"] * nan}, reward))
register("LateRewardNaN", Bad, at=7, change=lambda obs, reward: (obs, float("nan")))
register("Unmade", Unmade)
register("Quits", Quits)
register("Endless", Toy, limit=None)
# spaces
register("NoDict", Toy, observation_space=IMAGE)
register("Tuple", Toy, observation_space=gym.spaces.Tuple((IMAGE, VECTOR)))
register("Nested", Toy, observation_space=Dict(image=Dict(left=IMAGE), vector=VECTOR))
register("EmptyVector", Toy, observation_space=Dict(image=IMAGE, vector=Box(-1, 1, (0,), np.float32)))
register("DiscreteVector", Toy, observation_space=Dict(image=IMAGE, vector=gym.spaces.Discrete(3)))
register("TinyImage", Toy, observation_space=Dict(image=Box(0, 255, (8, 8, 3), np.uint8), vector=VECTOR))
register("WideImage", Toy, observation_space=Dict(image=Box(0, 255, (16, 32, 3), np.uint8), vector=VECTOR))
register("GrayImage", Toy, observation_space=Dict(image=Box(0, 255, (16, 16), np.uint8), vector=VECTOR))
register("NoAction", Toy, action_space=Box(-1, 1, (0,), np.float32))
register("WholeActions", Toy, action_space=Box(-1, 1, (1,), np.int8))
register("TableOfActions", Toy, action_space=Box(-1, 1, (2, 2), np.float32))
register("MultiDiscrete", Toy, action_space=gym.spaces.MultiDiscrete([3, 3]))
register("TwoActions", Toy, action_space=Box(-1, 1, (2,), np.float32))
