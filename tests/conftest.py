"""Makes the repository importable, and lets MuJoCo render without a screen."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.platform.startswith("linux"):
    os.environ.setdefault("MUJOCO_GL", "egl")

import torch  # noqa: E402  (after the environment variable)

torch.set_num_threads(1)  # networks this small only lose time on more
