"""docs/pretrained/at_scale.py: rows, the loss on latents, and a tiny run from end to end."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import tyro
from helpers import TINY, user_error
from stages import ROOT, TOY

from common import DRAW, Rectified, Sizes, kl_categorical, load_checkpoint, load_dataset, softmax

sys.path.insert(0, str(ROOT / "docs/pretrained"))
import at_scale  # noqa: E402

SEGMENT = at_scale.SEGMENT


def latents(B=3, T=6):
    torch.manual_seed(0)
    sizes = TINY
    draw = DRAW(sizes)
    shape = (B, T, sizes.S, sizes.K)
    log_q = torch.randn(shape).log_softmax(-1)
    z = torch.nn.functional.one_hot(torch.randint(sizes.K, shape[:-1]), sizes.K).float()
    first = torch.zeros(B, T, dtype=torch.bool)
    first[1, 3] = True
    data = {"action": torch.rand(B, T, sizes.action_size) * 2 - 1, "is_first": first}
    return draw, log_q, z, data | {"reward": torch.randn(B, T)}


def kl_by_hand(draw, log_q, z, data, own):
    """One sequence after the other, one step after the other"""
    dynamics = Rectified(draw)
    z0, sigma0 = draw.initial()
    found = []
    for b in range(len(z)):
        known, sigma = None, None
        for t in range(z.shape[1]):
            if t == 0 or data["is_first"][b, t]:
                u = dynamics(z0, sigma0, torch.zeros_like(data["action"][b, t]))
                known = z[b, t]
            else:
                u = dynamics(known, sigma, data["action"][b, t - 1])
                found.append(kl_categorical(log_q[b, t], dynamics.log_prior(u)))
                known = dynamics.prior(softmax(u)) if b < own else z[b, t]
            sigma = softmax(u)
    return torch.stack(found).mean()


@pytest.mark.parametrize("own", [0, 2, 3])
def test_kl_on_samples_and_on_own_predictions(own):
    draw, log_q, z, data = latents()
    _, kl, _ = at_scale.latent_loss(draw, Rectified(draw), log_q, z, data, own)
    torch.testing.assert_close(kl, kl_by_hand(draw, log_q, z, data, own))


def test_rewards_of_first_rows_teach_nothing():
    draw, log_q, z, data = latents()
    data["is_first"][:, 0] = True
    torch.nn.init.normal_(draw.reward_head[-1].weight)
    before = at_scale.latent_loss(draw, Rectified(draw), log_q, z, data, 0)[2]
    data["reward"][:, 0] += 5.0
    data["reward"][1, 3] += 5.0
    assert at_scale.latent_loss(draw, Rectified(draw), log_q, z, data, 0)[2] == before
    data["reward"][0, 1] += 5.0
    assert at_scale.latent_loss(draw, Rectified(draw), log_q, z, data, 0)[2] != before


def written(folder, number, count, first_row, paid=()):
    """A recorded file of two segments, whose vector is the number of the row"""
    t = np.arange(first_row, first_row + 2 * SEGMENT, dtype=np.float32).reshape(2, SEGMENT)
    flags = {name: np.zeros((2, SEGMENT), bool) for name in ("is_first", "is_terminal")}
    rows = {"image": np.zeros((2, SEGMENT, 16, 16, 3), np.uint8), "vector": t[..., None]}
    rows |= {"action": np.zeros((2, SEGMENT, 1), np.float32), **flags}
    rows |= {"reward": np.isin(t, paid).astype(np.float32), "quiet": t >= 0}
    np.savez(folder / f"{number:02d}-{count:06d}.npz", **rows)


def test_rows_lie_together(tmp_path):
    sizes = Sizes(image_size=16, vector_size=1, action_size=1)
    rows = at_scale.Rows(at_scale.Args(rows=4 * SEGMENT), sizes, torch.device("cpu"))
    real = []
    written(tmp_path, 0, 1, 0, paid=(5,))
    written(tmp_path, 1, 2, 1000, paid=(1000 + SEGMENT - 1,))
    assert rows.read(tmp_path, real) == 2 and not list(tmp_path.iterdir())
    assert real == [pytest.approx(1 / (2 * SEGMENT))]  # of the first recorder alone
    batch = rows.sample(400, 7, rewarded=0.5)
    t = batch["vector"][..., 0]
    assert (t.diff(dim=1) == 1).all()  # no border is crossed
    assert (batch["reward"][:200].sum(1) == 1).all()
    assert {5.0, 1000.0 + SEGMENT - 1} <= set(t[batch["reward"] == 1].tolist())
    written(tmp_path, 0, 3, 5000)  # in the place of the oldest two segments
    rows.read(tmp_path, real)
    assert len(rows) == 4 and rows.sample(400, 1)["vector"].min() >= 1000


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--recorders 0", "--recorders"),
        ("--joint 1", "--joint"),
        ("--rows 100", "--rows"),
        ("--rows 8000 --begin 9000", "--begin"),
        ("--length 200", "--length"),
        ("--starts 2000", "--starts"),
        (f"--model {ROOT}/docs/pretrained/pendulum.pt", "image_size"),
        ("--model nowhere.pt", "nowhere.pt"),
    ],
)
def test_bad_flags_end_in_one_line(flags, words, tmp_path):
    given = ["--out", str(tmp_path / "draw.pt"), "--device", "cpu", *flags.split()]
    with user_error(words):
        at_scale.main(tyro.cli(at_scale.Args, args=given))
    assert not list(tmp_path.iterdir())


def test_a_tiny_run_and_one_that_goes_on(tmp_path):
    """In the second part, which alone makes the second run, f and the reward head learn."""
    small = "--recorders 2 --begin 1600 --rows 8000 --batch 4 --length 8 --starts 16 --states 16 "
    small += "--f-batch 8 --policy-start 2 --policy-every 2 --device cpu --kept 300"

    def train(name, flags):
        out = tmp_path / name / "draw.pt"
        script = str(ROOT / "docs/pretrained/at_scale.py")
        command = [sys.executable, script, "--env-id", TOY[0], "--out", out, *flags.split()]
        env = os.environ | {"PYTHONPATH": f"{ROOT}/tests/support", "OMP_NUM_THREADS": "1"}
        command = list(map(str, command))
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return load_checkpoint(out, ("draw_pretrain",))

    one = train("one", f"{small} --minutes 0.15")
    lines = json.loads((tmp_path / "one/log.json").read_text())
    first, second = (next(x for x in lines[::-1] if x["part"] == part) for part in (1, 2))
    assert second["updates"] > first["updates"] > 0
    assert "imagined return" in first and "world_model/kl" in first and "f/kl" in second
    assert "world_model/kl" not in second
    rows = load_dataset(tmp_path / "one/rows.npz", Sizes(**one["sizes"]))
    assert len(rows["is_first"]) == 2 * SEGMENT and rows["is_first"][SEGMENT]
    assert set(one["source_range"]) >= {"kl", "image error"}
    two = train("two", f"{small} --minutes 0.05 --model {tmp_path}/one/draw.pt")
    for name, weight in two["draw"].items():
        learns = name.startswith(("dynamics_net.", "reward_head.", "initial_logits"))
        assert torch.equal(weight, one["draw"][name]) != learns, name
    # In so few updates the actor may learn nothing: where no reward is predicted, no action leads.
    assert any((w != one["task_critic"][k]).any() for k, w in two["task_critic"].items())
    assert all((w == one["explore_actor"][k]).all() for k, w in two["explore_actor"].items())
