"""Objective values of many selections at once, with torch on CPU or CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cbs_opt.errors import SolverError
from cbs_opt.instance import Instance
from cbs_opt.selection import SelectionObjective
from cbs_opt.solver import Context
from cbs_opt.typing import BoolArray, FloatArray

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 1 << 26  # of the matrix brought to the device at a time


def torch_device(context: Context) -> torch.device:
    """The device that `context` asks for, noted in its extras; `SolverError` where CUDA is missing."""
    import torch

    available = torch.cuda.is_available()
    if context.device == "cuda" and not available:
        raise SolverError("`--device cuda` was asked for, but torch finds no CUDA device here")
    name = "cuda" if available and context.device != "cpu" else "cpu"
    context.extras["device"] = torch.cuda.get_device_name() if name == "cuda" else "cpu"
    return torch.device(name)


class BatchEvaluator:
    """½ xᵀQx + cᵀx for batches of selections, in float64.

    For a gradient factor ‖G(w∘x)‖²/2m + λ/2 Σ w_i² x_i, so that R selections of n weights cost O(m n R) in one
    matrix product; for dense blocks O(Σ b_k² R).

    Parameters
    ----------
    instance : Instance
    context : Context
        Determines the device.
    """

    def __init__(self, instance: Instance, context: Context) -> None:
        import torch

        self._torch = torch
        self.device = torch_device(context)
        self.problem = SelectionObjective(instance)
        self._w = self._tensor(instance.weights)
        self._c = self._tensor(self.problem.c)

    def _tensor(self, array: FloatArray) -> torch.Tensor:
        array = array if array.flags.writeable else array.copy()
        return self._torch.from_numpy(array).to(self.device)

    def values(self, selections: BoolArray) -> FloatArray:
        """Objectives, float64 (R,), of selections, bool (R, n)."""
        torch = self._torch
        curvature, factor = self.problem.curvature, self.problem.curvature.as_factor()
        x = torch.from_numpy(selections).to(self.device).to(torch.float64)
        values = x @ self._c
        moved = x * self._w
        for k in range(curvature.number_of_blocks):
            part = curvature.block_slice(k)
            if factor is not None:
                projected = torch.zeros(len(selections), factor.m, dtype=torch.float64, device=self.device)
                for columns, piece in factor.pieces(part.start, part.stop, _PIECE_BYTES):
                    projected += moved[:, columns] @ self._tensor(piece).T
                values += 0.5 * (projected**2).sum(1) / factor.m
                values += 0.5 * factor.damping * (moved[:, part] ** 2).sum(1)
            else:
                mine = moved[:, part]
                values += 0.5 * ((mine @ self._tensor(curvature.block(k))) * mine).sum(1)
        return np.asarray(values.cpu().numpy())
