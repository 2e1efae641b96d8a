"""Exchanges between blocks keep every group's number, and the best of them is found."""

from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance, joint_loss
from cbs_opt.solvers.joint.moves import JointMoves


def feasible_swaps(instance, pruned):
    """The loss after each swap of a pruned and a kept weight that the groups allow."""
    found = []
    for i in np.flatnonzero(pruned):
        for j in np.flatnonzero(~pruned):
            other = pruned.copy()
            other[i], other[j] = False, True
            if instance.admits(other):
                found.append(joint_loss(instance, other))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_best_move_under_groups_that_cross_blocks(seed):
    rng = np.random.default_rng(seed)
    blocks = [A @ A.T / 5 + 0.1 * np.eye(5) for A in rng.normal(size=(3, 5, 5))]
    groups = rng.permutation(np.arange(15) % 3)
    instance = Instance(
        rng.normal(size=15), HessianBlocks.from_blocks(blocks), Budget(8, groups, np.array([2, 3, 3]))
    )
    moves = JointMoves(instance, instance.budget.cheapest(rng.random(15)))
    crossing = 0
    for _ in range(8):
        before = moves.pruned()
        move = moves.best_move()
        best = min(feasible_swaps(instance, before))
        assert (moves.doubled + move.change) / 2 == pytest.approx(best, rel=1e-7, abs=1e-12)
        moves.apply(move)
        crossing += move.leaving_block != move.coming_block
        assert instance.admits(moves.pruned())
        assert joint_loss(instance, moves.pruned()) == pytest.approx(best, rel=1e-7, abs=1e-12)
    assert crossing
