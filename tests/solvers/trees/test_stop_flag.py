"""A flag that ends the work on a node: what is left is a valid tree, and going on gives the same optimum."""

import itertools

import numpy as np
import pytest

from cbs_opt import Monitor, Stop
from cbs_opt.interrupt import Interrupted
from cbs_opt.solvers.kernels.stop_flag import NEVER, stop_flag
from cbs_opt.solvers.trees.best_first import Subproblem
from cbs_opt.solvers.trees.joint_worker import JointWorker, prepare_joint
from cbs_opt.solvers.trees.outlines import joint_bounds, outline_diagonal, selection_outline
from cbs_opt.solvers.trees.selection_shift import best_shift
from cbs_opt.solvers.trees.selection_worker import SelectionWorker, prepare_selection
from cbs_opt.solvers.trees.tables import JointTable, SelectionTable

N, BUDGET = 26, 11


@pytest.fixture
def data():
    rng = np.random.default_rng(2)
    A = rng.standard_normal((N + 8, N))
    H, w = A.T @ A / N + 0.02 * np.eye(N), rng.standard_normal(N)
    return H, np.linalg.inv(H), w, H * w[:, None] * w


def prepared(joint, data, stop=NEVER):
    H, A, w, Q = data
    group = np.zeros(N, np.int64)
    if joint:
        return prepare_joint(A, H, w, group, np.array([N - BUDGET]), [], stop=stop)
    return prepare_selection(Q, np.zeros(N), group, np.array([BUDGET]), [], stop=stop)


@pytest.mark.parametrize("joint", [False, True])
def test_a_node_that_is_interrupted_stays_open(data, joint):
    search, stop = prepared(joint, data), np.ones(1, np.int8)
    worker = (JointWorker if joint else SelectionWorker)(search.problem, 1e-9, 0.0, np.array([np.inf]), stop)
    root = Subproblem(-np.inf, np.full(N, -1, np.int8), None, None)
    worker.load(root)
    for pause in itertools.count():  # set before every other slice: nothing is lost
        stop[0] = 1
        before = worker.bound()
        more = worker.run(5)  # nodes that are closed at once may go
        assert more or worker.bound() == np.inf
        assert worker.bound() >= before
        stop[0] = 0
        if not more or not worker.run(5):
            break
        if pause % 7 == 3:
            left = worker.export()  # and what is left can be handed over
            best = worker.best[0]
            worker._shared[0] = min(worker._shared[0], best)
            for sub in left[1:]:
                worker.load(sub)
                while worker.run(1000):
                    pass
                worker._shared[0] = min(worker._shared[0], worker.best[0])
            worker.load(left[0])
    search.queue.run(lambda: False)
    assert min(worker.best[0], worker._shared[0]) == pytest.approx(search.queue.value, rel=1e-6)


@pytest.mark.parametrize("joint", [False, True])
def test_bounds_of_interrupted_work_hold(data, joint):
    H, A, w, Q = data
    stop = np.ones(1, np.int8)
    whole = prepared(joint, data)
    whole.queue.run(lambda: False)
    interrupted = prepared(joint, data, stop)
    interrupted.queue.run(lambda: True)
    assert interrupted.bound() <= whole.value() * (1 + 1e-9) <= interrupted.value() * (1 + 2e-9)
    table = JointTable(A, H, w, stop) if joint else SelectionTable(Q, np.zeros(N), stop)
    table.build(lambda: False)
    assert table.lower[BUDGET] <= whole.value() * (1 + 1e-9) <= table.upper[BUDGET] * (1 + 2e-9)
    if joint:
        lower = joint_bounds(A, H, w, outline_diagonal(A), BUDGET, whole.value(), stop)
    else:
        lower = selection_outline(Q, np.zeros(N), BUDGET, stop).lower
    assert lower[BUDGET] <= whole.value() * (1 + 1e-9)


def test_no_shift_is_half_fitted(data):
    with pytest.raises(Interrupted):
        best_shift(data[3], np.zeros(N), np.array([0, N]), np.array([BUDGET]), stop=np.ones(1, np.int8))


def test_the_flag_follows_what_is_asked():
    asked = []
    with stop_flag(lambda: len(asked) > 2 or asked.append(0) is not None) as stop:
        assert not stop[0]
        while not stop[0]:
            pass
    assert len(asked) == 3


def test_a_question_that_fails_stops():
    def fail():
        raise RuntimeError

    with stop_flag(fail) as stop:
        while not stop[0]:
            pass


def test_time_and_interrupts_only():
    monitor = Monitor(Stop(max_iterations=0, target=1e9, no_improvement=0))
    monitor.report(1.0, np.zeros(1, bool))
    assert not monitor.out_of_time()
    assert monitor.reason is None
    assert Monitor(Stop(time_limit=0.0)).out_of_time()
    assert Monitor(Stop(should_stop=lambda: True)).out_of_time()
