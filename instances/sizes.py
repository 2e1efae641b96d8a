"""Exact sizes of sparse tensors in formats that omit zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Bytes of the pruned tensors, each format for all of them.

    Attributes
    ----------
    dense : int
    bitmask : int
        One bit per weight, and the kept values.
    csr : int
        Compressed rows: values, column numbers of 2 bytes where these do (4 otherwise), 4 bytes per row.
    """

    dense: int
    bitmask: int
    csr: int


def sparse_sizes(tensors: Mapping[str, Tensor]) -> Sizes:
    """Of tensors with zeros; a tensor of more than two axes is a matrix (outputs, everything else)."""
    dense = bitmask = csr = 0
    for tensor in tensors.values():
        n, kept, item = tensor.numel(), int((tensor != 0).sum()), tensor.element_size()
        rows = tensor.shape[0] if tensor.dim() > 1 else 1
        index = 2 if n // max(rows, 1) <= 1 << 16 else 4
        dense += n * item
        bitmask += -(-n // 8) + kept * item
        csr += kept * (item + index) + 4 * (rows + 1)
    return Sizes(dense, bitmask, csr)
