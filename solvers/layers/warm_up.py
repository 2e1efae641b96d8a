"""Compilation of the kernels on a tiny layer, outside every clock."""

from __future__ import annotations

import numpy as np

from cbs_opt.budget import Budget
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.layers.solve import solve_layers
from cbs_opt.solvers.layers.tiled_budget import tiled_budget


def layers_joint() -> None:
    """Every kernel that the joint objective needs."""
    _both_budgets("joint")
    index = np.arange(24)
    row, column = np.divmod(index, 12)
    one, layer = np.full(12, 1), _layer()
    crossed = Budget(12, 6 * row + column // 2, one, column, one)
    budget = tiled_budget(crossed, LayerBudget(per_row=(np.full(2, 6),)), [index.reshape(2, 12)])
    assert budget is not None
    for wide in (False, True):
        solve_layers([layer], budget, max_rounds=3, wide=wide)


def layers_selection() -> None:
    """Every kernel that the selection objective needs."""
    _both_budgets("selection")


def _both_budgets(objective: str) -> None:
    for budget in (LayerBudget(total=12), LayerBudget(pattern=(2, 4))):
        solve_layers([_layer()], budget, objective=objective, bound_share=0.5, max_rounds=2)


def _layer() -> Layer:
    return Layer(np.random.default_rng(0).standard_normal((2, 12)), np.eye(12) + 0.2)
