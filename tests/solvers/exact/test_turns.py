"""The heuristic of `exact` goes on between the nodes of the tree, and exchanges incumbents with it."""

from __future__ import annotations

import contextlib
import itertools
import threading

import numpy as np
import pytest

from cbs_opt import (
    Budget,
    HessianBlocks,
    Instance,
    Monitor,
    Status,
    Stop,
    get_solver,
    joint_loss,
    selection_loss,
    solve,
)
from cbs_opt.compilation import finish_compilation
from cbs_opt.interrupt import checkpoint
from cbs_opt.run import run_solver
from cbs_opt.solver import Context, Solver
from cbs_opt.solvers.exact.solver import Exact
from cbs_opt.solvers.exact.turns import PausedSearch, SearchTurns
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.parameters import SearchParameters
from cbs_opt.solvers.selection.search import _Run
from cbs_opt.solvers.trees import prove
from cbs_opt.solvers.trees.joint_worker import prepare_joint
from cbs_opt.solvers.trees.prove import Prover
from cbs_opt.solvers.trees.selection_worker import prepare_selection


def correlated(n, keep, noise=0.3):
    """A dense problem; with little noise and more than 40 weights its proof takes long."""
    rng = np.random.default_rng(3)
    G = rng.standard_normal((4 * n, 8)) @ rng.standard_normal((8, n)) + noise * rng.standard_normal((4 * n, n))
    return Instance(rng.standard_normal(n), HessianBlocks.from_blocks([G.T @ G / (4 * n)]), Budget(n - keep))


class Late(Solver):
    """Finds `selection` in iteration `when`, and nothing before; notes what it is told."""

    name = "late"

    def __init__(self, selection, loss, when):
        super().__init__()
        self.selection, self.loss, self.when = selection, loss, when
        self.prepared, self.told, self.threads = 0, [], set()

    def prepare(self, instance, context):
        """Once."""
        self.prepared += 1

    def run(self, instance, context):
        """Until told to stop."""
        monitor = context.monitor
        while not monitor.should_stop():
            self.threads.add(threading.get_ident())
            self.told.append(monitor.objective)
            monitor.advance()
            if monitor.iterations == self.when:
                monitor.report(self.loss(instance, self.selection), self.selection)
        return Status.CONVERGED


def paused(solver, instance):
    """A run, and a search that has turns in it."""
    problem = SelectionProblem(instance)
    outer = Monitor()
    outer.report(problem.loss(problem.first()), problem.first())
    return outer, PausedSearch(solver, instance, Context("selection", 0, outer), problem)


def late_search(when):
    """An instance, its optimum, a solver that finds it in iteration `when`, a run, and the search in it."""
    instance = correlated(20, 10)
    best = solve(instance, "exact").pruned
    late = Late(best, selection_loss, when)
    return instance, best, late, *paused(late, instance)


def test_a_search_stands_still_between_its_turns_and_goes_on():
    instance, best, late, outer, search = late_search(7)
    first = outer.objective
    for total in (3, 6):
        search.turn(lambda total=total: search.iterations >= total)
        assert search.iterations == search.idle == total and outer.objective == first
    search.turn(lambda: search.iterations >= 9)
    assert outer.objective == selection_loss(instance, best) and np.array_equal(outer.pruned, best)
    assert search.idle == 2 and late.prepared == 1 and not search.finished
    assert late.threads.isdisjoint({threading.get_ident()}) and len(late.threads) == 1
    search.close()
    assert search.finished and search.iterations == 9
    search.turn(lambda: pytest.fail("it has finished"))


def test_a_search_is_told_the_incumbent_at_each_turn():
    instance, best, late, outer, search = late_search(0)
    first = outer.objective
    search.turn(lambda: search.iterations >= 2)
    outer.report(selection_loss(instance, best), best)
    search.turn(lambda: search.iterations >= 4)
    search.close()
    assert late.told == [first, first, outer.objective, outer.objective]


def test_errors_of_a_search_are_raised_where_it_has_its_turn():
    def fails(instance, pruned):
        raise MemoryError("no")

    instance = correlated(20, 10)
    _, search = paused(Late(None, fails, 2), instance)
    with pytest.raises(MemoryError, match="no"):
        search.turn(lambda: False)
    search.close()


@pytest.mark.parametrize(
    ("objective", "loss", "n", "keep"), [("selection", selection_loss, 50, 25), ("joint", joint_loss, 60, 12)]
)
@pytest.mark.parametrize(("threads", "heuristic"), [(1, 1), (1, 1000), (2, 1)])
def test_what_the_heuristic_finds_late_is_not_missed(objective, loss, n, keep, threads, heuristic, monkeypatch):
    """With a time limit it has turns as long as there is a gap; the clock counts how often it is asked."""
    instance = correlated(n, keep, noise=0.03)
    kind = "search" if objective == "selection" else "joint"
    good = solve(instance, kind, objective=objective, parameters={"proof": 0}, stop=Stop(max_iterations=300))
    late = Late(good.pruned, loss, 80)
    monkeypatch.setattr(Exact, "_heuristic", lambda self: late)
    monkeypatch.setattr(Exact, "_steps", lambda self, context: 50)
    ticks = itertools.count()
    stop = Stop(time_limit=3000.0, should_stop=lambda: len(late.told) > 85)
    monitor = Monitor(stop, clock=lambda: float(next(ticks)))
    context = Context(objective, 0, monitor, threads=threads)
    result = run_solver(get_solver("exact")({"heuristic": heuristic}), instance, context, finish_compilation)
    assert result.error is None
    assert len(late.told) > 85 and not monitor.closed
    assert monitor.objective <= good.objective * (1 + 1e-9)
    assert monitor.bound <= good.objective * (1 + 1e-9)
    assert late.prepared == 1


