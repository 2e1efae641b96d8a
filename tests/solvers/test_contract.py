"""The contract of `cbs_opt.testing`, for every solver that comes with the package."""

from __future__ import annotations

import pytest

from cbs_opt import SolverError, solver_names
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
