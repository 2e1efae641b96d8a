"""Presolve never changes the optimum, whatever it settles, splits off or rescales."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt import Budget, GradientFactor, HessianBlocks, Instance, InverseHessianBlocks, selection_loss, solve
from cbs_opt.solvers.problem.selection_problem import SelectionProblem

KINDS = ("hessian", "inverse_hessian", "gradients")


def component_problem(seed, kind, *, n=9, components=3, blocks=1, damping=1e-3, zero_columns=0, zero_weights=0):
    """An H whose blocks fall apart into scattered components: weights, curvature."""
    rng = np.random.default_rng(seed)
    m = 2 * n
    label = rng.integers(components, size=n)
    G = rng.standard_normal((m, n)) * rng.uniform(0.1, 3.0, n)
    G[(np.arange(m) % components)[:, None] != label] = 0.0
    G[:, rng.permutation(n)[:zero_columns]] = 0.0
    w = rng.standard_normal(n)
    w[rng.permutation(n)[:zero_weights]] = 0.0
    sizes = np.diff([0, *np.sort(rng.choice(np.arange(1, n), blocks - 1, replace=False)), n])
    if kind == "gradients":
        return w, GradientFactor(G, damping, sizes)
    parts = []
    for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        H, here = np.zeros((size, size)), label[start : start + size]
        for c in range(components):
            at = np.flatnonzero(here == c)
            g = G[:, start + at]
            part = g.T @ g / m + (damping or 1e-6) * np.eye(at.size)
            H[np.ix_(at, at)] = np.linalg.inv(part) if kind == "inverse_hessian" else part
        parts.append((H + H.T) / 2)
    made = InverseHessianBlocks if kind == "inverse_hessian" else HessianBlocks
    return w, made.from_blocks(parts)


def random_budget(rng, n, grouping, fixed):
    """A budget that agrees with `fixed`; some groups are forced or used up."""
    groups = {"one": np.zeros(n, int), "rows": np.arange(n) % 3, "layers": np.arange(n) * 3 // n}[grouping]
    low = np.bincount(groups[fixed == 1], minlength=groups.max() + 1)
    high = np.bincount(groups[fixed != -1], minlength=groups.max() + 1)
    each = np.array([rng.choice([a, b, rng.integers(a, b + 1)]) for a, b in zip(low, high, strict=True)])
    return Budget(int(each[0])) if grouping == "one" else Budget(int(each.sum()), groups, each)


def reduced_points(problem):
    """Every feasible binary point of the reduced problem and its objective there."""
    n = problem.n
    Q = np.array([problem.columns.product(row) for row in np.eye(n)]).reshape(n, n)
    for bits in itertools.product((0.0, 1.0), repeat=n):
        y = np.array(bits)
        if (np.bincount(problem.group, y, problem.budget.size) == problem.budget).all():
            yield y, 0.5 * y @ Q @ y + problem.linear @ y


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    grouping=st.sampled_from(("one", "rows", "layers")),
    components=st.integers(1, 4),
    blocks=st.integers(1, 3),
    zeros=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    linear=st.booleans(),
    fixed=st.booleans(),
    damping=st.sampled_from((0.0, 1e-3)),
    exponent=st.sampled_from((-8, 0, 5)),
)
def test_the_optimum_is_the_same(
    seed, kind, grouping, components, blocks, zeros, linear, fixed, damping, exponent
):
    rng = np.random.default_rng(seed)
    w, curvature = component_problem(
        seed,
        kind,
        components=components,
        blocks=blocks,
        damping=damping,
        zero_columns=zeros[0],
        zero_weights=zeros[1],
    )
    n = w.size
    fix = rng.choice([-1, 0, 0, 0, 1], size=n).astype(np.int8) if fixed else np.zeros(n, np.int8)
    instance = Instance(
        w * 10.0**exponent,
        curvature,
        random_budget(rng, n, grouping, fix),
        linear=0.3 * rng.standard_normal(n) * 10.0**exponent if linear else None,
        fixed=fix if fixed else None,
    )
    problem = SelectionProblem(instance)
    rounding = 1e-10 * abs(0.5 * problem.scale) * n**2 + 1e-10 * np.abs(problem.original.c).sum()
    optimum, seen = np.inf, set()
    for y, value in reduced_points(problem):
        pruned = problem.expand(y)
        assert instance.admits(pruned)
        mapped = problem.from_units(value)
        assert mapped == pytest.approx(selection_loss(instance, pruned), rel=1e-8, abs=rounding)
        np.testing.assert_array_equal(problem.restrict(pruned), y)
        seen.add(pruned.tobytes())
        optimum = min(optimum, mapped)
    oracle = solve(instance, "brute", objective="selection")
    assert optimum == pytest.approx(oracle.objective, rel=1e-8, abs=rounding)
    assert len(seen) == oracle.iterations  # every feasible selection is one point of the reduced problem


@pytest.mark.parametrize("kind", KINDS)
def test_components_have_no_terms_with_each_other(kind):
    w, curvature = component_problem(4, kind, n=20, components=4, blocks=2)
    reduced = SelectionProblem(Instance(w, curvature, Budget(9)))
    H = np.zeros((20, 20))
    for k in range(2):
        part = curvature.block_slice(k)
        H[part, part] = curvature.block(k)
    np.testing.assert_array_equal(np.sort(reduced.index), np.arange(20))
    label = np.empty(20, int)
    for c, component in enumerate(reduced.components):
        label[component.index] = c
        if not component.coupled:
            label[component.index] = 100 + component.index
    across = label[:, None] != label[None, :]
    np.testing.assert_allclose(H[across], 0.0, atol=1e-12 * np.abs(H).max())
    assert len(reduced.component_sizes) >= 4


def test_dead_weights_are_set_apart_and_still_counted():
    w, curvature = component_problem(1, "gradients", damping=0.0, zero_columns=3, zero_weights=2, components=1)
    reduced = SelectionProblem(Instance(w, curvature, Budget(4)))
    uncoupled = reduced.index[reduced.uncoupled]
    dead = (w == 0) | ~curvature.gradients.any(axis=0)
    np.testing.assert_array_equal(uncoupled, np.flatnonzero(dead))
    assert 3 <= uncoupled.size <= 5
    assert reduced.index.size == 9
    assert reduced.budget.tolist() == [4]


def test_a_free_weight_is_not_always_pruned():
    """Two weights that cancel each other are better than a free one and one of the two."""
    G = np.array([[1.0, 1.0, 0.0]])
    instance = Instance(np.array([3.0, -3.0, 5.0]), GradientFactor(G, 0.0), 2)
    assert solve(instance, "search").pruned.tolist() == [True, True, False]
    assert solve(instance, "search").objective == 0.0


@pytest.mark.parametrize("forced", [(0, 3), (3, 0), (3, 3), (0, 0)])
def test_groups_that_are_used_up_or_forced_leave_the_problem(forced, problem):
    base = problem(2, n=6, kind="hessian", linear=True).instance
    groups = np.array([0, 1, 0, 1, 0, 1])
    instance = Instance(base.weights, base.curvature, Budget(sum(forced), groups, forced), linear=base.linear)
    reduced = SelectionProblem(instance)
    assert reduced.n == 0
    assert not reduced.budget.any()
    nothing = np.zeros(0)
    assert reduced.from_units(0.0) == pytest.approx(selection_loss(instance, reduced.expand(nothing)))


@pytest.mark.parametrize("exponent", [-30, -8, 0, 8, 30])
def test_rescaling_is_by_a_power_of_two(exponent, problem):
    base = problem(3, kind="gradients").instance
    reduced = SelectionProblem(Instance(base.weights * 10.0**exponent, base.curvature, 4))
    mantissa, _ = np.frexp(reduced.scale)
    assert mantissa == 0.5
    largest = max(block.diagonal().max() for block in reduced.columns.blocks)
    assert 0.25 <= largest <= 4


@pytest.mark.parametrize("budget", [0, 3])
def test_a_problem_of_zeros_has_the_scale_one(budget):
    reduced = SelectionProblem(Instance(np.zeros(3), GradientFactor(np.ones((2, 3)), 0.0), budget))
    assert reduced.scale == 1.0
    assert reduced.offset == 0.0
