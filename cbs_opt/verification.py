"""Is a solution what it says it is? Everything that it claims is computed again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.arguments import as_instance
from cbs_opt.errors import UsageError
from cbs_opt.files.solution_file import read_solution
from cbs_opt.instance import Instance
from cbs_opt.losses import check_mask, evaluate, predicted_loss
from cbs_opt.result import Result
from cbs_opt.solution import Solution
from cbs_opt.typing import BoolArray
from cbs_opt.view import html, text

TOLERANCE = 1e-6
"""Largest relative difference between what is claimed and what is found."""


@dataclass(frozen=True)
class Verification:
    """What is true of a solution, beside what it claims.

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
        One sentence for each claim that is not true.
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
        """Whether the selection is feasible and every claim is true."""
        return not self.problems

    def facts(self) -> text.Facts:
        """Names and values for a person."""
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
    """Check that a solution is feasible, and recompute every loss that it claims, in float64.

    Parameters
    ----------
    instance : Instance, Path or str
    solution : Solution, Result, bool (n,), Path or str
        A path is that of a solution file. A bare selection claims nothing but to be feasible.

    Returns
    -------
    Verification
        `valid`, and a sentence for everything that is not true.

    Raises
    ------
    InstanceError, SolutionError
        When a file cannot be read, or the solution belongs to another instance.
    UsageError
        For a solution of another type.

    Notes
    -----
    The claimed bound is compared with the loss, not proven again: for that there are certificates, see
    `verify_certificate`. The solution may have another budget than the instance as long as it says so.

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
    losses = evaluate(instance, pruned)
    weights_loss = None
    if solution.weights is not None:
        if np.any(solution.weights[pruned] != 0):
            problems.append("`weights` is not zero on all pruned weights")
        weights_loss = predicted_loss(instance, solution.weights - instance.weights)
    found = {
        "selection_loss": losses.selection_loss,
        "joint_loss": losses.joint_loss,
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


def _as_solution(instance: Instance, solution: object) -> Solution:
    if isinstance(solution, str | Path):
        return read_solution(solution, instance)
    if isinstance(solution, Result):
        return solution.to_solution()
    if isinstance(solution, Solution):
        return solution
    if isinstance(solution, np.ndarray):
        return Solution(check_mask(instance, solution))
    raise UsageError(
        "`solution` must be a Solution, a Result, a selection of bool (n,) or the path of a solution file, got "
        f"{type(solution).__name__}"
    )


def _asked(instance: Instance, claims: Mapping[str, Any], count: int) -> Instance:
    """The instance with the budget that was solved for.

    Where `fixed` does not allow that budget, the instance stays as it is, and the selection is wrong.
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
    """Whether JSON gave a number that float64 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308
