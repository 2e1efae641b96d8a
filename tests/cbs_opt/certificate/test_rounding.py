"""Bounds of the checker against losses in rational arithmetic: never above them, and hardly below.

The cases are tight but for rounding: without its margin, or with the margin on the wrong side, a bound computed in
floats lies above the exact loss in about every second of them.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from cbs_opt.certificate_bounds import JointPart, SelectionPart
from cbs_opt.certificate_tables import join, small_table
from cbs_opt.certificate_tree import floor_of, least, root_table
from cbs_opt.errors import SolutionError

SEEDS = range(12)
CLOSE = 1e-11  # what margins may take away, relative to the sizes of the terms


def every(m):
    return np.array(list(itertools.product([0, 1], repeat=m)), np.int8)


def selection_part(seed, m=6, groups=1, linear=True):
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(m + 1, m)) + 0.5
    group = np.arange(m) % groups
    left = np.bincount(group[: m // 2], minlength=groups)
    return SelectionPart(np.arange(m), G.T @ G / m, rng.normal(size=m) * linear, group, left)


def joint_part(seed, m=5, decided=(), linear=True):
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(m + 2, m)) + 0.3
    state = np.full(m, -1, np.int8)
    for i, value in decided:
        state[i] = value
    g = 0.3 * rng.normal(size=m) * linear
    return JointPart(np.arange(m), G.T @ G / m, rng.normal(size=m), g, state, np.zeros(m, int), np.array([m // 2]))


def sizes(part, y):
    """The sum of the sizes of the terms of a loss."""
    if isinstance(part, SelectionPart):
        return 0.5 * y @ np.abs(part.Q) @ y + np.abs(part.c) @ y
    w = np.abs(part.w)
    return 10 * (w @ np.abs(part.H) @ w + np.abs(part.g) @ w)


def total(base, price, state, part, left):
    return float(least(np.atleast_1d(base), np.atleast_2d(price), state[None], part.group, left)[0][0])


@pytest.mark.parametrize("seed", SEEDS)
def test_value_of_a_selection(seed, rational):
    part = selection_part(seed)
    for y in every(6)[1:]:
        exact = rational.quadratic(part.Q, part.c, y)
        assert exact - Fraction(CLOSE * sizes(part, y)) < Fraction(part.value(y)) <= exact
    assert part.value(np.full(6, -1, np.int8)) == -np.inf
    assert (part.leaps(part.state) == -np.inf).all()


@pytest.mark.parametrize("with_diagonal", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_points_of_the_selection_problem(seed, with_diagonal, rational):
    """At the point y itself the bound of y is tight; at any point it holds for all selections."""
    groups = 1 + seed % 2
    part = selection_part(seed, groups=groups)
    rng = np.random.default_rng(seed)
    diagonal = 0.2 * rng.random(6) * np.linalg.eigvalsh(part.Q)[0] if with_diagonal else None
    frame = part.frame(part.state, diagonal, part.left)
    feasible = [
        y for y in every(6) if np.array_equal(np.bincount(part.group[y == 1], minlength=groups), part.left)
    ]
    points = np.array([*feasible, *rng.random((4, 6)), *rng.normal(size=(2, 6)) * 1e8], float)
    for y in feasible:
        exact = rational.quadratic(part.Q, part.c, y)
        states = np.broadcast_to(y, points.shape)
        bases, prices = frame.prices(points, states)
        for x, base, price in zip(points, bases, prices, strict=True):
            bound = total(base, price, y, part, part.left)
            assert Fraction(bound) <= exact
            if np.array_equal(x, y):
                assert bound > float(exact) - CLOSE * (sizes(part, y) + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_diagonal_that_needs_exact_sums(seed, rational):
    """D ⪯ Q on zero sums only, huge off them: no point, however large its entries, may profit from that."""
    part = selection_part(seed, m=4)
    big = 10.0 ** (seed % 6)
    diagonal = np.array([-big, big, 0.0, 0.0]) - 3 * big * np.array([0, 0, 1, 1])
    diagonal[1] = big / 8
    frame = part.frame(part.state, diagonal, part.left)
    feasible = [y for y in every(4) if y.sum() == part.left[0]]
    rng = np.random.default_rng(seed)
    points = np.array(
        [*rng.random((4, 4)), *(rng.choice([1e17, -1e17, 3e15, 0.5], 4) for _ in range(6)), *feasible]
    )
    for y in feasible:
        exact = rational.quadratic(part.Q, part.c, y)
        bases, prices = frame.prices(points, np.broadcast_to(y, points.shape))
        for base, price in zip(bases, prices, strict=True):
            assert Fraction(total(base, price, y, part, part.left)) <= exact


@pytest.mark.parametrize("decided", [(), ((0, 1),), ((0, 1), (3, 1)), ((1, 0), (2, 1))])
@pytest.mark.parametrize("seed", SEEDS)
def test_products_with_pruned_weights(seed, decided, rational):
    """y_i y_j is y_j once i is pruned, and 0 is what is used of it before: tight where no open pair is pruned."""
    part = selection_part(seed)
    rng = np.random.default_rng(seed)
    first, second = np.tril_indices(6, -1)
    some = rng.random(first.size) < 0.7
    products = first[some], second[some], 0.1 * rng.random(int(some.sum()))
    N = np.zeros((6, 6))
    N[products[:2]] = products[2]
    N += N.T
    frame = part.frame(part.state, -N.sum(1), part.left, products)
    state = part.state.copy()
    for i, value in decided:
        state[i] = value
    for y in every(6):
        if y.sum() != part.left[0] or any(y[i] != value for i, value in decided):
            continue
        exact = rational.quadratic(part.Q, part.c, y)
        points = np.array([y, *rng.random((3, 6))], float)
        bases, prices = frame.prices(points, np.broadcast_to(state, points.shape))
        inner = y * (state < 0)
        for k, (base, price) in enumerate(zip(bases, prices, strict=True)):
            bound = float(base + price @ y)
            assert Fraction(bound) <= exact
            if k == 0 and inner @ N @ inner == 0:
                assert bound > float(exact) - CLOSE * (sizes(part, y) + 1)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("lacking", [1e-12, 1e-8, 1e-4, 0.3])
def test_curvature_that_is_missing(lacking, grouped, rational):
    """What R lacks to be semidefinite (on zero sums where there is a diagonal) is taken off the bound."""
    rng = np.random.default_rng(3)
    part = selection_part(1)
    eigenvalues, V = np.linalg.eigh(part.Q)
    if grouped:
        v = rng.normal(size=6)
        v -= v.mean()
        v /= np.linalg.norm(v)
        rest = np.eye(6) - np.outer(v, v)
        part.Q = rest @ part.Q @ rest - lacking * np.outer(v, v)
        frame = part.frame(part.state, np.zeros(6), part.left)
    else:
        eigenvalues[0] = -lacking
        part.Q = (V * eigenvalues) @ V.T
        v = V[:, 0]
        frame = part.frame(part.state, None, part.left)
    part.Q = 0.5 * (part.Q + part.Q.T)
    assert v @ (frame.R + np.diag(frame.lift)) @ v >= 0
    assert frame.lift.max() < 1e4 * lacking
    for y in every(6):
        if y.sum() == part.left[0]:
            exact = rational.quadratic(part.Q, part.c, y)
            points = np.array([y - 0.4 * v, y + 0.4 * v, y], float)
            bases, prices = frame.prices(points, np.full(points.shape, -1, np.int8))
            for base, price in zip(bases, prices, strict=True):
                assert Fraction(float(base + price @ y)) <= exact


def test_matrices_that_cannot_be_curvature():
    part = selection_part(0)
    part.Q = np.zeros((6, 6))
    with pytest.raises(SolutionError, match="no part of a semidefinite matrix"):
        part.frame(part.state, np.full(6, 1e-9), part.left)
    part = selection_part(0)
    with pytest.raises(SolutionError, match="must be positive semidefinite is not"):
        part.frame(part.state, np.full(6, 1e12), part.left)


@pytest.mark.parametrize("seed", SEEDS)
def test_value_of_joint_selections(seed, rational):
    """What the pruned weights cost, and with one more; to prune more never costs less."""
    part = joint_part(seed)
    for pruned in every(5)[:-1]:
        state = np.where(pruned == 1, 1, -1).astype(np.int8)
        exact = rational.joint(part.H, part.w, part.g, pruned == 1)
        close = CLOSE * sizes(part, pruned)
        assert exact - Fraction(close) < Fraction(part.value(state)) <= exact
        leaps = part.leaps(state)
        for i in np.flatnonzero(pruned == 0):
            more = (pruned == 1) | (np.arange(5) == i)
            exact = rational.joint(part.H, part.w, part.g, more)
            assert exact - Fraction(close) < Fraction(leaps[i]) <= exact
        assert (leaps[pruned == 1] == -np.inf).all()


@pytest.mark.parametrize("decided", [(), ((1, 1),), ((0, 0), (3, 1))])
@pytest.mark.parametrize("seed", SEEDS)
def test_points_of_the_joint_problem(seed, decided, rational):
    """At u = 0 the bound of pruning everything is tight; at any point it holds for all selections."""
    part = joint_part(seed, decided=decided, linear=seed % 2 == 0)
    rng = np.random.default_rng(seed)
    is_open = part.state < 0
    m = int(is_open.sum())
    # M ⪰ λ_min(H) I: some of it, and a diagonal that only backing off makes valid.
    least_eigenvalue = np.linalg.eigvalsh(part.H)[0]
    diagonals = [0.9 * least_eigenvalue * rng.uniform(0.2, 1.0, m), 1e3 * np.diag(part.H)[is_open]]
    points = np.array([np.zeros(5), *(rng.normal(size=(3, 5)) * is_open), 1e9 * rng.normal(size=5) * is_open])
    for which, diagonal in enumerate(diagonals):
        frame = part.frame(part.state, diagonal, part.left)
        bases, prices = frame.prices(points, np.broadcast_to(part.state, points.shape))
        for y in every(5):
            if (part.state[~is_open] != y[~is_open]).any():
                continue
            exact = rational.joint(part.H, part.w, part.g, y == 1)
            for k, (base, price) in enumerate(zip(bases, prices, strict=True)):
                bound = float(base + price[is_open] @ y[is_open])
                assert Fraction(bound) <= exact
                if k == 0 and which == 0 and y[is_open].all():
                    assert bound > float(exact) - CLOSE * sizes(part, y)


@pytest.mark.parametrize("diagonal", [[0.0, 1.0], [-1.0, 1.0], None])
def test_diagonals_of_the_joint_problem_are_positive(diagonal):
    part = joint_part(0, m=2)
    with pytest.raises(SolutionError, match="positive diagonal"):
        part.frame(part.state, None if diagonal is None else np.array(diagonal), part.left)


@pytest.mark.parametrize("seed", SEEDS)
def test_tables_of_small_pieces(seed, rational):
    """Each entry is the exact minimum but for its margin; cheap tables lie below it."""
    rng = np.random.default_rng(seed)
    diagonal = selection_part(seed)
    diagonal.Q = np.diag(rng.random(6))
    for part in (selection_part(seed), diagonal, joint_part(seed), joint_part(seed, decided=((0, 0), (3, 1)))):
        m = part.index.size
        losses = {}
        for y in every(m):
            if ((part.state < 0) | (part.state == y)).all():
                exact = (
                    rational.quadratic(part.Q, part.c, y)
                    if isinstance(part, SelectionPart)
                    else rational.joint(part.H, part.w, part.g, y == 1)
                )
                k = int(y[part.state < 0].sum())
                losses[k] = min(exact, losses.get(k, exact))
        table = small_table(part, 18)
        assert table.size == len(losses)
        cheap = root_table(None, part)
        points = np.where(part.state < 0, rng.random(m), np.maximum(part.state, 0))
        frame = part.frame(part.state, None if isinstance(part, SelectionPart) else np.full(
            int((part.state < 0).sum()), 0.5 * np.linalg.eigvalsh(part.H)[0]), part.left)  # fmt: skip
        rooted = root_table((frame, points), part)
        for k, exact in losses.items():
            close = Fraction(CLOSE * (sizes(part, np.ones(m)) + 1))
            assert exact - close < Fraction(table[k]) <= exact
            assert Fraction(cheap[k]) <= exact
            assert cheap[k] <= rooted[k]
            assert Fraction(rooted[k]) <= exact
            assert abs(floor_of(part, np.array([k])) - cheap[k]) < close


def test_a_piece_too_large_for_a_table():
    assert small_table(selection_part(0), 5) is None
    assert small_table(selection_part(0), 6) is not None
    assert small_table(joint_part(0), 4) is None


@pytest.mark.parametrize("seed", range(40))
def test_join(seed):
    """The least sum of one entry per table, never above the exact one; entries may be infinite."""
    rng = np.random.default_rng(seed)
    tables = [rng.normal(size=rng.integers(1, 5)) for _ in range(int(rng.integers(1, 5)))]
    if seed % 3 == 0:
        tables[0][-1] = np.inf
    elif seed % 3 == 1:
        tables[-1][0] = -np.inf
    for budget in range(sum(table.size - 1 for table in tables) + 1):
        choices = [pick for pick in itertools.product(*(range(t.size) for t in tables)) if sum(pick) == budget]
        sums = [[table[j] for table, j in zip(tables, pick, strict=True)] for pick in choices]
        found = join(tables, budget)
        if any(-np.inf in entries for entries in sums):
            assert found == -np.inf
        elif all(np.inf in entries for entries in sums):
            assert found == np.inf
        else:
            exact = min(sum(map(Fraction, entries)) for entries in sums if np.inf not in entries)
            assert exact - Fraction(1e-13) < Fraction(found) <= exact
    if np.isfinite(tables[-1][0]):
        assert join(tables, sum(table.size - 1 for table in tables) + 1) == np.inf


OFF_SUMS = np.array([1.0, -2.5, -2.5])  # negative semidefinite on zero sums, far from it off them


@pytest.mark.parametrize("big", [1.0, 1e3, 1e6])
def test_a_diagonal_below_decisions(big, rational):
    """The sums that a diagonal needs are those of the open weights: what is pruned above counts."""
    part = selection_part(4, m=4)
    state = np.array([1, -1, -1, -1], np.int8)
    frame = part.frame(state, big * OFF_SUMS, np.array([2]))
    for x in ([1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.5, 0.5]):
        for i in (1, 2, 3):
            y = np.array([1, 0, 0, 0], np.int8)
            y[i] = 1
            base, price = frame.prices(np.array([x]), y[None])
            bound = total(base, price, y, part, np.array([2]))
            assert Fraction(bound) <= rational.quadratic(part.Q, part.c, y)


def test_the_whole_way_to_a_selection_counts(rational):
    """Curvature that is missing is paid for by the distance of y from x, not by the size of x."""
    Q = np.array([[1.0, 1.0009], [1.0009, 1.0]])
    part = SelectionPart(np.arange(2), Q, np.zeros(2), np.zeros(2, int), np.array([1]))
    frame = part.frame(part.state, None, part.left)
    y = np.array([1, 0], np.int8)
    for states in (y, part.state):
        for x in ([0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 2.0]):
            base, price = frame.prices(np.array([x]), states[None])
            assert Fraction(float(base[0] + price[0] @ y)) <= rational.quadratic(Q, np.zeros(2), y)
