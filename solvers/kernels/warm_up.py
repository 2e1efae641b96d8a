"""Compilation of the selection kernels on a tiny problem, outside every clock."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from cbs_opt.solvers.kernels import selection_numba as kernels
from cbs_opt.solvers.kernels.compilation import how_often
from cbs_opt.solvers.kernels.group_sums import shift_to_counts
from cbs_opt.solvers.kernels.swap_descent import swap_descent

logger = logging.getLogger("cbs_opt")

_PATIENCE = 2.0  # seconds: loading from the cache is done by then


@contextmanager
def compiling() -> Iterator[None]:
    """Log that kernels are being compiled; the results are cached on disk where that can be written."""
    timer = threading.Timer(_PATIENCE, logger.info, [f"compiling kernels, {how_often()}: up to a minute"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def warm_up_products(gradients: bool) -> None:
    """Compile, or load from the cache, products with Q: of dense blocks, or of rows of gradients."""
    with compiling():
        kernels.add_rows(np.eye(2), np.array([0]), np.ones(1), np.zeros(2))
        if gradients:
            for rows in (np.eye(2), np.eye(2, dtype=np.float32)):
                kernels.row_norms(rows)
                kernels.add_dots(rows, kernels.combine_rows(rows, np.array([0]), np.ones(1)), np.zeros(2))


def warm_up_selection() -> None:
    """Compile, or load from the cache, every kernel of a core with the types that it is called with."""
    q, start, cells = np.eye(2).ravel(), np.array([0, 2]), np.array([0, 2])
    layout = (q, np.array([0, 4]), start, np.array([0, 1]), cells, np.zeros(1, dtype=np.int64), 1)
    half, h = np.full(2, 0.5), np.array([1.0, 0.0])
    kernels.pair_descent(*layout, np.ones(2), np.zeros(2), np.array([1.0, 0.0]), h.copy(), 1, 1e-9)
    shift_to_counts(np.ones(2), np.zeros(2, dtype=np.int64), np.ones(1, dtype=np.int64), h.copy())
    y = np.array([1, 0], dtype=np.int8)
    swap_descent(*layout, half, y, h, 1e-9, 1)
    release = np.zeros(2, dtype=np.int64)
    kernels.tabu_swaps(*layout, half, y, h, 0.5, y.copy(), 0.5, release, 0, 1, 1, 1, np.uint64(1), 0)
