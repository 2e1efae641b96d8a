"""Compilation of the sweep kernels on a tiny problem, outside every clock."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels import sweeps_numba as kernels


def warm_up_sweeps() -> None:
    """Compile, or load from the cache, every kernel with the types that it is called with."""
    one, none = np.ones(1), np.zeros(1, dtype=np.int64)
    for kind in (np.float32, np.float64):
        rows = np.ones((1, 1), dtype=kind)
        gradients = np.ones((1, 1), dtype=kind)
        gradients.flags.writeable = False
        for stored in (gradients, gradients.copy()):
            kernels.project(stored, 0, one, np.ones(1))
            kernels.back_project(stored, 0, one, np.ones(1))
            for made in (np.float32, np.float64):
                kernels.scaled_transpose(stored, none, one, np.ones((1, 1), dtype=made))
        kernels.sweep_factor(rows, one, np.ones(1), *_rest())
    kernels.sweep_dense(np.ones((1, 1)), np.ones(1), *_rest())
    kernels.sweep_diagonal(*_rest())


def _rest() -> tuple[object, ...]:
    zero, none = np.zeros(1), np.zeros(1, dtype=np.int64)
    return (np.ones(1), zero, none, np.zeros(1), np.zeros(1), 0.0, np.ones(1), none.copy(), 1, 0.0)
