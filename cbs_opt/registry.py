"""Solvers by name: those of the package and those of third parties."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from cbs_opt.errors import CrossGroupsError, SolverError
from cbs_opt.instance import Instance
from cbs_opt.optional import missing
from cbs_opt.solver import Context, Solver

GROUP = "cbs_opt.solvers"
"""Entry-point group through which third parties add solvers: ``name = "module:SolverClass"``."""

S = TypeVar("S", bound=type[Solver])

_registered: dict[str, type[Solver]] = {}


def register(name: str) -> Callable[[S], S]:
    """Class decorator that registers a solver under `name`, in this process.

    A class that is defined again, as in notebooks, replaces the old one.
    """

    def add(solver: S) -> S:
        other = _registered.get(name, solver)
        if (other.__module__, other.__qualname__) != (solver.__module__, solver.__qualname__):
            raise SolverError(f"a solver named '{name}' is registered already")
        solver.name = name
        _registered[name] = solver
        return solver

    return add


def _modules() -> dict[str, str]:
    from cbs_opt.solvers import MODULES

    return MODULES


def _foreign() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def solver_names() -> list[str]:
    """The names of all solvers, in the order of the documentation, third parties last."""
    own = list(_modules())
    return own + sorted(({*_registered} | {*_foreign()}) - {*own})


def get_solver(name: str) -> type[Solver]:
    """The class of a solver; its module is imported now.

    Raises
    ------
    SolverError
        For an unknown name (the message lists the known ones), or a solver whose requirements are not installed.
    """
    if name in _registered:
        return _registered[name]
    if name in _modules():
        try:
            importlib.import_module(_modules()[name])
        except ModuleNotFoundError as error:
            raise SolverError(f"solver '{name}' {missing(error)}") from error
        return _registered[name]
    if name in (foreign := _foreign()):
        try:
            solver = foreign[name].load()
        except Exception as error:
            raise SolverError(f"solver '{name}' of {foreign[name].value} cannot be loaded: {error}") from error
        if not (isinstance(solver, type) and issubclass(solver, Solver)):
            raise SolverError(f"solver '{name}': {foreign[name].value} is not a subclass of cbs_opt.Solver")
        return register(name)(solver)
    raise SolverError(f"there is no solver '{name}'; known: {', '.join(solver_names())}")


def check_supports(solver: Solver, instance: Instance, context: Context) -> None:
    """`Solver.check_supports`, whose refusal of cross groups goes on with the solvers that take them.

    Raises
    ------
    SolverError
    """
    try:
        solver.check_supports(instance, context)
    except CrossGroupsError as error:
        able = []
        for name in solver_names():
            with suppress(SolverError):  # not installed
                supports = get_solver(name).supports
                if supports.cross_groups and context.objective in supports.objectives:
                    able.append(f"'{name}'")
        which = f"for the objective '{context.objective}' these solvers can: {', '.join(able)}"
        raise SolverError(f"{error}: {which}") from error
