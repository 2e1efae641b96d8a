"""How much each stage prunes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt.budget import Budget
from cbs_opt.pruning.schedule import SCHEDULES, part_of, share


def test_the_three_formulas():
    assert share("cubic", 3, 4, 0.9) == pytest.approx(1 - (1 / 4) ** 3)
    assert share("linear", 3, 4, 0.9) == 0.75
    # each stage leaves the same fraction of what is left
    left = [1 - 0.9 * share("exponential", k, 4, 0.9) for k in range(5)]
    np.testing.assert_allclose(np.divide(left[1:], left[:-1]), 0.1**0.25)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(stages=st.integers(1, 40), sparsity=st.floats(0, 1))
def test_parts_grow_to_the_whole(schedule, stages, sparsity):
    parts = [share(schedule, k, stages, sparsity) for k in range(1, stages + 1)]
    assert parts[-1] == 1
    assert all(0 < a <= b for a, b in pairwise(parts)) or parts == [1]


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    seed=st.integers(0, 3),
    parts=st.lists(st.floats(0, 1), min_size=2, max_size=5),
)
def test_groups_grow_together(sizes, seed, parts):
    rng = np.random.default_rng(seed)
    final = np.array([rng.integers(0, size + 1) for size in sizes])
    budget = Budget(int(final.sum()), np.repeat(np.arange(len(sizes)), sizes), final)
    before = np.zeros_like(final)
    for part in sorted(parts):
        now = part_of(budget, part)
        assert now.total == int(np.ceil(part * budget.total * (1 - 1e-12)))
        counts = np.asarray(now.group_budgets)
        assert (np.abs(counts - part * final) < 1 + 1e-9).all()
        assert (counts >= before - 1).all()
        before = counts
    np.testing.assert_array_equal(part_of(budget, 1.0).group_budgets, final)
    assert part_of(Budget(10), 0.55).total == 6
