"""Dense symmetric blocks in one flat array: construction and checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.errors import InstanceError
from cbs_opt.linalg import SYMMETRY_TOLERANCE, is_positive
from cbs_opt.temporary import temporary_array
from cbs_opt.typing import IntArray, RealArray

_IN_MEMORY = 1 << 29  # bytes of a memory-mapped array up to which a copy is made in memory
_CHUNK = 1 << 24


def flatten(blocks: Sequence[ArrayLike]) -> tuple[RealArray, IntArray]:
    """Concatenate square matrices in one flat array; returns the array and the block sizes.

    The array is float32 if all matrices are (this determines the rounding tolerance), and float64 otherwise.
    """
    try:
        matrices = [np.asarray(block) for block in blocks]
        numeric = all(np.issubdtype(matrix.dtype, np.number) for matrix in matrices)
    except (TypeError, ValueError):
        numeric = False
    if not numeric:
        raise InstanceError(f"`blocks` must be a sequence of square matrices of numbers, got {blocks!r:.60}")
    single = all(matrix.dtype == np.float32 for matrix in matrices)
    matrices = [matrix.astype(np.float32 if single else np.float64, copy=False) for matrix in matrices]
    for k, matrix in enumerate(matrices):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InstanceError(f"block {k} must be a square matrix, got shape {matrix.shape}")
    sizes = np.array([matrix.shape[0] for matrix in matrices], dtype=np.int64)
    flat = np.concatenate([matrix.ravel() for matrix in matrices]) if matrices else np.zeros(0)
    return flat, sizes


def check_flat(
    name: str, flat: RealArray, block_sizes: IntArray, *, definite: bool
) -> tuple[RealArray, list[int]]:
    """Check dense blocks one at a time; `flat` as a float32 or float64 array, and the indefinite blocks.

    With `definite` every block must be positive definite, else blocks may be indefinite.

    A block that is symmetric up to rounding only is replaced by its symmetric part (in a copy of `flat`; that of
    a large memory-mapped array lies in a temporary file), so that every route to a loss sees the same matrix.
    Raises `InstanceError` naming the block; O(Σ b_k³) time at most, memory of one block unless a copy is made.
    """
    flat = real_array(name, flat)
    expected = int((block_sizes**2).sum())
    if flat.shape != (expected,):
        raise InstanceError(
            f"`{name}` must have shape ({expected},), the squares of `block_sizes` summed, got {flat.shape}"
        )
    precision = float(np.finfo(flat.dtype).eps)
    ends = np.cumsum(block_sizes**2)
    copied = False
    indefinite = []
    for k, b in enumerate(block_sizes.tolist()):
        part = slice(int(ends[k]) - b * b, int(ends[k]))
        block = flat[part].reshape(b, b).astype(np.float64, copy=False)
        if not np.isfinite(block).all():
            raise InstanceError(f"`{name}`: block {k} has NaN or infinite entries")
        largest = float(np.abs(block).max())
        asymmetry = float(np.abs(block - block.T).max())
        if asymmetry > SYMMETRY_TOLERANCE * largest:
            raise InstanceError(
                f"`{name}`: block {k} must be symmetric, its largest |A - Aᵀ| is {asymmetry:.3g} where the "
                f"largest entry is {largest:.3g}"
            )
        if asymmetry > 0:
            block = (block + block.T) / 2
            if not copied:
                flat, copied = _writable_copy(name, flat), True
            flat[part] = block.ravel()
        if not is_positive(block, definite=definite, precision=precision):
            if definite:
                raise InstanceError(f"`{name}`: block {k} must be positive definite, but it is indefinite")
            indefinite.append(k)
    return flat, indefinite


def _writable_copy(name: str, flat: RealArray) -> RealArray:
    """A copy, of a large memory-mapped array in a temporary file that ends with it."""
    source: object = flat
    while isinstance(source, np.ndarray) and not isinstance(source, np.memmap):
        source = source.base
    if not isinstance(source, np.memmap) or flat.nbytes <= _IN_MEMORY:
        return real_array(name, np.array(flat))
    copy: RealArray = temporary_array(
        flat.shape, flat.dtype, f"`{name}`: a matrix is symmetric only up to rounding, and a copy of all"
    )
    for first in range(0, flat.size, _CHUNK):
        copy[first : first + _CHUNK] = flat[first : first + _CHUNK]
    return copy


def real_array(name: str, values: ArrayLike) -> RealArray:
    """`values` as float32 or float64 in native byte order, without a copy if possible."""
    array = np.asarray(values)
    if array.dtype.newbyteorder("=") not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise InstanceError(f"`{name}` must be float32 or float64, got {array.dtype}")
    return np.asarray(array, dtype=array.dtype.newbyteorder("="))
