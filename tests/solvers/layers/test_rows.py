"""The swap tableau of a row against refits from scratch, elimination against its definition, allocation."""

import numpy as np
import pytest

from cbs_opt.solvers.layers.allocation import choose_counts, merge_paths
from cbs_opt.solvers.layers.refit import refit_by_gradients, refit_row
from cbs_opt.solvers.layers.rows import RowState, RowTable, elimination_path
from cbs_opt.solvers.layers.selection_kernels import search_selection_row

GO = np.zeros(1, dtype=np.uint8)


def problem(seed=0, columns=20):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((3 * columns, columns)) @ rng.standard_normal((columns, columns))
    S = X.T @ X / (3 * columns) + 0.1 * np.eye(columns)
    return S, rng.standard_normal(columns)


def loss_of(S, w, mask):
    return refit_row(S, S @ w, w, mask)[1]


@pytest.mark.parametrize("price", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("tenure", [0, 3])
def test_state_and_table_agree_with_refits(price, tenure):
    S, w = problem()
    state, mask = RowState(20), np.arange(20) < 10
    table = RowTable.around(10, 5, 0, 20, 20)
    state.build(S, S @ w, w, mask)
    state.search(table, price, GO, 200, tenure)
    assert state.loss == pytest.approx(loss_of(S, w, state.mask()), rel=1e-9)
    for entry in np.flatnonzero(np.isfinite(table.values)):
        chosen = table.masks[entry] != 0
        assert chosen.sum() == table.lowest + entry
        assert table.values[entry] == pytest.approx(loss_of(S, w, chosen), rel=1e-9)
    assert np.isfinite(table.values).sum() > (1 if tenure else 0)


def test_prices_equal_exact_recomputation():
    """Removal, return and swap prices of the state against three refits each; a wrong sign fails."""
    S, w = problem(1)
    mask = np.arange(20) % 2 == 0
    state = RowState(20)
    state.build(S, S @ w, w, mask)
    p, q = state.sizes[:2]
    base = loss_of(S, w, mask)
    for s in range(0, q, 3):
        other = mask.copy()
        other[state.kept[s]] = True
        assert state.x[s] ** 2 / state.t[s] == pytest.approx(loss_of(S, w, other) - base, rel=1e-8)
        for r in range(0, p, 3):
            swapped = other.copy()
            swapped[state.pruned[r]] = False
            top = state.d[r] + state.U[r, s] * state.x[s] / state.t[s]
            price = state.x[s] ** 2 / state.t[s] - top**2 / (state.a[r] + state.U[r, s] ** 2 / state.t[s])
            assert price == pytest.approx(loss_of(S, w, swapped) - base, rel=1e-7, abs=1e-9)
    for r in range(0, p, 3):
        other = mask.copy()
        other[state.pruned[r]] = False
        assert state.d[r] ** 2 / state.a[r] == pytest.approx(base - loss_of(S, w, other), rel=1e-8)


def test_descent_ends_where_no_swap_helps():
    S, w = problem(2)
    state, table = RowState(20), RowTable.around(10, 0, 10, 10, 20)
    state.build(S, S @ w, w, np.arange(20) < 10)
    state.search(table, 0.0, GO, 1000)
    mask = table.masks[0] != 0
    best = table.values[0]
    for i in np.flatnonzero(mask):
        for j in np.flatnonzero(~mask):
            other = mask.copy()
            other[i], other[j] = False, True
            assert loss_of(S, w, other) >= best * (1 - 1e-9)


def test_swaps_stay_in_their_groups_and_locks_hold():
    S, w = problem(3)
    group = np.arange(20) // 4
    state, table = RowState(20, group), RowTable.around(10, 0, 10, 10, 20)
    state.locked[3] = 1
    mask = np.tile([True, True, False, False], 5)
    state.build(S, S @ w, w, mask)
    state.search(table, 0.0, GO, 100, 2)
    chosen = table.masks[0] != 0
    assert (chosen.reshape(5, 4).sum(1) == 2).all()
    assert not chosen[3]
    assert table.values[0] < loss_of(S, w, mask)


def test_elimination_is_greedy_and_exact():
    S, w = problem(4, columns=60)
    none = np.zeros(60, dtype=bool)
    order, costs = elimination_path(np.linalg.inv(S), w, none, none, np.zeros(60, dtype=np.int64), np.array([60]))
    assert sorted(order) == list(range(60))
    for k in (1, 30, 52, 59):
        mask = np.isin(np.arange(60), order[:k])
        assert costs[:k].sum() == pytest.approx(loss_of(S, w, mask), rel=1e-8)
    mask = np.isin(np.arange(60), order[:50])
    steps = []
    for j in np.flatnonzero(~mask):
        mask[j] = True
        steps.append((loss_of(S, w, mask), j))
        mask[j] = False
    assert min(steps)[1] == order[50]


def test_gradients_reach_the_exact_refit():
    S, w = problem(5)
    W = np.stack([w, 2 * w])
    masks = np.stack([np.arange(20) < 10, np.arange(20) % 3 == 0])
    found = refit_by_gradients(S, W, masks, None, 200, 1e-24)
    for x, v, mask in zip(found, W, masks, strict=True):
        assert x == pytest.approx(refit_row(S, S @ v, v, mask)[0], rel=1e-8, abs=1e-9)


def test_counts_meet_the_total_at_the_least_cost():
    values = np.array([[0.0, 1.0, 3.0], [0.0, 0.5, 4.0], [0.0, 2.0, np.inf]])
    for total, best in ((0, 0.0), (1, 0.5), (2, 1.5), (3, 3.5), (4, 5.5), (5, 9.0)):
        entries, _ = choose_counts(values, np.zeros(3, dtype=np.int64), total)
        assert entries.sum() == total
        assert values[np.arange(3), entries].sum() == best
    assert choose_counts(values, np.zeros(3, dtype=np.int64), 6) is None


def test_paths_are_merged_by_price_and_forced_steps_come_first():
    costs = [np.array([1.0, 2.0, 9.0]), np.array([5.0, 0.1, 6.0])]
    counts, price = merge_paths(costs, np.ones(2), np.array([0, 0]), 3)
    assert list(counts) == [2, 1] and price == 5.0
    assert list(merge_paths(costs, np.ones(2), np.array([0, 2]), 2)[0]) == [0, 2]


def test_selection_search_is_one_swap_optimal():
    S, w = problem(6)
    Q = S * w[:, None] * w
    y = (np.arange(20) < 10).astype(np.uint8)
    values, masks = np.full(1, np.inf), np.zeros((1, 20), dtype=np.uint8)
    h = Q @ y
    zeros = np.zeros(20, dtype=np.int64)
    loss, _ = search_selection_row(
        Q, y, h, np.zeros(20, dtype=np.uint8), zeros, False, float(y @ h), 0.0, 10, values, masks, zeros.copy(), 0,
        500, 0, 1, GO,
    )  # fmt: skip
    y = masks[0].astype(float)
    assert loss == pytest.approx(y @ Q @ y, rel=1e-10) == values[0]
    for i in np.flatnonzero(y):
        for j in np.flatnonzero(y == 0):
            z = y.copy()
            z[i], z[j] = 0, 1
            assert z @ Q @ z >= values[0] * (1 - 1e-9)
