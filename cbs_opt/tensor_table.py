"""The tensors of an instance: which weight is which entry of which tensor, according to the metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cbs_opt.typing import IntArray

if TYPE_CHECKING:
    from cbs_opt.instance import Instance


@dataclass(frozen=True, eq=False)
class TensorEntry:
    """A tensor of the network, or the part of it that belongs to the instance.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Of the whole tensor.
    start, stop : int
        Its weights among those of the instance.
    positions : int64 (stop − start,) or None
        Their positions in the flattened tensor; None if the instance has all of them in order.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    positions: IntArray | None = None

    @property
    def size(self) -> int:
        """Number of weights of the instance."""
        return self.stop - self.start

    def index(self, i: int) -> tuple[int, ...]:
        """The position of weight i of the instance in the tensor."""
        flat = i - self.start if self.positions is None else int(self.positions[i - self.start])
        return tuple(int(axis) for axis in np.unravel_index(flat, self.shape))


def tensor_table(instance: Instance) -> list[TensorEntry]:
    """The tensors in the order of their weights; empty if the metadata do not name them correctly.

    Read from `tensors`, a list of `name`, `shape` and `offset`, or from `tensor`, `shape` and `positions` of an
    instance that is a part of one tensor.
    """
    metadata = instance.metadata
    try:
        if "tensors" in metadata:
            return _whole(metadata["tensors"], instance.n)
        if {"tensor", "shape", "positions"} <= {*metadata}:
            return _part(metadata["tensor"], metadata["shape"], metadata["positions"], instance.n)
    except (KeyError, TypeError, ValueError):
        pass
    return []


def _whole(table: Sequence[Any], n: int) -> list[TensorEntry]:
    entries = []
    for item in table:
        shape = tuple(int(length) for length in item["shape"])
        start = int(item["offset"])
        entries.append(TensorEntry(str(item["name"]), shape, start, start + math.prod(shape)))
    entries.sort(key=lambda entry: entry.start)
    ends = [0, *(entry.stop for entry in entries)]
    fits = ends[-1] == n and all(entry.start == end for entry, end in zip(entries, ends, strict=False))
    return entries if fits else []


def _part(name: Any, shape: Sequence[int], positions: Sequence[int], n: int) -> list[TensorEntry]:
    lengths = tuple(int(length) for length in shape)
    places = np.asarray(positions, dtype=np.int64)
    if places.shape != (n,) or places.min() < 0 or places.max() >= math.prod(lengths):
        return []
    return [TensorEntry(str(name), lengths, 0, n, places)]
