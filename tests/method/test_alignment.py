"""Which row belongs to which: tests that fail when an index is off by one. The rows come from a
world in which every transition can be checked; the arithmetic of aligned rows is in
test_oracles.py."""

import numpy as np
import pytest
import torch
from exact_world import CELLS, COLUMNS, GOAL, ORDER, PIT, SOURCE, TARGET, next_cell, which_action
from helpers import TINY, borders, random_rows, random_states, read_replay, save_tiny_draw
from torch import nn

import draw_pretrain
import redraw_adapt
import train_policy
from common import DRAW, Rectified, make_envs, save_dataset
from redraw_adapt import encode, residual_loss


def check_rows(rows, env_id):
    """Row t: x_t, the reward and the end on ARRIVING at x_t, the action taken AT x_t"""
    cell = np.rint((rows["vector"][:, 0] + 1) * COLUMNS + rows["vector"][:, 1] + 1.5).astype(int)
    squares = rows["image"][..., 0].reshape(-1, 4, 4, COLUMNS, 4).mean((2, 4))
    assert np.array_equal(cell, squares.reshape(-1, 4 * COLUMNS).argmax(-1))  # the white one
    first, last = rows["is_first"], rows["is_last"]
    moves = 0
    for t in range(1, len(cell)):
        if not first[t]:
            action = which_action(rows["action"][t - 1])
            assert cell[t] == next_cell(cell[t - 1], action, ORDER[env_id])
            moves += 1
        assert not last[t - 1] or first[t]
    assert moves > 0.8 * len(cell)
    assert set(which_action(rows["action"])) == {0, 1, 2, 3} and set(cell) == set(range(CELLS))
    assert np.array_equal(rows["is_terminal"], cell == PIT)
    assert not (rows["is_terminal"] & ~last).any()
    # Episodes that were cut at the time limit do not end for the model.
    assert (last & ~rows["is_terminal"]).any()
    if "reward" in rows:
        assert np.array_equal(rows["reward"], (cell == GOAL) & ~first)


SMALL = {
    "S": 3,
    "K": 4,
    "cnn_depth": 2,
    "vector_units": 8,
    "vector_layers": 1,
    "units": 16,
    "actor_units": 16,
    "ensemble": 2,
    "ensemble_target": 2,
    "batch": 4,
    "length": 6,
    "horizon": 2,
    "device": "cpu",
}


