"""The tensors of an instance: which of its weights are which tensor of the network, and how they are laid out.

An instance holds every tensor as rows × inputs: one row for each output, in row-major order.
That is how `Linear` and `Conv2d` store their weights. `Conv1D` of Hugging Face and transposed convolutions store
(inputs, outputs, …); a `Layout` turns the one into the other, for arrays of numpy and tensors of torch alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cbs_opt.errors import InstanceError
from cbs_opt.instance import Instance

Shape = tuple[int, ...]
Flat = TypeVar("Flat", NDArray[Any], Tensor)


@dataclass(frozen=True)
class Layout:
    """The memory layout of the rows and inputs of a tensor.

    Attributes
    ----------
    shape : tuple of int
        Of the tensor as it is stored.
    inputs_first : bool
        Stored as (inputs, outputs, …) instead of (outputs, inputs, …).
    groups : int
        Groups of channels of a transposed convolution: its inputs are stored group by group.
    stacked : bool
        A stack of matrices, such as those of experts: (matrices, outputs, inputs), or (matrices, inputs, outputs)
        with `inputs_first`. The rows of all matrices follow each other.
    """

    shape: Shape
    inputs_first: bool = False
    groups: int = 1
    stacked: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def rows_shape(self) -> Shape:
        """(rows, inputs, …): the shape of the tensor in the order of the instance."""
        if self.stacked:
            matrices, first, second = self.shape
            return (matrices * second, first) if self.inputs_first else (matrices * first, second)
        if not self.inputs_first:
            return self.shape
        inputs, outputs, *rest = self.shape
        return (self.groups * outputs, inputs // self.groups, *rest)

    @property
    def rows(self) -> int:
        """Number of rows, one for each output."""
        return self.rows_shape[0] if self.shape else 1

    @property
    def inputs(self) -> int:
        """Number of weights of a row."""
        return self.size // max(self.rows, 1)

    def to_rows(self, flat: Flat) -> Flat:
        """From the tensor's order to that of the instance, along the last axis of (…, size)."""
        return self._swapped(flat, *self._parts) if self.inputs_first else flat

    def from_rows(self, flat: Flat) -> Flat:
        """From the order of the instance to that of the tensor, along the last axis of (…, size)."""
        if not self.inputs_first:
            return flat
        count, inputs, outputs = self._parts
        return self._swapped(flat, count, outputs, inputs)

    @property
    def _parts(self) -> tuple[int, int, int]:
        """How many parts are swapped, each on its own, and the inputs and outputs of one."""
        if self.stacked:
            matrices, inputs, outputs = self.shape
            return matrices, inputs, outputs
        return self.groups, self.shape[0] // self.groups, self.shape[1]

    def _swapped(self, flat: Flat, count: int, first: int, second: int) -> Flat:
        lead = tuple(flat.shape[:-1])
        parts = flat.reshape(*lead, count, first, second, self.size // (count * first * second))
        out: Flat = parts.swapaxes(len(lead) + 1, len(lead) + 2).reshape(*lead, self.size)
        return out


@dataclass(frozen=True)
class Place:
    """One tensor of the network among the weights of an instance.

    Attributes
    ----------
    name : str
    layout : Layout
    start : int
        Index of its first weight.
    aliases : tuple of str
        Other names of the same tensor: layers that share it.
    dtype : str
        Its type in the network, such as `float32`; empty if unknown.
    """

    name: str
    layout: Layout
    start: int
    aliases: tuple[str, ...] = ()
    dtype: str = ""

    @property
    def part(self) -> slice:
        """Its weights."""
        return slice(self.start, self.start + self.layout.size)

    @property
    def title(self) -> str:
        """All its names, for reports."""
        return " = ".join((self.name, *self.aliases))

    def tensor(self, weights: NDArray[Any]) -> NDArray[Any]:
        """Its entries of an array (n,) over all weights, in the shape in which the network stores them."""
        return np.ascontiguousarray(self.layout.from_rows(weights[self.part])).reshape(self.layout.shape)


def places(table: Sequence[tuple[str, Layout, tuple[str, ...], str]]) -> list[Place]:
    """Lay tensors, given as name, layout, aliases and type, one after the other."""
    out, start = [], 0
    for name, layout, aliases, dtype in table:
        out.append(Place(name, layout, start, aliases, dtype))
        start += layout.size
    return out


def to_rows(places: Sequence[Place], flat: Flat) -> Flat:
    """Columns (…, n) in the order of the tensors, each as it is stored, to the order of the instance.

    The array itself is returned where no tensor stores its inputs first.
    """
    if not any(place.layout.inputs_first for place in places):
        return flat
    out = flat.copy() if isinstance(flat, np.ndarray) else flat.clone()
    for place in places:
        out[..., place.part] = place.layout.to_rows(flat[..., place.part])
    return out


def table_of(places: Sequence[Place]) -> list[dict[str, Any]]:
    """`metadata["tensors"]` of an instance; what has its default is left out."""
    table = []
    for place in places:
        entry: dict[str, Any] = {"name": place.name, "shape": list(place.layout.shape), "offset": place.start}
        if place.aliases:
            entry["aliases"] = list(place.aliases)
        if place.layout.inputs_first:
            entry["inputs_first"] = True
            entry["groups"] = place.layout.groups
        if place.layout.stacked:
            entry["stacked"] = True
        if place.dtype not in ("", "float32"):
            entry["dtype"] = place.dtype
        table.append(entry)
    return table


def read_places(instance: Instance) -> list[Place]:
    """The tensors of an instance, checked to cover its weights once.

    Raises
    ------
    InstanceError
        When the tensors of the instance are missing from its metadata or wrong.
    """
    table = instance.metadata.get("tensors")
    if table is None:
        raise InstanceError("the instance does not name its tensors: `metadata` has no `tensors`")
    if not isinstance(table, list | tuple) or not table:
        raise InstanceError("`metadata`: `tensors` must be a list of name, shape and offset")
    out = sorted(map(_place, table), key=lambda place: (place.start, place.layout.size))
    end, seen = 0, set[str]()
    for place in out:
        if place.start != end or place.name in seen or place.part.stop > instance.n:
            raise InstanceError(
                f"`metadata`: the tensor {place.name}, {place.layout.size} weights from {place.start} on, does "
                f"not continue the others, which end at {end} of {instance.n}"
            )
        seen.add(place.name)
        end = place.part.stop
    if end != instance.n:
        raise InstanceError(f"`metadata`: its tensors hold {end} weights, the instance {instance.n}")
    return out


def _place(item: Any) -> Place:
    wrong = InstanceError(f"`metadata`: {str(item)[:80]} must be a tensor's name, shape and offset")
    if not isinstance(item, Mapping) or not isinstance(item.get("shape"), list | tuple):
        raise wrong
    name, shape, start = item.get("name"), tuple(item["shape"]), item.get("offset")
    aliases, groups = item.get("aliases", ()), item.get("groups", 1)
    inputs_first = item.get("inputs_first", False)
    dtype = item.get("dtype", "float32")
    numbers = (*shape, start, groups)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise wrong
    if (
        not isinstance(start, int)
        or not isinstance(name, str)
        or not isinstance(aliases, list | tuple)
        or not isinstance(dtype, str)
    ):
        raise wrong
    if not all(isinstance(alias, str) for alias in aliases):
        raise wrong
    stacked = item.get("stacked", False)
    if stacked and (len(shape) != 3 or groups != 1):
        raise InstanceError(f"`metadata`: {name} cannot be a stack of matrices in the shape {shape}")
    if inputs_first and (len(shape) < 2 or groups < 1 or shape[0] % groups):
        raise InstanceError(f"`metadata`: {name} cannot have {groups} groups of inputs in the shape {shape}")
    return Place(name, Layout(shape, bool(inputs_first), groups, bool(stacked)), start, tuple(aliases), dtype)


def names_of(places: Sequence[Place]) -> Iterator[str]:
    """All names, aliases included."""
    for place in places:
        yield place.name
        yield from place.aliases


def bounds_of(places: Sequence[Place]) -> list[tuple[int, int]]:
    """(first, last + 1) of the weights of each tensor."""
    ends = [0, *(place.part.stop for place in places)]
    return list(pairwise(ends))
