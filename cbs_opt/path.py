"""One instance under many budgets: solutions along a path, each the warm start of the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.linalg import inverse_pd
from cbs_opt.registry import get_solver
from cbs_opt.result import Result
from cbs_opt.solve import DEFAULT_SOLVERS, solve
from cbs_opt.typing import BoolArray, FloatArray
from cbs_opt.update import best_update

_ELIMINATED = 2000
"""Kept weights up to which the joint warm start removes one at a time."""


def extended(instance: Instance, pruned: BoolArray, objective: str = "selection") -> BoolArray:
    """A selection for the instance's budget: the weights of `pruned`, and the cheapest others.

    Selection: the price of weight i is its increase of the selection loss of `pruned`: w_i (H w_P)_i +
    ½ H_ii w_i², less its linear term. Couplings among the added weights are ignored: the result is a warm start.
    Joint: one weight at a time is removed, at the least rise x_i²/2[H_KK⁻¹]_ii of the loss after the best update.

    Parameters
    ----------
    instance : Instance
        With a budget, of each group, at least what `pruned` meets.
    pruned : bool (n,)
    objective : {"selection", "joint"}

    Returns
    -------
    bool (n,)
        One product with H and O(n log n) time; joint: O(q³) for q kept weights, up to 2000 of them.
    """
    crossed = instance.budget.cross_groups is not None
    if objective == "joint" and not crossed and int((~pruned).sum()) <= _ELIMINATED:
        found = _eliminated(instance, pruned)
        if found is not None:
            return found
    w = instance.weights
    price = 0.5 * instance.curvature.diagonal() * w * w
    price += w * instance.curvature.matmul(np.where(pruned, w, 0.0))
    if instance.linear is not None:
        price -= instance.linear * w
    price[pruned] = -np.inf
    return instance.budget.cheapest(price, instance.fixed)


def _eliminated(instance: Instance, pruned: BoolArray) -> BoolArray | None:
    """`extended` for the joint objective; None where H is singular on the kept weights."""
    curvature, budget = instance.curvature, instance.budget
    out = pruned.copy()
    group = budget.group_of(instance.n)
    left = budget.per_group - np.bincount(group[pruned], minlength=budget.number_of_groups)
    kept = np.flatnonzero(~pruned)
    A, x = np.zeros((kept.size, kept.size)), best_update(instance, pruned)[kept]
    for k in range(curvature.number_of_blocks):
        part = curvature.block_slice(k)
        at = np.flatnonzero((kept >= part.start) & (kept < part.stop))
        inverse = inverse_pd(curvature.submatrix(k, kept[at] - part.start, kept[at] - part.start))
        if inverse is None:
            return None
        A[np.ix_(at, at)] = inverse
    movable = np.ones(kept.size, bool) if instance.fixed is None else instance.fixed[kept] == 0
    while left.any():
        diagonal: FloatArray = A.diagonal()
        free = movable & (left > 0)[group[kept]] & (diagonal > 0)
        if not free.any():
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            i = int(np.argmin(np.where(free, x**2 / diagonal, np.inf)))
        column = A[:, i] / A[i, i]
        x = x - column * x[i]
        A -= np.outer(column, A[i].copy())
        A[i, :] = A[:, i] = 0.0
        movable[i] = False
        out[kept[i]] = True
        left[group[kept[i]]] -= 1
    return out


def solve_path(
    instance: Instance,
    sparsities: Sequence[float] | None = None,
    solver: str | None = None,
    *,
    keep: Sequence[int] | None = None,
    objective: str | None = None,
    warm_start: BoolArray | None = None,
    on_result: Callable[[float, Result], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[Result]:
    """Solve an instance for several budgets, from the least to the largest.

    Parameters
    ----------
    instance : Instance
        Budgets of groups change in proportion; an N:M pattern has one budget only.
    sparsities : sequence of float, optional
        In [0, 1]; sorted and taken once each.
    keep : sequence of int, optional
        Instead of `sparsities`: numbers of weights that stay, taken from the largest to the smallest.
    solver, objective, options
        As for `solve`; a time limit holds for every budget.
    warm_start : bool (n,), optional
        For the least budget.
    on_result : callable, optional
        Called with each sparsity, or number of kept weights, and its result.
    should_stop : callable
        Called between budgets.

    Returns
    -------
    list of Result
        In increasing order of the number pruned; those until a stop, at least one.

    Raises
    ------
    UsageError, SolverError
        As for `solve`.

    Examples
    --------
    >>> import cbs_opt
    >>> results = cbs_opt.solve_path(cbs_opt.library("digits-mlp"), [0.5, 0.6, 0.7])  # doctest: +SKIP
    >>> results = cbs_opt.solve_path(instance, keep=range(1, 21), objective="joint")  # doctest: +SKIP
    """
    values = sparsities if keep is None else keep
    if values is not None and np.ndim(values) != 1 and not isinstance(values, set | frozenset):
        wanted = (
            "`sparsities` must be a sequence, such as [0.5, 0.6]"
            if keep is None
            else ("`keep` must be a sequence, such as [3, 2, 1]")
        )
        raise UsageError(f"{wanted}, got {values!r}")
    if (sparsities is None) == (keep is None) or values is None or not len(values):
        raise UsageError("a path needs at least one sparsity, or one number to `keep`, and not both")
    kind = objective
    if kind is None:
        able = get_solver(solver or DEFAULT_SOLVERS["selection"]).supports.objectives
        kind = "selection" if "selection" in able else "joint"
    takes_start = get_solver(solver or DEFAULT_SOLVERS[kind]).supports.warm_start
    problems: list[tuple[float, Instance]]
    if keep is None:
        problems = [(share, instance.with_sparsity(share)) for share in sorted(set(values))]
    else:
        problems = [(number, instance.with_kept(number)) for number in sorted(set(keep), reverse=True)]
    results: list[Result] = []
    before = warm_start
    for value, problem in problems:
        if results and should_stop():
            break
        if results and takes_start:
            before = extended(problem, results[-1].pruned, kind)
        result = solve(problem, solver, objective=objective, warm_start=before, **options)
        results.append(result)
        if on_result is not None:
            on_result(value, result)
    return results
