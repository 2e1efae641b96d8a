"""Every compiled selection kernel equals its plain NumPy twin, on random cores of blocks, groups and shifts."""

import numpy as np
import pytest

from cbs_opt.solvers.kernels import group_sums, selection_numba, selection_numpy, swap_descent
from cbs_opt.solvers.kernels.warm_up import warm_up_selection
from cbs_opt.solvers.problem.columns import Columns, DenseBlock, DiagonalBlock, FactorBlock
from cbs_opt.solvers.selection.core import Core

BOTH = (selection_numba, selection_numpy)
SHAPES = [(1, 1), (3, 1), (1, 4), (3, 4), (6, 2)]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    warm_up_selection()


def random_core(seed, blocks, groups, n=24):
    """A core of `blocks` blocks and `groups` groups over all variables, and its whole matrix."""
    rng = np.random.default_rng(seed)
    sizes = np.diff([0, *np.sort(rng.choice(np.arange(1, n), blocks - 1, replace=False)), n])
    parts = []
    for size in sizes:
        A = rng.standard_normal((size, size + 2))
        parts.append(A @ A.T)
    columns = Columns([DenseBlock(part) for part in parts])
    return Core(columns, rng.integers(groups, size=n), np.arange(n)), rng


def whole_matrix(core):
    return np.array([core.product(row) for row in np.eye(core.n)])


def feasible(rng, core, counts):
    y = np.zeros(core.n)
    for g, count in enumerate(counts):
        members = np.flatnonzero(core.group == g)
        y[rng.permutation(members)[: int(count)]] = 1.0
    return y


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("blocks", "groups"), SHAPES)
@pytest.mark.parametrize("shifted", [0.0, 0.3, 1.2])
def test_pair_descent(seed, blocks, groups, shifted):
    core, rng = random_core(seed, blocks, groups)
    counts = np.bincount(core.group) // 2
    start = feasible(rng, core, counts)
    if shifted == 0:  # a fractional start as well
        start = np.clip(0.7 * start + 0.3 * (counts / np.bincount(core.group))[core.group], 0, 1)
    shift = shifted * core.diagonal * rng.uniform(0.5, 1.5, core.n)
    linear = rng.standard_normal(core.n)
    Q, outcomes = whole_matrix(core), []
    for module in BOTH:
        x = start.copy()
        h = Q @ x + linear + shift * (0.5 - x)
        value = []
        taken = 0
        for _ in range(20):
            taken += module.pair_descent(*core.layout(), core.diagonal - shift, shift, x, h, 10, 1e-9)
            value.append(0.5 * x @ Q @ x + linear @ x + 0.5 * shift @ (x * (1 - x)))
        np.testing.assert_allclose(h, Q @ x + linear + shift * (0.5 - x), atol=1e-8)
        np.testing.assert_allclose(np.bincount(core.group, x), np.bincount(core.group, start), atol=1e-9)
        assert x.min() >= 0
        assert x.max() <= 1
        assert (np.diff(value) <= 1e-9).all()
        outcomes.append((x, h, taken))
    (x, h, taken), (other, h_other, taken_other) = outcomes
    assert taken == taken_other
    np.testing.assert_allclose(x, other, atol=1e-8)
    np.testing.assert_allclose(h, h_other, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("blocks", "groups"), SHAPES)
def test_tabu_swaps(seed, blocks, groups):
    core, rng = random_core(seed, blocks, groups)
    y = feasible(rng, core, np.bincount(core.group) // 2).astype(np.int8)
    linear = rng.standard_normal(core.n)
    Q, outcomes = whole_matrix(core), []
    f = 0.5 * y @ Q @ y + linear @ y
    for module in BOTH:
        z, best, release = y.copy(), y.copy(), np.zeros(core.n, dtype=np.int64)
        h = Q @ z + linear
        state, clock, idle, now, f_best = np.uint64(seed + 1), 0, 0, f, f
        for _ in range(3):
            now, f_best, clock, state, idle = module.tabu_swaps(
                *core.layout(), 0.5 * core.diagonal, z, h, now, best, f_best, release, clock, 40, 60, 3,
                np.uint64(state), idle,
            )  # fmt: skip
        np.testing.assert_allclose(h, Q @ z + linear, atol=1e-8)
        assert now == pytest.approx(0.5 * z @ Q @ z + linear @ z, rel=1e-9, abs=1e-9)
        assert f_best == pytest.approx(0.5 * best @ Q @ best + linear @ best, rel=1e-9, abs=1e-9)
        for point in (z, best):
            np.testing.assert_array_equal(np.bincount(core.group, point), np.bincount(core.group, y))
        outcomes.append((z, best, release, clock, int(state), idle, now, f_best))
    for mine, other in zip(*outcomes, strict=True):
        np.testing.assert_allclose(np.asarray(mine, float), np.asarray(other, float), rtol=1e-10, atol=1e-9)
    assert outcomes[0][7] <= f


def test_tabu_finds_the_optimum_of_a_small_core():
    core, rng = random_core(5, 2, 2, n=12)
    counts = np.bincount(core.group) // 2
    Q = whole_matrix(core)
    every = (np.arange(1 << 12)[:, None] >> np.arange(12)) & 1
    fits = np.all([every[:, core.group == g].sum(1) == c for g, c in enumerate(counts)], axis=0)
    optimum = min(0.5 * y @ Q @ y for y in every[fits].astype(float))
    y = feasible(rng, core, counts).astype(np.int8)
    best, f = y.copy(), 0.5 * y @ Q @ y
    out = selection_numba.tabu_swaps(
        *core.layout(), 0.5 * core.diagonal, y, Q @ y, f, best, f, np.zeros(12, np.int64), 0, 2000, 2000, 2,
        np.uint64(7), 0,
    )  # fmt: skip
    assert out[1] == pytest.approx(optimum)


def test_a_core_whose_weights_are_all_on_one_side_does_not_move():
    core, _ = random_core(3, 2, 1, n=8)
    for value in (0, 1):
        for module in BOTH:
            y = np.full(8, value, dtype=np.int8)
            h = core.product(y.astype(float))
            f, f_best, *_ = module.tabu_swaps(
                *core.layout(), 0.5 * core.diagonal, y, h, 1.0, y.copy(), 1.0, np.zeros(8, np.int64), 0, 5, 5, 2,
                np.uint64(1), 0,
            )  # fmt: skip
            assert (y == value).all()
            assert f == pytest.approx(1.0)
            assert f_best == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(5, 3), (1, 7), (9, 1), (4, 64)])
