"""The pendulum with the source's dynamics and other looks, for the report's "visual drift". As
target environments:

PYTHONPATH=tests python redraw_adapt.py ... --target-env-id
changed_looks:redraw/PendulumSwingupCamera-v0
"""

import gymnasium as gym

from common import DMCEnv


class ChangedLooks(DMCEnv):
    """Args:
    shift: the camera stands so many metres further to the right.
    tint: factors of red, green and blue, as of another light.
    """

    def __init__(self, shift=0.0, tint=(1.0, 1.0, 1.0), **kwargs):
        super().__init__("pendulum", "swingup", **kwargs)
        self.physics.model.cam_pos[0, 0] += shift
        self.tint = tint

    def render(self):
        return (super().render() * self.tint).astype("uint8")


for name, changes in (("Camera", {"shift": 0.1}), ("Colours", {"tint": (1.0, 0.8, 0.6)})):
    gym.register(
        f"redraw/PendulumSwingup{name}-v0",
        ChangedLooks,
        kwargs=changes,
        max_episode_steps=500,
        disable_env_checker=True,
    )
