"""Outlines of a piece: for every number to prune, below and above what enumeration finds."""

import itertools

import numpy as np
import pytest

from cbs_opt.solvers.trees.outlines import Outline, eliminated, joint_bounds, outline_diagonal, selection_outline

FAMILIES = ("full", "low rank", "ill-scaled", "diagonal")


def hessian(rng, n, family):
    G = rng.normal(size=(3 if family == "low rank" else 2 * n, n))
    H = G.T @ G / len(G) + 1e-3 * np.eye(n)
    if family == "ill-scaled":
        s = 10.0 ** rng.uniform(-6, 1, n)
        H = H * s[:, None] * s
    return np.diag(np.diag(H)) if family == "diagonal" else H


def tables(n, value):
    every = np.array(list(itertools.product((False, True), repeat=n)))
    values = np.array([value(y) for y in every])
    return np.array([values[every.sum(1) == k].min() for k in range(n + 1)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("linear", [False, True])
def test_selection(family, linear):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 9))
        Q, c = hessian(rng, n, family), 0.1 * linear * rng.normal(size=n)
        best = tables(n, lambda y, Q=Q, c=c: 0.5 * y @ Q @ y + c @ y)
        size = np.abs(best).max()
        for count in range(1, n):
            found = selection_outline(Q, c, count)
            assert (found.lower <= best + 1e-12 * size).all()
            assert (found.upper >= best - 1e-12 * size).all()
            for k in range(n + 1):
                y = np.zeros(n)
                y[found.order[:k]] = 1
                assert 0.5 * y @ Q @ y + c @ y == pytest.approx(found.upper[k], rel=1e-9, abs=1e-12 * size)


@pytest.mark.parametrize("family", FAMILIES)
def test_joint(family):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 9))
        H, w = hessian(rng, n, family), rng.normal(size=n)
        A = np.linalg.inv(H)

        def value(y, A=A, w=w):
            return 0.5 * w[y] @ np.linalg.solve(A[np.ix_(y, y)], w[y]) if y.any() else 0.0

        best = tables(n, value)
        d = outline_diagonal(A)
        assert np.linalg.eigvalsh(H - np.diag(d))[0] >= -1e-9 * np.diag(H).max()
        for count in range(1, n):
            for upper in (np.inf, float(best[count])):
                found = Outline(joint_bounds(A, H, w, d, count, upper), *eliminated(A, H, w))
                assert (found.lower <= best * (1 + 1e-9) + 1e-12 * best[-1]).all()
                assert (found.upper >= best * (1 - 1e-9)).all()
                assert found.upper[-1] == pytest.approx(best[-1], rel=1e-6)
                if family == "diagonal":
                    np.testing.assert_allclose(found.upper, best, rtol=1e-4)
                    assert found.lower[count] >= 0.95 * best[count]  # tight, but for where the relaxation stops
