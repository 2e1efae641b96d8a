"""Blocks of the Hessian or of its inverse, in the order of an instance file.

The blocks are made in float64 and yielded one by one, so that all of them together may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.fisher import row_blocks
from cbs_opt.linalg import inverse_pd
from cbs_opt.scalars import is_integer
from cbs_opt.typing import FloatArray, RealArray

Shape = tuple[int, ...]

PANEL_BYTES = 1 << 28
"""Columns of the gradients are read in chunks of about this size: G may lie on disk, row by row."""

_PANEL_ROWS = 1024  # of a block that is made and mirrored at a time


def block_sizes(shapes: Sequence[Shape], blocks: str | int) -> list[int]:
    """Sizes of the diagonal blocks; none holds weights of two tensors, unless there is one for all.

    Parameters
    ----------
    shapes : sequence of tuple
        The tensors, in the order of the weights.
    blocks : {"full", "layer", "row"} or int
        One block for everything, for each tensor, for each output neuron or channel, or of this many weights,
        the last one of a tensor with what is left.

    Raises
    ------
    UsageError
        For anything else.
    """
    numbers = [int(np.prod(shape)) for shape in shapes]
    if blocks == "full":
        return [sum(numbers)]
    if blocks == "layer":
        return numbers
    if blocks == "row":
        return row_blocks(list(shapes))
    if isinstance(blocks, str) or not is_integer(blocks) or blocks < 1:
        raise UsageError(f"`blocks` must be 'full', 'layer', 'row' or a size of at least 1, got {blocks!r}")
    return cut(numbers, int(blocks))


def cut(lengths: Sequence[int], size: int) -> list[int]:
    """Cut each length into pieces of `size`, the last with what is left."""
    return [min(size, length - first) for length in lengths for first in range(0, length, size)]


def working_bytes(block: int, samples: int, *, inverse: bool) -> int:
    """Memory that a block needs while it is made, and when a reader checks it: whole matrices and G's columns."""
    matrices = 6 if inverse and block <= samples else 4
    return 8 * (matrices * block * block + 3 * samples * block + samples * samples * inverse)


def fisher_blocks(
    gradients: RealArray, damping: float, sizes: Sequence[int], *, inverse: bool
) -> Iterator[FloatArray]:
    """Yield the blocks H_k = λI + G_kᵀG_k/m of the empirical Fisher matrix, or their inverses.

    Parameters
    ----------
    gradients : float32 or float64 (m, n)
        G, one row for each sample or mini-batch; may be memory-mapped.
    damping : float
        λ ≥ 0.
    sizes : sequence of int
        Consecutive blocks, n weights in all.
    inverse : bool
        H_k⁻¹ instead of H_k.

    Yields
    ------
    float64 (b_k, b_k)
        Exactly symmetric.

    Raises
    ------
    InstanceError
        When a block that should be inverted is singular.

    Notes
    -----
    The inverse is made by Cholesky where b_k ≤ m, O(m b_k² + b_k³), and by Woodbury's formula otherwise,
    O(m³ + m² b_k + m b_k²): no route takes m rank-one steps.
    """
    m = gradients.shape[0]
    ends = [0, *accumulate(sizes)]
    first = 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and 8 * m * (ends[last + 1] - ends[first]) <= PANEL_BYTES:
            last += 1
        panel = np.asarray(gradients[:, ends[first] : ends[last]], dtype=np.float64)
        for k in range(first, last):
            G = panel[:, ends[k] - ends[first] : ends[k + 1] - ends[first]]
            block = _inverse(G, damping) if inverse else _hessian(G, damping)
            if block is None:
                raise InstanceError(singular_sentence(f"block {k} of the Fisher matrix"))
            yield block
        first = last


def singular_sentence(what: str) -> str:
    """The error of a block without an inverse, with a remedy."""
    return f"{what} is singular to working precision and has no inverse: raise the damping"


def _hessian(G: FloatArray, damping: float) -> FloatArray:
    m, b = G.shape
    H = _mirrored(G, np.empty((b, b)))
    H /= m
    H[np.diag_indices(b)] += damping
    return H


def _inverse(G: FloatArray, damping: float) -> FloatArray | None:
    """[λI + GᵀG/m]⁻¹; by Woodbury (I − Gᵀ(GGᵀ + mλI)⁻¹G)/λ where G is wider than high."""
    from scipy.linalg import lapack, solve_triangular

    m, b = G.shape
    if b <= m:
        return symmetric_inverse(_hessian(G, damping))
    if damping == 0:
        return None
    gram = np.array(G @ G.T)
    gram[np.diag_indices(m)] += m * damping
    L, info = lapack.dpotrf(gram, lower=1, overwrite_a=1)
    if info != 0:
        return None
    out = _mirrored(solve_triangular(L, G, lower=True, check_finite=False), np.empty((b, b)))
    out /= -damping
    out[np.diag_indices(b)] += 1.0 / damping
    return out


def symmetric_inverse(H: FloatArray) -> FloatArray | None:
    """By Cholesky, symmetric to the last bit: a reader then maps the block and need not copy it."""
    inverse = inverse_pd(H)
    return None if inverse is None else np.asarray((inverse + inverse.T) / 2)


def _mirrored(A: FloatArray, out: FloatArray) -> FloatArray:
    """AᵀA into `out`, the upper triangle made in panels and mirrored, so that it is exactly symmetric."""
    b = A.shape[1]
    for start in range(0, b, _PANEL_ROWS):
        rows = slice(start, min(start + _PANEL_ROWS, b))
        np.matmul(A[:, rows].T, A[:, start:], out=out[rows, start:])
        square = np.triu(out[rows, rows])
        out[rows, rows] = square + np.triu(square, 1).T
        out[rows.stop :, rows] = out[rows, rows.stop :].T
    return out
