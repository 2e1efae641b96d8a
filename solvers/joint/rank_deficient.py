"""The joint problem with a singular Hessian, such as fewer samples than weights and no damping.

Room: joint; the solvers `joint` and `backward`, and `exact`, turn here before they need an inverse.

The problem is well posed if fewer weights are kept than the rank of H: only systems of kept weights are solved.
The searches work on a copy with a damping of 1e-9 of the diagonal, whose inverse exists; every selection that
they find is evaluated on the instance, and no bound of the copy is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np

from cbs_opt.curvature import Curvature, HessianBlocks
from cbs_opt.curvature.gradient_factor import GradientFactor
from cbs_opt.errors import SolverError
from cbs_opt.instance import Instance
from cbs_opt.linalg import inverse_pd
from cbs_opt.losses import joint_loss
from cbs_opt.monitor import Monitor
from cbs_opt.result import Status
from cbs_opt.solver import Context
from cbs_opt.solvers.joint.forward import select_forward
from cbs_opt.solvers.problem.decided import decide
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray

_DAMPING = 1e-9  # of the copy, relative to the diagonal
_RANK = 1e-11  # eigenvalues of the scaled Hessian below this do not count, relative to the largest
_FEW, _LEAST_WORK = 2000, 1e8  # selections and operations up to which each is evaluated, in less than a second
_CLEAR = 1e-6  # least eigenvalue of scaled systems that rounding leaves clear
_LARGEST = 2000  # weights of a dense block up to which a factorisation finds out


def is_rank_deficient(instance: Instance) -> bool:
    """Whether H is known to be singular: without damping, by counting gradients or by a Cholesky factorisation.

    Dense blocks of more than 2000 weights are taken to be regular; O(Σ b³) for the others.
    """
    curvature = instance.curvature
    if curvature not in _known:
        _known[curvature] = _is_singular(curvature)
    return _known[curvature]


_known: WeakKeyDictionary[Curvature, bool] = WeakKeyDictionary()


def _is_singular(curvature: Curvature) -> bool:
    if curvature.damping:
        return False
    factor = curvature.as_factor()
    if factor is not None and factor.m < int(curvature.block_sizes.max()):
        return True
    if factor is None and curvature.kind != HessianBlocks.kind:
        return False
    return any(
        inverse_pd(curvature.block(k)) is None
        for k in range(curvature.number_of_blocks)
        if curvature.block_sizes[k] <= _LARGEST
    )


def check_well_posed(instance: Instance, solver: str) -> None:
    """Refuse a singular problem that keeps so many weights that nothing is lost, unless H is zero.

    Raises
    ------
    SolverError
        When at least as many weights are kept as the rank of H, which is not 0, or there is a first-order term.
    """
    rank, kept = _rank(instance), instance.n - instance.budget.total
    if (kept < rank or rank == 0) and instance.linear is None:
        return
    curvature = instance.curvature
    remedy = "a positive damping is needed"
    factor = curvature.as_factor()
    if factor is not None:
        remedy = factor.damping_advice()
    reason = (
        "with a first-order term the losses may have no minimum"
        if instance.linear is not None
        else f"it has rank {rank}, and {kept} weights are kept: with fewer than {rank} the problem is well posed"
    )
    raise SolverError(
        f"solver '{solver}' cannot take the instance: the Hessian is singular; {reason}; or {remedy}"
    )


def _exhausted(instance: Instance, monitor: Monitor, report: Callable[[BoolArray], None]) -> bool:
    """Whether all selections are so few that each is evaluated here; the bound follows where rounding allows."""
    sizes = instance.curvature.block_sizes.astype(np.float64)
    if instance.budget.cross_groups is not None:
        return False
    fixed, base, left = decide(instance)
    group = instance.budget.group_of(instance.n)
    open_ = [np.flatnonzero((fixed == 0) & (group == a)) for a in range(left.size)]
    count = math.prod(math.comb(at.size, int(b)) for at, b in zip(open_, left, strict=True))
    if count > _FEW or (count > 1 and count * float((sizes**3).sum()) > _LEAST_WORK):
        return False
    choices = (itertools.combinations(at.tolist(), int(b)) for at, b in zip(open_, left, strict=True))
    least = 1.0
    for chosen in itertools.product(*choices):
        if monitor.should_stop():
            return False
        pruned = base.copy()
        pruned[[weight for part in chosen for weight in part]] = True
        report(pruned)
        least = min(least, _least_eigenvalue(instance, ~pruned)) if count > 1 else least
    assert monitor.objective is not None
    if least >= _CLEAR:
        whole = joint_loss(instance, np.ones(instance.n, dtype=bool)) if count > 1 else 0.0
        monitor.report_bound(monitor.objective - 1e-14 * whole / least)
    return True


def _least_eigenvalue(instance: Instance, kept: BoolArray) -> float:
    """Of the Hessian of the kept weights, scaled to a unit diagonal."""
    curvature, least = instance.curvature, 1.0
    for k in range(curvature.number_of_blocks):
        own = np.flatnonzero(kept[curvature.block_slice(k)])
        if not own.size:
            continue
        H = curvature.block(k)[np.ix_(own, own)]
        scale = 1.0 / np.sqrt(np.where(H.diagonal() > 0, H.diagonal(), 1.0))
        least = min(least, float(np.linalg.eigvalsh(H * scale[:, None] * scale)[0]))
    return least


def _rank(instance: Instance) -> int:
    """The rank of H, over all blocks."""
    curvature, total = instance.curvature, 0
    factor = curvature.as_factor()
    for k in range(curvature.number_of_blocks):
        if factor is not None:
            G = factor.factor(k, np.arange(int(curvature.block_sizes[k])))
            size = np.sqrt((G**2).sum(axis=0))
            G = G / np.where(size > 0, size, 1.0)
            values = np.linalg.eigvalsh(G @ G.T if G.shape[0] < G.shape[1] else G.T @ G)
        else:
            H = curvature.block(k)
            scale = 1.0 / np.sqrt(np.where(H.diagonal() > 0, H.diagonal(), 1.0))
            values = np.linalg.eigvalsh(H * scale[:, None] * scale)
        total += int((values > _RANK * max(float(values[-1]), 1e-300)).sum())
    return total


def damped_copy(instance: Instance) -> Instance:
    """The instance with H + 1e-9 I in units of its diagonal, and the same gradient Hw − g.

    The joint loss of every selection rises by ½ 1e-9 ‖v‖² for the best weights v, less a constant.
    """
    curvature = instance.curvature
    diagonal = curvature.diagonal()
    s = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    factor = curvature.as_factor()
    scaled: GradientFactor | HessianBlocks
    if factor is not None:
        scaled = GradientFactor(factor.gradients.astype(np.float64) / s, _DAMPING, curvature.block_sizes)
    else:
        blocks = []
        for k in range(curvature.number_of_blocks):
            own = s[curvature.block_slice(k)]
            H = curvature.block(k) / own[:, None] / own
            blocks.append(H + _DAMPING * np.eye(own.size))
        scaled = HessianBlocks.from_blocks(blocks)
    weights = instance.weights * s
    return replace(instance, weights=weights, curvature=scaled, linear=_DAMPING * weights, path=None, sha256=None)


def search_singular(
    instance: Instance,
    context: Context,
    starts: Callable[[Instance, Context], BoolArray],
    search: Callable[[Instance, Context], None] | None = None,
) -> Status:
    """Search a singular problem on its damped copy; selections are evaluated on the instance.

    Parameters
    ----------
    instance : Instance
    context : Context
    starts : callable
        Gives a selection of a copy: backward elimination.
    search : callable, optional
        Improves on the warm start of a context, on the copy.
    """
    monitor = context.monitor

    def report(pruned: BoolArray) -> None:
        monitor.report(joint_loss(instance, pruned), pruned)

    report(instance.budget.cheapest(np.abs(instance.weights), instance.fixed))
    if context.warm_start is not None:
        report(context.warm_start)
    monitor.report_bound(0.0)  # there is no first-order term
    if monitor.closed or _exhausted(instance, monitor, report):
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED
    if not monitor.should_stop():
        report(select_forward(instance, monitor.should_stop))
    copy = damped_copy(instance)
    if not monitor.should_stop():
        report(starts(copy, context))
    stop = monitor.stop
    if search is not None and not monitor.should_stop() and not monitor.closed:
        before, reported = monitor.iterations, monitor.pruned

        def pass_on(inner: Monitor) -> None:
            monitor.advance(before + inner.iterations - monitor.iterations)
            if inner.pruned is not None:
                report(inner.pruned)

        inner = Monitor(
            Stop(
                max_iterations=stop.max_iterations,
                no_improvement=stop.no_improvement,
                time_limit=None if stop.time_limit is None else max(monitor.remaining, 0.0),
                should_stop=monitor.should_stop,
            ),
            pass_on,
        )
        search(copy, replace(context, monitor=inner, warm_start=reported, extras={}))
        monitor.advance(before + inner.iterations - monitor.iterations)
    return Status.OPTIMAL if monitor.closed else Status.CONVERGED
