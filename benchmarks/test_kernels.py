"""Micro-benchmarks: swaps and relaxation steps per second, seconds of a joint swap.

Not collected by the default run of the tests. With ``pip install "cbs-opt[dev]"``::

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_kernels.py --benchmark-columns=min,median

prints the time of a call; the number of steps a call and microseconds a step stand in the `extra_info` of the file
that ``--benchmark-json`` writes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cbs_opt import Budget, GradientFactor, Instance
from cbs_opt.solvers.joint.tableau import Tableau
from cbs_opt.solvers.joint.warm_up import warm_up_joint
from cbs_opt.solvers.kernels import selection_numba as kernels
from cbs_opt.solvers.kernels.warm_up import warm_up_selection
from cbs_opt.solvers.problem.columns import Columns, DenseBlock
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.core import Core
from cbs_opt.solvers.selection.relaxation import Relaxation
from cbs_opt.typing import FloatArray

pytest.importorskip("pytest_benchmark")

SIZES = (300, 3000, 10_000)
GRADIENTS = 400


def gradients(n: int, m: int = GRADIENTS) -> FloatArray:
    """Random gradients of many magnitudes, float64 (m, n)."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((m, n)) * rng.lognormal(0.0, 1.0, n)


def dense(n: int) -> FloatArray:
    """A dense positive semidefinite Q, float64 (n, n)."""
    G = gradients(n)
    return np.asarray(G.T @ G / GRADIENTS)


def note(benchmark: Any, steps: float) -> None:
    """Keep steps a call and microseconds a step with the figures."""
    benchmark.extra_info["steps a call"] = steps
    if benchmark.stats is not None:  # timing may be switched off
        benchmark.extra_info["microseconds a step"] = 1e6 * benchmark.stats.stats.median / steps


@pytest.mark.parametrize("n", SIZES)
def test_tabu_swaps(benchmark: Any, n: int) -> None:
    """Drop/add tabu steps with dense Q, at sparsity .8."""
    warm_up_selection()
    steps = 300
    columns = Columns([DenseBlock(dense(n))])
    core = Core(columns, np.zeros(n, dtype=np.int64), np.arange(n))
    y = (np.arange(n) < 0.8 * n).astype(np.int8)
    h = core.product(y.astype(np.float64))
    f = float(0.5 * y @ h)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        z, release = y.copy(), np.zeros(n, dtype=np.int64)
        point = (0.5 * core.diagonal, z, h.copy(), f, z.copy(), f)
        return (*core.layout(), *point, release, 0, steps, 10**9, 10, np.uint64(1), 0), {}

    benchmark.pedantic(kernels.tabu_swaps, setup=setup, rounds=8, warmup_rounds=1)
    note(benchmark, steps)


@pytest.mark.parametrize("n", SIZES)
def test_relaxation(benchmark: Any, n: int) -> None:
    """A round of the relaxation of a gradient factor at sparsity .8, everything included."""
    warm_up_selection()
    rng = np.random.default_rng(1)
    problem = SelectionProblem(
        Instance(rng.standard_normal(n), GradientFactor(gradients(n), 0.0), Budget(int(0.8 * n)))
    )
    taken: list[int] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (Relaxation(problem),), {}

    def solve(relaxed: Relaxation) -> None:
        relaxed.solve(rounds=8)
        taken.append(relaxed.steps)

    benchmark.pedantic(solve, setup=setup, rounds=4, warmup_rounds=1)
    note(benchmark, max(taken[-1], 1))


@pytest.mark.parametrize("n", SIZES)
def test_pair_descent(benchmark: Any, n: int) -> None:
    """Pairwise steps of the second-order working set on one dense core, from the cheapest weights."""
    warm_up_selection()
    columns = Columns([DenseBlock(dense(n))])
    core = Core(columns, np.zeros(n, dtype=np.int64), np.arange(n))
    x = np.zeros(n)
    x[np.argsort(core.diagonal)[: int(0.8 * n)]] = 1.0
    h, zero, steps = core.product(x), np.zeros(n), 300
    done: list[int] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (x.copy(), h.copy()), {}

    def descend(x: FloatArray, h: FloatArray) -> None:
        done.append(core.descend(x, h, zero, steps, 0.0))

    benchmark.pedantic(descend, setup=setup, rounds=8, warmup_rounds=1)
    note(benchmark, max(done[-1], 1))


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_joint_swap(benchmark: Any, sparsity: float) -> None:
    """The best swap of the tableau at n = 3,100, found and made."""
    warm_up_joint()
    n = 3100
    H = dense(n) + 1e-3 * np.eye(n)
    w = np.random.default_rng(2).standard_normal(n)
    b = H @ w
    kept = np.arange(n) >= sparsity * n
    tableau = Tableau(H, b, 0.5 * float(w @ b), kept, np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool))

    def swap() -> None:
        r, s, _ = tableau.best_swap()
        tableau.swap(r, s)

    benchmark.pedantic(swap, rounds=12, warmup_rounds=2)
    note(benchmark, 1)
