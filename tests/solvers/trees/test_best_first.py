"""The queue of subproblems: workers that rest, and how many there are."""

import os
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from cbs_opt import Budget, HessianBlocks, Instance, Monitor, Stop
from cbs_opt.solver import Context
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.trees import prove
from cbs_opt.solvers.trees.beside import NoTurns
from cbs_opt.solvers.trees.best_first import BestFirst, Subproblem
from cbs_opt.threads import thread_limit


class Endless:
    """A worker that never gets done."""

    size = 1
    best = np.array([np.inf])
    selection = np.zeros(1, np.int8)

    def load(self, subproblem):
        """Take it."""
        self.left = [subproblem]

    def run(self, nodes):
        """There is always something left."""
        time.sleep(0.001)
        return True

    def take_nodes(self):
        """One at a time."""
        return 1

    def crowded(self):
        """Never."""
        return False

    def bound(self):
        """Of what it holds."""
        return 0.0

    def export(self):
        """What it holds."""
        left, self.left = self.left, []
        return left

    def shift_cost(self, thorough):
        """Nothing else has a turn."""
        return 1e9


def test_one_of_two_workers_rests_and_goes_on():
    fixings = np.full(1, -1, np.int8)
    queue = BestFirst(lambda *_: Endless(), Subproblem(0.0, fixings, None, None), fixings, 1.0, 1e-6, 0.0)
    queue._push(Subproblem(0.0, fixings, None, None))

    rested = []

    def until(at_work):
        """Wait for so many workers at work; nothing of what they hold is lost meanwhile."""
        for _ in range(10_000):
            if len(queue._busy) == at_work:
                break
            time.sleep(0.001)
        assert len(queue._busy) == at_work and queue.open == 2 and queue.bound() == 0.0

    def progress():
        if rested:  # asked once more, after the end
            return True
        until(2)
        with queue.one_worker_rests():
            until(1)
        until(2)
        rested.append(True)
        return True

    queue.run(progress, threads=2)
    assert rested and queue.open == 2 and not queue._busy and not queue.finished()


@pytest.mark.parametrize(
    ("stop", "threads", "workers"),
    [
        (Stop(), None, 1),
        (Stop(max_iterations=5, time_limit=5.0), None, 1),
        (Stop(time_limit=5.0), None, len(os.sched_getaffinity(0))),
        (Stop(time_limit=5.0), 3, 3),
        (Stop(max_iterations=5), 3, 3),
    ],
)
def test_a_tree_takes_all_cores_where_only_time_is_limited(stop, threads, workers):
    assert Context(monitor=Monitor(stop), threads=threads).tree_workers == workers


@pytest.mark.parametrize("threads", [1, 2])
def test_workers_of_a_tree_do_not_share_cores_with_threads_of_their_own(threads):
    """Two workers with two threads of BLAS each had a tenth of the nodes of one, on two cores that were busy."""
    rng = np.random.default_rng(0)
    G = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 50)) + 0.03 * rng.standard_normal((200, 50))
    instance = Instance(rng.standard_normal(50), HessianBlocks.from_blocks([G.T @ G / 200]), Budget(25))
    context = Context(monitor=Monitor(Stop(max_iterations=400)), threads=threads)
    prover, seen = prove.Prover(SelectionProblem(instance)), set()

    class Spy(NoTurns):
        """Looks at BLAS between nodes."""

        def due(self, workers):
            """Never."""
            seen.update(found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas")
            return False

    with thread_limit(2):
        prover.start(context)
        prover.run(context, turns=Spy())
    assert seen == ({1} if threads == 2 else {2})
