"""Enumeration of whole joint problems against all selections, from both sides."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt import Budget, HessianBlocks, Instance, Status, joint_loss, solve
from cbs_opt.solvers.trees import enumeration
from cbs_opt.solvers.trees.enumeration import Enumeration, number_of_sets


def problem(seed, n):
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((n + 2, n)) + 0.3
    return G.T @ G / n, rng.standard_normal(n)


def losses(H, w, keep):
    """Loss of every set of pruned weights."""
    A = np.linalg.inv(H)
    out = {}
    for P in itertools.combinations(range(w.size), w.size - keep):
        at = list(P)
        out[P] = 0.5 * float(w[at] @ np.linalg.solve(A[np.ix_(at, at)], w[at]))
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.data())
def test_finds_what_beats_the_incumbent_and_nothing_else(seed, n, data):
    keep = data.draw(st.integers(1, n - 1))
    H, w = problem(seed, n)
    every = losses(H, w, keep)
    best = min(every.values())
    for value in (1.01 * best, 0.99 * best):
        search = Enumeration(np.linalg.inv(H), H, w, keep, value)
        pruned = search.run(lambda: False, threads=data.draw(st.sampled_from([1, 2])))
        assert search.complete
        assert (pruned is not None) == (value > best)
        if pruned is not None:
            assert every[tuple(np.flatnonzero(pruned))] == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("keep", [3, 13])
@pytest.mark.parametrize("piece", [10**8, 3])
def test_prices_exclude_no_optimum(keep, piece, monkeypatch):
    """Of 16 weights: the root's relaxation prices the sets, on both sides, in large and small pieces."""
    monkeypatch.setattr(enumeration, "_PIECE", piece)
    H, w = problem(5, 16)
    every = losses(H, w, keep)
    best = min(every.values())
    search = Enumeration(np.linalg.inv(H), H, w, keep, 1.05 * best)
    pruned = search.run(lambda: False)
    assert search.complete
    assert every[tuple(np.flatnonzero(pruned))] == pytest.approx(best, rel=1e-8)


def test_stops_and_does_not_trust_small_pivots():
    H, w = problem(0, 8)
    stopped = Enumeration(np.linalg.inv(H), H, w, 4, 1e9)
    assert stopped.run(lambda: True) is None
    assert not stopped.complete
    H[:, 1], H[1] = H[:, 0], H[0]
    H[1, 1] = H[0, 0] * (1 + 1e-12)
    unsafe = Enumeration(np.linalg.inv(H), H, w, 4, 1e9)
    unsafe.run(lambda: False)
    assert not unsafe.complete


def test_few_kept_of_many_are_proven_by_enumeration():
    """Strongly correlated columns: the relaxation says little, and 27,405 sets are looked at."""
    rng = np.random.default_rng(1)
    G = rng.standard_normal((60, 30)) + 3.0 * rng.standard_normal((60, 1))
    H, w = G.T @ G / 60 + 1e-3 * np.eye(30), rng.standard_normal(30)
    instance = Instance(w, HessianBlocks.from_blocks([H]), Budget(26))
    result = solve(instance, "exact", objective="joint")
    assert result.status is Status.OPTIMAL
    assert result.extras.get("counted", number_of_sets(30, 4)) == 27405
    b = H @ w
    gains = [
        (0.5 * float(b[list(T)] @ np.linalg.solve(H[np.ix_(T, T)], b[list(T)])), T)
        for T in itertools.combinations(range(30), 4)
    ]
    pruned = ~np.isin(np.arange(30), max(gains)[1])
    assert result.objective == pytest.approx(joint_loss(instance, pruned), rel=1e-9)
