"""Contract tests for solvers and kinds of curvature, also those of third parties.

    from cbs_opt.testing import check_solver, check_curvature

    check_solver("my-solver")            # the name of a solver, or its class
    check_curvature(my_curvature)        # an object

Both raise one `ContractError`, an AssertionError, that lists every check that failed. With pytest each check
becomes a test of its own; the package itself does not import pytest::

    @pytest.mark.parametrize("check", solver_checks("my-solver"), ids=str)
    def test_contract(check):
        check()
"""

from cbs_opt.testing.contract import Check, ContractError
from cbs_opt.testing.curvature_contract import check_curvature, curvature_checks
from cbs_opt.testing.problems import CASES, Problem, make_curvature, make_problem
from cbs_opt.testing.solver_contract import check_solver, solver_checks

__all__ = [
    "CASES",
    "Check",
    "ContractError",
    "Problem",
    "check_curvature",
    "check_solver",
    "curvature_checks",
    "make_curvature",
    "make_problem",
    "solver_checks",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
