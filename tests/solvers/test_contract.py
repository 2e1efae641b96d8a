"""The contract of `cbs_opt.testing`, for every solver that comes with the package."""

from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import SolverError, Stop, get_solver, library, solve, solver_names
from cbs_opt.testing import solver_checks

_SWEPT = {"large": 0, "proof": 0, "patience": 20, "dense_bytes": 0, "threaded_gradients": 0}
VARIANTS = {
    "search, swept": ("search", _SWEPT),
    "search, block by block": ("search", _SWEPT | {"many_blocks": 0, "small_block": 0, "double_bytes": 0}),
}
"""Solvers with parameters that send small problems the way of large ones, by a name for the tests."""


def checks():
    out = []
    for name in (*solver_names(), *VARIANTS):
        solver, parameters = VARIANTS.get(name, (name, None))
        try:
            out += [
                pytest.param(check, id=f"{name}-{check}") for check in solver_checks(solver, parameters=parameters)
            ]
        except SolverError as error:
            mark = pytest.mark.skip(reason=f"NOT TESTED: solver '{name}' is not available here: {error}")
            out.append(pytest.param(None, marks=mark, id=name))
    return out


@pytest.mark.parametrize("check", checks())
def test_contract(check):
    check()


def test_oracle_is_among_them():
    assert {"brute", "exact", "search", "joint"} <= {*solver_names()}


SEARCHES = [name for name in solver_names() if name not in {"exact", "highs", "pyomo", "brute"}]


@pytest.mark.parametrize("name", SEARCHES)
def test_threads_change_no_more_than_rounding(name):
    """Two runs with two threads are the same; the first selection is that of one thread, up to rounding."""
    instance = library("mlp-hidden-rows")
    for objective in get_solver(name).supports.objectives:
        runs = [
            solve(instance, name, objective=objective, seed=3, stop=Stop(max_iterations=5), threads=threads)
            for threads in (2, 2, 1)
        ]
        two, again, one = ([row[1:] for row in run.history] for run in runs)
        assert two == again
        assert np.array_equal(runs[0].pruned, runs[1].pruned)
        assert one[0][1] == pytest.approx(two[0][1], rel=1e-9)
