"""Compilation of the kernels of the trees on small problems: the units of `kernels.loading`."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.trees.block_search import BlockSearch
from cbs_opt.solvers.trees.joint_worker import prepare_joint
from cbs_opt.solvers.trees.selection_shift import best_shift
from cbs_opt.solvers.trees.selection_worker import TOLERANCE, prepare_selection
from cbs_opt.solvers.trees.tables import JointTable, SelectionTable, Table
from cbs_opt.typing import FloatArray


def selection_tree() -> None:
    """One tree over one dense component."""
    Q, _, w = _problem()
    tree = prepare_selection(Q * w[:, None] * w, np.zeros(w.size), _GROUP, _BUDGET, [])
    tree.queue.run(_never)
    tree.value()


def joint_tree() -> None:
    """The same for the joint loss."""
    H, A, w = _problem()
    tree = prepare_joint(A, H, w, _GROUP, _BUDGET, [])
    tree.queue.run(_never)
    tree.value()


def selection_tables() -> None:
    """What several components need beside trees, and better diagonals, which only long trees need."""
    H, _, w = _problem()
    Q = H * w[:, None] * w
    _join([SelectionTable(Q[:3, :3], w[:3]) for _ in range(2)])
    best_shift(Q, np.zeros(w.size), np.array([0, w.size]), _BUDGET)


def joint_tables() -> None:
    """The same for the joint loss."""
    _, A, w = _problem()
    inverse = np.asarray(np.linalg.inv(A[:3, :3]), np.float64)
    _join([JointTable(A[:3, :3], inverse, w[:3]) for _ in range(2)])


_GROUP, _BUDGET = np.zeros(14, np.int64), np.array([7])


def _problem() -> tuple[FloatArray, FloatArray, FloatArray]:
    """H, its inverse, and weights."""
    rng = np.random.default_rng(0)
    G = rng.standard_normal((16, 14))
    H = G.T @ G
    return H, np.asarray(np.linalg.inv(H), np.float64), rng.standard_normal(14)


def _join(tables: list[Table]) -> None:
    BlockSearch(tables, 3, TOLERANCE).run(_never, _never)


def _never() -> bool:
    return False
