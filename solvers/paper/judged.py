"""Algorithms 1 and 2 as the paper runs them: swaps follow the quadratic model, the network judges the outcome.

The paper keeps the draw of RMP, and the step of the local search, whose pruned network has the least loss on
training images. What judges is a function of the caller, so that nothing here knows of networks. The solvers
`rmp`, `ls` and `cbs` judge by the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.solvers.paper.ls import LocalSearch, LocalSearchParameters
from cbs_opt.solvers.paper.rmp import Draws, RmpParameters
from cbs_opt.threads import library_threads
from cbs_opt.typing import BoolArray

Judge = Callable[[BoolArray], float]
"""The loss of the network pruned by a selection, bool (n,); it may be infinite or NaN, which is never the best."""


@dataclass(frozen=True)
class Judged:
    """A selection, and how it was found.

    Attributes
    ----------
    pruned : bool (n,)
    value : float
        As judged.
    judgements : int
        How often the judge was asked.
    swaps : int
        Taken until the last step, which need not be the best one.
    """

    pruned: BoolArray
    value: float
    judgements: int
    swaps: int = 0


def judged_draws(instance: Instance, parameters: RmpParameters, judge: Judge, rng: np.random.Generator) -> Judged:
    """The best of S random selections (Algorithm 2), the first of them plain magnitude.

    Parameters
    ----------
    instance : Instance
    parameters : RmpParameters
    judge : callable
    rng : numpy.random.Generator

    Returns
    -------
    Judged
        The first of the best.

    Notes
    -----
    O(S n log n) and S judgements.

    References
    ----------
    Yu, Serra, Ramalingam, Zhe, "The Combinatorial Brain Surgeon", ICML 2022, Algorithm 2.
    """
    draws = Draws(instance, parameters)
    best = draws.draw(None)
    value = _number(judge(best))
    for _ in range(parameters.draws - 1):
        drawn = draws.draw(rng)
        found = _number(judge(drawn))
        if found < value:
            best, value = drawn, found
    return Judged(best, value, parameters.draws)


def judged_search(
    instance: Instance,
    start: BoolArray,
    parameters: LocalSearchParameters,
    judge: Judge,
    *,
    value: float | None = None,
    patience: int | None = None,
) -> Judged:
    """The best step of the swap local search (Algorithm 1).

    Parameters
    ----------
    instance : Instance
    start : bool (n,)
        Feasible; it is the answer where no step is judged to be better.
    parameters : LocalSearchParameters
    judge : callable
    value : float, optional
        The judgement of the start, where it is known.
    patience : int, optional
        Ends after so many steps in a row without a better judgement. The paper's "non-improving steps" are those
        of the quadratic objective, which every step but the last one lowers.

    Returns
    -------
    Judged

    Notes
    -----
    A step costs what `LocalSearch` says and one judgement. BLAS uses one thread.

    References
    ----------
    Yu, Serra, Ramalingam, Zhe, "The Combinatorial Brain Surgeon", ICML 2022, Algorithm 1.
    """
    judgements = 0
    if value is None:
        value, judgements = _number(judge(start)), 1
    best, swaps, failures = start.copy(), 0, 0
    with library_threads(1, blas_only=True):
        for x, _, taken in LocalSearch(instance, parameters).steps(start):
            if not taken:
                break
            swaps += taken
            judgements += 1
            found = _number(judge(x))
            if found < value:
                best, value, failures = x.copy(), found, 0
            else:
                failures += 1
                if failures == patience:
                    break
    return Judged(best, value, judgements, swaps)


def _number(value: float) -> float:
    """Infinity for NaN, which compares with nothing."""
    return float("inf") if np.isnan(value) else float(value)
