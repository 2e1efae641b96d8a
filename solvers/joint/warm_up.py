"""Compilation of the kernels of the joint search on a tiny problem: a unit of `kernels.loading`."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.joint.tableau import Tableau
from cbs_opt.solvers.kernels import joint_numba as kernels
from cbs_opt.solvers.kernels.sweep_tabu import sweep, sweep_tabu


def warm_up_joint() -> None:
    """Compile, or load from the cache, the kernels of backward elimination and of the tableau."""
    one, index = np.ones((1, 1)), np.zeros(1, dtype=np.int64)
    kernels.eliminate(one, one.copy(), 0, np.ones(1), np.ones(1), np.ones(1, dtype=bool), -1, 1, index, np.ones(1))
    kernels.subtract_from_rest(one, index, one.copy())
    H = np.diag([1.0, 2.0, 3.0, 4.0])
    kept, free = np.array([True, False, True, False]), np.ones(4, dtype=bool)
    for group in (np.zeros(4, dtype=np.int64), np.array([0, 0, 1, 1])):
        tableau = Tableau(H, np.ones(4), 1.0, kept, group, free)
        for _ in range(2):  # the first search of all has nothing to bring up to date
            r, s, _ = tableau.best_swap()
            tableau.swap(r, s)
        assert tableau.U.size
    M, A, here = np.eye(3), np.eye(3), np.array([1, 0], dtype=np.int8)
    sweep(M, here, np.zeros(2), A)
    weights = (here, np.zeros(2), np.zeros(2, dtype=np.int64), np.array([0, 2]), np.full(2, -1), here.copy())
    sweep_tabu(M, A, *weights, 1.0, 0, 0, 0, np.uint64(1), 1, 1, 1, 1, 9)
