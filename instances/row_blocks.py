"""The blocks of layers whose rows have one Hessian, up to a factor: what is stored, and which row uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cbs_opt.errors import InstanceError
from cbs_opt.instances.curvature import cut, singular_sentence, symmetric_inverse
from cbs_opt.instances.reconstruction import LayerCovariance
from cbs_opt.typing import FloatArray, IntArray


@dataclass(frozen=True)
class StoredBlock:
    """A block that is stored once: covariance[first:last, first:last] + shift · I.

    Attributes
    ----------
    name : str
        Of the weight.
    covariance : float64 (K, K)
    first, last : int
    shift : float
        The damping, and what rows add to their diagonals.
    """

    name: str
    covariance: FloatArray
    first: int
    last: int
    shift: float

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.last - self.first

    def matrix(self, *, inverse: bool) -> FloatArray:
        """The block or its inverse, float64 (b, b), exactly symmetric; O(b³) for the latter.

        Raises
        ------
        InstanceError
            When it should be inverted and is singular.
        """
        part = slice(self.first, self.last)
        block = self.covariance[part, part].copy()
        block[np.diag_indices(self.size)] += self.shift
        made = symmetric_inverse(block) if inverse else block
        if made is None:
            raise InstanceError(singular_sentence(f"the Hessian of a row of '{self.name}'"))
        return made


@dataclass(frozen=True)
class RowBlocks:
    """The blocks of all rows: H_k = scale_k · S_{shared_k}.

    Attributes
    ----------
    stored : tuple of StoredBlock
        S, in the order in which the rows meet them.
    shared : int64 (blocks,)
        The stored block of each block.
    scale : float64 (blocks,)
    """

    stored: tuple[StoredBlock, ...]
    shared: IntArray
    scale: FloatArray

    @property
    def sizes(self) -> list[int]:
        """Sizes of the stored blocks."""
        return [block.size for block in self.stored]

    @property
    def scaled(self) -> bool:
        """Whether a factor is not 1."""
        return bool((self.scale != 1.0).any())

    @property
    def plain(self) -> bool:
        """Whether every block is stored for itself, as it is."""
        return len(self.stored) == self.shared.size and not self.scaled

    def matrices(self, *, inverse: bool) -> Iterator[FloatArray]:
        """The stored blocks or their inverses one by one, see `StoredBlock.matrix`."""
        for block in self.stored:
            yield block.matrix(inverse=inverse)


def row_blocks(
    layers: Sequence[LayerCovariance],
    dampings: Sequence[float],
    size: int | None = None,
    scales: Mapping[str, FloatArray] | None = None,
) -> RowBlocks:
    """Lay out the blocks of all rows of all layers.

    Parameters
    ----------
    layers : sequence of LayerCovariance
    dampings : sequence of float
        λ of each layer, added to the diagonal of its stored blocks.
    size : int, optional
        Rows are cut into blocks of at most so many weights.
    scales : mapping of str to float64 (rows,), optional
        Positive factor of each row by the name of its layer; 1 by default. It multiplies damping and `shifts` too.

    Returns
    -------
    RowBlocks
        Rows of one range that add the same to their diagonals use the same stored blocks.
    """
    stored: list[StoredBlock] = []
    shared: list[IntArray] = []
    factors: list[FloatArray] = []
    for layer, damping in zip(layers, dampings, strict=True):
        K = layer.layout.inputs
        pieces = np.cumsum([0, *cut([K], size or K)])
        for rows in layer.ranges:
            number = rows.last - rows.first
            scale = np.ones(number) if scales is None else scales[layer.name][rows.first : rows.last]
            values, which = _in_order(np.zeros(number) if rows.shifts is None else rows.shifts)
            first = len(stored) + (len(pieces) - 1) * which
            shared.append((first[:, None] + np.arange(len(pieces) - 1)).ravel())
            factors.append(np.repeat(scale, len(pieces) - 1))
            stored += [
                StoredBlock(layer.name, rows.covariance, int(start), int(stop), damping + float(value))
                for value in values
                for start, stop in pairwise(pieces)
            ]
    return RowBlocks(tuple(stored), np.concatenate(shared), np.concatenate(factors))


def _in_order(values: FloatArray) -> tuple[FloatArray, IntArray]:
    """Distinct values in the order of their first appearance, and the number of each entry's."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return values[first[order]], rank[which.ravel()]
