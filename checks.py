"""What can be wrong with what a user hands over: flags, and environments of their own. Each mistake is a UserError, one line.

Datasets and checkpoints are checked where they are read, in common.py.
"""

import gymnasium as gym
import numpy as np


class UserError(SystemExit):
    """A mistake that the user can mend, e.g. a missing file or an impossible flag.

    As a SystemExit with a text it ends a script with that one line on stderr and exit status 1
    instead of a traceback; code that imports this module can still catch it.
    """

    def __init__(self, message):
        super().__init__("error: " + " ".join(str(message).splitlines()))


def check_positive(args, *names):
    """Raises UserError for a flag that must be above zero, and finite, and is not."""
    for name in names:
        if (value := getattr(args, name)) is not None and not 0 < value < np.inf:
            raise UserError(f"--{name.replace('_', '-')} must be a number above 0, it is {value}")


def check_range(args, low, high, *names):
    """Raises UserError for a flag that is not from low to high, or is NaN."""
    for name in names:
        if not low <= (value := getattr(args, name)) <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, it is {value}")


class Envs(gym.vector.SyncVectorEnv):
    """Copies of one environment, stepped together. UserError if its code fails, or returns NaN or infinity.

    Args:
        env_id: its name, for the messages.
        make: function () -> gymnasium.Env
        n: number of copies.
    """

    def __init__(self, env_id, make, n):
        self.env_id = env_id
        super().__init__([make] * n)

    def reset(self, **kwargs):
        return self.checked(super().reset, **kwargs)

    def step(self, actions):
        return self.checked(super().step, actions)

    def checked(self, call, *args, **kwargs):
        name = f"{self.env_id}: its {call.__name__}"
        try:
            with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
                obs, *rest = call(*args, **kwargs)  # the rest of a reset is info, that of a step begins with the rewards
        except Exception as e:  # someone else's code can raise anything
            raise UserError(f"{name} fails ({type(e).__name__}: {e})") from e
        if not np.isfinite(obs["vector"]).all():
            raise UserError(f"{name} returns NaN or infinity in the vector")
        if len(rest) > 1 and not np.isfinite(rest[0]).all():
            raise UserError(f"{name} returns a reward that is NaN or infinite")
        return obs, *rest


def check_spaces(env_id, envs):
    """Raises UserError if DRAW can't use an environment's observations and actions."""
    obs, act = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs, gym.spaces.Dict) or set(obs.spaces) != {"image", "vector"}:
        raise UserError(f"{env_id}: the observation space must be Dict(image=..., vector=...), it is {obs}")
    L, V, A = ((space.shape or (0,))[0] for space in (obs["image"], obs["vector"], act))
    if obs["image"].dtype != np.uint8 or obs["image"].shape != (L, L, 3) or L < 16 or L & (L - 1):
        raise UserError(f"{env_id}: image must be uint8 (L, L, 3) with L = 16, 32, 64, ..., it is {obs['image']}")
    if obs["vector"].dtype != np.float32 or obs["vector"].shape != (V,) or V == 0:
        raise UserError(f"{env_id}: vector must be float32 (V,), V at least 1, it is {obs['vector']}")
    if not isinstance(act, gym.spaces.Box) or act.dtype.kind != "f" or act.shape != (A,) or A == 0 or (act.low != -1).any() or (act.high != 1).any():
        raise UserError(f"{env_id}: the action space must be Box(-1, 1, (A,)), it is {act}; gymnasium.wrappers.RescaleAction can make it so")


def check_sizes(env_id, envs, sizes):
    """Raises UserError if an environment's observations and actions are not those of a checkpoint."""
    spaces = envs.single_observation_space
    has = (spaces["image"].shape[0], spaces["vector"].shape[0], envs.single_action_space.shape[0])
    wants = (sizes.image_size, sizes.vector_size, sizes.action_size)
    if has != wants:
        raise UserError(f"{env_id} has (image, vector, action) sizes {has}, the checkpoint was trained with {wants}")
