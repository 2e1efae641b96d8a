"""Compilation of the relaxation at the nodes of selection trees, apart from the tree that calls it."""

from __future__ import annotations

from typing import Any

import numba

from cbs_opt.solvers.kernels import box_relaxation

_F, _I = numba.float64[::1], numba.int64[::1]
_M = numba.float64[:, ::1]
_FLAG = numba.int8[::1]
_NODE = (_M, _F, _F, _F, _I, numba.int64, _I, _I, _M, _F)  # Q, dg, x, u, gp, G, S, ref, A, sc
RELAXATION: dict[Any, tuple[Any, ...]] = {
    box_relaxation.relax: (
        *(_F, _F, _F, _M, _F, _I, numba.int64, *(numba.float64,) * 3),  # x, u, g, Q, dg, gp, G, f, thr, goal
        *(_F, _I, _I, _M, _F, _F, _FLAG),  # th, S, ref, A, sc, d, stop
    ),
    box_relaxation.responses: (*_NODE, _M, _F, _FLAG),  # …, B, w, stop
    box_relaxation.response: (_I, numba.int64, numba.int64, _M, _F, _F, numba.int64, _F),
}
"""Kernels, and the types with which `selection_tree.run` calls them."""


def warm_up_relaxation() -> None:
    """Compile the inner kernels, which Python cannot call."""
    for kernel, signature in RELAXATION.items():
        kernel.compile(signature)
