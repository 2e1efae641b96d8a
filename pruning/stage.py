"""One stage: solve every variant of its quadratic model, apply, and choose by the loss on held-out samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cbs_opt.budget import Budget
from cbs_opt.curvature import Curvature
from cbs_opt.engines import Engine, make_engine
from cbs_opt.errors import CbsError, SolverError
from cbs_opt.instance import Instance
from cbs_opt.instances.batches import reason
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.losses import SampleLoss
from cbs_opt.instances.scores import Score, evaluate
from cbs_opt.losses import predicted_loss
from cbs_opt.pruning.gauss_newton import Distance, preconditioner, steps
from cbs_opt.pruning.method import Method
from cbs_opt.pruning.network import State, WorkingCopy
from cbs_opt.pruning.problem import Problem, of_layers, scaled_update, undamped_loss
from cbs_opt.pruning.refits import DAMPING, refit
from cbs_opt.pruning.statistics import reestimate
from cbs_opt.pruning.targets import one_by_one
from cbs_opt.result import Result, Status
from cbs_opt.solve import solve
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray, FloatArray

logger = logging.getLogger("cbs_opt")

STEP_SCALES = (1.0, 0.5)
"""Parts of a Gauss-Newton step that are tried."""


class Stopped(Exception):  # noqa: N818  # no error: someone asked for it
    """A stop was asked for while something was computed that is of no use unfinished."""


@dataclass(frozen=True)
class Scorer:
    """Loss and metric of a network on held-out training samples.

    Attributes
    ----------
    source : SampleSource or None
        None where nothing is held out: then there is no score.
    loss, metric, output_key : object
        See `scores.evaluate`.
    device : torch.device
    should_stop : callable
        True ends the score with `Stopped`.
    """

    source: SampleSource | None
    loss: object
    metric: object
    output_key: str | None
    device: torch.device
    should_stop: Callable[[], bool] = lambda: False

    def __call__(self, copy: WorkingCopy) -> Score | None:
        """Score the network as it is."""
        if self.source is None:
            return None
        return evaluate(
            copy.model,
            self.source,
            loss=self.loss,  # type: ignore[arg-type]
            metric=self.metric,  # type: ignore[arg-type]
            output_key=self.output_key,
            device=self.device,
            progress=self.check,
        )

    def check(self, samples: int = 0) -> None:
        """Raise `Stopped` where a stop was asked for."""
        if self.should_stop():
            raise Stopped


@dataclass(frozen=True)
class Choice:
    """A pruned network, and what it came from.

    Attributes
    ----------
    state : dict of str to Tensor
        The tensors of the network that changed.
    pruned : bool (n,)
    score : Score or None
        On the held-out samples.
    predicted : float
        Change of the quadratic model, without its damping, by the change of the weights.
    damping, update_scale, split, recalibrated, first_order_scale, refitted : float, float, str, bool, float, bool
        What was chosen.
    gauss_newton : int
        Steps that were taken then.
    status : str
        Of the solver.
    """

    state: State
    pruned: BoolArray
    score: Score | None
    predicted: float
    damping: float
    update_scale: float
    split: str
    recalibrated: bool
    status: str
    first_order_scale: float = 1.0
    refitted: bool = False
    gauss_newton: int = 0

    @property
    def loss(self) -> float:
        """On the held-out samples; infinite where it is not finite, 0 where nothing is held out."""
        if self.score is None:
            return 0.0
        return self.score.loss if math.isfinite(self.score.loss) else math.inf


@dataclass(frozen=True)
class Selected:
    """What is pruned.

    Attributes
    ----------
    pruned : bool (n,)
    weights : float64 (n,) or None
        After the update, where there is one.
    status : str
        Of the solver.
    """

    pruned: BoolArray
    weights: FloatArray | None = None
    status: str = str(Status.CONVERGED)


def budgeted(problem: Problem, budget: Budget, fixed: NDArray[np.int8] | None) -> Instance:
    """The instance of a variant with the budget of the stage."""
    if problem.split == "layer":
        budget = of_layers(problem.instance, budget.total, fixed)
    return replace(problem.instance, budget=budget, fixed=fixed)


def solved(
    instance: Instance,
    method: Method,
    seed: int,
    should_stop: Callable[[], bool],
    device: str,
    engine: Engine,
) -> Result:
    """Solve one variant, with the update where there is one."""
    stop = Stop(time_limit=method.time_limit, max_iterations=method.max_iterations, should_stop=should_stop)
    return solve(
        instance,
        method.solver,
        objective=method.objective,
        stop=stop,
        seed=seed,
        update=method.updates,
        device=device,
        threads=method.threads,
        engine=engine,
    )


def best(
    copy: WorkingCopy,
    variants: Iterable[Problem],
    budget: Budget,
    fixed: NDArray[np.int8] | None,
    method: Method,
    scorer: Scorer,
    samples: SampleSource,
    *,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
    dense: nn.Module | None = None,
    fresh: Callable[[int], SampleSource] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Choice | None:
    """Solve the variants and return the network with the least loss on the held-out samples.

    Parameters
    ----------
    copy : WorkingCopy
        With the weights of the instances; it is the same afterwards.
    variants : iterable of Problem
    budget : Budget
        Of the stage.
    fixed : int8 (n,) or None
    method : Method
    scorer : Scorer
    samples : SampleSource
        Of the stage: batch norms are re-estimated on them.
    seed : int
    should_stop : callable, optional
        True ends the search; what was found before counts.
    dense : torch.nn.Module, optional
        The dense network, whose outputs are the targets of methods that are `sequential`, `refit` or take
        Gauss-Newton steps.
    fresh : callable, optional
        The samples of the Gauss-Newton steps 1, 2, ….
    progress : callable, optional
        Gets what is done in these steps, how much of it, and the total.

    Returns
    -------
    Choice or None
        None when it was stopped before anything was found.
    """
    before = copy.state()
    refusals: list[SolverError] = []
    found: Choice | None = None
    origin: tuple[Problem, Instance] | None = None
    workers = make_engine(method.engine, method.workers, method.threads or 1)
    try:
        with workers.kept() as engine:
            for problem in variants:
                if should_stop():
                    break
                instance = budgeted(problem, budget, fixed)
                where = "cpu" if scorer.device.type == "cpu" else "auto"  # solvers without a card refuse "cuda"
                try:
                    result = solved(instance, method, seed, should_stop, where, engine)
                except SolverError as error:  # as where a Hessian without damping is singular
                    logger.info(f"damping {problem.damping:g} is left out: {error}")
                    refusals.append(error)
                    continue
                if method.sequential and dense is not None and not should_stop():
                    result = _sequential(
                        copy, dense, instance, result, samples, method, seed, should_stop, where, engine
                    )
                    copy.restore(before)
                selected = Selected(result.pruned, result.weights, str(result.status))
                try:
                    applied = _applied(copy, before, problem, instance, selected, method, scorer, samples, dense)
                    for choice in applied:
                        if found is None or choice.loss < found.loss:
                            found, origin = choice, (problem, instance)
                except Stopped:
                    if found is None:
                        unscored, plain = replace(scorer, source=None), replace(method, refit="no")
                        (found,) = _applied(
                            copy, before, problem, instance, selected, plain, unscored, samples, dense
                        )
                        origin = problem, instance
                if scorer.source is None:
                    break  # nothing could tell one variant from another: the first is taken
        if found is not None and origin is not None and dense is not None and fresh is not None:
            found = _together(copy, found, origin, dense, method, scorer, samples, fresh, seed, progress)
        if found is not None and origin is not None and scorer.source is not None:
            found = _no_worse_than_magnitude(copy, before, found, origin, method, scorer, samples)
    finally:
        copy.restore(before)
    if found is None and refusals:
        raise refusals[0]
    return found


def _sequential(
    copy: WorkingCopy,
    dense: nn.Module,
    instance: Instance,
    result: Result,
    samples: SampleSource,
    method: Method,
    seed: int,
    should_stop: Callable[[], bool],
    where: str,
    engine: Engine,
) -> Result:
    """The result, refined layer by layer."""
    limit = None if method.time_limit is None else method.time_limit / max(len(copy.places), 1)
    own = replace(method, time_limit=limit)
    pruned, weights = one_by_one(
        copy, dense, instance, result, samples, lambda layer: solved(layer, own, seed, should_stop, where, engine)
    )
    return replace(result, pruned=pruned, weights=weights if method.updates else None)


def _applied(
    copy: WorkingCopy,
    before: State,
    problem: Problem,
    instance: Instance,
    selected: Selected,
    method: Method,
    scorer: Scorer,
    samples: SampleSource,
    dense: nn.Module | None,
) -> Iterable[Choice]:
    """The network with every scale of the update, refitted and not, with and without re-estimated statistics."""
    scales = method.scales if selected.weights is not None else (0.0,)
    if scorer.source is None:
        scales = scales[:1]
    for scale in scales:
        weights = instance.weights if selected.weights is None else selected.weights
        new = scaled_update(instance, selected.pruned, weights, scale)
        statistics = _tried(method.recalibrate_bn if copy.statistics else "no", scorer)
        for refitted, recalibrated in product(_tried(method.refit if scale else "no", scorer), statistics):
            copy.restore(before)
            copy.take(new)
            if refitted:
                assert dense is not None
                how = {"relative": method.relative, "statistics": recalibrated}
                refit(copy, dense, samples, selected.pruned, DAMPING * problem.damping, check=scorer.check, **how)
            elif recalibrated:
                reestimate(copy.model, samples)
            yield Choice(
                copy.state(),
                selected.pruned,
                scorer(copy),
                _predicted(problem, instance, copy.weights if refitted else new, method),
                problem.damping,
                scale,
                problem.split,
                recalibrated,
                selected.status,
                problem.first_order_scale,
                refitted,
            )


def _no_worse_than_magnitude(
    copy: WorkingCopy,
    before: State,
    found: Choice,
    origin: tuple[Problem, Instance],
    method: Method,
    scorer: Scorer,
    samples: SampleSource,
) -> Choice:
    """The choice, or the smallest weights pruned without an update, should that lose less on the held-out samples.

    As where a handful of samples misleads the quadratic model.
    """
    problem, instance = origin
    pruned = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
    plain = replace(method, refit="no")
    try:
        for choice in _applied(copy, before, problem, instance, Selected(pruned), plain, scorer, samples, None):
            if choice.loss < found.loss:
                logger.info(f"magnitude alone has a lower held-out loss, {choice.loss:.4f}: it is taken")
                found = choice
    except Stopped:
        pass
    return found


def _together(
    copy: WorkingCopy,
    found: Choice,
    origin: tuple[Problem, Instance],
    dense: nn.Module,
    method: Method,
    scorer: Scorer,
    samples: SampleSource,
    fresh: Callable[[int], SampleSource],
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Choice:
    """The choice after Gauss-Newton steps, each as far as it lowers the loss on the held-out samples."""
    start = found
    if scorer.source is None or not isinstance(scorer.loss, SampleLoss):
        return found
    distance = Distance(scorer.loss)
    copy.restore(found.state)
    K: Curvature | None = None
    try:
        for number in range(1, method.most_steps + 1):
            drawn = fresh(number)
            K = preconditioner(copy, drawn, distance, seed) if K is None else K
            weights, before = copy.weights, found

            def tell(done: int, total: int, number: int = number) -> None:
                scorer.check()
                progress(f"Gauss-Newton step {number} of at most {method.most_steps}", done, total)

            moves = steps(copy, dense, drawn, found.pruned, distance, K, tell)
            for move, scale in product(moves, STEP_SCALES):
                copy.take(weights + scale * move)
                score = scorer(copy)
                if score is not None and math.isfinite(score.loss) and score.loss < found.loss:
                    predicted = _predicted(*origin, copy.weights, method)
                    found = replace(
                        found, state=copy.state(), score=score, predicted=predicted, gauss_newton=number
                    )
            if found is before:
                break
            copy.restore(found.state)
            logger.info(f"Gauss-Newton step {number}: held-out loss {before.loss:.4f} → {found.loss:.4f}")
    except Stopped:
        pass
    except CbsError as error:
        done = f"{found.gauss_newton} Gauss-Newton steps" if found.gauss_newton else "no Gauss-Newton step"
        logger.info(f"{done}, and no more: {error}")
    except torch.OutOfMemoryError:
        logger.warning(f"no Gauss-Newton step after {found.gauss_newton}: the memory of the card is too short")
    except Exception as error:  # whatever a user's network does in forward mode: the choice is kept
        logger.warning(f"no Gauss-Newton step after {found.gauss_newton}: {reason(error)}")
    if found is start or not copy.statistics or method.recalibrate_bn == "no":
        return found
    return _with_new_statistics(copy, start, found, method, scorer, samples)


def _with_new_statistics(
    copy: WorkingCopy, start: Choice, found: Choice, method: Method, scorer: Scorer, samples: SampleSource
) -> Choice:
    """The choice with statistics of its own, as those of `start` are of the network before the steps.

    Where they do not help, "auto" leaves those of `start`; "yes" must have its own, and takes `start` itself.
    """
    otherwise = start if method.recalibrate_bn == "yes" else found
    copy.restore(found.state)
    try:
        reestimate(copy.model, samples)
        again = replace(found, state=copy.state(), score=scorer(copy), recalibrated=True)
    except Stopped:
        return otherwise
    except Exception as error:  # as above
        logger.warning(f"statistics of batch norms are not re-estimated: {reason(error)}")
        return otherwise
    return again if again.loss < otherwise.loss else otherwise


def _tried(choice: str | None, scorer: Scorer) -> tuple[bool, ...]:
    """Whether something is done or not; both, where held-out samples decide."""
    if choice == "auto":
        return (False,) if scorer.source is None else (False, True)
    return (choice == "yes",)


def _predicted(problem: Problem, instance: Instance, new: FloatArray, method: Method) -> float:
    """The change by the quadratic model without its damping, which is no part of the loss."""
    bare = instance
    if bare.linear is not None and problem.first_order_scale > 0:
        bare = replace(bare, linear=bare.linear / problem.first_order_scale)
    damped = problem.damping > 0 and method.curvature != "inverse-hessian"
    return (undamped_loss if damped else predicted_loss)(bare, new - instance.weights)
