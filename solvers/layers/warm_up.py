"""Compilation of the kernels on a tiny layer, outside every clock."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.layers.solve import solve_layers


def layers_joint() -> None:
    """Every kernel that the joint objective needs."""
    _both_budgets("joint")


def layers_selection() -> None:
    """Every kernel that the selection objective needs."""
    _both_budgets("selection")


def _both_budgets(objective: str) -> None:
    layer = Layer(np.random.default_rng(0).standard_normal((2, 12)), np.eye(12) + 0.2)
    for budget in (LayerBudget(total=12), LayerBudget(pattern=(2, 4))):
        solve_layers([layer], budget, objective=objective, bound_share=0.5, max_rounds=2)
