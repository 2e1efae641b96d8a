"""Thresholding and coordinate descent on the joint loss, after CHITA: our own implementation, for comparison.

Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao, Mazumder: Fast as CHITA: Neural Network Pruning with
Combinatorial Optimization. ICML 2023. The problem is min ½‖A(β − w̄)‖² + ½λ‖β − w̄‖² with A = G/√m and at most
k = n − p nonzero β; H is never formed. A run for one k is

1. iterative hard thresholding on an active set, β ← P_k(β − τ∇f(β)), with their line search: on the piece of the
   path where the support does not change f is quadratic and its minimiser is taken; where it lies beyond the end
   of the piece, τ grows by a factor as long as f falls. When nothing moves, one step on all weights enlarges the
   set;
2. cyclic coordinate descent on the support, after each thresholding step;
3. an exact refit on the support, at the end.

Runs are repeated until the time is up: straight for k first, then along paths of decreasing k with 2, 4, 8, …
stations, each started from the refitted result of the one before (their several stages, without new gradients).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cbs_opt import Instance, Monitor, best_update, joint_loss
from cbs_opt.errors import InstanceError
from cbs_opt.solvers.kernels.compilation import compiled
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_GROWTH = 2.0  # of the step beyond the end of a quadratic piece
_SWEEPS = 5  # of coordinate descent after each thresholding step
_STEPS = 100  # of thresholding on one active set
_ROUNDS = 20  # enlargements of the active set
_TOLERANCE = 1e-7  # smallest relative fall of a step that goes on


class Chita:
    """Thresholding and coordinate descent for one instance.

    Parameters
    ----------
    instance : Instance
        A gradient factor of one block with damping, one budget, no `linear`, nothing fixed.

    Raises
    ------
    InstanceError
        For any other instance.
    """

    def __init__(self, instance: Instance) -> None:
        curvature = instance.curvature.as_factor()
        if curvature is None or curvature.number_of_blocks > 1:
            raise InstanceError("chita takes a gradient factor of one block")
        if instance.budget.groups is not None or instance.fixed is not None or instance.linear is not None:
            raise InstanceError("chita takes one budget, without `fixed` and `linear`")
        self.instance = instance
        A = curvature.factor(0, np.arange(instance.n)) / np.sqrt(curvature.m)
        self.rows = np.ascontiguousarray(A.T)  # (n, m): a row for each weight
        self.damping = curvature.damping
        self.w = instance.weights
        self.diagonal = np.einsum("is,is->i", self.rows, self.rows) + self.damping
        sweep(
            self.rows[:1], self.w[:1].copy(), self.w[:1], np.zeros(curvature.m), np.ones(1), 0.0, np.array([0]), 1
        )

    def residual(self, beta: FloatArray) -> FloatArray:
        """A(β − w̄), float64 (m,)."""
        return np.asarray((beta - self.w) @ self.rows)

    def value(self, beta: FloatArray, residual: FloatArray) -> float:
        """½‖A(β − w̄)‖² + ½λ‖β − w̄‖²."""
        distance = beta - self.w
        return 0.5 * float(residual @ residual) + 0.5 * self.damping * float(distance @ distance)

    def solve(self, k: int, beta: FloatArray, monitor: Monitor) -> FloatArray:
        """A local solution with at most k nonzero weights, before the refit, from any β; float64 (n,)."""
        beta = self._threshold(beta, k)
        active = np.union1d(np.argsort(-np.abs(self.w), kind="stable")[: 2 * k], np.flatnonzero(beta))
        for _ in range(_ROUNDS):
            beta = self._on_active_set(beta, k, active, monitor)
            if monitor.should_stop():
                break
            # One step on all weights: what it brings in was missing from the active set.
            everything = np.arange(self.w.size)
            stepped, _, fell = self._step(beta, self.residual(beta), k, everything)
            new = np.setdiff1d(np.flatnonzero(stepped), active)
            if new.size == 0 or not fell:
                break
            beta, active = stepped, np.union1d(active, new)
        return beta

    def _on_active_set(self, beta: FloatArray, k: int, active: IntArray, monitor: Monitor) -> FloatArray:
        residual = self.residual(beta)
        value = self.value(beta, residual)
        for _ in range(_STEPS):
            if monitor.should_stop():
                break
            beta, residual, fell = self._step(beta, residual, k, active)
            support = np.flatnonzero(beta)
            sweep(self.rows, beta, self.w, residual, self.diagonal, self.damping, support, _SWEEPS)
            before, value = value, self.value(beta, residual)
            if not fell or value > before - _TOLERANCE * abs(before):
                break
        return beta

    def _step(
        self, beta: FloatArray, residual: FloatArray, k: int, active: IntArray
    ) -> tuple[FloatArray, FloatArray, bool]:
        """One thresholding step with line search; also whether the objective fell."""
        value = self.value(beta, residual)
        if k == 0:
            return beta, residual, False
        gradient = np.zeros_like(beta)
        rows = self.rows if active.size == beta.size else self.rows[active]
        gradient[active] = rows @ residual + self.damping * (beta[active] - self.w[active])
        support = beta != 0
        tau, exact = self._first_piece(beta, gradient, support, k)
        best, best_residual, best_value = beta, residual, value
        while True:
            trial = self._threshold(beta - tau * gradient, k)
            trial_residual = self.residual(trial)
            trial_value = self.value(trial, trial_residual)
            if not trial_value < best_value:
                break
            best, best_residual, best_value = trial, trial_residual, trial_value
            if exact:
                break
            tau *= _GROWTH
        return best, best_residual, best_value < value

    def _first_piece(
        self, beta: FloatArray, gradient: FloatArray, support: BoolArray, k: int
    ) -> tuple[float, bool]:
        """The least τ of the path within its first quadratic piece, and whether it is the minimiser there."""
        direction = np.where(support, -gradient, 0.0)
        image = direction @ self.rows
        bend = float(image @ image) + self.damping * float(direction @ direction)
        slope = float(gradient[support] @ gradient[support])
        minimiser = slope / bend if bend > 0 else np.inf
        outside = np.abs(gradient[~support]).max(initial=0.0)
        if int(support.sum()) < k:
            end = 0.0
        else:
            # τ where the smallest weight of the support first meets the largest outside it.
            size, speed = np.abs(beta[support]), -np.sign(beta[support]) * gradient[support]
            with np.errstate(divide="ignore", invalid="ignore"):
                meets = np.where(outside > speed, size / (outside - speed), np.inf)
                crosses = np.where(speed < -outside, size / (-outside - speed), np.inf)
            end = float(np.minimum(meets, crosses).min(initial=np.inf))
        if minimiser <= end and slope > 0:
            return minimiser, True
        lipschitz = max(float(self.diagonal.max()), 1e-300)
        end = end if np.isfinite(end) else 0.0
        return max(end, 1e-3 / lipschitz) * (1.0 + 1e-9), False

    @staticmethod
    def _threshold(beta: FloatArray, k: int) -> FloatArray:
        """P_k: the k largest magnitudes stay."""
        out = np.zeros_like(beta)
        if k > 0:
            stays = np.argpartition(-np.abs(beta), k - 1)[:k]
            out[stays] = beta[stays]
        return out

    def refit(self, beta: FloatArray, k: int) -> tuple[BoolArray, FloatArray]:
        """The selection of the k largest |β|, and the exact minimiser on it."""
        pruned = np.ones(beta.size, dtype=bool)
        order = np.lexsort((-np.abs(self.w), -np.abs(beta)))
        pruned[order[:k]] = False
        return pruned, best_update(self.instance, pruned)

    def run(self, monitor: Monitor) -> None:
        """Solve straight, then along ever finer paths, reporting what is found, until told to stop."""
        n, k = self.w.size, self.w.size - self.instance.budget.total
        stations = 1
        while not monitor.should_stop():
            beta = self.w.copy()
            for station in range(1, stations + 1):
                size = round(n * (k / n) ** (station / stations)) if station < stations else k
                found = self.solve(size, beta, monitor)
                if monitor.should_stop() and station < stations:
                    return
                pruned, beta = self.refit(found, size)
            monitor.advance()
            monitor.report(joint_loss(self.instance, pruned), pruned)
            if k in (0, n):
                return
            stations *= 2


@compiled(fastmath={"reassoc", "contract", "nsz"})
def sweep(
    rows: Any, beta: Any, w: Any, residual: Any, diagonal: Any, damping: float, support: Any, sweeps: int
) -> None:
    """Cyclic coordinate descent on the support, in place on β and the residual A(β − w̄); O(m) a coordinate."""
    m = rows.shape[1]
    for _ in range(sweeps):
        for i in support:
            row = rows[i]
            slope = damping * (beta[i] - w[i])
            for s in range(m):
                slope += row[s] * residual[s]
            step = -slope / diagonal[i]
            beta[i] += step
            for s in range(m):
                residual[s] += step * row[s]
