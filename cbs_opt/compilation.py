"""Keeps the compilation of kernels outside the time measurements of the benchmarks."""

from __future__ import annotations

import sys

_LOADING = "cbs_opt.solvers.kernels.loading"


def finish_compilation() -> None:
    """Wait for the kernels that the `prepare` of a solver has requested, if any."""
    if _LOADING in sys.modules:
        sys.modules[_LOADING].finish()
