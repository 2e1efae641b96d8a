"""The remaining weights of a block during backward elimination: prices of removals, and exact updates."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cbs_opt.errors import InstanceError
from cbs_opt.instance import Instance
from cbs_opt.solvers.joint.inverse import conditional_inverse
from cbs_opt.solvers.kernels import joint_numba as kernels
from cbs_opt.typing import BoolArray, FloatArray, IntArray

LAZY_STEPS = 128
"""Eliminations between two updates of the inverse."""

Removal = tuple[float, int]
"""Rise of the doubled loss, and the weight among all n."""


class Elimination(Protocol):
    """Weights of one block that are removed one at a time.

    Attributes
    ----------
    weight : int64 (b,)
        Among all n.
    group : int64 (b,)
    removable : bool (b,)
    """

    weight: IntArray
    group: IntArray
    removable: BoolArray

    def close(self, group: int) -> None:
        """Remove no more weights of this group."""

    def cheapest(self) -> tuple[float, int]:
        """The next removal: rise of the doubled loss and position; infinity when there is none."""

    def remove(self, steps: int, forced: int = -1) -> list[Removal]:
        """Remove up to `steps` weights, position `forced` first."""

    def rest(self) -> list[Removal]:
        """Every removable weight, by its current price, the cheapest first."""


class CoupledElimination:
    """ExactOBS: the conditional inverse of the remaining weights, and the updated weights.

    Parameters
    ----------
    instance : Instance
    k : int
    index : int64 (b,)
        The weights within the block, none of them pruned.
    x : float64 (b_k,)
        The updated weights of the block.

    Raises
    ------
    InstanceError
        H is singular on them.
    """

    def __init__(self, instance: Instance, k: int, index: IntArray, x: FloatArray) -> None:
        inverse = conditional_inverse(instance.curvature, k, index)
        if inverse is None:
            raise InstanceError(f"block {k} of the Hessian is singular: a positive damping is needed")
        self.T = np.ascontiguousarray(inverse)
        self.x = x[index]
        self.t = self.T.diagonal().copy()
        self.weight = instance.curvature.block_slice(k).start + index
        self.group = instance.budget.group_of(instance.n)[self.weight]
        self.removable = np.ones(index.size, dtype=bool)
        if instance.fixed is not None:
            self.removable = instance.fixed[self.weight] == 0
        self._V = np.empty((LAZY_STEPS, index.size))
        self._left = np.ones(index.size, dtype=bool)
        self._done = 0
        self._other: FloatArray | None = None

    def close(self, group: int) -> None:
        """Remove no more weights of this group."""
        self.removable &= self.group != group

    def cheapest(self) -> tuple[float, int]:
        """The next removal: rise of the doubled loss and position; infinity when there is none."""
        if not self.removable.any():
            return np.inf, -1
        costs = np.where(self.removable, self.x**2 / self.t, np.inf)
        j = int(np.argmin(costs))
        return float(costs[j]), j

    def rest(self) -> list[Removal]:
        """Every weight that may still be removed, by x²/t of the conditional inverse."""
        open_ = np.flatnonzero(self.removable)
        return _by_price(self.x[open_] ** 2 / self.t[open_], self.weight[open_])

    def remove(self, steps: int, forced: int = -1) -> list[Removal]:
        """Remove up to `steps` weights, `forced` first; O(b) and at most `LAZY_STEPS` vectors of b each."""
        steps = min(steps, LAZY_STEPS - self._done)
        order, losses = np.empty(steps, dtype=np.int64), np.empty(steps)
        taken = kernels.eliminate(
            self.T, self._V, self._done, self.x, self.t, self.removable, forced, steps, order, losses
        )
        made = list(zip(losses[:taken].tolist(), self.weight[order[:taken]].tolist(), strict=True))
        self._left[order[:taken]] = False
        self._done += taken
        if self._done == LAZY_STEPS:
            self._apply()
        return made

    def _apply(self) -> None:
        """Apply the stored steps to T and drop the removed weights."""
        left = np.flatnonzero(self._left)
        V = self._V[: self._done, left]
        # Two buffers alternate: new memory would cost as much as the product.
        if self._other is None:
            self._other = np.empty(left.size**2)
        product = self._other[: left.size**2].reshape(left.size, left.size)
        np.matmul(V.T, V, out=product)
        kernels.subtract_from_rest(self.T, left, product)
        self._other, self.T = self.T.reshape(-1), product
        self.t = self.T.diagonal().copy()
        for name in ("x", "weight", "group", "removable"):
            setattr(self, name, getattr(self, name)[left])
        self._V = np.empty((LAZY_STEPS, self.x.size))
        self._left = np.ones(self.x.size, dtype=bool)
        self._done = 0


class UncoupledElimination:
    """Uncoupled weights: each raises the doubled loss by its own price, whatever else is pruned.

    Parameters
    ----------
    instance : Instance
    k : int
    index : int64 (b,)
        Within the block.
    x : float64 (b_k,)
        The updated weights of the block.
    """

    def __init__(self, instance: Instance, k: int, index: IntArray, x: FloatArray) -> None:
        self.weight = instance.curvature.block_slice(k).start + index
        self.price = x[index] ** 2 * instance.curvature.diagonal()[self.weight]
        self.group = instance.budget.group_of(instance.n)[self.weight]
        self.removable = np.ones(index.size, dtype=bool)
        if instance.fixed is not None:
            self.removable = instance.fixed[self.weight] == 0

    def close(self, group: int) -> None:
        """Remove no more weights of this group."""
        self.removable &= self.group != group

    def cheapest(self) -> tuple[float, int]:
        """The next removal: rise of the doubled loss and position; infinity when there is none."""
        costs = np.where(self.removable, self.price, np.inf)
        j = int(np.argmin(costs))
        return float(costs[j]), j

    def rest(self) -> list[Removal]:
        """Every weight that may still be removed, by its price."""
        open_ = np.flatnonzero(self.removable)
        return _by_price(self.price[open_], self.weight[open_])

    def remove(self, steps: int, forced: int = -1) -> list[Removal]:
        """Remove up to `steps` weights, `forced` first; O(b log b)."""
        if forced >= 0:
            first = [forced] if self.removable[forced] else []
        else:
            open_ = np.flatnonzero(self.removable)
            first = open_[np.argsort(self.price[open_], kind="stable")][:steps].tolist()
        self.removable[first] = False
        return [(float(self.price[j]), int(self.weight[j])) for j in first]


def _by_price(price: FloatArray, weight: IntArray) -> list[Removal]:
    order = np.argsort(price, kind="stable")
    return list(zip(price[order].tolist(), weight[order].tolist(), strict=True))
