"""Presolve of the selection problem: exact reductions, connected components and scaling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.curvature.base import LARGE_BLOCK
from cbs_opt.instance import Instance
from cbs_opt.interrupt import checkpoint
from cbs_opt.selection import SelectionObjective
from cbs_opt.solvers.problem.decided import decide
from cbs_opt.typing import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Component:
    """Open weights that are coupled with each other, or the uncoupled weights of all blocks.

    Attributes
    ----------
    block : int
        Block of the curvature; −1 for the uncoupled weights.
    index : int64 (c,)
        Weights among all n, increasing.
    """

    block: int
    index: IntArray

    @property
    def coupled(self) -> bool:
        """Whether its weights are coupled."""
        return self.block >= 0


@dataclass(frozen=True, eq=False)
class Presolved:
    """The presolved selection problem: min ½ yᵀQy + cᵀy over the open weights, in units of `scale`.

    Attributes
    ----------
    components : tuple of Component
        The uncoupled weights first, if there are any, then the coupled ones by block.
    index : int64 (r,)
        The open weights, component by component.
    linear : float64 (r,)
        c: (g∘w and the couplings to decided weights) / scale, and ½ Q_ii / scale on the uncoupled weights.
    group : int64 (r,)
    budget : int64 (G,)
        What is left to prune in each group.
    scale : float
        A power of two near the largest Q_ii, so that dividing by it is exact.
    offset : float
        Loss of the decided weights alone, in units of the instance.
    base : bool (n,)
        The weights that are pruned in every selection.
    """

    components: tuple[Component, ...]
    index: IntArray
    linear: FloatArray
    group: IntArray
    budget: IntArray
    scale: float
    offset: float
    base: BoolArray


def presolve(objective: SelectionObjective) -> Presolved:
    """Reduce the selection problem; every step is exact, so that the optimum does not change.

    - Weights that `fixed` or a used-up or forced group decides leave the problem; their terms go into the linear
      part and the offset.
    - A block is split into the connected components of its open weights. A weight that is coupled with no
      other one has the linear cost c_i + ½ Q_ii, since y_i² = y_i: it costs no storage and no time, and is exact
      in the relaxation. Such weights are not simply pruned first, which would be wrong: two weights that cancel
      each other can be better than one uncoupled weight and one of the two.
    - Q is divided by a power of two near its largest diagonal entry.

    Parameters
    ----------
    objective : SelectionObjective

    Returns
    -------
    Presolved
        O(nnz) time, or O(m n) for a gradient factor.
    """
    instance = objective.instance
    fixed, base, left = decide(instance)
    diagonal = objective.diagonal
    components = _components(instance, diagonal, fixed == 0)
    index = np.concatenate([np.zeros(0, np.int64), *(component.index for component in components)])
    gradient = objective.gradient(base.astype(np.float64)) if base.any() else objective.c.copy()
    largest = float(diagonal[index].max(initial=0.0))
    if largest == 0.0:
        largest = float(np.abs(gradient[index]).max(initial=0.0))
    scale = float(2.0 ** np.round(np.log2(largest))) if largest > 0 else 1.0
    uncoupled = components[0].index if components and not components[0].coupled else index[:0]
    gradient[uncoupled] += 0.5 * diagonal[uncoupled]
    return Presolved(
        components=tuple(components),
        index=index,
        linear=gradient[index] / scale,
        group=instance.budget.group_of(instance.n)[index],
        budget=left,
        scale=scale,
        offset=objective.value(base) if base.any() else 0.0,
        base=base,
    )


def _components(instance: Instance, diagonal: FloatArray, is_open: BoolArray) -> list[Component]:
    """The uncoupled open weights together, then the connected components of every block."""
    curvature = instance.curvature
    alone: list[IntArray] = []
    coupled: list[Component] = []
    for k in range(curvature.number_of_blocks):
        part = curvature.block_slice(k)
        if k and part.stop - part.start > LARGE_BLOCK:
            checkpoint()
        local = np.flatnonzero(is_open[part])
        nothing = diagonal[part][local] == 0
        if nothing.any():
            rows = local[nothing]
            nothing[nothing] = (instance.weights[part][rows] == 0) | curvature.empty_columns(k, rows)
        alone.append(part.start + local[nothing])
        local = local[~nothing]
        if local.size == 0:
            continue
        labels = curvature.connected_components(k, local)
        sizes = np.bincount(labels)
        single = sizes[labels] == 1
        alone.append(part.start + local[single])
        coupled += [
            Component(k, part.start + local[labels == label]) for label in np.flatnonzero(sizes > 1).tolist()
        ]
    uncoupled = np.sort(np.concatenate([np.zeros(0, np.int64), *alone]))
    return [Component(-1, uncoupled), *coupled] if uncoupled.size else coupled
