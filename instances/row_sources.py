"""Sources of curvature whose blocks are rows of layers: reconstruction and kfac, as an export asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from cbs_opt.instances.batches import Samples
from cbs_opt.instances.fisher_terms import fisher_terms
from cbs_opt.instances.gradients import CHUNK_BYTES
from cbs_opt.instances.kfac import factored
from cbs_opt.instances.losses import SampleLoss
from cbs_opt.instances.output_gradients import row_gradients
from cbs_opt.instances.recipe import DAMPING, Recipe
from cbs_opt.instances.reconstruction import input_covariances
from cbs_opt.instances.row_blocks import RowBlocks, row_blocks
from cbs_opt.instances.tensors import Layout


def row_hessians(
    model: nn.Module,
    inputs: Samples,
    labels: Samples | None,
    layouts: Mapping[str, Layout],
    recipe: Recipe,
    loss: SampleLoss | None,
    *,
    dense: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> tuple[RowBlocks, float | list[float]]:
    """The blocks of all rows, and the damping within: λ, or that of each layer where it is relative.

    Parameters
    ----------
    model : torch.nn.Module
    inputs, labels : (m, …)
        The labels may be None where the recipe does not need them.
    layouts : mapping of str to Layout
        The weights, by name.
    recipe : Recipe
        With a source whose `by_rows` is true.
    loss : SampleLoss or None
        For kfac.
    dense : bool
        Whether nothing of the network is pruned yet, see `factored`.
    chunk_bytes : int
    progress : callable, optional
        Gets what is being done, and the number of samples done.

    Raises
    ------
    UsageError, InstanceError
        As `row_gradients`, `fisher_terms` and `input_covariances` do.
    """
    gradients = None
    if recipe.source == "kfac":
        assert loss is not None
        gradients = row_gradients(
            model,
            inputs,
            labels,
            layouts,
            fisher_terms(recipe.fisher or "empirical", loss, recipe.seed, recipe.temperature),
            chunk_bytes=chunk_bytes,
            progress=lambda done: progress("output gradients", done),
        )
    layers = input_covariances(
        model, inputs, layouts, chunk_bytes=chunk_bytes, progress=lambda done: progress("inputs", done)
    )
    scales = None
    if gradients is not None:
        layers, scales = factored(layers, gradients, dense=dense)
    damping = DAMPING if recipe.damping is None else recipe.damping
    dampings = [damping] * len(layers)
    if recipe.relative_damping is not None:
        dampings = [recipe.relative_damping * layer.mean_diagonal for layer in layers]
    size = recipe.block_rule if isinstance(recipe.block_rule, int) else None
    return row_blocks(layers, dampings, size, scales), damping if recipe.relative_damping is None else dampings
