"""The Lagrangian bound of the joint problem: its rounding, and that the ascent ascends."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance, Monitor, evaluate, solve
from cbs_opt.solvers.joint.lagrangian_bound import dual_bound, improve_bound


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("linear", [False, True])
def test_a_tight_bound_is_below_the_exact_loss(seed, linear):
    """With H = D the bound is the optimum but for rounding, which must count against it."""
    rng = np.random.default_rng(seed)
    n = 11
    D, w = rng.uniform(0.1, 3, n), rng.normal(size=n)
    g = rng.normal(size=n) if linear else None
    instance = Instance(w, HessianBlocks.from_blocks([np.diag(D)]), Budget(6), linear=g)
    bound, _ = dual_bound(instance, D, rng.normal(size=n))
    H, v = [Fraction(d) for d in D], [Fraction(x) for x in w]
    kept = [Fraction(0)] * n if g is None else [-(Fraction(x) ** 2) / (2 * h) for x, h in zip(g, H, strict=True)]
    gone = [
        h * x * x / 2 - (0 if g is None else Fraction(g[i]) * x) for i, (h, x) in enumerate(zip(H, v, strict=True))
    ]
    excess = sorted(a - b for a, b in zip(gone, kept, strict=True))
    exact = sum(kept) + sum(excess[:6])
    assert exact - Fraction(1e-11) < Fraction(bound) <= exact


@pytest.fixture(params=[0, 3, 5])
def connected(request):
    """An instance whose bound at rest is far from what the ascent reaches."""
    rng = np.random.default_rng(request.param)
    G = rng.normal(size=(60, 20))
    return Instance(rng.normal(size=20), HessianBlocks.from_blocks([G.T @ G / 60]), Budget(10))


def test_the_direction_ascends(connected):
    D = connected.curvature.diagonal_split()
    rng = np.random.default_rng(0)
    for _ in range(20):
        u = -connected.weights * rng.random(20)
        bound, direction = dual_bound(connected, D, u)
        assert dual_bound(connected, D, u + 1e-4 * direction)[0] > bound
        assert dual_bound(connected, D, u - 1e-4 * direction)[0] < bound


def test_the_ascent_closes_much_of_the_gap(connected):
    """From the incumbent; no ascent, or one downwards, stays at what start and rest give."""
    best = solve(connected, "brute", objective="joint")
    D = connected.curvature.diagonal_split()
    start = evaluate(connected, best.pruned).weights - connected.weights
    at_rest = max(dual_bound(connected, D, u)[0] for u in (start, np.zeros(20)))
    monitor = Monitor()
    improve_bound(connected, start, best.objective, monitor, 200, 1e9)
    assert monitor.bound <= best.objective
    assert monitor.bound > at_rest + 0.3 * (best.objective - at_rest)
    assert [row.bound for row in monitor.history] == sorted(row.bound for row in monitor.history)
