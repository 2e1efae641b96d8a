"""Verification of a solution: all values that it states are recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.arguments import as_instance
from cbs_opt.errors import UsageError
from cbs_opt.files.certificate_file import Certificate
from cbs_opt.files.solution_file import read_solution
from cbs_opt.instance import Instance
from cbs_opt.losses import check_mask, evaluate, predicted_loss
from cbs_opt.result import Result
from cbs_opt.solution import Solution
from cbs_opt.typing import BoolArray
from cbs_opt.view import html, text

TOLERANCE = 1e-6
"""Largest relative difference between a stated and a recomputed value."""


@dataclass(frozen=True)
class Verification:
    """The recomputed values of a solution, and every statement that is wrong.

    Attributes
    ----------
    feasible : bool
        Whether the selection meets the budget, the groups and `fixed`.
    n, pruned_count : int
    selection_loss : float
    joint_loss : float or None
        None where the update has no minimum.
    weights_loss : float or None
        Predicted loss of the weights that the solution holds; None where it holds none.
    problems : tuple of str
        One sentence for each wrong statement.
    """

    feasible: bool
    n: int
    pruned_count: int
    selection_loss: float
    joint_loss: float | None
    weights_loss: float | None
    problems: tuple[str, ...]

    @property
    def valid(self) -> bool:
        """Whether the selection is feasible and every statement is correct."""
        return not self.problems

    def facts(self) -> text.Facts:
        """Names and values for display."""
        rows = [
            ("feasible", "yes" if self.feasible else "no"),
            ("pruned", f"{self.pruned_count} of {self.n} weights"),
            ("selection loss", text.number(self.selection_loss)),
            ("joint loss", text.number(self.joint_loss)),
        ]
        if self.weights_loss is not None:
            rows.append(("weights loss", text.number(self.weights_loss)))
        return rows

    def _repr_html_(self) -> str:
        problems = [("problems", "\n".join(self.problems))] if self.problems else []
        return html.facts("Verification", [*self.facts(), *problems])


def verify(instance: Instance | Path | str, solution: Solution | Result | BoolArray | Path | str) -> Verification:
    """Check that a solution is feasible, and recompute every loss that it states, in float64.

    Parameters
    ----------
    instance : Instance, Path or str
    solution : Solution, Result, bool (n,), Path or str
        A path is that of a solution file. For a selection alone, only feasibility is checked.

    Returns
    -------
    Verification
        `valid`, and a sentence for every wrong statement.

    Raises
    ------
    InstanceError, SolutionError
        When a file cannot be read, or the solution belongs to another instance.
    UsageError
        For a solution of another type.

    Notes
    -----
    The stated bound is compared with the loss but not proven again; for this use certificates, see
    `verify_certificate`. The solution may have another budget than the instance if its file states it.

    Examples
    --------
    >>> import cbs_opt
    >>> instance = cbs_opt.library("mlp-output-12")
    >>> cbs_opt.verify(instance, cbs_opt.solve(instance, "obd")).valid
    True
    """
    instance = as_instance(instance)
    solution = _as_solution(instance, solution)
    pruned = check_mask(instance, solution.pruned)
    count = int(pruned.sum())
    problems = []
    if not _asked(instance, solution.result, count).admits(pruned):
        problems.append(
            f"the selection, {count} weights, does not meet the budget of {instance.budget.total}, the groups "
            "or `fixed` of the instance"
        )
    feasible = not problems
    losses = evaluate(instance, pruned, start=solution.weights)
    weights_loss = None
    if solution.weights is not None:
        if np.any(solution.weights[pruned] != 0):
            problems.append("`weights` is not zero on all pruned weights")
        weights_loss = predicted_loss(instance, solution.weights - instance.weights)
    found = {
        "selection_loss": losses.selection_loss,
        "joint_loss": _joint_claimed(solution.result, losses.joint_loss, weights_loss),
        "pruned_count": count,
    }
    return Verification(
        feasible=feasible,
        n=instance.n,
        pruned_count=count,
        selection_loss=losses.selection_loss,
        joint_loss=losses.joint_loss,
        weights_loss=weights_loss,
        problems=(*problems, *_wrong_claims(solution.result, found)),
    )


def _joint_claimed(claims: Mapping[str, Any], best: float | None, held: float | None) -> float | None:
    """What a file may state as the joint loss: an interrupted run states that of the weights which it holds."""
    claimed = claims.get("joint_loss")
    if best is None or held is None or claimed is None or not _is_number(claimed) or claimed <= best:
        return best
    return held if abs(claimed - held) <= TOLERANCE * abs(held) else best


def _as_solution(instance: Instance, solution: object) -> Solution:
    if isinstance(solution, str | Path):
        return read_solution(solution, instance)
    if isinstance(solution, Result):
        return solution.to_solution()
    if isinstance(solution, Solution):
        return solution
    if isinstance(solution, np.ndarray):
        return Solution(check_mask(instance, solution))
    if isinstance(solution, Certificate):
        raise UsageError("`solution` is a Certificate: `cbs_opt.verify_certificate` checks what it proves")
    raise UsageError(
        "`solution` must be a Solution, a Result, a selection of bool (n,) or the path of a solution file, got "
        f"{type(solution).__name__}"
    )


def _asked(instance: Instance, claims: Mapping[str, Any], count: int) -> Instance:
    """The instance with the budget of the run.

    If `fixed` does not allow that budget, the instance is not changed, and the selection is infeasible.
    """
    stored = claims.get("instance")
    if instance.budget.groups is None and isinstance(stored, Mapping) and stored.get("budget") == count:
        with suppress(UsageError):
            return instance.with_budget(count)
    return instance


def _wrong_claims(claims: Mapping[str, Any], found: Mapping[str, float | None]) -> list[str]:
    kind = "joint_loss" if claims.get("objective_kind") == "joint" else "selection_loss"
    problems = []
    for key, value in (*found.items(), ("objective", found[kind])):
        claimed = claims.get(key)
        if claimed is None or value is None:
            continue
        if not _is_number(claimed) or abs(claimed - value) > TOLERANCE * max(abs(value), 1e-300):
            problems.append(f"`{key}` is {value:.9g}, the file claims {str(claimed)[:40]}")
    bound, value = claims.get("bound"), found[kind]
    if bound is not None and not _is_number(bound):
        problems.append(f"the claimed bound {str(bound)[:40]} is no number")
    elif bound is not None and value is not None and bound > value + TOLERANCE * abs(value):
        problems.append(f"the claimed bound {bound:.9g} lies above the {kind} {value:.9g}")
    return problems


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float64 can represent."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308
