"""What a run gives back, and the solution that a file keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from cbs_opt.typing import BoolArray, FloatArray


class Status(StrEnum):
    """Why a run ended."""

    OPTIMAL = "optimal"
    TARGET_REACHED = "target_reached"
    GAP_REACHED = "gap_reached"
    CONVERGED = "converged"
    TIME_LIMIT = "time_limit"
    ITERATION_LIMIT = "iteration_limit"
    NO_IMPROVEMENT = "no_improvement"
    INTERRUPTED = "interrupted"
    INFEASIBLE = "infeasible"
    ERROR = "error"


class HistoryRow(NamedTuple):
    """One event of a run: a better objective or a better bound."""

    seconds: float
    iteration: int
    objective: float | None
    bound: float | None


def relative_gap(objective: float | None, bound: float | None) -> float | None:
    """(objective − bound) / max(|objective|, 1e-300), None where either is unknown."""
    if objective is None or bound is None:
        return None
    return max(objective - bound, 0.0) / max(abs(objective), 1e-300)


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of one run.

    Attributes
    ----------
    status : Status
    solver, objective_kind : str
        Which solver ran, and which loss, "selection" or "joint", it minimised.
    pruned : bool (n,)
        True = removed.
    weights : float64 (n,) or None
        The weights after the best update, where it was asked for.
    objective : float
        The loss of `objective_kind`, recomputed by `cbs_opt.evaluate`.
    selection_loss : float
    joint_loss : float or None
    bound : float or None
        Proven lower bound on the objective of every feasible selection.
    iterations : int
    build_seconds, solve_seconds : float
        Preparation (compilation, float64 copies), and the run itself.
    history : tuple of HistoryRow
    seed : int
    parameters : mapping
        Every parameter of the solver, defaults included.
    environment : mapping
        Versions, threads, device.
    extras : mapping
        What the solver has to say beyond this; JSON types only.
    """

    status: Status
    solver: str
    objective_kind: str
    pruned: BoolArray
    weights: FloatArray | None
    objective: float
    selection_loss: float
    joint_loss: float | None
    bound: float | None
    iterations: int
    build_seconds: float
    solve_seconds: float
    history: tuple[HistoryRow, ...]
    seed: int
    parameters: Mapping[str, Any]
    environment: Mapping[str, Any]
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> float | None:
        """(objective − bound) / |objective|, None without a bound."""
        return relative_gap(self.objective, self.bound)

    @property
    def runtime(self) -> dict[str, float]:
        """Seconds of building and solving."""
        return {"build_s": self.build_seconds, "solve_s": self.solve_seconds}


@dataclass(frozen=True, eq=False)
class Solution:
    """A selection as a file keeps it.

    Attributes
    ----------
    pruned : bool (n,)
    instance_sha256 : str
        Hash of the instance file that it belongs to; empty for an instance that never was a file.
    weights : float64 (n,) or None
    result : mapping
        The JSON of the run that found it; may be empty.
    """

    pruned: BoolArray
    instance_sha256: str = ""
    weights: FloatArray | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
