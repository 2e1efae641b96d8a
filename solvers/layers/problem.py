"""Layers, their budget, and the one float64 evaluator of both losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.errors import InstanceError
from cbs_opt.typing import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Layer:
    """Rows that share one stored Hessian.

    Parameters
    ----------
    weights : float64 (rows, K)
    hessian : float64 (K, K)
        S, symmetric; positive definite for the joint objective, semidefinite for the selection objective.
    scale : float64 (rows,), optional
        s_r > 0, H_r = s_r S; ones without.
    locked : int8 (rows, K), optional
        1 must be pruned, −1 must be kept, 0 undecided.

    Raises
    ------
    InstanceError
        Shapes that do not match, values that are not finite, or a scale that is not positive.
    """

    weights: FloatArray
    hessian: FloatArray
    scale: FloatArray = None  # type: ignore[assignment]  # ones, set in __post_init__
    locked: np.ndarray[tuple[int, int], np.dtype[np.int8]] | None = None

    def __post_init__(self) -> None:
        weights = np.ascontiguousarray(self.weights, dtype=np.float64)
        hessian = np.ascontiguousarray(self.hessian, dtype=np.float64)
        if weights.ndim != 2 or hessian.shape != (weights.shape[-1],) * 2:
            raise InstanceError(
                f"a layer needs weights (rows, K) and a Hessian (K, K), got {weights.shape} and {hessian.shape}"
            )
        scale = np.ones(weights.shape[0]) if self.scale is None else np.asarray(self.scale, dtype=np.float64)
        if scale.shape != weights.shape[:1] or not (np.isfinite(scale).all() and (scale > 0).all()):
            raise InstanceError(f"the scale of a layer must be {weights.shape[0]} positive numbers, one per row")
        if not (np.isfinite(weights).all() and np.isfinite(hessian).all()):
            raise InstanceError("weights and Hessian of a layer must be finite")
        if self.locked is not None:
            locked = np.ascontiguousarray(self.locked, dtype=np.int8)
            if locked.shape != weights.shape:
                raise InstanceError(f"`locked` must have the shape {weights.shape} of the weights")
            object.__setattr__(self, "locked", locked)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "hessian", hessian)
        object.__setattr__(self, "scale", scale)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.weights.shape[0])

    @property
    def columns(self) -> int:
        """K, weights of a row."""
        return int(self.weights.shape[1])

    def must_prune(self) -> BoolArray:
        """Bool (rows, K)."""
        return np.zeros(self.weights.shape, dtype=bool) if self.locked is None else self.locked > 0

    def must_stay(self) -> BoolArray:
        """Bool (rows, K)."""
        return np.zeros(self.weights.shape, dtype=bool) if self.locked is None else self.locked < 0


@dataclass(frozen=True)
class LayerBudget:
    """How many weights to prune: exactly one of the three.

    Parameters
    ----------
    total : int, optional
        Over all layers together.
    per_row : tuple of int64 (rows,), optional
        For each row of each layer.
    pattern : (n, m), optional
        n of every m consecutive columns of every row, as in 2:4; m divides K.
    """

    total: int | None = None
    per_row: tuple[IntArray, ...] | None = None
    pattern: tuple[int, int] | None = None

    def check(self, layers: list[Layer]) -> None:
        """Raise `InstanceError` where the budget does not fit the layers."""
        given = [name for name in ("total", "per_row", "pattern") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InstanceError(f"a layer budget needs one of total, per_row and pattern, got {given or 'none'}")
        least = sum(int(layer.must_prune().sum()) for layer in layers)
        most = sum(layer.weights.size - int(layer.must_stay().sum()) for layer in layers)
        if self.total is not None and not least <= self.total <= most:
            raise InstanceError(f"the budget must be in [{least}, {most}], got {self.total}")
        if self.per_row is not None:
            if len(self.per_row) != len(layers):
                raise InstanceError(f"per_row needs {len(layers)} arrays, one per layer, got {len(self.per_row)}")
            for layer, counts in zip(layers, self.per_row, strict=True):
                counts = np.asarray(counts)
                if counts.shape != (layer.rows,):
                    raise InstanceError(f"per_row of a layer must have {layer.rows} entries, got {counts.shape}")
                low, high = layer.must_prune().sum(1), layer.columns - layer.must_stay().sum(1)
                if (counts < low).any() or (counts > high).any():
                    raise InstanceError("the budget of a row is outside of what its fixed weights allow")
        if self.pattern is not None:
            n, m = self.pattern
            for layer in layers:
                if m < 1 or not 0 <= n <= m or layer.columns % m:
                    raise InstanceError(
                        f"the pattern {n}:{m} must prune 0 … {m} of {m} and divide {layer.columns} columns"
                    )
                cells = (layer.rows, layer.columns // m, m)
                low, high = layer.must_prune().reshape(cells).sum(2), m - layer.must_stay().reshape(cells).sum(2)
                if (low > n).any() or (high < n).any():
                    raise InstanceError("the pattern is outside of what the fixed weights allow")

    def satisfied(self, pruned: list[BoolArray]) -> bool:
        """Whether masks of the layers, bool (rows, K), meet the budget."""
        if self.total is not None:
            return sum(int(mask.sum()) for mask in pruned) == self.total
        if self.per_row is not None:
            return all(bool((m.sum(1) == c).all()) for m, c in zip(pruned, self.per_row, strict=True))
        assert self.pattern is not None
        n, m = self.pattern
        return all(bool((mask.reshape(mask.shape[0], -1, m).sum(2) == n).all()) for mask in pruned)

    def cheapest(self, layers: list[Layer], costs: list[FloatArray]) -> list[BoolArray]:
        """The feasible masks with the least sum of costs; fixed weights are respected."""
        costs = [
            cost
            if layer.locked is None
            else np.where(layer.must_prune(), -np.inf, np.where(layer.must_stay(), np.inf, cost))
            for layer, cost in zip(layers, costs, strict=True)
        ]
        if self.total is not None:
            flat = np.concatenate([cost.ravel() for cost in costs])
            chosen = np.zeros(flat.size, dtype=bool)
            if self.total:
                chosen[np.argpartition(flat, self.total - 1)[: self.total]] = True
            ends = np.cumsum([cost.size for cost in costs])[:-1]
            return [part.reshape(c.shape) for part, c in zip(np.split(chosen, ends), costs, strict=True)]
        if self.per_row is not None:
            return [_smallest(cost, np.asarray(counts)) for cost, counts in zip(costs, self.per_row, strict=True)]
        assert self.pattern is not None
        n, m = self.pattern
        out = []
        for cost in costs:
            cells = cost.reshape(cost.shape[0], -1, m)
            mask = np.zeros(cells.shape, dtype=bool)
            if n:
                np.put_along_axis(mask, np.argpartition(cells, n - 1, axis=2)[:, :, :n], True, axis=2)
            out.append(mask.reshape(cost.shape))
        return out


def _smallest(cost: FloatArray, counts: IntArray) -> BoolArray:
    """Mask of the `counts` (rows,) smallest entries of every row; of equal ones the first."""
    last = np.maximum(counts - 1, 0)
    # A sort of values takes a tenth of the time of a sort of indices.
    threshold = np.take_along_axis(np.sort(cost, axis=1), last[:, None], axis=1)
    below, equal = cost < threshold, cost == threshold
    left = (counts - below.sum(1))[:, None]
    return np.asarray(below | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= left)))


@dataclass(frozen=True)
class LayerSolution:
    """The result of `solve_layers`.

    Attributes
    ----------
    pruned : list of bool (rows, K)
    weights : list of float64 (rows, K)
        After the best update (joint), or with the pruned weights set to zero (selection).
    objective : float
        Recomputed from the data.
    bound : float or None
        Proven lower bound.
    history : tuple of (seconds, objective or None, bound or None)
    compared : bool
        Whether the loss of magnitude and of the warm start was computed, so that `objective` is not larger. A
        limit may end the run on large layers before that.
    near : bool
        Whether `weights` are the best ones of the masks, or near them, in place of the original ones.
    device : str
        The card that was used, and whether it failed; "cpu" without one.
    """

    pruned: list[BoolArray]
    weights: list[FloatArray]
    objective: float
    bound: float | None
    history: tuple[tuple[float, float | None, float | None], ...] = ()
    compared: bool = True
    near: bool = True
    device: str = "cpu"

    @property
    def gap(self) -> float | None:
        """(objective − bound) / objective, None without a bound."""
        if self.bound is None:
            return None
        return (self.objective - self.bound) / max(abs(self.objective), 1e-300)


def row_losses(layer: Layer, weights: FloatArray) -> FloatArray:
    """½ (ŵ_r − w_r)ᵀ H_r (ŵ_r − w_r) of each row, float64 (rows,); O(rows K²)."""
    change = weights - layer.weights
    return np.asarray(0.5 * layer.scale * np.einsum("rk,rk->r", change @ layer.hessian, change))


def loss_bound(layers: list[Layer], masks: list[BoolArray]) -> float:
    """½ Σ_r s_r (Σ_i |w_i| √S_ii)² over the pruned weights: at least the loss of setting them to 0; O(rows K)."""
    total = 0.0
    for layer, mask in zip(layers, masks, strict=True):
        norms = np.where(mask, np.abs(layer.weights), 0.0) @ np.sqrt(np.maximum(np.diag(layer.hessian), 0.0))
        total += 0.5 * float(layer.scale @ norms**2)
    return total


def layer_losses(layers: list[Layer], weights: list[FloatArray]) -> float:
    """Σ ½ (ŵ_r − w_r)ᵀ H_r (ŵ_r − w_r) over all rows of all layers."""
    return float(sum(row_losses(layer, w).sum() for layer, w in zip(layers, weights, strict=True)))