@pytest.mark.parametrize("joint", [False, True])
def test_a_tree_takes_better_selections_only(joint):
    instance = correlated(14, 7)
    objective = "joint" if joint else "selection"
    best = solve(instance, "exact", objective=objective).pruned.astype(np.int8)
    H, w, group = instance.curvature.block(0), instance.weights, np.zeros(14, np.int64)
    worse = np.zeros(14, np.int8)
    worse[np.argsort(-np.abs(w))[:7]] = 1

    def tree(start):
        if joint:
            return prepare_joint(np.linalg.inv(H), H, w, group, np.array([7]), [start])
        return prepare_selection(H * np.outer(w, w), np.zeros(14), group, np.array([7]), [start], roundings=0)

    one = tree(worse)
    before = one.value()
    one.offer(worse)
    assert one.value() == before
    one.queue._shared[0] *= 2.0
    one.offer(best)
    assert np.array_equal(one.selection(), best)
    assert one.value() == pytest.approx((joint_loss if joint else selection_loss)(instance, best.astype(bool)))
    one.queue.run(lambda: False)
    assert one.queue.finished() and np.array_equal(one.selection(), best)


class Locked(Late):
    """Computes with a lock that others need."""

    def __init__(self):
        super().__init__(None, None, 0)
        self.lock = threading.Lock()

    def run(self, instance, context):
        """Until told to stop."""
        while not context.monitor.should_stop():
            with self.lock:
                checkpoint()
        return Status.CONVERGED


def test_no_turn_ends_within_a_computation():
    solver = Locked()
    _, search = paused(solver, correlated(12, 6))
    with contextlib.closing(search):
        for _ in range(3):
            search.turn(lambda: True)
            assert not solver.lock.locked()


def test_a_turn_ends_with_the_proof(monkeypatch):
    """One of two workers closes the tree during a turn that has no other end."""
    monkeypatch.setattr("cbs_opt.solvers.exact.turns.SHORT", 0)
    monkeypatch.setattr("cbs_opt.solvers.exact.turns._FIRST", 1.0)
    monkeypatch.setattr(Exact, "_heuristic", lambda self: Late(None, None, 0))
    monkeypatch.setattr(Exact, "_steps", lambda self, context: 10**9)
    result = solve(correlated(44, 22), "exact", threads=2, stop=Stop(time_limit=600.0))
    assert result.status is Status.OPTIMAL and result.solve_seconds < 300


def test_an_incumbent_that_came_first_is_taken_over():
    instance = correlated(60, 30)
    best = solve(instance, "search", parameters={"proof": 0}, stop=Stop(max_iterations=300)).pruned
    monitor = Monitor(Stop(max_iterations=1))
    monitor.report(selection_loss(instance, best), best)
    run = _Run(SelectionProblem(instance), SearchParameters(), Context("selection", 0, monitor))
    assert not np.array_equal(run.problem.expand(run.point.y), best)
    run._take_over()
    assert np.array_equal(run.problem.expand(run.point.y), best)


@pytest.mark.parametrize(
    ("stop", "threads", "free", "workers"),
    [
        (Stop(time_limit=5.0), None, 1e12, 8),
        (Stop(time_limit=5.0, max_iterations=3000), None, 1e12, 1),
        (Stop(time_limit=5.0), None, 2 * 132 * 60**2 * 3.5, 3),
        (Stop(time_limit=5.0), 6, 0.0, 6),
    ],
)
def test_how_many_workers_a_tree_has_within_a_search(stop, threads, free, workers, monkeypatch):
    monkeypatch.setattr("cbs_opt.solver.usable_threads", lambda given=None: given or 8)
    monkeypatch.setattr(prove, "available_bytes", lambda: free)
    found = []
    monkeypatch.setattr(Prover, "run", lambda self, context, *_: found.append(self._workers(context)))
    prover = Prover(SelectionProblem(correlated(60, 30)))
    prove._prove(prover, Context("selection", 0, Monitor(stop), threads=threads), seconds=3.0)
    assert found == [workers]


def test_search_breeds_on_what_a_proof_has_found():
    instance = correlated(60, 30)
    best = solve(instance, "search", parameters={"proof": 0}, stop=Stop(max_iterations=300)).pruned
    monitor = Monitor(Stop(max_iterations=1))
    run = _Run(SelectionProblem(instance), SearchParameters(), Context("selection", 0, monitor))
    run.search()
    assert not np.array_equal(run.problem.expand(run.point.y), best)
    monitor.stop, monitor.reason = Stop(max_iterations=2), None
    monitor.report(selection_loss(instance, best), best)
    run.search()
    assert np.array_equal(run.problem.expand(run.point.y), best)
    assert any(
        np.array_equal(run.problem.expand(point.astype(float)), best) for point in run.breeding.elites.points
    )


def test_no_turns_before_all_selections_are_counted(monkeypatch):
    monkeypatch.setattr("cbs_opt.solvers.exact.turns.SHORT", 0)
    monkeypatch.setattr(SearchTurns, "take", lambda self, over: pytest.fail("a turn"))
    instance = correlated(60, 5, noise=0.03)
    result = solve(instance, "exact", objective="joint", threads=1, stop=Stop(time_limit=1000.0))
    assert result.status is Status.OPTIMAL and result.extras["counted"]
