"""One method on one instance: a selection, then an update of the kept weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cbs_opt.bench.anytime import CLOCKS
from cbs_opt.bench.paper.study import NETWORK, NONE, SCALED, SINGLE, Method
from cbs_opt.compilation import finish_compilation
from cbs_opt.instance import Instance
from cbs_opt.losses import predicted_loss
from cbs_opt.monitor import Monitor
from cbs_opt.registry import get_solver
from cbs_opt.run import run_solver
from cbs_opt.solver import Context
from cbs_opt.solvers.paper.cbs import CbsParameters, CombinatorialBrainSurgeon
from cbs_opt.solvers.paper.judged import Judged, judged_draws, judged_search
from cbs_opt.solvers.paper.ls import LocalSearchParameters, SwapLocalSearch
from cbs_opt.solvers.paper.single_updates import single_weight_update
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray, FloatArray
from cbs_opt.update import best_update

SCALES = tuple(k / 10 for k in range(1, 11))
"""Multiples of the best update that `scaled` chooses from."""

Loss = Callable[[FloatArray], float]
"""The loss of the network with these weights, float64 (n,), on training images."""

_BLIND = ("magnitude", "random", "rmp")
"""Selections that see no image unless the network judges them."""


@dataclass(frozen=True)
class Selected:
    """A selection.

    Attributes
    ----------
    pruned : bool (n,)
    status : str
        Why the search ended.
    seconds : float
        Processor seconds.
    iterations : int or None
        Of the solver; None where the network judged.
    judgements, swaps : int or None
        Networks that were scored, swaps that were taken; None where the model judged.
    """

    pruned: BoolArray
    status: str
    seconds: float
    iterations: int | None = None
    judgements: int | None = None
    swaps: int | None = None


@dataclass(frozen=True)
class Updated:
    """The weights of a pruned network.

    Attributes
    ----------
    weights : float64 (n,)
        Zero where pruned.
    predicted : float
        The increase of the loss by the quadratic model.
    seconds : float
        Processor seconds of the update, its choice of a scale included.
    scale : float or None
        By which the best update is multiplied, where it was chosen.
    """

    weights: FloatArray
    predicted: float
    seconds: float
    scale: float | None = None


def select(method: Method, instance: Instance, loss: Loss, seed: int, threads: int | None = 1) -> Selected:
    """Choose the weights to prune.

    Parameters
    ----------
    method : Method
    instance : Instance
        With the budget.
    loss : callable
        Judges, for methods whose draws and steps the network chooses among.
    seed : int
    threads : int, optional

    Raises
    ------
    CbsError
        Where the solver cannot take the instance, or fails.
    """
    clock = time.process_time()
    if method.judge == NETWORK:
        found = _judged(method, instance, loss, seed)
        seconds = time.process_time() - clock
        return Selected(found.pruned, "converged", seconds, None, found.judgements, found.swaps)
    solver = get_solver(method.select)(json.loads(method.parameters))
    # Processor seconds: the limit then allows the same work on a busy machine.
    stop = Stop(time_limit=method.time_limit, max_iterations=method.iterations)
    context = Context(method.objective, seed, Monitor(stop, clock=CLOCKS["processor"]), threads=threads)
    run = run_solver(solver, instance, context, finish_compilation)
    if run.error is not None:
        raise run.error
    assert run.pruned is not None
    return Selected(run.pruned, str(run.status), run.processor_seconds, run.monitor.iterations)


def _judged(method: Method, instance: Instance, loss: Loss, seed: int) -> Judged:
    """The published searches, judged by the network without an update."""

    def judge(pruned: BoolArray) -> float:
        return loss(np.where(pruned, 0.0, instance.weights))

    given = json.loads(method.parameters)
    if method.select == SwapLocalSearch.name:
        search = SwapLocalSearch(given).parameters
        assert isinstance(search, LocalSearchParameters)
        start = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
        return judged_search(instance, start, search, judge)
    both = CombinatorialBrainSurgeon(given).parameters
    assert isinstance(both, CbsParameters)
    drawn = judged_draws(instance, both.rmp(), judge, Context(seed=seed).rng())
    found = judged_search(instance, drawn.pruned, both.local_search(), judge, value=drawn.value)
    return Judged(found.pruned, found.value, drawn.judgements + found.judgements, found.swaps)


def update(method: Method, instance: Instance, pruned: BoolArray, loss: Loss) -> Updated:
    """Move the kept weights as the method does.

    Parameters
    ----------
    method : Method
    instance : Instance
    pruned : bool (n,)
    loss : callable
        Chooses the scale of scaled updates.

    Raises
    ------
    CbsError
        Where H is singular.
    """
    clock = time.process_time()
    zeroed = np.where(pruned, 0.0, instance.weights)
    scale = None
    if method.update == NONE:
        weights = zeroed
    elif method.update == SINGLE:
        weights = single_weight_update(instance, pruned)
    else:
        weights = best_update(instance, pruned)
        if method.update == SCALED:
            scale = min(SCALES, key=lambda s: _ordered(loss(zeroed + s * (weights - zeroed))))
            weights = zeroed + scale * (weights - zeroed)
    seconds = time.process_time() - clock
    return Updated(weights, predicted_loss(instance, weights - instance.weights), seconds, scale)


def images_seen(method: Method, choice_images: int) -> int:
    """Training images that decide about the pruned network."""
    blind = method.select in _BLIND and method.judge != NETWORK and method.update == NONE
    chosen = method.judge == NETWORK or method.update == SCALED
    return (0 if blind else method.source.images) + (choice_images if chosen else 0)


def _ordered(value: float) -> float:
    """Infinity for NaN, which compares with nothing."""
    return float("inf") if np.isnan(value) else value
