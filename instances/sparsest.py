"""The largest sparsity whose cost on held-out data is at most a given value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.instances.apply import apply
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.losses import LossLike
from cbs_opt.instances.metrics import MetricLike
from cbs_opt.instances.modes import unwrapped
from cbs_opt.instances.plain import effective_tensors, set_effective
from cbs_opt.instances.scores import Score, cost, evaluate
from cbs_opt.instances.tensors import read_places
from cbs_opt.path import solve_path
from cbs_opt.result import Result

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Sparsities that are tried by default."""


@dataclass(frozen=True)
class Trial:
    """One sparsity: its result, the score of the pruned network, and what that costs (see `scores.cost`)."""

    sparsity: float
    result: Result
    score: Score
    cost: float


@dataclass(frozen=True)
class Sparsest:
    """The result of the search.

    Attributes
    ----------
    chosen : Trial or None
        The largest sparsity within the allowed cost; None if all cost more.
    before : Score
        Of the dense network.
    trials : list of Trial
        All sparsities, in increasing order.
    """

    chosen: Trial | None
    before: Score
    trials: list[Trial]


def largest_sparsity(
    model: nn.Module,
    instance: Instance,
    source: SampleSource,
    *,
    max_drop: float = 1.0,
    sparsities: Sequence[float] = SPARSITIES,
    loss: LossLike | None = None,
    metric: MetricLike | None = None,
    output_key: str | None = None,
    device: str = "cpu",
    **options: Any,
) -> Sparsest:
    """Solve for a path of sparsities, score the network at each, and choose.

    Parameters
    ----------
    model : torch.nn.Module
        With the weights from which the instance was made; it is not changed.
    instance : Instance
        Without groups.
    source : SampleSource
        Data that were not used to make the instance: a score on the data used for selection is biased.
    max_drop : float
        Points of accuracy and the like, or percent of perplexity, error or loss.
    sparsities : sequence of float
    loss, metric, output_key, device
        As for `scores.evaluate`.
    **options
        Of `cbs_opt.path.solve_path`: solver, objective, update, stop, seed, …

    Raises
    ------
    UsageError
        For a negative `max_drop`, or data without samples.
    """
    if max_drop < 0:
        raise UsageError(f"`max_drop` must not be negative, got {max_drop:g}")
    model = unwrapped(model)
    names = [place.name for place in read_places(instance)]
    own = {name: tensor.clone() for name, tensor in effective_tensors(model).items() if name in names}

    def scored() -> Score:
        score = evaluate(model, source, loss=loss, metric=metric, output_key=output_key, device=device)
        if score is None:
            raise UsageError(f"{source.name}: holds no samples to score with")
        return score

    before = scored()
    trials: list[Trial] = []
    results = solve_path(instance, sparsities, **options)
    for sparsity, result in zip(sorted(set(sparsities)), results, strict=False):
        try:
            apply(model, instance, result)
            after = scored()
        finally:
            for name, tensor in own.items():
                set_effective(model, name, tensor)
        trials.append(Trial(sparsity, result, after, cost(before, after)))
    within = [trial for trial in trials if trial.cost <= max_drop]
    return Sparsest(within[-1] if within else None, before, trials)
