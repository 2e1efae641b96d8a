"""Weights without a term with any other: their ½Q_ii is a linear cost, so that sorting is proven optimal."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    InverseHessianBlocks,
    Status,
    Stop,
    selection_loss,
    solve,
)
from cbs_opt.certificate import forced_state, selection_parts, verify
from cbs_opt.files.certificate_file import read_certificate
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.testing import make_curvature

KINDS = ("hessian", "inverse_hessian", "gradients", "blocks", "float32 hessian")


def diagonal_curvature(kind, d):
    """H = diag(d), d > 0, in each form that can hold it."""
    n = d.size
    if kind == "gradients":
        return GradientFactor(np.diag(np.sqrt(n * d)), 0.0)
    if kind == "inverse_hessian":
        return InverseHessianBlocks.from_blocks([np.diag(1 / d)])
    if kind == "blocks":
        return HessianBlocks.from_blocks([np.diag(part) for part in np.array_split(d, min(3, n))])
    return HessianBlocks.from_blocks([np.diag(d).astype(np.float32 if "32" in kind else np.float64)])


def sorted_optimum(instance, cost):
    """The loss of the cheapest weights of each group, with the fixed ones decided."""
    fixed = np.zeros(instance.n, int) if instance.fixed is None else instance.fixed
    group = instance.budget.group_of(instance.n)
    total = cost[fixed == 1].sum()
    for g, p in enumerate(instance.budget.per_group):
        inside = np.sort(cost[(group == g) & (fixed == 0)])
        total += inside[: p - np.count_nonzero(fixed[group == g] == 1)].sum()
    return total


@st.composite
def diagonal_instances(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n = draw(st.integers(1, 40))
    ties = draw(st.booleans())
    d = np.ones(n) if ties else rng.lognormal(0, 2, n)
    w = np.where(rng.random(n) < 0.5, 1.0, -2.0) if ties else rng.standard_normal(n)
    if draw(st.booleans()):
        w[rng.random(n) < 0.2] = 0.0
    kind = draw(st.sampled_from(KINDS))
    fixed = rng.choice([-1, 0, 0, 0, 1], size=n).astype(np.int8) if draw(st.booleans()) else None
    group = rng.integers(draw(st.integers(1, 4)), size=n)
    low = np.zeros(n) if fixed is None else fixed == 1
    high = np.ones(n) if fixed is None else fixed != -1
    size = group.max() + 1
    low, high = np.bincount(group, low, size).astype(int), np.bincount(group, high, size).astype(int)
    each = rng.integers(low, high + 1)
    budget = Budget(int(each[0])) if size == 1 else Budget(int(each.sum()), group, each)
    linear = rng.standard_normal(n) if draw(st.booleans()) else None
    instance = Instance(w, diagonal_curvature(kind, d), budget, linear, fixed)
    d = instance.curvature.diagonal()
    cost = 0.5 * w**2 * d - (0.0 if linear is None else linear * w)
    return instance, cost


@given(diagonal_instances())
@pytest.mark.parametrize("solver", ["search", "relax", "exact", "highs"])
def test_sorting_is_proven_optimal(solver, made):
    instance, cost = made
    result = solve(instance, solver)
    size = np.abs(cost).sum()
    assert result.objective == pytest.approx(sorted_optimum(instance, cost), rel=1e-12, abs=1e-13 * size)
    assert result.bound <= result.objective
    assert result.bound >= result.objective - 1e-6 * abs(result.objective) - 1e-13 * size
    if abs(result.objective) > 1e-5 * size:
        assert result.status is Status.OPTIMAL
    assert result.iterations <= 1


@given(diagonal_instances(), st.integers(0, 10**6))
def test_the_bound_is_the_optimum_from_any_point(made, seed):
    instance, cost = made
    reduced = SelectionProblem(instance)
    assert reduced.component_sizes == []
    assert not reduced.columns.diagonal.any()
    optimum = sorted_optimum(instance, cost)
    bound = reduced.certified_bound(np.random.default_rng(seed).random(reduced.n))
    assert optimum - 1e-12 * np.abs(cost).sum() <= bound <= optimum + 1e-15 * np.abs(cost).sum()


def mixed(seed, kind, *, n=12, coupled=5, linear=False, fixed=False, groups=1, same_block=True):
    """Some coupled weights among uncoupled ones, in one block or in blocks of their own; also H."""
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((2 * n, n)) * rng.uniform(0.3, 2.0, n)
    chosen = np.sort(rng.permutation(n)[:coupled]) if same_block else np.arange(coupled)
    G[:n, chosen] = 0.0
    rest = np.setdiff1d(np.arange(n), chosen)
    diagonal = rng.uniform(1.0, 5.0, n)
    G[:, rest] = 0.0
    G[rest, rest] = np.sqrt(2 * n * diagonal[rest])
    curvature, H = make_curvature(kind, G, 1e-3, [n] if same_block else [coupled, n - coupled])
    fix = np.zeros(n, np.int8)
    fix[chosen[:1]], fix[rest[:1]] = 1, -1  # a pruned weight that others are coupled with
    group = np.arange(n) % groups
    each = np.bincount(group) // 2
    instance = Instance(
        rng.standard_normal(n),
        curvature,
        Budget(n // 2) if groups == 1 else Budget(int(each.sum()), group, each),
        linear=0.3 * rng.standard_normal(n) if linear else None,
        fixed=fix if fixed else None,
    )
    return instance, H


SHAPES = (
    {},
    {"linear": True},
    {"fixed": True},
    {"groups": 3},
    {"fixed": True, "linear": True, "groups": 2, "same_block": False},
    {"coupled": 2, "fixed": True},
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["hessian", "inverse_hessian", "gradients"])
def test_partly_coupled_problems(kind, shape):
    for seed in range(3):
        instance, H = mixed(seed, kind, **shape)
        optimum = solve(instance, "brute", objective="selection").objective
        reduced = SelectionProblem(instance)
        free = reduced.uncoupled.size
        assert free >= instance.n - shape.get("coupled", 5) - 1
        rng = np.random.default_rng(seed)
        for _ in range(10):
            x = np.clip(1.5 * rng.standard_normal(reduced.n), 0, 1)
            assert reduced.certified_bound(x) <= optimum
        for solver in ("search", "exact", "highs"):
            result = solve(instance, solver)
            assert result.status is Status.OPTIMAL
            assert result.objective == pytest.approx(optimum, rel=1e-9)
        relaxed = solve(instance, "relax")
        assert relaxed.bound <= optimum <= relaxed.objective + 1e-12
        # Q y = (w H w) y, by definition, for a few selections.
        Q = instance.weights[:, None] * H * instance.weights
        for _ in range(5):
            y = reduced.smallest(rng.standard_normal(reduced.n))
            value = 0.5 * y @ reduced.columns.product(y) + reduced.linear @ y
            pruned = reduced.expand(y).astype(float)
            c = 0.0 if instance.linear is None else -instance.linear * instance.weights
            assert reduced.from_units(value) == pytest.approx(0.5 * pruned @ Q @ pruned + (c * pruned).sum())


@pytest.mark.parametrize("shape", [*SHAPES, {"coupled": 0}, {"coupled": 0, "groups": 3}], ids=str)
@pytest.mark.parametrize("kind", ["hessian", "gradients"])
def test_certificates_of_partly_coupled_problems_are_valid(kind, shape, tmp_path):
    instance, _ = mixed(7, kind, **shape)
    path = tmp_path / "proof.npz"
    result = solve(instance, "exact", parameters={"certificate": str(path)})
    verified = verify(instance, read_certificate(path))
    assert verified.bound == pytest.approx(result.objective, rel=2e-6)
    assert verified.bound <= result.objective


@pytest.mark.parametrize("shape", [*SHAPES, {"coupled": 0}], ids=str)
def test_the_parts_of_the_checker_add_up_to_the_loss(shape):
    """A cost that is moved twice, or not at all, would let a wrong proof pass."""
    instance, _ = mixed(7, "hessian", **shape)
    state, left = forced_state(instance)
    pieces = np.where(state < 0, 0, -1)
    group = instance.budget.group_of(instance.n)
    (part,), constant = selection_parts(instance, state, pieces, 1, group, left)
    rng = np.random.default_rng(1)
    for _ in range(20):
        chosen = rng.integers(2, size=part.index.size).astype(np.int8)
        pruned = state == 1
        pruned[part.index] = chosen == 1
        loss = selection_loss(instance, pruned)
        assert constant + part.value(chosen) == pytest.approx(loss, rel=1e-9, abs=1e-12)
        base, price = part.frame(part.state, None, left).prices(rng.random((1, chosen.size)), part.state[None])
        assert constant + base[0] + price[0] @ chosen <= loss + 1e-12


@pytest.mark.parametrize("solver", ["search", "relax", "exact"])
def test_many_uncoupled_weights_are_sorted(solver):
    rng = np.random.default_rng(1)
    n = 20_000
    w, group = rng.standard_normal(n), np.arange(n) % 5
    G = np.zeros((3, n), dtype=np.float32)
    instance = Instance(w, GradientFactor(G, 0.7), Budget(5 * 3000, group, np.full(5, 3000)))
    result = solve(instance, solver, stop=Stop(max_iterations=1))
    assert result.status is Status.OPTIMAL
    assert result.objective == pytest.approx(sorted_optimum(instance, 0.35 * w**2), rel=1e-12)


def test_components_of_sparse_gradients():
    """Pairs, triples and single weights, found whatever the order of the samples."""
    rng = np.random.default_rng(2)
    n = 200
    order = rng.permutation(n)
    label = np.full(n, -1)
    label[order[:100]] = np.arange(100) // 2  # 50 pairs
    label[order[100:130]] = 50 + np.arange(30) // 3  # 10 triples
    rows = []
    for c in range(60):
        at = np.flatnonzero(label == c)
        for a, b in itertools.pairwise(at):
            row = np.zeros(n)
            row[[a, b]] = rng.standard_normal(2)
            rows.append(row)
    for i in np.flatnonzero(label < 0)[:40]:
        row = np.zeros(n)
        row[i] = 1.0
        rows.append(row)
    G = np.array(rows)[rng.permutation(len(rows))]
    components = SelectionProblem(Instance(rng.uniform(1, 2, n), GradientFactor(G, 0.1), 50)).components
    full = [c.index for c in components if c.coupled]
    assert sorted(at.size for at in full) == [2] * 50 + [3] * 10
    assert all(np.unique(label[at]).size == 1 for at in full)
    np.testing.assert_array_equal(components[0].index, np.flatnonzero(label < 0))


def test_too_many_components_of_gradients_stay_together_but_for_single_weights():
    pairs, n = 1200, 2500
    G = np.zeros((pairs, n), dtype=np.float32)
    G[np.arange(pairs), 2 * np.arange(pairs)] = G[np.arange(pairs), 2 * np.arange(pairs) + 1] = 1.0
    components = SelectionProblem(Instance(np.ones(n), GradientFactor(G, 0.1), 50)).components
    assert not components[0].coupled
    np.testing.assert_array_equal(components[0].index, np.arange(2 * pairs, n))
    assert len(components) < pairs
    np.testing.assert_array_equal(np.sort(np.concatenate([c.index for c in components])), np.arange(n))
