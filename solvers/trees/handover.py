"""When a heuristic hands over to branch and bound: its incumbent and what is left of its time go along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cbs_opt.instance import Instance
from cbs_opt.monitor import Monitor
from cbs_opt.result import Status
from cbs_opt.solver import Context, Solver
from cbs_opt.stop import Stop

WITHOUT_LIMIT = 100
"""Largest piece, in weights, without a time limit: most such blocks that we have are proven in a second."""

_TABLE_SPEED = 1e5  # squared weights of the pieces, summed, of which branch and bound brings much home in a second
_TABLE_WORK = 1e6  # the same, as much as is taken on without a time limit
_NODES = 10**6  # after which it ends without a time limit


def is_provable(sizes: Sequence[int], groups: int, largest: int, stop: Stop) -> bool:
    """Whether branch and bound is likely to prove something of pieces of these sizes, many under one budget.

    Parameters
    ----------
    sizes : sequence of int
        Weights that hang together, piece by piece.
    groups : int
        Groups with a budget of their own; several tie all pieces together.
    largest : int
        Largest piece that is taken on.
    stop : Stop
        The work must fit into half of the time, which heuristics use better for more; no limit on iterations.
    """
    if not sizes or groups != 1 or max(sizes) > largest:
        return False
    if stop.time_limit is None:
        return not stop.limits_work and sum(size**2 for size in sizes) <= _TABLE_WORK
    return sum(size**2 for size in sizes) <= 0.5 * stop.time_limit * _TABLE_SPEED


def branch_and_bound() -> Solver:
    """The exact solver, without a heuristic of its own."""
    from cbs_opt.solvers.exact.solver import Exact  # it looks for its first selections with our callers

    return Exact({"heuristic": 10**9})


def prove(exact: Solver, instance: Instance, context: Context) -> Status:
    """Go on from the monitor's incumbent until it is proven or a rule stops; without one, after many nodes."""
    monitor = context.monitor
    inner = monitor if monitor.stop.limits_work else _limited(monitor, _NODES)
    exact.run(instance, replace(context, warm_start=monitor.pruned, monitor=inner))
    return Status.OPTIMAL if monitor.closed else Status.CONVERGED


def _limited(outer: Monitor, nodes: int) -> Monitor:
    """A monitor that passes everything on to `outer` and stops after some nodes."""
    before = outer.iterations

    def pass_on(inner: Monitor) -> None:
        outer.advance(before + inner.iterations - outer.iterations)
        if inner.objective is not None and inner.pruned is not None:
            outer.report(inner.objective, inner.pruned)
        if inner.bound is not None:
            outer.report_bound(inner.bound)

    return Monitor(Stop(max_iterations=nodes, should_stop=outer.should_stop), pass_on)
