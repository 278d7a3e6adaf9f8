"""All three stages on a world whose dynamics and best return are known. What is asserted holds with
each of five seeds (exact_world.py), that a replacement overfits with four."""

import pytest
import torch
from exact_world import (
    CELLS,
    GOAL,
    PIT,
    SOURCE,
    adapt,
    all_cells,
    judge,
    learn_source,
    mode,
    next_cell,
    observation,
    returns_and_best,
    train,
)

from common import load_checkpoint, load_draw
from redraw_adapt import encode

SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def source(folder):
    return learn_source(folder, SEED)


@pytest.fixture(scope="module")
def adapted(folder, source):
    return adapt(folder, source, 800, SEED)


def test_the_world_is_as_described():
    for order in ((0, 1, 2, 3), (1, 0, 2, 3)):
        for cell in range(CELLS):
            assert len({next_cell(cell, a, order) for a in range(4)} - {cell}) == 4
    assert (
        sum(
            next_cell(c, a, (0, 1, 2, 3)) != next_cell(c, a, (1, 0, 2, 3))
            for c in range(CELLS)
            for a in range(4)
        )
        == 2 * CELLS
    )
    pictures = {observation(cell)["image"].tobytes() for cell in range(CELLS)}
    assert len(pictures) == CELLS


def test_reward_and_continue_are_those_of_arriving(source):
    """An index that is off by one would smear both over the neighbours."""
    draw = load_draw(load_checkpoint(source, ("draw_pretrain",)), "cpu")
    q = encode(draw, all_cells(), "cpu")["log_q"]
    z = torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1]).float()
    is_goal, is_pit = torch.arange(CELLS) == GOAL, torch.arange(CELLS) == PIT
    reward, cont = draw.reward(z), draw.cont(z)
    # An episode may begin at the goal. Its reward there, 0, must not teach.
    assert reward[is_goal] > 0.95 and reward[~is_goal].abs().max() < 0.2
    assert cont[is_pit] < 0.1 and cont[~is_pit].min() > 0.9


def test_the_residual_mends_the_dynamics(source, adapted):
    assert judge(source, SOURCE)[0] >= 0.99  # where it was trained
    assert judge(source)[0] < 0.6  # half of the actions do what they did
    assert judge(f"{adapted}/best.pt")[0] >= 0.99
    assert judge(f"{adapted}/best.pt", SOURCE)[0] < 0.6  # it is the target's now


def test_the_policy_is_nearly_the_best_there_is(folder, adapted):
    paid, best = returns_and_best(mode(train(folder, f"{adapted}/best.pt", f"{adapted}.npz", SEED)))
    assert (paid <= best).all()  # value iteration is an upper bound
    # From one cell of twelve, or two, REINFORCE may settle for a detour that costs one reward.
    assert (paid >= best - 1).all() and (paid == best).mean() > 0.8 and best.min() > 4


def test_a_policy_from_recorded_rows_alone(folder, source, adapted):
    """With the source's model, whose dynamics are wrong here: they have no part in it."""
    changes = {"learn": "recorded", "updates": 150, "ahead": 3}
    paid, best = returns_and_best(train(folder, source, f"{adapted}.npz", SEED, **changes))
    assert (paid >= best - 1).all() and (paid == best).mean() > 0.8


def test_a_replacement_overfits_where_a_residual_does_not(folder, source):
    """200 transitions are about 4 of each of the 44 pairs of cell and action: enough to correct
    half of them, not to learn them all anew"""
    kl, replaced_kl = (
        judge(f"{adapt(folder, source, 200, SEED, method)}/last.pt")[1]
        for method in ("residual", "replace")
    )
    assert kl < replaced_kl
