"""The largest sparsity whose cost on held-out samples is at most a given value, by bisection."""

from __future__ import annotations

import logging
import time

from cbs_opt.errors import UsageError
from cbs_opt.instances.scores import Score, cost
from cbs_opt.pruning.outcome import Pruned
from cbs_opt.pruning.run import Run
from cbs_opt.pruning.stage import Choice, Stopped

logger = logging.getLogger("cbs_opt")

HALVINGS = 6
"""Sparsities tried between the last stage within the limit and the first beyond it."""

TRIALS = HALVINGS + 1
"""Choices that a stage makes, at most."""


def sparsest(run: Run, max_drop: float) -> Pruned:
    """Prune as far as the loss of quality allows.

    Stages are done one after the other until one costs more than `max_drop`; between that one and the one before,
    the sparsity is bisected, from the same network and the same quadratic model. One shot is the case of a single
    stage.

    Parameters
    ----------
    run : Run
        Its sparsity is the largest that is tried.
    max_drop : float
        Points of accuracy and the like, or percent of perplexity, error or loss, see `scores.cost`; on the samples
        held out.

    Returns
    -------
    Pruned
        Without stages where all cost more.

    Raises
    ------
    UsageError
        For a negative `max_drop`, without labelled samples that are held out, or for an N:M pattern.
    """
    if max_drop < 0:
        raise UsageError(f"`accuracy_drop` must not be negative, got {max_drop:g}")
    if run.method.nm is not None:
        raise UsageError(
            "`accuracy_drop` looks for a sparsity, and an N:M pattern has its own: leave out one of them"
        )
    if not run.held_out:
        raise UsageError("`accuracy_drop` needs labelled samples that are held out: see `held_out`")
    try:
        run.score_dense()
        low = 0.0
        for number in range(1, run.method.stages + 1):
            high = run.part(number)
            found = _within(run, number, low, high, max_drop)
            if found is None or found < high:
                break
            low = high
    except Stopped:
        run.interrupted = True
    return run.outcome()


def _within(run: Run, number: int, low: float, high: float, max_drop: float) -> float | None:
    """Do the stage as far as it goes: the part of the budget that it reached, None for none."""
    started = time.perf_counter()
    samples = run.samples_of(number)
    instance = run.model_around(number, samples)
    taken: tuple[float, Choice] | None = None
    failed = high
    for trial in range(TRIALS):
        part = high if trial == 0 else 0.5 * (failed + (low if taken is None else taken[0]))
        choice = run.choice(number, part, samples, instance)
        price = cost(_scored(run.before), _scored(choice.score))
        logger.info(f"{choice.pruned.mean():.2%} pruned costs {price:+.2f}")
        if price <= max_drop:
            taken = part, choice
            if part == high:
                break
        else:
            failed = part
    if taken is None:
        return None
    run.take(number, taken[1], time.perf_counter() - started)
    run.tell(run.stages[-1])
    return taken[0]


def _scored(score: Score | None) -> Score:
    assert score is not None
    return score
