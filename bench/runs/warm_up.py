"""Work outside the time measurement: each solver solves a tiny instance once per process before its first row."""

from __future__ import annotations

from functools import cache

import numpy as np

from cbs_opt.budget import Budget
from cbs_opt.curvature import Curvature, GradientFactor, HessianBlocks, InverseHessianBlocks
from cbs_opt.instance import Instance

TINY = 12
"""Weights of the tiny instance."""

SECONDS = 0.2
"""Most seconds of the tiny solve itself; compilation comes before."""


@cache
def tiny_instance(kind: str) -> Instance:
    """A random instance of `TINY` weights whose curvature has this form; one block, half to prune.

    Parameters
    ----------
    kind : {"hessian", "inverse_hessian", "gradients"}
        The form decides which kernels are compiled.
    """
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((2 * TINY, TINY))
    hessian = gradients.T @ gradients / (2 * TINY) + 1e-3 * np.eye(TINY)
    curvature: Curvature
    if kind == "gradients":
        curvature = GradientFactor(gradients, 1e-3, np.array([TINY]))
    elif kind == "hessian":
        curvature = HessianBlocks.from_blocks([hessian])
    else:
        inverse = np.linalg.inv(hessian)
        curvature = InverseHessianBlocks.from_blocks([(inverse + inverse.T) / 2])
    return Instance(rng.standard_normal(TINY), curvature, Budget(TINY // 2))
