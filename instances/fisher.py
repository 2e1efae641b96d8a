"""The empirical Fisher matrix H = λI + GᵀG/m of a network's gradients, in the form that an instance needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt import GradientFactor, InverseHessianBlocks
from cbs_opt.typing import RealArray


def fisher_inverse_blocks(gradients: RealArray, damping: float, block_sizes: ArrayLike) -> InverseHessianBlocks:
    """Invert the empirical Fisher matrix block by block.

    Parameters
    ----------
    gradients : float32 or float64 (m, n)
        G, one row for the gradient of each sample or mini-batch.
    damping : float
        λ > 0, or 0 where every block has full rank.
    block_sizes : int64 (K,)
        Consecutive blocks; entries of H between two blocks are dropped.

    Returns
    -------
    InverseHessianBlocks
        [λI + G_kᵀG_k/m]⁻¹ for the columns G_k of each block, float64.

    Raises
    ------
    InstanceError
        When a block is singular.

    Notes
    -----
    Cholesky in float64, of the block where b_k ≤ m, O(m b_k² + b_k³), and by Woodbury's formula of the
    (m, m) matrix of inner products otherwise, O(m³ + m b_k²). WoodFisher computes the same matrix by m
    rank-one steps, which accumulate rounding errors.
    """
    factor = GradientFactor(gradients, damping, block_sizes)
    return InverseHessianBlocks.from_blocks([factor.inverse_block(k) for k in range(factor.number_of_blocks)])


def row_blocks(shapes: list[tuple[int, ...]]) -> list[int]:
    """Block sizes with one block for each output neuron, a row of its weight matrix."""
    return [int(np.prod(shape[1:])) for shape in shapes for _ in range(shape[0])]


def tensor_table(names: list[str], shapes: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """The position of each tensor among the weights: `metadata["tensors"]` of an instance."""
    table, offset = [], 0
    for name, shape in zip(names, shapes, strict=True):
        table.append({"name": name, "shape": list(shape), "offset": offset})
        offset += int(np.prod(shape))
    return table