def test_row_kernels(dtype, shape):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal(shape).astype(dtype)
    index, value = rng.permutation(shape[0])[: 1 + shape[0] // 2], rng.standard_normal(1 + shape[0] // 2)
    results = []
    for module in BOTH:
        r = module.combine_rows(rows, index, value[: index.size])
        out = np.ones(shape[0])
        module.add_dots(rows, r, out)
        results.append((module.row_norms(rows), r, out))
    for mine, other in zip(*results, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-12)
        assert np.asarray(mine).dtype == np.float64


def test_rows_of_a_square():
    rng = np.random.default_rng(2)
    q, index, value = rng.standard_normal((6, 6)), np.array([4, 0]), np.array([2.0, -1.0])
    for module in BOTH:
        out = np.ones(6)
        module.add_rows(q, index, value, out)
        np.testing.assert_allclose(out, 1 + 2 * q[4] - q[0])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_blocks_agree_with_their_matrix(dtype):
    rng = np.random.default_rng(3)
    A, ridge = rng.standard_normal((7, 4)).astype(dtype), rng.random(7)
    Q = A.astype(np.float64) @ A.T.astype(np.float64) + np.diag(ridge)
    columns = Columns([FactorBlock(A, ridge), DenseBlock(Q), DiagonalBlock(ridge)])
    whole = np.zeros((21, 21))
    whole[:7, :7] = whole[7:14, 7:14] = Q
    whole[14:, 14:] = np.diag(ridge)
    x = rng.standard_normal(21)
    np.testing.assert_allclose(columns.product(x), whole @ x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(columns.diagonal, whole.diagonal(), rtol=1e-10)
    index = np.array([1, 5, 9, 14, 20])
    out = whole @ x
    columns.add_product(index, np.arange(5.0), out)
    np.testing.assert_allclose(out, whole @ x + whole[:, index] @ np.arange(5.0), rtol=1e-10, atol=1e-12)
    rows, other = np.array([0, 3, 6]), np.array([3, 4])
    for block, matrix in zip(columns.blocks, (Q, Q, np.diag(ridge)), strict=True):
        np.testing.assert_allclose(block.submatrix(rows), matrix[np.ix_(rows, rows)], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(block.cross(rows, other), matrix[np.ix_(rows, other)], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("blocks", "groups"), SHAPES)
def test_swap_descent(seed, blocks, groups):
    core, rng = random_core(seed, blocks, groups)
    start = feasible(rng, core, np.bincount(core.group) // 2)
    linear, Q, outcomes = rng.standard_normal(core.n), whole_matrix(core), []
    for descent in (swap_descent.swap_descent, selection_numpy.swap_descent):
        y, h = start.astype(np.int8), Q @ start + linear
        made = descent(*core.layout(), 0.5 * core.diagonal, y, h, 1e-9, 100)
        np.testing.assert_allclose(h, Q @ y + linear, atol=1e-9)
        assert np.bincount(core.group, y).tolist() == np.bincount(core.group, start).tolist()
        outcomes.append((made, y.tolist()))
    assert outcomes[0] == outcomes[1]
    change = (0.5 * core.diagonal - h)[:, None] + (0.5 * core.diagonal + h) - Q
    allowed = (y == 1)[:, None] & (y == 0) & (core.group[:, None] == core.group)
    assert not (change[allowed] < -1e-8).any()


@pytest.mark.parametrize("groups", [1, 3])
def test_group_sums(groups):
    rng = np.random.default_rng(groups)
    group, x = rng.integers(groups, size=30), rng.random(30)
    count = np.bincount(group, minlength=groups) // 3
    x[group == 0] = 0.0
    x[np.flatnonzero(group == 0)[: count[0]]] = 1.0  # a group whose sum is right
    one, two = np.empty(30), np.empty(30)
    group_sums.shift_to_counts(x, group, count, one)
    selection_numpy.shift_to_counts(x, group, count, two)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(np.bincount(group, one), count, atol=1e-12)
    np.testing.assert_array_equal(one[group == 0], x[group == 0])
