"""Budgets with cross groups: exact selections, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_array, vstack

from cbs_opt import Budget, HessianBlocks, Instance, InstanceError, SolverError, UsageError, solve
from cbs_opt.blockwise import can_split


def crossed(shapes, masks, names=None):
    """Tiles of these shapes with the counts of their masks, and the weights under other indices and groups."""
    groups, crosses, flat = [], [], []
    first = np.zeros(2, dtype=np.int64)
    for (a, b), mask in zip(shapes, masks, strict=True):
        rows, columns = np.divmod(np.arange(a * b), b)
        groups.append(first[0] + rows)
        crosses.append(first[1] + columns)
        flat.append(np.asarray(mask, dtype=bool).ravel())
        first += a, b
    groups, crosses, flat = (np.concatenate(parts) for parts in (groups, crosses, flat))
    if names is not None:
        order, rows, columns = names
        groups, crosses, flat = rows[groups][order], columns[crosses][order], flat[order]
    counts = [np.bincount(of[flat], minlength=k) for of, k in zip((groups, crosses), first.tolist(), strict=True)]
    return Budget(int(flat.sum()), groups, counts[0], crosses, counts[1]), flat


def least_sum(budget, scores, fixed):
    """The least sum of scores by a linear program, whose vertices are selections."""
    n = scores.size
    sums = [(budget.groups, budget.group_budgets), (budget.cross_groups, budget.cross_group_budgets)]
    rows = vstack([csr_array((np.ones(n), (of, np.arange(n))), shape=(counts.size, n)) for of, counts in sums])
    sides = np.concatenate([counts for _, counts in sums])
    bounds = [(float(f > 0), float(f >= 0)) for f in fixed]
    return linprog(scores, A_eq=rows, b_eq=sides, bounds=bounds, method="highs-ds").fun


@st.composite
def cases(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    share = draw(st.sampled_from([0.2, 0.5, 0.8]))
    n, rows, columns = sum(a * b for a, b in shapes), sum(a for a, _ in shapes), sum(b for _, b in shapes)
    names = rng.permutation(n), rng.permutation(rows), rng.permutation(columns)
    budget, flat = crossed(shapes, [rng.random(shape) < share for shape in shapes], names)
    scores = rng.integers(-3, 4, n).astype(float) if draw(st.booleans()) else rng.standard_normal(n)
    fixed = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.3])), np.where(flat, 1, -1), 0).astype(np.int8)
    return budget, scores, fixed


@given(cases())
def test_cheapest_against_a_linear_program(case):
    budget, scores, fixed = case
    pruned = budget.cheapest(scores, fixed)
    assert budget.is_met_by(pruned)
    assert pruned[fixed == 1].all() and not pruned[fixed == -1].any()
    assert scores[pruned].sum() == pytest.approx(least_sum(budget, scores, fixed), abs=1e-9)
    budget.check_fits(scores.size, fixed)


@pytest.mark.parametrize(("side", "count"), [(4, 2), (8, 2), (16, 12), (32, 16)])
def test_cheapest_in_large_tiles(side, count):
    rng = np.random.default_rng(side)
    mask = np.add.outer(np.arange(side), np.arange(side)) % side < count
    budget, _ = crossed([(side, side)] * 3, [mask] * 3)
    assert (budget.group_budgets == count).all() and (budget.cross_group_budgets == count).all()
    scores = rng.random(3 * side * side)
    found = budget.cheapest(scores)
    tiles = found.reshape(3, side, side)
    assert (tiles.sum(1) == count).all() and (tiles.sum(2) == count).all()
    assert scores[found].sum() == pytest.approx(least_sum(budget, scores, np.zeros(scores.size)), rel=1e-12)


def test_scores_that_are_not_finite_are_taken_last():
    budget, _ = crossed([(2, 2)], [np.eye(2)])
    assert budget.cheapest(np.array([0.0, 1.0, 1.0, np.inf])).tolist() == [False, True, True, False]
    assert budget.cheapest(np.array([0.0, np.nan, 1.0, 5.0])).tolist() == [True, False, False, True]
    assert budget.cheapest(np.array([-np.inf, -9.0, -9.0, 5.0])).tolist() == [True, False, False, True]
    assert budget.cheapest(np.array([1e308, -1e308, 1e308, 1e308])).tolist() == [False, True, True, False]
    assert budget.cheapest(np.array([3, 1, 1, 3], dtype=np.float32)).tolist() == [False, True, True, False]


def test_both_partitions_must_be_met():
    budget, flat = crossed([(2, 2)], [np.eye(2)])
    assert budget.is_met_by(flat)
    assert not budget.is_met_by(np.array([True, False, True, False]))  # the rows alone are met
    assert not budget.is_met_by(np.array([True, True, False, False]))  # the columns alone are met
    assert [group.tolist() for group, _ in budget.partitions(4)] == [[0, 0, 1, 1], [0, 1, 0, 1]]


ROWS, COLUMNS = [0, 0, 1, 1], [0, 1, 0, 1]
WRONG = {
    "without budgets": ((2, ROWS, [1, 1], COLUMNS), "`cross_group_budgets` is missing"),
    "without cross groups": ((2, ROWS, [1, 1], None, [1, 1]), "`cross_groups` is missing"),
    "without groups": ((2, None, None, COLUMNS, [1, 1]), "`cross_groups` is allowed only with `groups`"),
    "of another length": (
        (2, ROWS, [1, 1], [0, 1, 0], [1, 1]),
        "shape (4,), that of `groups`, got (3,)",
    ),
    "no numbers": ((2, ROWS, [1, 1], [0.0, 1, 0, 1], [1, 1]), "`cross_groups` must be a one-dimensional array"),
    "out of range": ((2, ROWS, [1, 1], [0, 1, 0, 2], [1, 1]), "`cross_groups` must be in [0, 1]"),
    "too many": ((2, ROWS, [1, 1], COLUMNS, [3, -1]), "`cross_group_budgets[0]` must be in [0, 2], the size"),
    "another sum": ((2, ROWS, [1, 1], COLUMNS, [1, 0]), "`cross_group_budgets` must sum to `budget` = 2, got 1"),
    "a torn cross group": ((2, [0, 0, 1, 1], [1, 1], [0, 1, 1, 2], [1, 1, 0]), "must form tiles"),
    "a pair twice": ((2, [0, 0, 0, 0, 1, 1, 1, 1], [1, 1], [0, 0, 1, 1, 0, 1, 1, 1], [1, 1]), "must form tiles"),
    "a hole": ((1, [0, 0, 1], [1, 0], [0, 1, 1], [0, 1]), "must form tiles"),
    "tiles of other sums": (
        (2, [0, 0, 1, 1, 2, 3], [1, 0, 1, 0], [0, 1, 0, 1, 2, 2], [1, 1, 0]),
        "must have the same sum in every tile, got 1 and 0 in the tile of group 2",
    ),
    "numbers that exclude each other": (
        (4, np.repeat(np.arange(3), 3), [3, 1, 0], np.tile(np.arange(3), 3), [3, 1, 0]),
        "exclude each other: no selection meets all of those of the tile of group 0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_partitions(case):
    arguments, message = WRONG[case]
    with pytest.raises(InstanceError) as refusal:
        Budget(*(np.asarray(a) if isinstance(a, list) else a for a in arguments))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_fixed_weights_that_only_both_partitions_exclude():
    budget, _ = crossed([(3, 3)], [np.eye(3)])
    fixed = np.zeros(9, dtype=np.int8)
    fixed[[0, 1, 3, 4]] = -1  # two rows have one column left, the same
    with pytest.raises(InstanceError, match="no selection meets the budgets of all groups and cross groups"):
        budget.check_fits(9, fixed)
    with pytest.raises(InstanceError, match="no selection meets the budgets of all groups and cross groups"):
        budget.cheapest(np.zeros(9), fixed)
    fixed[:] = 0
    fixed[[0, 3]] = 1
    with pytest.raises(InstanceError, match="pruned in cross group 0, the budget is 1"):
        budget.check_fits(9, fixed)


def test_other_totals_are_refused():
    budget, flat = crossed([(2, 2)], [np.eye(2)])
    assert budget.with_total(2) is budget
    with pytest.raises(InstanceError, match="fix its total, 2: it cannot become 1"):
        budget.with_total(1)
    instance = Instance(np.ones(4), HessianBlocks.from_blocks([np.eye(4)]), budget)
    with pytest.raises(UsageError, match="fix its total"):
        instance.with_sparsity(0.25)
    assert instance.admits(flat)
    assert "2 groups, 2 cross groups" in instance.describe()


def test_parts_of_a_budget():
    budget, flat = crossed([(2, 2), (1, 3), (2, 2)], [np.eye(2), [[1, 0, 1]], [[1, 1], [0, 0]]])
    part = budget.of_part(slice(4, 7), flat[4:7])
    assert part.groups.tolist() == [0, 0, 0] and part.cross_group_budgets.tolist() == [1, 0, 1]
    assert part.is_met_by(flat[4:7])
    with pytest.raises(InstanceError, match="must form tiles"):
        budget.of_part(np.array([0, 1, 2]), flat[:3])
    plain = Budget(2, [0, 0, 1, 1], [1, 1]).of_part(np.array([0, 3]), np.array([True, False]))
    assert (plain.total, plain.groups.tolist(), plain.group_budgets.tolist()) == (1, [0, 1], [1, 0])
    assert Budget(3).of_part(slice(0, 2), np.array([True, False])).groups is None
    assert [tile.index.shape for tile in budget.tiles] == [(1, 1, 3), (2, 2, 2)]
    assert repr(budget) == "<Budget: 6 of 11 weights in 5 groups and 7 cross groups>"
    assert dict(budget.facts())["cross groups"].startswith("7 of 4 of 2, 3 of 1 weights")


def test_blocks_are_not_solved_alone():
    budget, _ = crossed([(2, 2)], [np.eye(2)])
    blocks = HessianBlocks.from_blocks([np.eye(2)] * 2)
    assert not can_split(Instance(np.ones(4), blocks, budget))
    assert can_split(Instance(np.ones(4), blocks, 2))


@pytest.mark.parametrize("solver", ["ls", "cbs", "rmp", "relax", "exact", "backward"])
def test_solvers_that_know_one_partition_name_those_that_know_two(solver):
    budget, _ = crossed([(2, 2)], [np.eye(2)])
    instance = Instance(np.ones(4), HessianBlocks.from_blocks([np.eye(4)]), budget)
    with pytest.raises(SolverError) as refusal:
        solve(instance, solver)
    assert str(refusal.value).startswith(f"solver '{solver}' cannot take a second partition of the weights")
    assert "these solvers can: " in str(refusal.value) and "'brute'" in str(refusal.value)
