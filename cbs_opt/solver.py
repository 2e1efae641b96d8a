"""The base class of solvers: a name, capabilities, parameters, and one method."""

from __future__ import annotations

import abc
import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from cbs_opt.engines import Engine
from cbs_opt.errors import CrossGroupsError, SolverError, UsageError
from cbs_opt.instance import Instance
from cbs_opt.monitor import Monitor
from cbs_opt.result import Status
from cbs_opt.scalars import MOST_WHOLE
from cbs_opt.typing import BoolArray

OBJECTIVES = ("selection", "joint")


_CROSSED = "a second partition of the weights (`cross_groups`), as of transposable N:M patterns"


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a solver. Instances that need others are refused with one sentence.

    Attributes
    ----------
    objectives : frozenset of str
        Of "selection" and "joint".
    groups, several_blocks, linear, fixed : bool
        Whether it supports instances with these.
    cross_groups : bool
        Whether it supports a second partition of the weights into groups, as of transposable N:M patterns.
    indefinite : bool
        Whether it supports the selection objective of an indefinite H. It is given a convex one with the same
        losses, see `convex_form`; False for rules that need H itself.
    bound : bool
        Whether it proves a lower bound.
    batched : bool
        Whether it works on batches, so that `batch_size` has an effect, and on a card.
    device : bool
        Whether it runs on a card, so that `device` has an effect; so do all that are `batched`.
    engines : bool
        Whether it can give parts of an instance to the workers of an engine.
    warm_start : bool
        Whether it can start from a selection.
    not_worse_than_magnitude : bool
        Whether a run answers with the magnitude selection where that has the smaller loss: for methods that
        search. Rules that score weights, such as `obd`, are measured as they are. A warm start is always kept.
    """

    objectives: frozenset[str] = frozenset({"selection"})
    groups: bool = True
    cross_groups: bool = False
    several_blocks: bool = True
    linear: bool = True
    fixed: bool = True
    indefinite: bool = True
    bound: bool = False
    batched: bool = False
    device: bool = False
    engines: bool = False
    warm_start: bool = False
    not_worse_than_magnitude: bool = False

    @property
    def on_card(self) -> bool:
        """Whether it runs on a card."""
        return self.batched or self.device


@dataclass(frozen=True)
class Parameters:
    """Base of the parameters of a solver: a frozen dataclass whose fields have types, defaults and help.

    Declare a field as ``epsilon: float = option(1e-4, "smallest gain of a swap")``.
    """


def option(default: Any, help: str, writes: bool = False) -> Any:
    """Declare a field of `Parameters` with its default and one line of help.

    `writes` says that it names a file that the solver writes: `cbs-solve` then checks that this is no input and no
    other output.
    """
    return field(default=default, metadata={"help": help, "writes": writes})


def written_files(parameters: Parameters) -> list[Any]:
    """The values of the parameters that name files to write."""
    return [getattr(parameters, f.name) for f in dataclasses.fields(parameters) if f.metadata.get("writes")]


@dataclass
class Context:
    """Everything that a run depends on, except the instance.

    Attributes
    ----------
    objective : str
        "selection" or "joint".
    seed : int
    monitor : Monitor
    warm_start : bool (n,) or None
    device : str
        "auto", "cpu" or "cuda".
    batch_size : int or None
        Candidates per batch; None lets the solver choose.
    threads : int or None
        Threads that the run may use; None for all cores that the process may use, but see `tree_workers`.
    update : bool
        Whether the updated weights are wanted, whatever the objective.
    engine : Engine or None
        Whose workers solve the parts of the instance; None for this process alone.
    extras : dict
        Entries for `Result.extras`; JSON types only.
    """

    objective: str = "selection"
    seed: int = 0
    monitor: Monitor = field(default_factory=Monitor)
    warm_start: BoolArray | None = None
    device: str = "auto"
    batch_size: int | None = None
    threads: int | None = None
    update: bool = False
    engine: Engine | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """Threads for independent tasks, whose results do not depend on timing."""
        return usable_threads(self.threads)

    @property
    def tree_workers(self) -> int:
        """Threads of one branch-and-bound tree, whose order of nodes depends on timing if there are several.

        By default all cores, where the result depends on timing in any case: with a time limit, and without one
        on iterations. Else one.
        """
        stop = self.monitor.stop
        timed = stop.time_limit is not None and not stop.limits_iterations
        return self.workers if timed or self.threads is not None else 1

    def rng(self) -> np.random.Generator:
        """A fresh NumPy generator from the seed."""
        return np.random.default_rng(np.random.SeedSequence(self.seed))


class Solver(abc.ABC):
    """Base of every solver.

    A subclass sets `name`, `summary`, `supports` and, if it has any, `parameters_type`, and implements `run`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    supports: ClassVar[Capabilities] = Capabilities()
    parameters_type: ClassVar[type[Parameters]] = Parameters

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        self.parameters = parse_parameters(self.name, self.parameters_type, parameters or {})

    def prepare(self, instance: Instance, context: Context) -> None:  # noqa: B027
        """Work that is not part of the solving time: compilation, float64 copies, contexts."""

    @abc.abstractmethod
    def run(self, instance: Instance, context: Context) -> Status:
        """Search, reporting to `context.monitor`; return the reason for the end.

        `Status.CONVERGED` means that the algorithm terminated by itself. If a rule of `Stop` ended the run,
        `context.monitor.reason` takes precedence.
        """

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Raise `SolverError` with one sentence if this solver does not support the instance."""
        supports = self.supports
        if context.objective not in supports.objectives:
            able = " and ".join(sorted(supports.objectives))
            raise SolverError(
                f"solver '{self.name}' minimises {able} only, not the objective '{context.objective}'"
            )
        convex = instance.curvature.is_convex
        if context.objective == "joint" and not convex:
            raise SolverError(f"solver '{self.name}' cannot take the instance: {indefinite_sentence(instance)}")
        refused = [
            (instance.budget.groups is not None and not supports.groups, "a budget per group (`groups`)"),
            (instance.budget.cross_groups is not None and not supports.cross_groups, _CROSSED),
            (instance.curvature.number_of_blocks > 1 and not supports.several_blocks, "several blocks"),
            (instance.linear is not None and not supports.linear, "a first-order term (`linear`)"),
            (instance.fixed is not None and not supports.fixed, "fixed weights (`fixed`)"),
            (not convex and not supports.indefinite, "an indefinite Hessian"),
            (context.warm_start is not None and not supports.warm_start, "a warm start"),
            (context.device == "cuda" and not supports.on_card, "the device 'cuda': it runs on the CPU only"),
            (context.batch_size is not None and not supports.batched, "a batch size: it has no batches"),
            (context.engine is not None and not supports.engines, "an engine: it runs in this process"),
        ]
        for applies, what in refused:
            if applies:
                kind = CrossGroupsError if what is _CROSSED else SolverError
                raise kind(f"solver '{self.name}' cannot take {what}")


def indefinite_sentence(instance: Instance) -> str:
    """The error of an instance without a best update."""
    return (
        f"block {instance.curvature.indefinite_blocks[0]} of the Hessian is indefinite: the loss after an update "
        "has no minimum, only the objective 'selection' is defined"
    )


def usable_threads(threads: int | None = None) -> int:
    """`threads`, or if None the number of cores that this process may use."""
    if threads is not None:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_parameters(solver: str, kind: type[Parameters], given: Mapping[str, Any]) -> Parameters:
    """Make the parameters of a solver from names and values; text is converted to the declared type.

    Raises
    ------
    UsageError
        For an unknown name (the message lists the known ones), or a value of the wrong type.
    SolverError
        When `kind` declares parameters but is no dataclass.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    lost = [name for name, hint in hints.items() if name not in known and typing.get_origin(hint) is not ClassVar]
    if lost:
        raise SolverError(
            f"{kind.__name__} must be a @dataclass(frozen=True): '{lost[0]}' is no parameter otherwise"
        )
    values = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            listed = ", ".join(known) if known else "none"
            raise UsageError(f"solver '{solver}' has no parameter '{key}'; known: {listed}")
        values[name] = _convert(solver, name, value, known[name])
    return kind(**values)


def _convert(solver: str, name: str, value: Any, hint: Any) -> Any:
    kinds = list(typing.get_args(hint)) if isinstance(hint, types.UnionType) else [hint]
    if type(None) in kinds:
        kinds.remove(type(None))
        if value is None or value == "none":
            return None
    (kind,) = kinds
    try:
        if kind is bool:
            if isinstance(value, str):
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                    value.lower()
                ]
            if isinstance(value, bool):
                return value
        elif kind is int and not isinstance(value, bool):
            number = int(value)
            if abs(number) <= MOST_WHOLE and (not isinstance(value, float) or number == value):
                return number
        elif kind is float and not isinstance(value, bool):
            number_ = float(value)
            if np.isfinite(number_):
                return number_
        elif kind is str and isinstance(value, str):
            return value
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    raise UsageError(f"parameter '{name}' of solver '{solver}' must be a {kind.__name__}, got {value!r}")
