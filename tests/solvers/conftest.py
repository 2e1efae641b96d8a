"""Small problems of the exact tests, with all their selections and losses by textbook formulae."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cbs_opt import Budget, Instance
from cbs_opt.testing import make_curvature

FAMILIES = ("hidden", "output", "low rank", "gaussian", "ill-scaled")
DEGENERATE = ("ties", "dead", "collinear")
KINDS = ("hessian", "inverse_hessian", "gradients")


def factor(rng, n, family):
    """Rows of gradients, float64 (m, n)."""
    if family == "hidden":  # rectified activations: nonnegative, many zeros, strongly correlated
        mix = rng.normal(size=(4, n)) + rng.normal(size=n)
        return np.maximum(rng.normal(size=(3 * n, 4)) @ mix + 0.3 * rng.normal(size=(3 * n, n)), 0)
    if family == "output":  # activations times small residuals of a softmax
        rows = rng.dirichlet(np.ones(4), size=3 * n)[:, :1] - (rng.random((3 * n, 1)) < 0.25)
        return np.maximum(rng.normal(size=(3 * n, n)) + 0.5, 0) * rows
    if family == "low rank":
        return rng.normal(size=(int(rng.integers(1, 4)), n))
    if family == "gaussian":
        return rng.normal(size=(n + 3, n))
    if family == "ill-scaled":  # curvatures from 1e-12 to 1e2
        return rng.normal(size=(n + 1, n)) * 10.0 ** rng.uniform(-6, 1, n)
    if family == "ties":
        return rng.integers(-1, 2, size=(3, n)).astype(float)
    if family == "dead":
        return rng.normal(size=(4, n)) * (rng.random(n) > 0.4)
    assert family == "collinear"
    return rng.normal(size=(6, 1)) @ rng.normal(size=(1, n)) + 1e-4 * rng.normal(size=(6, n))


def size_of(seed):
    """Mostly tiny; every twelfth problem has 13 to 16 weights."""
    return 13 + (seed // 12) % 4 if seed % 12 == 11 else 1 + seed % 10


def make_case(seed, family, kind, objective, scale=1.0):
    """An instance, its feasible selections, bool (R, n), and their losses with what rounding may do to them."""
    number = (*FAMILIES, *DEGENERATE).index(family)
    rng = np.random.default_rng([seed, number, KINDS.index(kind), objective == "joint"])
    n = size_of(seed)
    G = scale * factor(rng, n, family)
    damping = 0.0
    if objective == "joint" or kind == "inverse_hessian" or rng.random() < 0.3:
        damping = 10.0 ** rng.uniform(-4, 0) * max(float((G**2).mean()), 1e-12 * scale**2)
    cuts = np.sort(rng.choice(np.arange(1, n), rng.integers(0, 3), replace=False)) if n > 4 else []
    sizes = np.diff([0, *cuts, n]).astype(np.int64)
    curvature, H = make_curvature(kind, G, damping, sizes)
    w = rng.normal(size=n) * 10 ** rng.uniform(-1, 1, n)
    linear = 0.3 * rng.normal(size=n) * np.sqrt(np.diag(H)) if seed % 3 == 1 and damping else None
    pick = rng.random(n) < rng.uniform(0.1, 0.9)
    groups = group_budgets = fixed = None
    if seed % 4 == 2:
        groups = rng.integers(0, 3, n)
        group_budgets = np.bincount(groups[pick], minlength=3)
    if seed % 3 == 2:
        fixed = np.where(rng.random(n) < 0.25, np.where(pick, 1, -1), 0).astype(np.int8)
    instance = Instance(w, curvature, Budget(int(pick.sum()), groups, group_budgets), linear=linear, fixed=fixed)
    every = ((np.arange(1 << n)[:, None] >> np.arange(n)) & 1).astype(bool)
    every = every[every.sum(1) == pick.sum()]
    if groups is not None:
        every = every[(every @ np.eye(3, dtype=int)[groups] == group_budgets).all(1)]
    if fixed is not None:
        every = every[(every[:, fixed == 1]).all(1) & ~(every[:, fixed == -1]).any(1)]
    values, sizes_ = losses(H, w, np.zeros(n) if linear is None else linear, every, objective)
    return instance, every, values, sizes_


def losses(H, w, g, every, objective):
    """The losses of selections by textbook formulae, all at once, and the sums of the sizes of their terms."""
    delta = np.where(every, -w, 0.0)
    if objective == "joint":
        s = 1 / np.sqrt(np.diag(H))
        kept = ~every
        systems = np.where(kept[:, :, None] & kept[:, None, :], H * s[:, None] * s, np.eye(w.size))
        right = np.where(kept, -(delta @ H + g) * s, 0.0)
        delta = delta + np.linalg.solve(systems, right[:, :, None])[:, :, 0] * s * kept
    values = 0.5 * np.einsum("ri,ri->r", delta @ H, delta) + delta @ g
    size = 0.5 * np.einsum("ri,ri->r", np.abs(delta) @ np.abs(H), np.abs(delta)) + np.abs(delta) @ np.abs(g)
    return values, size


@pytest.fixture(scope="session")
def cases():
    """`make_case`, `factor`, `losses` and the names of families and kinds."""
    names = {"families": FAMILIES, "degenerate": DEGENERATE, "kinds": KINDS}
    return SimpleNamespace(make=make_case, factor=factor, losses=losses, **names)


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family in turn, but for the degenerate ones."""
    return request.param
