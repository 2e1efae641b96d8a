"""Objective values of many selections at once, with NumPy, or with torch on a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cbs_opt.device import choose, in_batches, is_wanted, or_on_cpu
from cbs_opt.instance import Instance
from cbs_opt.interrupt import checkpoint
from cbs_opt.selection import SelectionObjective
from cbs_opt.solver import Context
from cbs_opt.typing import BoolArray, FloatArray

if TYPE_CHECKING:
    import torch

    from cbs_opt.solvers.device.objective import DeviceObjective

_PIECE_BYTES = 1 << 26  # of the matrix that is converted at a time
_ON_CARD = 256  # selections evaluated together there


class BatchEvaluator:
    """½ xᵀQx + cᵀx for batches of selections, in float64.

    For a gradient factor ‖G(w∘x)‖²/2m + λ/2 Σ w_i² x_i, so that R selections of n weights cost O(m n R) in one
    matrix product; for dense blocks O(Σ b_k² R).

    Parameters
    ----------
    instance : Instance
    context : Context
        Determines the device.
    selections : int
        How many will be evaluated, roughly: whether a card pays depends on it.

    Attributes
    ----------
    on_card : DeviceObjective or None
        The objective on the card, where one was chosen.
    """

    def __init__(self, instance: Instance, context: Context, selections: int = 50) -> None:
        self.problem = SelectionObjective(instance)
        self.on_card: DeviceObjective | None = None
        self._extras = context.extras
        context.extras["device"] = "cpu"
        if is_wanted(context.device, instance.n):
            self._choose(context, selections)

    def _choose(self, context: Context, selections: int) -> None:
        """Bring the objective to the card if that pays."""
        from cbs_opt.solvers.device.objective import DeviceObjective, evaluation_work

        card = choose(context.device, evaluation_work(self.problem, selections), context.workers)
        if card is not None:
            with or_on_cpu("the objective"):
                self.on_card = DeviceObjective(self.problem, card)
                context.extras["device"] = card.name

    def values(self, selections: BoolArray) -> FloatArray:
        """Objectives, float64 (R,), of selections, bool (R, n)."""
        if self.on_card is not None:
            import torch

            with or_on_cpu("the objective", self._extras):
                return self.values_on_card(torch.tensor(selections, device=self.on_card.device))
            self.on_card = None
        curvature, factor = self.problem.curvature, self.problem.curvature.as_factor()
        x = selections.astype(np.float64)
        values, moved = x @ self.problem.c, x * self.problem.w
        for k in curvature.blocks_in_turn():
            part = curvature.block_slice(k)
            mine = moved[:, part]
            if factor is not None:
                projected = np.zeros((len(selections), factor.m))
                for columns, piece in factor.pieces(part.start, part.stop, _PIECE_BYTES):
                    projected += moved[:, columns] @ piece.T
                values += 0.5 * (projected**2).sum(1) / factor.m
                values += 0.5 * factor.damping * (mine**2).sum(1)
            else:
                values += 0.5 * ((mine @ curvature.block(k)) * mine).sum(1)
        return np.asarray(values)

    def values_on_card(self, selections: torch.Tensor) -> FloatArray:
        """Objectives, float64 (R,), of selections that are on the card, bool (R, n)."""
        assert self.on_card is not None
        objective, out = self.on_card, np.empty(len(selections))

        def evaluate(first: int, last: int) -> None:
            checkpoint()
            out[first:last] = objective.values(selections[first:last]).cpu().numpy()

        in_batches(len(selections), _ON_CARD, evaluate, lambda: False)
        return out
