"""Enumeration inside the joint trees against all subsets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt.certificate_counting import least_rise
from cbs_opt.errors import SolutionError
from cbs_opt.solvers.kernels.counting import DONE, SAFE_PIVOT, TOO_MANY, UNSAFE, best_set, count_node


def definite(rng, m):
    G = rng.standard_normal((m + 2, m)) + 0.3
    return G.T @ G


def value(H, b, chosen):
    at = list(chosen)
    return 0.5 * float(b[at] @ np.linalg.solve(H[np.ix_(at, at)], b[at]))


def call(H, b, r, record, sign, prices=None, need=-1.0, cap=10**6):
    """`best_set` with its workspaces: outcome, whether the record was broken, the record, the set."""
    m, levels = b.size, max(r - 3, 0)
    prices = np.zeros(m) if prices is None else prices
    found, best = np.array([record]), np.zeros(r, np.int64)
    outcome, _, broken = best_set(
        H, b, prices, need, r, m, found, sign, cap, SAFE_PIVOT * np.diag(H), True, np.zeros((levels, m, m)),
        np.zeros((levels, m)), np.zeros(m), np.zeros(m + 1), np.zeros(r, np.int64), best,
        np.zeros(r + 1, np.int64),
    )  # fmt: skip
    return outcome, broken, found[0], best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5), st.sampled_from([1.0, -1.0]), st.booleans())
def test_best_set_is_the_best_among_those_that_prices_allow(seed, m, r, sign, priced):
    r = min(r, m)
    rng = np.random.default_rng(seed)
    H, b = definite(rng, m), rng.standard_normal(m)
    prices = np.sort(rng.random(m))[::-1].copy() if priced else np.zeros(m)
    need = float(rng.random() * r) if priced else -1.0
    allowed = [T for T in itertools.combinations(range(m), r) if prices[list(T)].sum() > need]
    outcome, broken, record, best = call(H, b, r, -sign * 1e3, sign, prices, need)
    assert outcome == DONE
    assert broken == bool(allowed)
    if allowed:
        expected = max(allowed, key=lambda T: sign * value(H, b, T))
        assert record == pytest.approx(value(H, b, expected), rel=1e-9)
        assert value(H, b, best) == pytest.approx(record, rel=1e-9)
        assert not call(H, b, r, record * (1 + sign * 1e-9), sign, prices, need)[1]


def test_best_set_gives_up_at_the_cap_and_at_small_pivots():
    rng = np.random.default_rng(0)
    H, b = definite(rng, 12), rng.standard_normal(12)
    assert call(H, b, 5, -1.0, 1.0, cap=20)[0] == TOO_MANY
    H[:, 1] = H[:, 0]
    H[1] = H[0]
    H[1, 1] = H[0, 0] * (1 + 1e-12)
    assert call(H, b, 2, -1.0, 1.0)[0] == UNSAFE
    assert call(H, b, 3, -1.0, 1.0)[0] == UNSAFE


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.data())
def test_a_node_is_settled_as_by_enumeration(seed, m, data):
    """Kept columns, a relaxed point that need not be optimal, and a threshold above or below the best value."""
    rng = np.random.default_rng(seed)
    M, v = definite(rng, m), rng.standard_normal(m)
    kept = np.zeros(m, np.int8)
    kept[rng.permutation(m)[: data.draw(st.integers(0, m - 2))]] = 1
    free = np.flatnonzero(kept == 0)
    R = data.draw(st.integers(1, free.size - 1))
    d = np.full(m, 0.9 * np.linalg.eigvalsh(M)[0])
    u = v * (rng.random(m) < 0.7) + 0.1 * rng.standard_normal(m) * (rng.random(m) < 0.5)
    c = -M @ v
    losses = {}
    for T in itertools.combinations(free, R):
        at = np.sort([*np.flatnonzero(kept), *T])
        losses[tuple(at)] = 0.5 * float(v @ M @ v) - value(M, M @ v, at)
    best = min(losses.values())
    least = data.draw(st.sampled_from([0.0, 1.0]))
    for threshold in (best * 1.01, best * 0.99):
        sel = np.zeros(m, np.int8)
        settled, found = count_node(
            M, c, np.diag(M).copy(), d, u, M @ u + c, kept, m, R, 0.5 * float(v @ M @ v), threshold, 10**6, least,
            np.zeros(20 * m * m), np.zeros((4, m + 2)), np.zeros(m + 2, np.int64), np.zeros((3, m + 2), np.int64),
            sel,
        )  # fmt: skip
        assert settled
        assert found == (threshold > best)
        if found:
            assert losses[tuple(np.flatnonzero(sel))] == pytest.approx(best, rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.data())
def test_least_rise_of_the_check(seed, m, data):
    """The enumeration of the check of certificates, which has no code of the kernels: never above the minimum."""
    rng = np.random.default_rng(seed)
    M, v = definite(rng, m), rng.standard_normal(m)
    kept = data.draw(st.integers(0, m))
    whole = 0.5 * float(v @ M @ v)
    exact = min(whole - (value(M, M @ v, T) if T else 0.0) for T in itertools.combinations(range(m), kept))
    found = least_rise(M, v, kept)
    assert found <= max(exact, 0.0) + 1e-14 * whole
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-9 * whole)


def test_least_rise_refuses_what_it_cannot_count():
    M = np.eye(60)
    with pytest.raises(SolutionError, match="selections to be counted"):
        least_rise(M, np.ones(60), 30)
    with pytest.raises(SolutionError, match="singular"):
        least_rise(np.ones((3, 3)), np.ones(3), 1)
