"""One instance under many budgets: solutions along a path of sparsities, each the warm start of the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.registry import get_solver
from cbs_opt.result import Result
from cbs_opt.solve import DEFAULT_SOLVERS, solve
from cbs_opt.typing import BoolArray


def extended(instance: Instance, pruned: BoolArray) -> BoolArray:
    """A selection for the instance's budget: the weights of `pruned`, and the cheapest others.

    The price of weight i is its increase of the selection loss of `pruned`: w_i (H w_P)_i + ½ H_ii w_i², less its
    linear term. Couplings among the added weights are ignored: the result is a warm start.

    Parameters
    ----------
    instance : Instance
        With a budget, of each group, at least what `pruned` meets.
    pruned : bool (n,)

    Returns
    -------
    bool (n,)
        One product with H and O(n log n) time.
    """
    w = instance.weights
    price = 0.5 * instance.curvature.diagonal() * w * w
    price += w * instance.curvature.matmul(np.where(pruned, w, 0.0))
    if instance.linear is not None:
        price -= instance.linear * w
    price[pruned] = -np.inf
    return instance.budget.cheapest(price, instance.fixed)


def solve_path(
    instance: Instance,
    sparsities: Sequence[float],
    solver: str | None = None,
    *,
    objective: str | None = None,
    warm_start: BoolArray | None = None,
    on_result: Callable[[float, Result], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[Result]:
    """Solve an instance for several sparsities, from the lowest to the highest.

    Parameters
    ----------
    instance : Instance
        Budgets of groups change in proportion; an N:M pattern has one budget only.
    sparsities : sequence of float
        In [0, 1]; sorted and taken once each.
    solver, objective, options
        As for `solve`; a time limit holds for every sparsity.
    warm_start : bool (n,), optional
        For the lowest sparsity.
    on_result : callable, optional
        Called with each sparsity and its result.
    should_stop : callable
        Called between sparsities.

    Returns
    -------
    list of Result
        In increasing order of sparsity; those until a stop, at least one.

    Raises
    ------
    UsageError, SolverError
        As for `solve`.

    Examples
    --------
    >>> import cbs_opt
    >>> results = cbs_opt.solve_path(cbs_opt.library("digits-mlp"), [0.5, 0.6, 0.7])  # doctest: +SKIP
    """
    if not sparsities:
        raise UsageError("a path needs at least one sparsity")
    name = solver or DEFAULT_SOLVERS[objective or "selection"]
    takes_start = get_solver(name).supports.warm_start
    results: list[Result] = []
    before = warm_start
    for sparsity in sorted(set(sparsities)):
        if results and should_stop():
            break
        problem = instance.with_sparsity(sparsity)
        if results and takes_start:
            before = extended(problem, results[-1].pruned)
        result = solve(problem, solver, objective=objective, warm_start=before, **options)
        results.append(result)
        if on_result is not None:
            on_result(sparsity, result)
    return results
