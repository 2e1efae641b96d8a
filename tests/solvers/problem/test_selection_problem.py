"""The selection problem: its certified bound in rational arithmetic, and ties."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.testing import make_problem


def exact_loss(instance, pruned):
    """½ w_Pᵀ H_PP w_P − g_Pᵀ w_P without rounding."""
    H = np.zeros((instance.n, instance.n))
    for k in range(instance.curvature.number_of_blocks):
        part = instance.curvature.block_slice(k)
        H[part, part] = instance.curvature.block(k)
    P = np.flatnonzero(pruned)
    w = [Fraction(float(instance.weights[i])) for i in P]
    loss = sum(w[a] * w[b] * Fraction(float(H[i, j])) for a, i in enumerate(P) for b, j in enumerate(P)) / 2
    if instance.linear is not None:
        loss -= sum(Fraction(float(instance.linear[i])) * w[a] for a, i in enumerate(P))
    return Fraction(loss)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("linear", [False, True])
def test_a_tight_bound_is_below_the_exact_loss(seed, linear):
    """Where only rounding separates bound and loss, the bound is the lower one, and hardly lower."""
    rng = np.random.default_rng(seed)
    n = 9
    G = rng.normal(size=(12, n)) + 0.3
    w = rng.normal(size=n)
    pruned = rng.random(n) < 0.6 if linear else np.ones(n, bool)
    # A first-order term that makes `pruned` the cheapest at itself; without one all weights are pruned.
    g = np.where(pruned, 1, -1) * 50.0 * np.sign(w) + rng.normal(size=n) if linear else None
    instance = Instance(w, HessianBlocks.from_blocks([G.T @ G / 12]), Budget(int(pruned.sum())), linear=g)
    problem = SelectionProblem(instance, 1)
    bound = problem.certified_bound(pruned[problem.index].astype(float))
    exact = exact_loss(instance, pruned)
    assert exact - Fraction(1e-11) * (abs(exact) + 100) < Fraction(bound) <= exact


def test_single_precision_that_is_indefinite_is_paid_for():
    """H of float32 with an eigenvalue of −1.2e-7: at x = (½, ½) convexity does not hold, and the bound knows."""
    one = np.float32(1.0)
    H = np.array([[one, np.nextafter(one, np.float32(2))], [np.nextafter(one, np.float32(2)), one]], np.float32)
    instance = Instance(np.ones(2), HessianBlocks.from_blocks([H]), Budget(1))
    smallest = float(np.linalg.eigvalsh(H.astype(float))[0])
    assert smallest < -1e-7
    assert instance.curvature.indefiniteness() == pytest.approx([-smallest] * 2, rel=1e-6)
    problem = SelectionProblem(instance, 1)
    assert problem.n == 2
    bound = problem.certified_bound(np.full(2, 0.5))
    assert 0.5 - 1e-6 < bound <= 0.5
    assert not HessianBlocks.from_blocks([np.eye(2)]).indefiniteness().any()


@pytest.mark.parametrize("grouped", [False, True])
def test_ties_go_to_the_lower_index_of_the_instance(grouped):
    """Not to the first in the order of the components, which puts coupled weights elsewhere than the others."""
    rng = np.random.default_rng(0)
    n = 12
    H = np.diag(rng.uniform(1, 2, n))
    for i, j in ((0, 7), (2, 11), (5, 6)):
        H[i, j] = H[j, i] = 0.5
    groups = np.arange(n) % 2
    budget = Budget(6, groups, np.array([2, 4])) if grouped else Budget(5)
    problem = SelectionProblem(Instance(np.ones(n), HessianBlocks.from_blocks([H]), budget), 1)
    index = problem.index
    assert (np.diff(index) < 0).any()
    for _ in range(50):
        value = rng.integers(0, 3, n).astype(float)
        chosen = np.zeros(n)
        for group, count in enumerate(problem.budget):
            members = np.flatnonzero(problem.group == group)
            order = sorted(members, key=lambda k: (value[k], index[k]))
            chosen[order[: int(count)]] = 1.0
        assert problem.smallest(value).tolist() == chosen.tolist()
        for group, count in enumerate(problem.budget):
            members = np.flatnonzero(problem.group == group)
            limit = np.sort(value[members])[int(count) - 1]
            assert (problem.threshold(value)[members] == limit).all()


@pytest.mark.parametrize("shape", [{}, {"blocks": 2}, {"linear": True}, {"fixed": True}])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 30.0])
def test_the_bound_counts_a_damping_exactly(shape, damping):
    rng = np.random.default_rng(3)
    for seed in range(4):
        made = make_problem(seed, n=10, kind="gradients", damping=damping, **shape)
        problem, optimum = SelectionProblem(made.instance, 1), made.optimum("selection")
        for x in (np.zeros(problem.n), rng.random(problem.n)):
            assert problem.certified_bound(x) <= optimum + 1e-12 * made.scale()
        if damping == 30.0 and not shape:  # hardly anything else is left
            assert problem.certified_bound(np.zeros(problem.n)) >= 0.8 * optimum
