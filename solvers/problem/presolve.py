"""Presolve of the selection problem: what can be settled, split off or rescaled without changing the optimum."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.selection import SelectionProblem
from cbs_opt.typing import BoolArray, FloatArray, IntArray


class Coupling(Enum):
    """How the weights of a component enter the objective together."""

    FREE = "free"  # no quadratic term at all: a zero gradient column, or a zero weight
    DIAGONAL = "diagonal"  # each by itself
    FULL = "full"


@dataclass(frozen=True, eq=False)
class Component:
    """Weights of one block that have no term with any other weight.

    Attributes
    ----------
    block : int
        Block of the curvature; −1 for free and diagonal weights, which are gathered from all blocks.
    index : int64 (c,)
        Weights among all n, increasing.
    coupling : Coupling
    """

    block: int
    index: IntArray
    coupling: Coupling


@dataclass(frozen=True, eq=False)
class Presolved:
    """min ½ yᵀQ'y + c'ᵀy over the weights that are still open, in units of `scale`.

    Attributes
    ----------
    instance : Instance
    components : tuple of Component
        Free weights first, then diagonal ones, then the coupled ones by block.
    index : int64 (r,)
        The open weights, component by component.
    linear : float64 (r,)
        (c + Q x_fixed) / scale on the open weights.
    group : int64 (r,)
    budget : int64 (G,)
        What is left to prune in each group.
    scale : float
        A power of two near the largest Q_ii, so that dividing by it is exact.
    offset : float
        Objective of the fixed weights alone, in the units of the instance.
    base : bool (n,)
        The weights that are pruned whatever happens.
    """

    instance: Instance
    components: tuple[Component, ...]
    index: IntArray
    linear: FloatArray
    group: IntArray
    budget: IntArray
    scale: float
    offset: float
    base: BoolArray

    def expand(self, y: FloatArray | BoolArray) -> BoolArray:
        """Postsolve: the selection, bool (n,), of a binary y (r,)."""
        pruned = self.base.copy()
        pruned[self.index[y.astype(np.float64) > 0.5]] = True
        return pruned

    def expand_fractional(self, x: FloatArray) -> FloatArray:
        """The point of the relaxation over all weights, float64 (n,), of x (r,)."""
        out = self.base.astype(np.float64)
        out[self.index] = x
        return out

    def restrict(self, pruned: BoolArray) -> FloatArray:
        """The open part of a selection that agrees with the fixed weights, float64 (r,)."""
        return pruned[self.index].astype(np.float64)

    def objective(self, value: float) -> float:
        """A reduced objective in the units of the instance."""
        return self.offset + self.scale * value


def presolve(instance: Instance) -> Presolved:
    """Reduce the selection problem; every step is exact, so that the optimum stays.

    - Weights that `fixed` or a used-up or forced group decides leave the problem; their terms go into the
      linear part and the offset.
    - Weights without any quadratic term (Q_ii = 0, so their whole row of the semidefinite Q is 0) are set
      apart as free: they cost no storage and no time. They are not simply pruned first, which would be wrong:
      two weights that cancel each other can be better than one free weight and one of the two.
    - A block falls apart into the connected components of its nonzero pattern; for inverse blocks the pattern
      of H⁻¹, which has the same components; for a gradient factor two weights are connected when some sample
      has a gradient for both.
    - Q is divided by a power of two near its largest diagonal entry.

    Parameters
    ----------
    instance : Instance

    Returns
    -------
    Presolved
        O(nnz) time, or O(m n) for a gradient factor.
    """
    problem = SelectionProblem(instance)
    n = instance.n
    group = instance.budget.group_of(n)
    fixed = np.zeros(n, dtype=np.int8) if instance.fixed is None else instance.fixed.copy()
    left = instance.budget.per_group - np.bincount(group[fixed == 1], minlength=instance.budget.number_of_groups)
    open_count = np.bincount(group[fixed == 0], minlength=left.size)
    free = fixed == 0
    fixed[free & (left == 0)[group]] = -1
    fixed[free & (left == open_count)[group]] = 1
    base = fixed == 1
    left = instance.budget.per_group - np.bincount(group[base], minlength=left.size)

    diagonal = problem.diagonal
    components = _components(instance, diagonal, fixed == 0)
    index = np.concatenate([component.index for component in components]) if components else np.zeros(0, np.int64)
    gradient = problem.gradient(base.astype(np.float64)) if base.any() else problem.c
    largest = float(diagonal[index].max(initial=0.0))
    if largest == 0.0:
        largest = float(np.abs(gradient[index]).max(initial=0.0))
    scale = float(2.0 ** np.round(np.log2(largest))) if largest > 0 else 1.0
    return Presolved(
        instance=instance,
        components=tuple(components),
        index=index,
        linear=gradient[index] / scale,
        group=group[index],
        budget=left,
        scale=scale,
        offset=problem.value(base) if base.any() else 0.0,
        base=base,
    )


def _components(instance: Instance, diagonal: FloatArray, is_open: BoolArray) -> list[Component]:
    curvature = instance.curvature
    free, alone, coupled = [], [], []
    for k in range(curvature.number_of_blocks):
        part = curvature.block_slice(k)
        local = np.flatnonzero(is_open[part])
        nothing = diagonal[part][local] == 0
        if nothing.any():
            rows = local[nothing]
            nothing[nothing] = (instance.weights[part][rows] == 0) | curvature.empty_columns(k, rows)
        free.append(part.start + local[nothing])
        local = local[~nothing]
        if local.size == 0:
            continue
        labels = curvature.connected_components(k, local)
        sizes = np.bincount(labels)
        single = sizes[labels] == 1
        alone.append(part.start + local[single])
        coupled += [
            Component(k, part.start + local[labels == label], Coupling.FULL)
            for label in np.flatnonzero(sizes > 1).tolist()
        ]
    gathered = [
        Component(-1, np.concatenate(parts), coupling)
        for parts, coupling in ((free, Coupling.FREE), (alone, Coupling.DIAGONAL))
        if sum(part.size for part in parts)
    ]
    return gathered + coupled
