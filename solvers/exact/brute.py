"""Enumeration, the reference of the tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from cbs_opt.errors import SolverError, UnboundedError
from cbs_opt.instance import Instance
from cbs_opt.losses import evaluate
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.selection import SelectionObjective
from cbs_opt.solver import OBJECTIVES, Capabilities, Context, Solver
from cbs_opt.typing import BoolArray, FloatArray

MAX_WEIGHTS = 25
_CHUNK = 1 << 14
_CLOSE = 64  # selections of a chunk that rounding may have put in the wrong order, and that are evaluated anew


@register("brute")
class BruteForce(Solver):
    """Evaluate every selection that the budget, the groups and `fixed` allow; each is an iteration."""

    summary = f"enumeration of every selection, up to {MAX_WEIGHTS} weights"
    supports = Capabilities(
        objectives=frozenset(OBJECTIVES), cross_groups=True, bound=True, not_worse_than_magnitude=True
    )

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse instances that are too large for enumeration."""
        super().check_supports(instance, context)
        if instance.n > MAX_WEIGHTS:
            raise SolverError(f"solver 'brute' takes at most {MAX_WEIGHTS} weights, the instance has {instance.n}")

    def run(self, instance: Instance, context: Context) -> Status:
        """O(2ⁿ n²) time for selection, O(2ⁿ n³) for joint; 2ⁿ in the worst case, over all feasible selections."""
        monitor = context.monitor
        losses = _SelectionLosses(instance) if context.objective == "selection" else _JointLosses(instance)
        for chunk in _feasible_selections(instance):
            values = losses(chunk)
            best = int(np.argmin(values))
            monitor.advance(len(chunk))
            monitor.report(values[best], chunk[best])
            if monitor.should_stop():
                return Status.CONVERGED
        if monitor.objective is None:
            raise UnboundedError(
                "the joint loss of no selection has a minimum: the Hessian is singular along `linear`, a positive "
                "damping is needed"
            )
        monitor.report_bound(monitor.objective - losses.unsure)
        return Status.OPTIMAL


def _feasible_selections(instance: Instance) -> itertools.chain[BoolArray]:
    """Every feasible selection, in bool arrays (R, n) of bounded size."""
    n = instance.n
    partitions = list(instance.budget.partitions(n))
    wanted = np.concatenate([budgets for _, budgets in partitions])
    members = [(group[:, None] == np.arange(budgets.size)).astype(np.int64) for group, budgets in partitions]
    member = np.concatenate(members, axis=1)

    def chunks() -> Iterator[BoolArray]:
        for start in range(0, 1 << n, _CHUNK):
            code = np.arange(start, min(start + _CHUNK, 1 << n), dtype=np.int64)
            code = code[np.bitwise_count(code) == instance.budget.total]
            selections = (code[:, None] >> np.arange(n)) & 1
            fits = (selections @ member == wanted).all(axis=1)
            if instance.fixed is not None:
                fits &= (selections[:, instance.fixed == 1] == 1).all(axis=1)
                fits &= (selections[:, instance.fixed == -1] == 0).all(axis=1)
            if fits.any():
                yield selections[fits].astype(bool)

    return itertools.chain(chunks())


class _SelectionLosses:
    unsure = 0.0

    def __init__(self, instance: Instance) -> None:
        self.problem = SelectionObjective(instance)
        self.Q = [self.problem.block(k) for k in range(instance.curvature.number_of_blocks)]

    def __call__(self, selections: BoolArray) -> FloatArray:
        x = selections.astype(np.float64)
        values = x @ self.problem.c
        for k, Q in enumerate(self.Q):
            part = x[:, self.problem.curvature.block_slice(k)]
            values += 0.5 * np.einsum("ri,ri->r", part @ Q, part)
        return np.asarray(values)


class _JointLosses:
    """By the kept side: the loss at the δ that solves H_KK δ_K = H_KP w_P − g_K.

    All selections of a chunk are solved at once, with the identity in place of the pruned rows and columns of
    H, scaled to a unit diagonal. A singular H goes through the evaluator, one selection at a time; so do those
    selections whose losses differ from the least by no more than rounding may have done, the first `_CLOSE` of
    them; `unsure` is by how much others may be better.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        n, curvature = instance.n, instance.curvature
        self.H = np.zeros((n, n))
        for k in range(curvature.number_of_blocks):
            part = curvature.block_slice(k)
            self.H[part, part] = curvature.block(k)
        diagonal = self.H.diagonal()
        self.scale = 1.0 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        self.unit = self.H * self.scale[:, None] * self.scale
        least = float(np.linalg.eigvalsh(self.unit)[0])
        self.regular = least > 1e-11
        self.rounding = 64 * n * float(np.finfo(np.float64).eps) * np.array([1.0, 1.0 / max(least, 1e-11)])
        self.g = np.zeros(n) if instance.linear is None else instance.linear
        self.unsure = 0.0

    def __call__(self, selections: BoolArray) -> FloatArray:
        if not self.regular:
            return np.array([self._by_evaluator(pruned) for pruned in selections])
        n = self.H.shape[0]
        values, error = np.empty(len(selections)), np.empty(len(selections))
        for start in range(0, len(selections), 1024):
            pruned = selections[start : start + 1024]
            kept = ~pruned
            system = np.where(kept[:, :, None] & kept[:, None, :], self.unit, np.eye(n))
            move = np.where(pruned, -self.instance.weights, 0.0)
            rhs = np.where(kept, -(move @ self.H + self.g) * self.scale, 0.0)
            move += np.linalg.solve(system, rhs[:, :, None])[:, :, 0] * self.scale * kept
            found = 0.5 * np.einsum("ri,ri->r", move @ self.H, move) + move @ self.g
            size = np.abs(move)
            terms = 0.5 * np.einsum("ri,ri->r", size @ np.abs(self.H), size) + size @ np.abs(self.g)
            values[start : start + 1024] = found
            error[start : start + 1024] = self.rounding[0] * terms + self.rounding[1] * np.abs(found)
        close = np.flatnonzero(values - error <= (values + error).min())
        close = close[np.argsort(values[close], kind="stable")]
        for at in close[:_CLOSE].tolist():
            values[at] = self._by_evaluator(selections[at])
        self.unsure = max(self.unsure, float(error[close[_CLOSE:]].max(initial=0.0)))
        return values

    def _by_evaluator(self, pruned: BoolArray) -> float:
        joint = evaluate(self.instance, pruned).joint_loss
        return np.inf if joint is None else joint
