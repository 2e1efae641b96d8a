"""The exact solver against enumeration, over hard families, with bad starts and interrupted runs."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    InverseHessianBlocks,
    SolverError,
    Status,
    Stop,
    evaluate,
    get_solver,
    solve,
)
from cbs_opt.solvers.kernels import subsets
from cbs_opt.solvers.trees import block_search as blocks
from cbs_opt.solvers.trees.block_search import BlockSearch, combine, multiplier
from cbs_opt.solvers.trees.joint_worker import prepare_joint
from cbs_opt.solvers.trees.selection_worker import prepare_selection
from cbs_opt.solvers.trees.tables import JointTable, SelectionTable, SeparableTable

FAMILIES = ("hidden", "output", "low rank", "gaussian", "ill-scaled", "ties", "dead", "collinear")


def factor(rng, n, family):
    """Rows g with H = GᵀG / m, float64 (m, n)."""
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
    if family == "ill-scaled":
        return rng.normal(size=(n + 1, n)) * 10.0 ** rng.uniform(-6, 1, n)
    if family == "ties":
        return rng.integers(-1, 2, size=(3, n)).astype(float)
    if family == "dead":
        return rng.normal(size=(4, n)) * (rng.random(n) > 0.4)
    return rng.normal(size=(6, 1)) @ rng.normal(size=(1, n)) + 1e-4 * rng.normal(size=(6, n))


def random_case(seed, objective, most=11):
    """An instance, all its feasible selections, bool (R, n), and their losses by textbook formulae."""
    rng = np.random.default_rng([seed, objective == "joint"])
    n = int(rng.integers(1, most + 1))
    G = factor(rng, n, FAMILIES[seed % len(FAMILIES)])
    if objective == "joint":
        G *= 1 / np.sqrt(max(float((G**2).mean()), 1e-300))
    damping = 10.0 ** rng.uniform(-4, 0) if objective == "joint" or rng.random() < 0.3 else 0.0
    size = 10.0 ** rng.uniform(-4, 2)
    G, damping = G * size, damping * size**2
    kind = ("hessian", "inverse", "gradients")[seed % 3]
    if kind == "inverse" and damping == 0:
        kind = "hessian"
    cuts = np.sort(rng.choice(np.arange(1, n), rng.integers(0, 3), replace=False)) if n > 4 else []
    sizes = np.diff([0, *cuts, n]).astype(np.int64)
    ends = np.cumsum(sizes)
    H = np.zeros((n, n))
    for start, stop in zip(ends - sizes, ends, strict=True):
        H[start:stop, start:stop] = G[:, start:stop].T @ G[:, start:stop] / len(G) + damping * np.eye(stop - start)
    parts = [H[start:stop, start:stop] for start, stop in zip(ends - sizes, ends, strict=True)]
    if kind == "gradients":
        curvature = GradientFactor(G, damping, sizes)
    elif kind == "hessian":
        curvature = HessianBlocks.from_blocks(parts)
    else:
        inverses = []
        for part in parts:
            s = 1 / np.sqrt(np.diag(part))
            inverse = np.linalg.inv(part * s[:, None] * s) * s[:, None] * s
            inverses.append((inverse + inverse.T) / 2)
        curvature = InverseHessianBlocks.from_blocks(inverses)
    w = rng.normal(size=n) * 10 ** rng.uniform(-1, 1, n)
    g = 0.3 * rng.normal(size=n) * np.sqrt(np.diag(H)) if rng.random() < 0.3 and damping > 0 else None
    pick = rng.random(n) < rng.random()
    groups = group_budgets = None
    if rng.random() < 0.4:
        groups = rng.integers(0, 3, n)
        group_budgets = np.bincount(groups[pick], minlength=3)
    fixed = None
    if rng.random() < 0.4:
        fixed = np.where(rng.random(n) < 0.25, np.where(pick, 1, -1), 0).astype(np.int8)
    instance = Instance(w, curvature, Budget(int(pick.sum()), groups, group_budgets), linear=g, fixed=fixed)
    every = np.array(list(itertools.product((False, True), repeat=n)))
    every = every[[instance.admits(y) for y in every]]
    g = np.zeros(n) if g is None else g
    return instance, every, losses(H, w, g, every, objective), pick


def losses(H, w, g, every, objective):
    delta = np.where(every, -w, 0.0)
    if objective == "joint":
        s = 1 / np.sqrt(np.diag(H))
        unit = H * s[:, None] * s
        for row, pruned in zip(delta, every, strict=True):
            K = np.flatnonzero(~pruned)
            if K.size:
                row[K] = np.linalg.solve(unit[np.ix_(K, K)], -(row @ H + g)[K] * s[K]) * s[K]
    return 0.5 * np.einsum("ri,ri->r", delta @ H, delta) + delta @ g


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("chunk", range(8))
def test_against_enumeration(objective, chunk, monkeypatch):
    """Half of the runs start from an arbitrary selection; half forbid the enumeration of small blocks."""
    for seed in range(chunk * 16, chunk * 16 + 16):
        instance, _, values, pick = random_case(seed, objective)
        monkeypatch.setattr("cbs_opt.solvers.trees.tables.MAX_WEIGHTS", 18 if seed % 2 else 2)
        start = pick if seed % 4 < 2 else None
        result = solve(instance, "exact", objective=objective, warm_start=start)
        optimum = values.min()
        terms = 0.5 * np.abs(instance.weights) @ np.abs(curvature_matrix(instance)) @ np.abs(instance.weights)
        slack = 1e-6 * abs(optimum) + 1e-12 * terms
        where = f"seed {seed}, {instance.describe()}"
        assert abs(result.objective - optimum) <= slack, where
        assert result.bound is not None, where
        assert result.bound <= optimum + 1e-9 * abs(optimum) + 1e-12 * terms, where
        assert result.bound >= optimum - 2 * slack, where
        if abs(optimum) > 1e-5 * terms:
            assert result.status is Status.OPTIMAL, where


def curvature_matrix(instance):
    H = np.zeros((instance.n, instance.n))
    for k in range(instance.curvature.number_of_blocks):
        part = instance.curvature.block_slice(k)
        H[part, part] = instance.curvature.block(k)
    return H


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupted_runs_keep_valid_bounds(objective, threads):
    rng = np.random.default_rng(5)
    n = 70 if objective == "selection" else 40
    G = factor(rng, n, "output")
    H = G.T @ G / len(G) + 1e-6 * np.eye(n)
    instance = Instance(rng.normal(size=n), HessianBlocks.from_blocks([H]), Budget(n // 2))
    optimum = solve(instance, "exact", objective=objective, stop=Stop(time_limit=20))
    assert optimum.status is Status.OPTIMAL
    last = -np.inf
    for nodes in (1, 5, 20, 60, 200):
        stop = Stop(max_iterations=nodes)
        result = solve(instance, "exact", objective=objective, stop=stop, threads=threads)
        assert instance.admits(result.pruned)
        assert result.bound <= optimum.objective * (1 + 1e-9)
        assert result.objective >= optimum.bound
        if threads == 1:
            assert result.bound >= last
            last = result.bound
    for seconds in (0.0, 0.002, 0.02):
        result = solve(instance, "exact", objective=objective, stop=Stop(time_limit=seconds), threads=threads)
        assert instance.admits(result.pruned)
        assert result.bound is None or result.bound <= optimum.objective * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_one_thread_gives_the_same_nodes(objective):
    rng = np.random.default_rng(1)
    n = 60 if objective == "selection" else 32
    G = factor(rng, n, "output")
    instance = Instance(
        rng.normal(size=n), HessianBlocks.from_blocks([G.T @ G / len(G) + 1e-7 * np.eye(n)]), Budget(n // 2)
    )
    runs = [solve(instance, "exact", objective=objective, threads=1) for _ in range(2)]
    assert runs[0].iterations == runs[1].iterations > 0
    assert [row[1:] for row in runs[0].history] == [row[1:] for row in runs[1].history]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("enumerated", [True, False])
def test_blocks_against_tables_of_their_own(joint, enumerated, monkeypatch):
    monkeypatch.setattr("cbs_opt.solvers.trees.tables.MAX_WEIGHTS", 18 if enumerated else 1)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pieces, tables = [], []
        for size in rng.integers(2, 6, rng.integers(2, 5)):
            G = factor(rng, size, FAMILIES[int(rng.integers(len(FAMILIES)))])
            H = G.T @ G / len(G) + 10.0 ** rng.uniform(-3, 0) * np.eye(size)
            w = rng.normal(size=size)
            every = np.array(list(itertools.product((False, True), repeat=int(size))))
            if joint:
                pieces.append(JointTable(np.linalg.inv(H), H, w))
                values = losses(H, w, np.zeros(size), every, "joint")
            else:
                c = 0.3 * rng.normal(size=size)
                pieces.append(SelectionTable(H, c))
                values = 0.5 * np.einsum("ri,ri->r", every @ H, every) + every @ c
            tables.append([values[every.sum(1) == k].min() for k in range(size + 1)])
        price = rng.normal(size=3) ** 2
        pieces.append(SeparableTable(price))
        tables.append([0.0, *np.cumsum(np.sort(price))])
        n = sum(piece.n for piece in pieces)
        budget = int(rng.integers(0, n + 1))
        best = min(
            sum(table[k] for table, k in zip(tables, counts, strict=True))
            for counts in itertools.product(*[range(len(table)) for table in tables])
            if sum(counts) == budget
        )
        search = BlockSearch(pieces, budget, 1e-7, threads=1 + seed % 2)
        search.run(lambda: False, lambda: False)
        assert search.value == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert search.bound <= best + 1e-9 * abs(best) + 1e-12
        assert search.bound >= best - 1e-6 * abs(best) - 1e-12
        assert search.selection().sum() == budget


def test_combine_is_the_best_sum():
    rng = np.random.default_rng(3)
    for _ in range(50):
        tables = [np.cumsum(rng.normal(size=rng.integers(1, 5))) for _ in range(3)]
        budget = int(rng.integers(0, sum(t.size - 1 for t in tables) + 1))
        wanted = min(
            sum(t[k] for t, k in zip(tables, counts, strict=True))
            for counts in itertools.product(*[range(t.size) for t in tables])
            if sum(counts) == budget
        )
        mu, bound = multiplier(tables, budget)
        value, path = combine(tables, budget, mu, np.inf)
        assert value == pytest.approx(wanted)
        assert bound <= wanted + 1e-9
        assert path.sum() == budget
    assert blocks.combine([np.array([0.0, 1.0])], 5, 0.0, np.inf)[0] == np.inf


@pytest.mark.parametrize("joint", [False, True])
def test_subsets_are_the_best_of_each_number(joint):
    rng = np.random.default_rng(0)
    G, w = rng.normal(size=(9, 7)), rng.normal(size=7)
    H = G.T @ G
    every = np.array(list(itertools.product((False, True), repeat=7)))
    if joint:
        values = losses(H, w, np.zeros(7), every, "joint")
        best, code = subsets.all_subsets(np.linalg.inv(H), w, True)
    else:
        values = 0.5 * np.einsum("ri,ri->r", every @ H, every) + every @ w
        best, code = subsets.all_subsets(H, w, False)
    for k in range(8):
        of = every.sum(1) == k
        assert best[k] == pytest.approx(values[of].min(), abs=1e-12)
        chosen = ((int(code[k]) >> np.arange(7)) & 1).astype(bool)
        assert values[(every == chosen).all(1)][0] == pytest.approx(best[k], abs=1e-12)


def test_relaxed_diagonals_are_safe():
    """The shifted matrices stay positive definite where the relaxations need it."""
    rng = np.random.default_rng(2)
    G = factor(rng, 30, "hidden")
    H = G.T @ G / len(G) + 1e-5 * np.eye(30)
    group = np.repeat([0, 1], 15)
    search = prepare_selection(H, np.zeros(30), group, np.array([5, 9]), [])
    worker = search.queue.new_worker(np.array([np.inf]))
    worker.load(search.queue.best_open())
    shift = worker.better_diagonal()
    N = np.zeros((30, 28))  # sums of both groups are zero
    for k in range(14):
        N[k, k], N[14, k] = 1, -1
        N[15 + k, 14 + k], N[29, 14 + k] = 1, -1
    Q = search.problem.Q
    assert np.linalg.eigvalsh(N.T @ (Q - np.diag(shift)) @ N)[0] > -1e-12 * np.trace(Q)
    joint = prepare_joint(np.linalg.inv(H), H, rng.normal(size=30), group, np.array([5, 9]), [])
    worker = joint.queue.new_worker(np.array([np.inf]))
    worker.load(joint.queue.best_open())
    d = worker.better_diagonal()
    assert (d > 0).all()
    assert np.linalg.eigvalsh(np.linalg.inv(joint.problem.A) - np.diag(d))[0] > -1e-9


def test_proves_what_enumeration_cannot():
    rng = np.random.default_rng(7)
    G = factor(rng, 60, "output")
    instance = Instance(rng.normal(size=60), GradientFactor(G, 1e-6, [60]), Budget(30))
    started = time.perf_counter()
    result = solve(instance, "exact", stop=Stop(time_limit=20))
    assert result.status is Status.OPTIMAL
    assert result.gap <= 1e-6
    assert result.extras["nodes"] == result.iterations
    assert result.extras["open"] == 0
    assert time.perf_counter() - started < 25
    search = solve(instance, "search", stop=Stop(max_iterations=30))
    assert result.objective <= search.objective * (1 + 1e-6)


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_too_large_is_one_sentence(objective):
    n = 2100
    rng = np.random.default_rng(0)
    instance = Instance(rng.normal(size=n), GradientFactor(rng.normal(size=(3, n)), 1.0, [n]), Budget(n // 2))
    with pytest.raises(SolverError, match=r"at most 2000 coupled weights.*has 2100") as refusal:
        solve(instance, "exact", objective=objective)
    assert "\n" not in str(refusal.value)


def test_evaluator_agrees():
    instance, _, _, _ = random_case(3, "joint")
    result = solve(instance, "exact", objective="joint")
    assert evaluate(instance, result.pruned).joint_loss == result.objective
    assert get_solver("exact").supports.bound
