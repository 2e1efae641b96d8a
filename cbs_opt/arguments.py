"""Checks of what a Python caller passes to `solve`: one sentence for each kind of mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.library_file import resolve
from cbs_opt.files.text_instance import read_instance
from cbs_opt.instance import Instance
from cbs_opt.losses import check_mask
from cbs_opt.registry import get_solver
from cbs_opt.scalars import checked_seed, is_integer
from cbs_opt.solver import OBJECTIVES, Solver
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray

DEVICES = ("auto", "cpu", "cuda")

Kind = tuple[Callable[[Any], bool], str]


def got(value: object) -> str:
    """A short description of a value and its type, for error messages."""
    text = repr(value)
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    if len(text) > 60 or "\n" in text or text.startswith("<"):
        return f"an object of type {type(value).__name__}"
    return f"{text} ({type(value).__name__})"


_KINDS: dict[str, Kind] = {
    "stop": (lambda v: isinstance(v, Stop), "a Stop, such as Stop(time_limit=10)"),
    "seed": (is_integer, "a whole number"),
    "parameters": (lambda v: isinstance(v, Mapping), "a mapping from names to values"),
    "update": (lambda v: isinstance(v, bool | np.bool_), "True or False"),
    "objective": (lambda v: isinstance(v, str) and v in OBJECTIVES, "'selection' or 'joint'"),
    "device": (lambda v: isinstance(v, str) and v in DEVICES, "'auto', 'cpu' or 'cuda'"),
    "threads": (is_integer, "a whole number"),
    "batch_size": (is_integer, "a whole number"),
    "engine": (
        lambda v: isinstance(v, str) or callable(getattr(v, "run", None)),
        "'serial', 'processes', 'ray' or an Engine",
    ),
    "callback": (callable, "a callable that takes a Monitor"),
}
_REQUIRED = ("seed", "update", "device")
_LEAST = {"threads": 1, "batch_size": 1}
MOST_THREADS = 1024
"""More would only wait for one another, or be refused by the operating system."""


def check_arguments(**given: Any) -> None:
    """Check the type and range of the keyword arguments of `solve`, all but instance, solver and warm start.

    Raises
    ------
    UsageError
        One sentence that names the argument, what is expected and what was given.
    """
    seed = given["seed"]
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        if seed < 0:
            raise UsageError(f"`seed` must not be negative, got {seed}")
        checked_seed(seed)
    for name, value in given.items():
        fits, expected = _KINDS[name]
        if value is None and name not in _REQUIRED:
            continue
        if not fits(value):
            raise UsageError(f"`{name}` must be {expected}, got {got(value)}")
        if name in _LEAST and value < _LEAST[name]:
            raise UsageError(f"`{name}` must be at least {_LEAST[name]}, got {value}")
        if name == "threads" and value > MOST_THREADS:
            raise UsageError(f"`threads` must be at most {MOST_THREADS}, got {value}")


def as_instance(instance: object) -> Instance:
    """The instance itself, or the one that a path or `library:NAME` denotes.

    Raises
    ------
    UsageError
        For anything else.
    InstanceError
        When the file is missing or invalid.
    """
    if isinstance(instance, Instance):
        return instance
    if isinstance(instance, str | Path):
        return read_instance(resolve(instance))
    raise UsageError(
        f"`instance` must be an Instance, the path of an instance file or 'library:NAME', got {got(instance)}"
    )


def as_solver(solver: object) -> type[Solver]:
    """The class of a solver, from its name or the class itself.

    Raises
    ------
    UsageError
        For anything else.
    SolverError
        For a name that is unknown, or a solver whose requirements are not installed.
    """
    if isinstance(solver, str):
        return get_solver(solver)
    if isinstance(solver, type) and issubclass(solver, Solver):
        if not hasattr(solver, "name"):
            raise UsageError(f'{solver.__name__} has no name: decorate it with @register("…") or set `name`')
        return solver
    raise UsageError(
        f"`solver` must be the name of a solver, such as 'search', or a subclass of Solver, got {got(solver)}; "
        "`solver_names()` lists the names"
    )


def as_selection(instance: Instance, warm_start: object) -> BoolArray:
    """A warm start as bool (n,), from an array or from anything with `pruned`: a Result or a Solution.

    Raises
    ------
    UsageError
        For a wrong type or shape, or a selection that does not meet the budget, the groups or `fixed`.
    """
    values = np.asarray(getattr(warm_start, "pruned", warm_start))
    try:
        pruned = check_mask(instance, values)
    except InstanceError:
        what = f"{values.dtype} of shape {values.shape}" if values.shape else got(warm_start)
        raise UsageError(f"`warm_start` must be bool of shape ({instance.n},), got {what}") from None
    if not instance.admits(pruned):
        raise UsageError("the warm start does not meet the budget, the groups or `fixed` of the instance")
    return pruned
