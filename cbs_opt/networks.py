"""Functions for users with a network: `export`, `prune`, `apply` and `masks`.

torch, `cbs_opt.instances` and `cbs_opt.pruning` are loaded when a function is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.result import Result
from cbs_opt.scalars import checked_seed, is_finite
from cbs_opt.solution import Solution

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cbs_opt.instances.masks import LayerMask
    from cbs_opt.pruning.outcome import Pruned


def export(
    model: nn.Module,
    inputs: Any,
    labels: Any = None,
    names: Sequence[str] | None = None,
    *,
    sparsity: float | str | None = None,
    nm: str | tuple[int, int] | None = None,
    samples: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> Instance:
    """Turn a trained network and samples into an instance.

    Parameters
    ----------
    model : torch.nn.Module
        May be compiled, in DataParallel, or of half precision; it is not changed.
    inputs, labels : tensors, arrays, lists
        Or `inputs` alone: (inputs, labels), dictionaries, a loader of batches, a data set, a function that runs
        the model; see `cbs_opt.instances.own_data`. Reconstruction (`source="reconstruction"`) and
        `source="kfac"` with `fisher="exact"` or `"sampled"` need no labels.
    names : sequence of str, optional
        Tensors to prune, by names or patterns; by default the weights of all layers that multiply.
    sparsity : float or str, optional
        0.5 or "50%".
    nm : str or (int, int), optional
        "2:4": two of four consecutive inputs are kept.
    samples : int, optional
        Maximum number.
    seed : int, optional
        Draw them at random; also of labels that `fisher="sampled"` draws, 0 there by default.
    **options
        `loss`, `metric`, `source`, `fisher`, `blocks`, `damping`, `layers`, `path` and all others of
        `cbs_opt.instances.export.export`.

    Returns
    -------
    Instance

    Raises
    ------
    UsageError, InstanceError
        One sentence that names what does not fit; the error of torch is its `__cause__`.

    Examples
    --------
    >>> import cbs_opt, numpy, torch
    >>> model = torch.nn.Linear(4, 3)
    >>> x, y = numpy.random.rand(20, 4), numpy.arange(20, dtype="int32") % 3
    >>> cbs_opt.export(model, x, y, nm="2:4").describe()
    '12 weights in 1 block (20 gradients, damping 1e-05), 6 to prune (50.0%), 3 groups'
    """
    from cbs_opt.instances.budgets import share_of
    from cbs_opt.instances.export import export as export_samples
    from cbs_opt.instances.modes import unwrapped
    from cbs_opt.instances.own_data import own_samples
    from cbs_opt.instances.recipe import check_memory, check_options

    check_options("export", options, [*signature(export_samples).parameters][3:])
    check_memory(options.get("memory"))
    data = inputs if labels is None else (inputs, _array(labels))
    if seed is not None:
        checked_seed(seed)
    owned = own_samples(data, unwrapped(model), "the data", samples, seed)
    return export_samples(
        model,
        owned.inputs,
        owned.targets,
        names,
        sparsity=None if sparsity is None else share_of(sparsity, "`sparsity`"),
        nm=None if nm is None else _pattern(nm),
        seed=0 if seed is None else seed,
        **options,
    )


def prune(
    model: nn.Module,
    data: Any,
    sparsity: float | str | None = None,
    *,
    held_out: Any = None,
    names: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    nm: str | tuple[int, int] | None = None,
    loss: Any = None,
    metric: Any = None,
    output_key: str | None = None,
    device: str = "auto",
    accuracy_drop: float | None = None,
    state: Any = None,
    on_stage: Any = None,
    should_stop: Any = None,
    **options: Any,
) -> Pruned:
    """Prune a network in one shot, or in stages.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.
    data : object
        Training samples, (inputs, labels) or any other form that `export` takes.
    sparsity : float or str, optional
        0.9 or "90%"; the fraction of the prunable weights to prune.
    held_out : int or object, optional
        Samples for choices such as the damping: a number of training samples that are held out, a tenth of them by
        default, or other data.
    names, exclude : sequence of str, optional
        Tensors to prune or not, by names or patterns.
    nm : str or (int, int), optional
        "2:4" in place of a sparsity.
    loss, metric, output_key, device : optional
        As for `export`.
    accuracy_drop : float, optional
        Take the largest sparsity, at most `sparsity`, that costs at most so many points of accuracy, or percent of
        perplexity, error or loss, on the samples held out; without any such, the network as it was and no stages.
    state : Path or str, optional
        A file that is written after every stage, from which the same call continues.
    on_stage : callable, optional
        Called with the record of every stage.
    should_stop : callable, optional
        True ends the run with the network of the last stage.
    **options
        `stages`, `schedule`, `source`, `samples`, `batch`, `damping`, `update_scale`, `recalibrate_bn`, `split`
        and all others of `cbs_opt.pruning.method.Method`. `memory` is in bytes.

    Returns
    -------
    Pruned
        With `model`, `masks`, `stages`, `before` and `after`, `summary()`.

    Raises
    ------
    UsageError, InstanceError
        One sentence that names what does not fit.

    Examples
    --------
    >>> import cbs_opt, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> x, y = torch.randn(200, 8), torch.randint(3, (200,))
    >>> pruned = cbs_opt.prune(model, (x, y), 0.5, time_limit=1)
    >>> round(pruned.sparsity, 2)
    0.5
    """
    from cbs_opt.instances.budgets import share_of
    from cbs_opt.instances.data import own_source
    from cbs_opt.instances.modes import unwrapped
    from cbs_opt.instances.recipe import check_memory
    from cbs_opt.pruning.method import Method
    from cbs_opt.pruning.run import Run
    from cbs_opt.pruning.search import TRIALS, sparsest

    check_memory(options.get("memory"))
    other = None
    number = held_out if held_out is None or isinstance(held_out, int) else None
    inner = unwrapped(model)
    if held_out is not None and number is None:
        other = own_source(held_out, inner, "the held-out data")
    given = {"sparsity": None if sparsity is None else share_of(sparsity, "`sparsity`")}
    method = Method.of({**given, "nm": None if nm is None else _pattern(nm), "held_out": number, **options})
    if accuracy_drop is not None and not (is_finite(accuracy_drop) and accuracy_drop >= 0):
        raise UsageError(f"`accuracy_drop` must be a finite number ≥ 0, got {accuracy_drop!r}")
    run = Run(
        model,
        own_source(data, inner, "the data"),
        method,
        names=names,
        exclude=exclude,
        loss=loss,
        metric=metric,
        output_key=output_key,
        held_out=other,
        device=device,
        state=state,
        trials=1 if accuracy_drop is None else TRIALS,
        on_stage=on_stage,
        should_stop=should_stop or (lambda: False),
    )
    return run() if accuracy_drop is None else sparsest(run, accuracy_drop)


def apply(model: nn.Module, instance: Instance, solution: Result | Solution) -> list[LayerMask]:
    """Prune a network in place, and update its kept weights if the solution has updated weights.

    Parameters, result and errors are those of `cbs_opt.instances.apply.apply`.
    """
    from cbs_opt.instances.apply import apply as apply_solution

    return apply_solution(model, instance, solution)


def masks(instance: Instance, solution: Result | Solution) -> dict[str, Tensor]:
    """The masks of a solution by name of tensor, bool of the tensor's shape: True where a weight is kept.

    Raises
    ------
    InstanceError
        When the instance does not name its tensors.
    """
    from cbs_opt.instances.apply import layer_masks
    from cbs_opt.instances.masks import kept_masks

    return kept_masks(layer_masks(instance, solution.pruned))


def _array(values: Any) -> Any:
    """Lists and series as arrays; tensors and trees of them unchanged."""
    import numpy as np

    if isinstance(values, list) or type(values).__module__.startswith("pandas"):
        return np.asarray(values)
    return values


def _pattern(nm: str | tuple[int, int]) -> tuple[int, int]:
    parts = nm.split(":") if isinstance(nm, str) else list(nm)
    try:
        keep, of = (int(part) for part in parts)
    except (TypeError, ValueError):
        raise UsageError(f"`nm` must be 'N:M', such as '2:4', or (N, M), got {nm!r}") from None
    return keep, of
