"""Makes the repository importable, lets MuJoCo render without a screen, and seeds every test."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.platform.startswith("linux"):
    os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np  # noqa: E402  (after the environment variable)
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # networks this small only lose time on more


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)
    torch.manual_seed(0)
