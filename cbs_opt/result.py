"""The result of a run, and its solution file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cbs_opt.errors import UsageError
from cbs_opt.jsonable import finite
from cbs_opt.solution import Solution
from cbs_opt.typing import BoolArray, FloatArray
from cbs_opt.view import html, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = 1
"""Version of the JSON of a run."""


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
        None where the update has no minimum, or where a time limit left no time for it.
    bound : float or None
        Proven lower bound on the objective of every feasible selection.
    iterations : int
    build_seconds, solve_seconds, evaluate_seconds : float
        Preparation (compilation, float64 copies), the run itself, and the losses of its answer.
    history : tuple of HistoryRow
    seed : int
    parameters : mapping
        Every parameter of the solver, defaults included.
    environment : mapping
        Versions, threads, device.
    extras : mapping
        Further information from the solver; JSON types only.
    instance : mapping
        Of the instance: `path`, `sha256`, `n`, `blocks`, `budget`; see `Instance.identity`.

    Examples
    --------
    >>> import cbs_opt
    >>> result = cbs_opt.solve("library:mlp-output-12", "brute")
    >>> result
    <Result of brute: optimal, selection loss 5.194717e-03, 10 of 12 weights pruned, gap 0.00 %>
    >>> result.to_dict()["pruned_count"]
    10
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
    instance: Mapping[str, Any] = field(default_factory=dict)
    evaluate_seconds: float = 0.0

    @property
    def gap(self) -> float | None:
        """(objective − bound) / |objective|, None without a bound."""
        return relative_gap(self.objective, self.bound)

    @property
    def runtime(self) -> dict[str, float]:
        """Seconds of building, solving and evaluating."""
        return {
            "build_s": self.build_seconds,
            "solve_s": self.solve_seconds,
            "evaluate_s": self.evaluate_seconds,
        }

    @property
    def pruned_count(self) -> int:
        """Number of weights pruned."""
        return int(self.pruned.sum())

    def __repr__(self) -> str:
        gap = "no bound" if self.gap is None else f"gap {text.percent(self.gap)}"
        return (
            f"<Result of {self.solver}: {self.status}, {self.objective_kind} loss {text.number(self.objective)}, "
            f"{self.pruned_count} of {self.pruned.size} weights pruned, {gap}>"
        )

    def _repr_html_(self) -> str:
        return html.facts(f"Result of {self.solver}", self.facts())

    def facts(self) -> text.Facts:
        """Names and values of the main properties, as text."""
        updated = "" if self.weights is None else ", weights updated"
        return [
            ("status", str(self.status)),
            ("pruned", f"{self.pruned_count} of {self.pruned.size} weights{updated}"),
            ("objective", f"{text.number(self.objective)}  ({self.objective_kind})"),
            ("selection loss", text.number(self.selection_loss)),
            ("joint loss", text.number(self.joint_loss)),
            ("bound", text.number(self.bound)),
            ("gap", text.percent(self.gap)),
            (
                "time",
                f"{self.build_seconds:.2f} s building, {self.solve_seconds:.2f} s solving, "
                f"{self.iterations} iterations",
            ),
        ]

    def summary(self) -> str:
        """The result in a few lines of text: status, losses, bound, gap, time."""
        return text.facts([("solver", f"{self.solver}, seed {self.seed}"), *self.facts()])

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON types, schema 1 of `cbs-solve --json`; every number is finite.

        The selection and the weights are not included: see `save`.
        """
        identity = dict.fromkeys(("path", "sha256", "n", "blocks", "budget"))
        content: dict[str, Any] = finite(
            {
                "schema": SCHEMA,
                "instance": {**identity, "n": self.pruned.size, **self.instance},
                "solver": self.solver,
                "objective_kind": self.objective_kind,
                "parameters": self.parameters,
                "seed": self.seed,
                "status": str(self.status),
                "objective": self.objective,
                "selection_loss": self.selection_loss,
                "joint_loss": self.joint_loss,
                "bound": self.bound,
                "gap": self.gap,
                "pruned_count": self.pruned_count,
                "iterations": self.iterations,
                "runtime": self.runtime,
                "history": [list(row) for row in self.history],
                "environment": self.environment,
                "extras": self.extras,
            }
        )
        return content

    def to_solution(self) -> Solution:
        """The solution that is stored in a file."""
        return Solution(self.pruned, self.instance.get("sha256") or "", self.weights, self.to_dict())

    def save(self, path: Path | str) -> None:
        """Write the result to a file.

        Parameters
        ----------
        path : Path or str
            `.npz` writes a solution file, selection and weights included; `.json` writes `to_dict`.

        Raises
        ------
        UsageError
            For another extension.
        OutputError
            When the file cannot be written; nothing is left behind then.
        """
        from cbs_opt.files.solution_file import write_json, write_solution

        ending = Path(path).suffix
        if ending == ".npz":
            write_solution(path, self)
        elif ending == ".json":
            write_json(path, self.to_dict())
        else:
            raise UsageError(f"{path}: a result is saved as .npz (a solution file) or .json, not as '{ending}'")

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw incumbent and bound over time.

        Parameters
        ----------
        axes : matplotlib.axes.Axes, optional
            Where to draw; a new figure of `matplotlib.pyplot` when not given.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        RequirementError
            When matplotlib is not installed.
        """
        from cbs_opt.view.convergence import draw_convergence

        return draw_convergence(self, axes)
