"""The Combinatorial Brain Surgeon as an optimization problem: instances, solvers, bounds.

>>> import cbs_opt
>>> instance = cbs_opt.read_instance("instance.npz")          # doctest: +SKIP
>>> result = cbs_opt.solve(instance, "cbs", seed=0)            # doctest: +SKIP
>>> result.objective, result.gap                               # doctest: +SKIP

The package has five parts. This one, `cbs_opt`, holds the problem, the file formats and the command lines. It
imports none of the others; `cbs_opt.solvers` and `cbs_opt.instances` import this one but not each other;
`cbs_opt.pruning` imports `cbs_opt.instances`, and `cbs_opt.bench` all.
"""

from cbs_opt.early_memory import refuse_small_address_space
from cbs_opt.early_signals import end_quietly_while_importing

end_quietly_while_importing()
refuse_small_address_space()

import logging  # noqa: E402
from pathlib import Path  # noqa: E402

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "solvers" / "__init__.py").is_file():
    __path__.append(str(_root))  # a checkout: the other four packages are sibling folders

from cbs_opt.budget import Budget  # noqa: E402
from cbs_opt.certificate import verify as verify_certificate  # noqa: E402
from cbs_opt.curvature import (  # noqa: E402
    Curvature,
    GradientFactor,
    HessianBlocks,
    InverseHessianBlocks,
    SharedBlocks,
    register_curvature,
)
from cbs_opt.errors import (  # noqa: E402
    CbsError,
    InstanceError,
    OutputError,
    RequirementError,
    SolutionError,
    SolverError,
    UsageError,
)
from cbs_opt.files import (  # noqa: E402
    LibraryEntry,
    library,
    library_entries,
    library_entry,
    library_names,
    library_path,
    read_instance,
    read_solution,
    write_instance,
    write_solution,
)
from cbs_opt.files.certificate_file import read_certificate  # noqa: E402
from cbs_opt.instance import Instance  # noqa: E402
from cbs_opt.losses import Losses, evaluate, joint_loss, selection_loss  # noqa: E402
from cbs_opt.monitor import Monitor  # noqa: E402
from cbs_opt.networks import apply, export, masks, prune  # noqa: E402
from cbs_opt.path import solve_path  # noqa: E402
from cbs_opt.registry import get_solver, register, solver_names  # noqa: E402
from cbs_opt.regression import from_regression, regression_coefficients  # noqa: E402
from cbs_opt.result import Result, Status  # noqa: E402
from cbs_opt.solution import Solution  # noqa: E402
from cbs_opt.solve import solve  # noqa: E402
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option  # noqa: E402
from cbs_opt.stop import Stop  # noqa: E402
from cbs_opt.update import best_update  # noqa: E402
from cbs_opt.verification import Verification, verify  # noqa: E402
from cbs_opt.version import __version__  # noqa: E402


def __dir__() -> list[str]:
    """The public names; modules are imported by their full names."""
    return sorted(__all__)


logging.getLogger("cbs_opt").addHandler(logging.NullHandler())

__all__ = [
    "Budget",
    "Capabilities",
    "CbsError",
    "Context",
    "Curvature",
    "GradientFactor",
    "HessianBlocks",
    "Instance",
    "InstanceError",
    "InverseHessianBlocks",
    "LibraryEntry",
    "Losses",
    "Monitor",
    "OutputError",
    "Parameters",
    "RequirementError",
    "Result",
    "SharedBlocks",
    "Solution",
    "SolutionError",
    "Solver",
    "SolverError",
    "Status",
    "Stop",
    "UsageError",
    "Verification",
    "__version__",
    "apply",
    "best_update",
    "evaluate",
    "export",
    "from_regression",
    "get_solver",
    "joint_loss",
    "library",
    "library_entries",
    "library_entry",
    "library_names",
    "library_path",
    "masks",
    "option",
    "prune",
    "read_certificate",
    "read_instance",
    "read_solution",
    "register",
    "register_curvature",
    "regression_coefficients",
    "selection_loss",
    "solve",
    "solve_path",
    "solver_names",
    "verify",
    "verify_certificate",
    "write_instance",
    "write_solution",
]
