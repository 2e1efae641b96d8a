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


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("chunk", range(8))
def test_against_enumeration(cases, objective, chunk, monkeypatch):
    """All families and scales; half start from an arbitrary selection, half may not enumerate small blocks."""
    families = (*cases.families, *cases.degenerate)
    for seed in range(chunk * 16, chunk * 16 + 16):
        family, kind, scale = families[seed % len(families)], cases.kinds[seed % 3], 10.0 ** (seed % 7 - 4)
        instance, every, values, sizes = cases.make(seed, family, kind, objective, scale)
        monkeypatch.setattr("cbs_opt.solvers.trees.tables.MAX_WEIGHTS", 18 if seed % 2 else 2)
        start = every[len(every) // 2] if seed % 4 < 2 else None
        result = solve(instance, "exact", objective=objective, warm_start=start)
        best = int(np.argmin(values))
        optimum, terms = values[best], sizes[best]
        slack = 1e-6 * abs(optimum) + 1e-12 * terms
        where = f"seed {seed}, {family}, {instance.describe()}"
        assert abs(result.objective - optimum) <= slack, where
        assert result.bound is not None, where
        assert result.bound <= optimum + 1e-9 * abs(optimum) + 1e-12 * terms, where
        assert result.bound >= optimum - 2 * slack, where
        if abs(optimum) > 1e-5 * terms:
            assert result.status is Status.OPTIMAL, where


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupted_runs_keep_valid_bounds(cases, objective, threads):
    rng = np.random.default_rng(5)
    n = 70 if objective == "selection" else 40
    G = cases.factor(rng, n, "output")
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
def test_one_thread_gives_the_same_nodes(cases, objective):
    rng = np.random.default_rng(1)
    n = 60 if objective == "selection" else 32
    G = cases.factor(rng, n, "output")
    instance = Instance(
        rng.normal(size=n), HessianBlocks.from_blocks([G.T @ G / len(G) + 1e-7 * np.eye(n)]), Budget(n // 2)
    )
    runs = [solve(instance, "exact", objective=objective, threads=1) for _ in range(2)]
    assert runs[0].iterations == runs[1].iterations > 0
    assert [row[1:] for row in runs[0].history] == [row[1:] for row in runs[1].history]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("enumerated", [True, False])
def test_blocks_against_tables_of_their_own(cases, joint, enumerated, monkeypatch):
    monkeypatch.setattr("cbs_opt.solvers.trees.tables.MAX_WEIGHTS", 18 if enumerated else 1)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pieces, tables = [], []
        for size in rng.integers(2, 6, rng.integers(2, 5)):
            G = cases.factor(rng, size, rng.choice([*cases.families, *cases.degenerate]))
            H = G.T @ G / len(G) + 10.0 ** rng.uniform(-3, 0) * np.eye(size)
            w = rng.normal(size=size)
            every = np.array(list(itertools.product((False, True), repeat=int(size))))
            if joint:
                pieces.append(JointTable(np.linalg.inv(H), H, w))
                values = cases.losses(H, w, np.zeros(size), every, "joint")[0]
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
def test_subsets_are_the_best_of_each_number(cases, joint):
    rng = np.random.default_rng(0)
    G, w = rng.normal(size=(9, 7)), rng.normal(size=7)
    H = G.T @ G
    every = np.array(list(itertools.product((False, True), repeat=7)))
    if joint:
        values = cases.losses(H, w, np.zeros(7), every, "joint")[0]
        best, code = subsets.all_subsets(np.linalg.inv(H), w, True)
    else:
        values = 0.5 * np.einsum("ri,ri->r", every @ H, every) + every @ w
        best, code = subsets.all_subsets(H, w, False)
    for k in range(8):
        of = every.sum(1) == k
        assert best[k] == pytest.approx(values[of].min(), abs=1e-12)
        chosen = ((int(code[k]) >> np.arange(7)) & 1).astype(bool)
        assert values[(every == chosen).all(1)][0] == pytest.approx(best[k], abs=1e-12)


def test_relaxed_diagonals_are_safe(cases):
    """The shifted matrices stay positive definite where the relaxations need it."""
    rng = np.random.default_rng(2)
    G = cases.factor(rng, 30, "hidden")
    H = G.T @ G / len(G) + 1e-5 * np.eye(30)
    group = np.repeat([0, 1], 15)
    search = prepare_selection(H, np.zeros(30), group, np.array([5, 9]), [])
    worker = search.queue.new_worker(np.array([np.inf]))
    worker.load(search.queue.best_open())
    B = np.zeros((30, 28))  # sums of both groups are zero
    for k in range(14):
        B[k, k], B[14, k] = 1, -1
        B[15 + k, 14 + k], B[29, 14 + k] = 1, -1
    Q = search.problem.Q
    for thorough in (False, True):
        shift, _ = worker.better_relaxation(thorough)
        R = Q - np.diag(shift.diagonal) - shift.products()
        assert np.linalg.eigvalsh(B.T @ R @ B)[0] > -1e-12 * np.trace(Q)
    joint = prepare_joint(np.linalg.inv(H), H, rng.normal(size=30), group, np.array([5, 9]), [])
    worker = joint.queue.new_worker(np.array([np.inf]))
    worker.load(joint.queue.best_open())
    shift, _ = worker.better_relaxation(False)
    assert (shift.diagonal > 0).all()
    assert np.linalg.eigvalsh(np.linalg.inv(joint.problem.A) - np.diag(shift.diagonal))[0] > -1e-9


def test_proves_what_enumeration_cannot(cases):
    rng = np.random.default_rng(7)
    G = cases.factor(rng, 60, "output")
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


def test_evaluator_agrees(cases):
    instance, _, _, _ = cases.make(3, "ill-scaled", "hessian", "joint")
    result = solve(instance, "exact", objective="joint")
    assert evaluate(instance, result.pruned).joint_loss == result.objective
    assert get_solver("exact").supports.bound
