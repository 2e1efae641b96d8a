"""Compilation of the kernels on a tiny layer, outside every clock."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.warm_up import compiling
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.layers.solve import solve_layers


def warm_up_layers() -> None:
    """Compile, or load from the cache, every kernel with the types that it is called with."""
    weights = np.random.default_rng(0).standard_normal((2, 12))
    layer = Layer(weights, np.eye(12) + 0.2)
    with compiling():
        for objective in ("joint", "selection"):
            for budget in (LayerBudget(total=12), LayerBudget(pattern=(2, 4))):
                solve_layers([layer], budget, objective=objective, bound_share=0.5, max_rounds=2)
