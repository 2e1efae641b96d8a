"""Counting under budgets: each function of the tree walk against all selections of a few weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance
from cbs_opt.certificate import forced_state
from cbs_opt.certificate_tree import counts, forced, least, settled

SEEDS = range(60)


def case(seed):
    """Prices, a state, groups and what each is to prune in all; whole numbers, so that sums are exact."""
    rng = np.random.default_rng(seed)
    m, groups = int(rng.integers(1, 7)), int(rng.integers(1, 4))
    group = rng.integers(0, groups, m)
    state = rng.choice([-1, -1, -1, 0, 1], m).astype(np.int8)
    left = np.array([int(rng.integers(0, (group == a).sum() + 1)) for a in range(groups)])
    return rng.integers(-4, 9, m).astype(float), state, group, left, float(rng.integers(-5, 6))


def completions(state, group, left):
    """All selections that agree with the state and prune what each group asks for."""
    for y in itertools.product([0, 1], repeat=state.size):
        y = np.array(y)
        if ((state < 0) | (y == state)).all() and np.array_equal(
            np.bincount(group[y == 1], minlength=left.size), left
        ):
            yield y


@pytest.mark.parametrize("seed", SEEDS)
def test_least_and_forced(seed):
    """The cheapest selection, and the cheapest with one weight pruned or kept, infinite where there is none."""
    price, state, group, left, base = case(seed)
    costs = [(y, base + price @ y) for y in completions(state, group, left)]
    total, ordered = least(np.array([base]), price[None], state[None], group, left)
    assert total[0] == min((cost for _, cost in costs), default=np.inf)
    if not costs:
        return
    for i in np.flatnonzero(state < 0):
        a = group[i]
        need = int(left[a] - (state[group == a] == 1).sum())
        for pruned in (False, True):
            found = forced(float(total[0]), price, state, ordered[a][0], need, int(i), pruned)
            assert found == min((cost for y, cost in costs if y[i] == pruned), default=np.inf), (i, pruned)


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_without_a_choice(seed):
    """`settled` decides what all selections agree on in groups that are full or empty, and nothing else."""
    _, state, group, left, _ = case(seed)
    every = np.array(list(completions(state, group, left)))
    is_open = np.ones(state.size, bool)
    free, need = counts(state, is_open, group, left)
    assert free.tolist() == [int(((group == a) & (state < 0)).sum()) for a in range(left.size)]
    assert need.tolist() == [int(left[a] - ((group == a) & (state == 1)).sum()) for a in range(left.size)]
    if not every.size:
        assert ((need < 0) | (need > free)).any()
        return
    out = settled(state, is_open, group, left)
    same = (every == every[0]).all(0)
    assert np.array_equal(out >= 0, same)
    assert np.array_equal(out[same], every[0][same])


def test_weights_that_are_not_open_do_not_count():
    """What a part had decided before is no part of the numbers."""
    state, group = np.array([1, 0, -1, -1], np.int8), np.zeros(4, np.int64)
    is_open = np.array([False, False, True, True])
    free, need = counts(state, is_open, group, np.array([1]))
    assert (free.tolist(), need.tolist()) == ([2], [1])
    assert settled(state, is_open, group, np.array([1])).tolist() == [1, 0, -1, -1]
    assert settled(state, is_open, group, np.array([2])).tolist() == [1, 0, 1, 1]
    assert settled(state, is_open, group, np.array([0])).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_forced_state(seed, rational):
    """Open are the weights on which `fixed` and the budgets leave a choice."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    pruned = rng.random(n) < 0.5
    groups = rng.integers(0, 2, n)
    fixed = np.where(rng.random(n) < 0.3, np.where(pruned, 1, -1), 0).astype(np.int8)
    total = int(pruned.sum())
    budget = Budget(total, groups, np.bincount(groups[pruned], minlength=2)) if seed % 2 else Budget(total)
    instance = Instance(np.ones(n), HessianBlocks.from_blocks([np.eye(n)]), budget, fixed=fixed)
    every = rational.selections(instance)
    state, left = forced_state(instance)
    same = (every == every[0]).all(0)
    assert np.array_equal(state >= 0, same)
    assert np.array_equal(state[same], every[0][same])
    group = instance.budget.group_of(n)
    assert left.tolist() == [int((every[0] & ~same & (group == a)).sum()) for a in range(left.size)]
