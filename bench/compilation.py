"""Compilation of kernels stays outside the clocks of the benchmarks."""

from __future__ import annotations

import sys

_LOADING = "cbs_opt.solvers.kernels.loading"


def finish_compilation() -> None:
    """Wait for the kernels that a solver's `prepare` has asked for; nothing where it has asked for none."""
    if _LOADING in sys.modules:
        sys.modules[_LOADING].finish()
