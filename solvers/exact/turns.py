"""A heuristic that takes turns with branch and bound: neither starts again, and each takes over the incumbent."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.interrupt import Interrupted, interruptible
from cbs_opt.monitor import Monitor
from cbs_opt.solver import Context, Solver
from cbs_opt.solvers.trees.prove import Provable, Report
from cbs_opt.stop import Stop

SHORT = 2000
"""Nodes of a tree before the first turn, where that does not come before all branching."""

_FIRST = 0.1  # of the time limit, for the first turn at most
_LONGEST = 10  # iterations of the first turn, over those without improvement that end it
_BEFORE_SECOND = 0.02  # of the time limit, for the tree before the second turn
_SECOND = 0.1  # of the time limit, for the second turn where nothing is proven
_SHARE = 0.25  # of the time, for further turns where nothing is proven
_LEAST_SHARE = 0.125  # the same after a turn that found nothing
_LARGEST_SHARE = 0.5
_SHORTEST = 0.005  # of the time limit, for a turn
_NEVER = 2**62


class PausedSearch:
    """A heuristic in a thread of its own, which works only while it has a turn.

    A turn ends where the heuristic asks its monitor whether to stop, never at a `checkpoint` of linear algebra,
    where it may hold a lock that others need. Its selections and bounds are reported to the run as they are found;
    at the start of a turn it is told the incumbent of the run. The thread that gives a turn waits for its end, so
    that the two never work at once.

    Parameters
    ----------
    solver : Solver
        Not yet prepared.
    instance : Instance
    context : Context
        Of the run.
    problem : SelectionProblem or JointProblem
        In whose units losses are reported.

    Attributes
    ----------
    iterations, idle : int
        Of the heuristic, and those since its last improvement.
    finished : bool
        Whether it has ended by itself.
    """

    def __init__(self, solver: Solver, instance: Instance, context: Context, problem: Provable) -> None:
        self._solver, self._instance, self._outer = solver, instance, context.monitor
        self._report = Report(problem, self._outer)
        self._monitor = Monitor(Stop(max_iterations=_NEVER, should_stop=self._ask), self._pass_on)
        self._context = Context(context.objective, context.seed, self._monitor, context.warm_start, threads=1)
        self._thread: threading.Thread | None = None
        self._begin, self._end = threading.Semaphore(0), threading.Semaphore(0)
        self._enough: Callable[[], bool] = lambda: False
        self._error: BaseException | None = None
        self._improved_at, self._objective = 0, np.inf
        self.finished = self._closed = False

    @property
    def iterations(self) -> int:
        """Iterations so far."""
        return self._monitor.iterations

    @property
    def idle(self) -> int:
        """Iterations since the last improvement."""
        return self.iterations - self._improved_at

    def turn(self, enough: Callable[[], bool]) -> None:
        """Let it work until `enough` holds, a rule stops the run, or it has finished; its errors are raised."""
        if self.finished:
            return
        self._enough = enough
        if self._thread is None:
            variables = contextvars.copy_context()
            self._thread = threading.Thread(target=variables.run, args=(self._work,), daemon=True)
            self._thread.start()
        else:
            self._begin.release()
        self._end.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        if self._thread is not None:
            self._begin.release()
            self._thread.join()

    def _work(self) -> None:
        try:
            self._take_over()
            with interruptible(self._must_end):
                self._solver.prepare(self._instance, self._context)
                self._solver.run(self._instance, self._context)
        except Interrupted:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.finished = True
            self._end.release()

    def _must_end(self) -> bool:
        return self._closed or self._outer.should_stop()

    def _ask(self) -> bool:
        """Whether the heuristic must end; a turn that is over lasts until the next one in here."""
        mine = threading.current_thread() is self._thread
        if mine and not self._closed and (self._outer.should_stop() or self._outer.closed or self._enough()):
            self._end.release()
            self._begin.acquire()
            self._take_over()
        return self._closed

    def _take_over(self) -> None:
        outer = self._outer
        if outer.objective is not None and outer.pruned is not None:
            self._monitor.report(outer.objective, outer.pruned)

    def _pass_on(self, monitor: Monitor) -> None:
        if monitor.objective is not None and monitor.pruned is not None and monitor.objective < self._objective:
            self._objective, self._improved_at = monitor.objective, monitor.iterations
            self._report.selection(monitor.pruned)
        if monitor.bound is not None:
            self._report.bound(monitor.bound)


class SearchTurns:
    """When the search has a turn, and how long.

    The first turn ends after a number of iterations without improvement. With a time limit others follow. Their
    share of the time is a quarter of the root of the gap, half of that after a turn that found nothing; times the
    number of workers where the others of them go on meanwhile.

    Parameters
    ----------
    search : PausedSearch
    context : Context
    steps : int
        Iterations without improvement that end the first turn.
    """

    def __init__(self, search: PausedSearch, context: Context, steps: int) -> None:
        self._search, self._outer, self._steps = search, context.monitor, steps
        self._begun, self._share = False, _SHARE
        self._last, self._credit = 0.0, -np.inf

    def due(self, workers: int) -> bool:
        """Whether it is time for a turn, where one of so many workers would rest."""
        outer = self._outer
        if self._search.finished or outer.closed or outer.should_stop():
            return False
        if not self._begun:
            return outer.iterations >= SHORT
        limit, now = outer.stop.time_limit, outer.elapsed
        if limit is None:
            return False
        promise = 1.0 if outer.gap is None else min(outer.gap, 1.0) ** 0.5
        if self._credit == -np.inf:
            if now - self._last < _BEFORE_SECOND * limit:
                return False
            self._credit = _SECOND * promise * limit
        else:
            self._credit += min(self._share * workers * promise, _LARGEST_SHARE) * (now - self._last)
        self._last = now
        return self._credit >= _SHORTEST * limit

    def take(self, over: Callable[[], bool] = lambda: False) -> None:
        """A turn, which also ends when `over` holds."""
        search, outer = self._search, self._outer
        began, before = outer.elapsed, outer.objective
        if self._begun:
            until = began + self._credit
            search.turn(lambda: outer.elapsed > until or over())
            found = outer.objective != before
            self._share = _SHARE if found else _LEAST_SHARE
            self._credit -= outer.elapsed - began
        else:
            limit = outer.stop.time_limit
            until = np.inf if limit is None else began + _FIRST * limit
            search.turn(
                lambda: (
                    search.idle >= self._steps
                    or search.iterations >= _LONGEST * self._steps
                    or outer.elapsed > until
                    or over()
                )
            )
            self._begun = True
        self._last = outer.elapsed