@pytest.mark.parametrize("collect", ["random", "mixed"])
def test_rows_and_starts_of_stage_1(monkeypatch, tmp_path, collect):
    """What main records, and that the states that imagination starts from keep their ends"""
    batches, starts = [], []
    loss, update = draw_pretrain.world_model_loss, draw_pretrain.reinforce

    def numbered_loss(draw, data, args, soft):
        out, metrics, (embed, z, sigma) = loss(draw, data, args, soft)
        sigma = sigma.clone()
        sigma[..., 0, 0] = torch.arange(24.0).view(4, 6)  # tells a state from all others
        batches.append((z, data["is_terminal"]))
        return out, metrics, (embed, z, sigma)

    def recorded_update(args, draw, dynamics, policy, z, sigma, alive, reward_of):
        starts.append((z, sigma[:, 0, 0].long(), alive))
        return update(args, draw, dynamics, policy, z, sigma, alive, reward_of)

    monkeypatch.setattr(draw_pretrain, "world_model_loss", numbered_loss)
    monkeypatch.setattr(draw_pretrain, "reinforce", recorded_update)
    draw_pretrain.main(
        draw_pretrain.Args(
            env_id=SOURCE,
            run_dir=str(tmp_path),
            steps=900,
            prefill=600,
            train_every=30,
            collect=collect,
            starts=10,
            **SMALL,
        )
    )
    check_rows(read_replay(tmp_path / "replay"), SOURCE)
    assert len(starts) == 2 * len(batches) == 20  # of the task and of the exploration
    for i, (z, number, weight) in enumerate(starts):
        batch_z, terminal = batches[i // 2]
        assert torch.equal(z, batch_z.flatten(0, 1)[number]) and torch.equal(
            weight, 1.0 - terminal.flatten()[number].float()
        )
        assert number.unique().numel() == 10
    assert any(0 in weight for _, _, weight in starts)


def test_ensemble_is_trained_on_what_the_world_model_saw(monkeypatch, tmp_path):
    seen = []
    loss, ensemble_loss = draw_pretrain.world_model_loss, draw_pretrain.Ensemble.loss

    def recorded(draw, data, args, soft):
        out = loss(draw, data, args, soft)
        seen.append((data, *out[2]))
        return out

    def compare(self, sigma, z, action, embed, is_first):
        data, embed_seen, z_seen, sigma_seen = seen[-1]
        pairs = (
            (sigma, sigma_seen),
            (z, z_seen),
            (action, data["action"]),
            (embed, embed_seen),
            (is_first, data["is_first"]),
        )
        assert all(torch.equal(a, b) for a, b in pairs)
        return ensemble_loss(self, sigma, z, action, embed, is_first)

    monkeypatch.setattr(draw_pretrain, "world_model_loss", recorded)
    monkeypatch.setattr(draw_pretrain.Ensemble, "loss", compare)
    draw_pretrain.main(
        draw_pretrain.Args(
            env_id=SOURCE,
            run_dir=str(tmp_path),
            steps=160,
            prefill=100,
            train_every=30,
            starts=4,
            **SMALL,
        )
    )
    assert len(seen) == 2


@pytest.mark.parametrize("policy", [None, lambda image, vector: np.sign(vector) * 0.5 + 0.1])
def test_rows_of_stage_2(policy):
    args = redraw_adapt.Args(
        checkpoint="", collect_steps=900, collect_noise=0.5, hold=2.0, n_envs=3
    )
    rows = redraw_adapt.collect(args, make_envs(TARGET, 3), policy)
    assert (
        set(rows) == {"image", "vector", "action", "is_first", "is_last", "is_terminal"}
        and len(rows["action"]) == 900
    )
    check_rows(rows, TARGET)


@pytest.mark.parametrize("inputs", ["za", "za+sigma", "za+base"])
def test_residual_sees_the_step_before(inputs):
    """At t the residual sees z_{t-1} and a_{t-1}; at the first step of a sequence or an episode
    neither, but the initial state and no action. Then sigma_{t-1}, or softmax(f_t)."""
    draw = DRAW(TINY)
    nn.init.normal_(draw.initial_logits)
    rectified, seen = Rectified(draw, "residual", hidden=8, inputs=inputs), []
    rectified.delta[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    z, _, action = random_states(2, 6)
    first = borders(2, 6, (0, 3), (1, 1))
    log_q = torch.randn(2, 6, TINY.S, TINY.K).log_softmax(-1)
    residual_loss(draw, rectified, log_q, z, action, first)
    assert len(seen) == (1 if inputs == "za" else 6 + 1)  # one batched call, after the recurrence
    given = seen[-1]
    z0, sigma0 = draw.initial()
    u = draw.observe(z, action, first, rectified)
    for b in range(2):
        for t in range(6):
            fresh = t == 0 or first[b, t]
            z_prev = z0 if fresh else z[b, t - 1]
            a_prev = torch.zeros(1) if fresh else action[b, t - 1]
            sigma = sigma0 if fresh else u[b, t - 1].softmax(-1)
            parts = [z_prev.flatten(), a_prev]
            if inputs == "za+sigma":
                parts.append(sigma.flatten())
            if inputs == "za+base":
                parts.append(draw.dynamics(z_prev, sigma, a_prev).softmax(-1).flatten())
            assert torch.allclose(given[b, t], torch.cat(parts), atol=1e-5)


@pytest.fixture
def numbered(tmp_path):
    """(checkpoint, data file, rows, log-posteriors): a data set whose actions are the row numbers /
    1000, in episodes of 10 rows"""
    draw = DRAW(TINY)
    rows, number = random_rows(80), np.arange(80)
    rows |= {
        "action": (number[:, None] / 1000).astype(np.float32),
        "is_first": number % 10 == 0,
        "is_last": number % 10 == 9,
    }
    save_dataset(tmp_path / "data.npz", rows)
    return (
        save_tiny_draw(tmp_path / "draw.pt", draw),
        str(tmp_path / "data.npz"),
        rows,
        encode(draw, rows, "cpu")["log_q"],
    )


def check_sequences(action, first, rows):
    """The rows (B, T) of sequences of actions: consecutive ones, but where whole episodes are left
    out"""
    number = (action[..., 0] * 1000).round().long()
    assert torch.equal(first, torch.from_numpy(rows["is_first"])[number])
    assert ((number.diff(dim=1) == 1) | first[:, 1:]).all()
    return number


def test_batches_of_stage_2(monkeypatch, tmp_path, numbered):
    """What main hands to its loss: posterior, sample, action and border of the same rows; no
    held-out episode is trained on"""
    checkpoint, data, rows, posterior = numbered
    episodes, original = {True: set(), False: set()}, redraw_adapt.residual_loss
    mean_kl = redraw_adapt.mean_kl

    def looked_at(draw, dynamics, data, rows, length):
        episodes[False] |= set((rows // 10).tolist())
        return mean_kl(draw, dynamics, data, rows, length)

    def compare(draw, rectified, q, z, action, is_first, l2):
        number = check_sequences(action, is_first, rows)
        assert torch.allclose(q, posterior[number], atol=1e-5)
        assert (z * q.exp()).sum(-1).min() > 0  # a sample, of what is not impossible
        assert l2 == 0.25
        episodes[True] |= set((number // 10).flatten().tolist())
        return original(draw, rectified, q, z, action, is_first, l2)

    monkeypatch.setattr(redraw_adapt, "residual_loss", compare)
    monkeypatch.setattr(redraw_adapt, "mean_kl", looked_at)
    redraw_adapt.main(
        redraw_adapt.Args(
            checkpoint,
            dataset=data,
            run_dir=str(tmp_path / "run"),
            l2=0.25,
            device="cpu",
            hidden=8,
            updates=60,
            batch=4,
            length=5,
            holdout=0.25,
            log_every=60,
        )
    )
    # A quarter of the eight episodes is only looked at.
    assert len(episodes[True]) == 6 and episodes[False] == set(range(8))


def test_starts_of_stage_3(monkeypatch, tmp_path, numbered):
    checkpoint, data, rows, posterior = numbered
    seen, original = [], DRAW.observe

    def recorded(self, z, action, is_first, dynamics=None):
        number = check_sequences(action, is_first, rows)
        assert ((number >= 0) & (number < 80)).all()
        seen.append((number, z))
        return original(self, z, action, is_first, dynamics)

    monkeypatch.setattr(DRAW, "observe", recorded)
    train_policy.main(
        train_policy.Args(
            checkpoint,
            data,
            run_dir=str(tmp_path / "run"),
            device="cpu",
            updates=120,
            batch=8,
            length=5,
            starts=4,
            horizon=2,
        )
    )
    number, z = torch.cat([n for n, _ in seen]), torch.cat([z for _, z in seen])
    assert set(number[:, 0].tolist()) == set(range(76))  # every start of five rows
    # Samples of the posteriors of their own rows fit these better than those of the rows around
    # them.
    fit = [
        (z * posterior[(number + shift).clamp(0, 79)]).sum((-2, -1)).mean().item()
        for shift in (-1, 0, 1)
    ]
    assert fit[1] > max(fit[0], fit[2])
