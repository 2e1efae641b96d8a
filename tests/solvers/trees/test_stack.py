"""What a worker shows of its stack agrees with what it exports."""

import numpy as np
import pytest

from cbs_opt.solvers.kernels.stack_layout import ROOT
from cbs_opt.solvers.trees.joint_worker import prepare_joint
from cbs_opt.solvers.trees.selection_worker import prepare_selection

N, BUDGET = 22, 11


def worker_of(kind, seed):
    """A worker on a fresh problem, with nothing to compare its nodes with."""
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(30, N))
    H, w, group = G.T @ G / 30, rng.normal(size=N), np.zeros(N, np.int64)
    if kind == "selection":
        search = prepare_selection(H * w[:, None] * w, np.zeros(N), group, np.array([BUDGET]), [])
    else:
        search = prepare_joint(np.linalg.inv(H), H, w, group, np.array([N - BUDGET]), [])
    worker = search.queue.new_worker(np.array([np.inf]))
    worker.load(search.queue.best_open())
    return worker


@pytest.mark.parametrize("kind", ["selection", "joint"])
@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_shows_what_is_exported(kind, seed):
    worker = worker_of(kind, seed)
    view = worker.snapshot()
    assert (view.top, view.nodes, view.limit) == (0, 0, np.inf)
    assert view.entry(0).pending == ROOT
    assert worker.run(7)
    assert view.nodes == 7
    assert view.limit == worker.best[0] < np.inf
    entries = [(i, view.entry(i)) for i in range(view.top + 1)]
    open_entries = [(i, entry) for i, entry in entries if entry.pending]
    assert view.open_entry() == max(i for i, _ in open_entries if view.bounds[i] < view.limit)
    assert worker.bound() == min(view.bounds[i] for i, _ in open_entries)
    expected = []
    for i, entry in open_entries:
        variables = view.variables(entry.level)
        if kind == "selection":
            fixings, point = view.decisions(i, entry.level), view.point(i, entry.level)
            assert point.sum() == pytest.approx(BUDGET)
            assert ((point >= 0) & (point <= 1)).all()
            np.testing.assert_array_equal(point[fixings >= 0], fixings[fixings >= 0])
        else:
            fixings = np.zeros(N, np.int8)
            fixings[variables] = np.where(view.kept[i, : variables.size] == 1, 1, -1)
        if entry.pending == 1:
            assert fixings[variables[entry.branch]] == -1
            fixings[variables[entry.branch]] = entry.value
        expected.append(fixings)
    exported = worker.export()
    assert view.top == view.open_entry() == -1
    assert len(exported) == len(expected)
    for sub, fixings in zip(exported, expected, strict=True):
        np.testing.assert_array_equal(sub.fixings, fixings)
    assert worker.take_nodes() == 7
    assert view.nodes == 0
