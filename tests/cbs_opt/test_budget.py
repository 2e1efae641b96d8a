from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt import Budget, InstanceError


@st.composite
def budgets_with_scores(draw):
    """Scores with many ties, groups, and `fixed` that the budget allows."""
    n = draw(st.integers(1, 9))
    scores = np.array(draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n)), dtype=float)
    fixed = np.array(draw(st.lists(st.sampled_from([0, 0, 0, 1, -1]), min_size=n, max_size=n)), dtype=np.int8)
    number = draw(st.integers(1, 3))
    groups = np.array(draw(st.lists(st.integers(0, number - 1), min_size=n, max_size=n)))
    per_group = []
    for g in range(number):
        of_group = fixed[groups == g]
        per_group.append(draw(st.integers(int((of_group == 1).sum()), int((of_group != -1).sum()))))
    return scores, fixed, groups, np.array(per_group)


@given(budgets_with_scores())
def test_cheapest_against_enumeration(case):
    scores, fixed, groups, per_group = case
    budget = Budget(int(per_group.sum()), groups, per_group)
    best = None
    for bits in itertools.product([False, True], repeat=scores.size):
        pruned = np.array(bits)
        counts = [int(pruned[groups == g].sum()) for g in range(per_group.size)]
        if counts != per_group.tolist() or not pruned[fixed == 1].all() or pruned[fixed == -1].any():
            continue
        # Lower indices win ties, so among equal prices the set that is first in order is wanted.
        key = (scores[pruned].sum(), tuple(np.flatnonzero(pruned)))
        if best is None or key < best[0]:
            best = key, pruned
    assert best is not None
    assert budget.cheapest(scores, fixed).tolist() == best[1].tolist()
    assert budget.is_met_by(best[1])


@given(st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_cells_choose_like_groups_in_another_order(size, number, random):
    """The selection within equal runs of weights is that of the same groups under other names."""
    n = size * number
    count = random.randint(0, size)
    scores = np.array([random.randint(-2, 2) for _ in range(n)], dtype=float)
    fixed = np.zeros(n, dtype=np.int8)
    for g in range(number):
        choice = [1] * random.randint(0, count) + [-1] * random.randint(0, size - count)
        fixed[g * size : g * size + len(choice)] = choice
    groups = np.repeat(np.arange(number), size)
    cells = Budget(count * number, groups, np.full(number, count))
    names = np.array(random.sample(range(number), number))
    renamed = Budget(count * number, names[groups], np.full(number, count))
    assert cells.cell == (count, size)
    assert cells.cheapest(scores, fixed).tolist() == renamed.cheapest(scores, fixed).tolist()


@pytest.mark.parametrize("total", [0, 1, 3, 5])
def test_cheapest_without_groups_sorts(total):
    scores = np.array([0.3, -1.0, 7.0, 0.3, 0.0])
    expected = np.zeros(5, dtype=bool)
    expected[[1, 4, 0, 3, 2][:total]] = True
    assert Budget(total).cheapest(scores).tolist() == expected.tolist()


def test_members_partition_the_weights():
    budget = Budget(2, [2, 0, 2, 0, 2], [1, 0, 1])
    assert [members.tolist() for members in budget.members(5)] == [[1, 3], [], [0, 2, 4]]
    assert budget.group_sizes(5).tolist() == [2, 0, 3]
    assert [members.tolist() for members in Budget(1).members(3)] == [[0, 1, 2]]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 9), share=st.floats(0, 1))
def test_another_total_changes_groups_in_proportion(sizes, seed, share):
    rng = np.random.default_rng(seed)
    old = np.array([rng.integers(0, size + 1) for size in sizes])
    budget = Budget(int(old.sum()), np.repeat(np.arange(len(sizes)), sizes), old)
    n = sum(sizes)
    total = round(share * n)
    new = np.asarray(budget.with_total(total).group_budgets)
    assert new.sum() == total and (new >= 0).all() and (new <= sizes).all()
    if total <= old.sum():
        wanted = old * total / max(old.sum(), 1)
    else:
        wanted = sizes - (sizes - old) * (n - total) / max(n - old.sum(), 1)
    assert (np.abs(new - wanted) < 1 + 1e-9).all()
    assert Budget(3).with_total(2).total == 2


def test_layers_with_one_fraction_have_one_again():
    budget = Budget(18, [0] * 10 + [1] * 10, [9, 9])
    assert budget.with_total(10).group_budgets.tolist() == [5, 5]
    assert Budget(10, [0] * 10 + [1] * 10, [5, 5]).with_total(18).group_budgets.tolist() == [9, 9]
    with pytest.raises(InstanceError, match=r"in \[0, 20\], got 21"):
        budget.with_total(21)


def test_is_met_by_counts_each_group():
    budget = Budget(2, [0, 0, 1, 1], [1, 1])
    assert budget.is_met_by(np.array([True, False, False, True]))
    assert not budget.is_met_by(np.array([True, True, False, False]))
    assert not Budget(2).is_met_by(np.array([True, False]))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((-1,), "budget"),
        ((1.5,), "budget"),
        ((True,), "budget"),
        ((1, [0, 0]), "group_budgets"),
        ((1, None, [1]), "groups"),
        ((1, [0, 1], [1]), "groups"),
        ((1, [0, -1], [1]), "groups"),
        ((1, [0.0, 0.0], [1]), "groups"),
        ((1, [[0, 0]], [1]), "groups"),
        ((3, [0, 0, 1], [3, 0]), "group_budgets[0]"),
        ((0, [0, 0, 1], [1, -1]), "group_budgets[1]"),
        ((2, [0, 0, 1], [1, 0]), "group_budgets"),
        ((2**63, [0, 0], np.array([2**63], dtype=np.uint64)), "group_budgets[0]"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments, field):
    with pytest.raises(InstanceError) as refusal:
        Budget(*arguments)
    assert f"`{field}`" in str(refusal.value)


@pytest.mark.parametrize(
    ("budget", "n", "fixed", "text"),
    [
        (Budget(4), 3, None, r"`budget` must be in \[0, 3\]"),
        (Budget(1, [0, 0], [1]), 3, None, r"`groups` must have shape \(3,\)"),
        (Budget(1), 3, [1, 1, 0], "between 2 and 3"),
        (Budget(2), 3, [-1, -1, 0], "between 0 and 1"),
        (Budget(2, [0, 0, 1, 1], [1, 1]), 4, [0, 0, -1, -1], "in group 1"),
    ],
)
def test_check_fits(budget, n, fixed, text):
    with pytest.raises(InstanceError, match=text):
        budget.check_fits(n, fixed)
