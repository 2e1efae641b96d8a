"""Inputs and targets of a network: a tensor, or tuples and dictionaries of tensors, cut along the samples.

A `Bundle` behaves like a tensor in the few ways that the rest of the package needs: it has a length, slices, and
moves to a device. `Pieces` holds samples of several shapes, such as sequences of different lengths, grouped by
shape; `slices` never mixes shapes. `call` runs a model on any of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cbs_opt.device import release_memory
from cbs_opt.errors import InstanceError
from cbs_opt.instances.modes import differentiable

logger = logging.getLogger("cbs_opt")

_LEAST_CHUNK = 1 << 20  # bytes of activations at a time below which a card has too little memory
_SMALLER = 8  # by which fewer are tried

P = ParamSpec("P")
T = TypeVar("T")


class Samples(Protocol):
    """Inputs or targets: a tensor, or whatever gives tensors or bundles for slices."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, part: slice, /) -> Any:
        """The samples of a slice, along the first dimension."""
        ...


def map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same tuples, lists, dictionaries and dataclasses with all other objects mapped."""
    if isinstance(tree, tuple | list) and not isinstance(tree, PackedSequence):  # sequences packed stay so
        parts = [map_leaves(change, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, Mapping):
        items = {key: map_leaves(change, part) for key, part in tree.items()}
        # Outputs of Hugging Face's models are dictionaries whose constructor takes the fields by name.
        return type(tree)(**items) if dataclasses.is_dataclass(tree) else items
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: map_leaves(change, getattr(tree, f.name)) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **fields)
    return change(tree)


def leaves_of(tree: Any) -> list[Any]:
    """The objects that `map_leaves` would change, in order."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


class _Place:
    """Where a leaf stands among the leaves of a bundle; no dataclass, which would be a tree."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"leaf {self.index}"


class Bundle:
    """A tree of tensors, those with one row a sample cut together.

    Parameters
    ----------
    tree : tuple, list, mapping or dataclass
        Of tensors and constants. For the inputs of a model it is (arguments, arguments by keyword).
    m : int
        Number of samples: tensors of this length are cut, everything else is the same for all of them.
    """

    def __init__(self, tree: Any, m: int) -> None:
        self.leaves: list[Any] = []
        self._m = m

        def place(leaf: Any) -> _Place:
            self.leaves.append(leaf)
            return _Place(len(self.leaves) - 1)

        self.layout = map_leaves(place, tree)
        self.varying = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == m for leaf in self.leaves]

    def like(self, leaves: list[Any], m: int) -> Bundle:
        """A bundle of the same layout with other leaves, of m samples."""
        other = object.__new__(Bundle)
        other.leaves, other.layout, other.varying, other._m = leaves, self.layout, self.varying, m
        return other

    def __len__(self) -> int:
        return self._m

    def __getitem__(self, part: slice | Tensor) -> Bundle:
        """The samples of a slice, or of an int64 tensor of indices."""
        m = len(range(*part.indices(self._m))) if isinstance(part, slice) else len(part)
        cut = [leaf[part] if v else leaf for leaf, v in zip(self.leaves, self.varying, strict=True)]
        return self.like(cut, m)

    @property
    def tree(self) -> Any:
        """The tensors in their places."""
        return map_leaves(lambda place: self.leaves[place.index], self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(leaf.nbytes for leaf in self.leaves if isinstance(leaf, Tensor))

    def with_leaves(self, leaves: Sequence[Any]) -> Bundle:
        """The same places with other tensors."""
        return self.like(list(leaves), self._m)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Bundle:
        """Every tensor changed."""
        return self.with_leaves([change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves])


class Pieces:
    """Samples of several shapes, one piece for each: slices stay within a piece.

    Parameters
    ----------
    parts : sequence of Tensor or Bundle
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.borders = [0]
        for part in self.parts:
            self.borders.append(self.borders[-1] + len(part))

    def __len__(self) -> int:
        return self.borders[-1]

    def __getitem__(self, part: slice | Tensor) -> Any:
        """The samples of a slice within a piece, or of an int64 tensor of indices, piece by piece."""
        if isinstance(part, Tensor):
            within = [
                (p, part[(part >= first) & (part < end)] - first)
                for p, first, end in zip(self.parts, self.borders, self.borders[1:], strict=False)
            ]
            return Pieces([p[rows] for p, rows in within if len(rows)])
        start, stop, _ = part.indices(len(self))
        number = next(k for k, end in enumerate(self.borders[1:]) if start < end or end == len(self))
        first, end = self.borders[number], self.borders[number + 1]
        if stop > end:
            raise InstanceError(f"samples {start} … {stop - 1} have inputs of different shapes")
        return self.parts[number][start - first : stop - first]


def joined(parts: Sequence[Any]) -> Any:
    """Samples of one layout and shape, tensors or bundles, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Bundle):
        leaves = [
            torch.cat([part.leaves[k] for part in parts]) if varies else parts[0].leaves[k]
            for k, varies in enumerate(parts[0].varying)
        ]
        return parts[0].like(leaves, sum(len(part) for part in parts))
    return torch.cat(list(parts))


def slices(samples: Samples, size: int, start: int = 0, stop: int | None = None) -> Iterator[slice]:
    """Cut the samples into slices of at most `size`, none with inputs of two shapes."""
    stop = len(samples) if stop is None else stop
    borders = [b for b in getattr(samples, "borders", ()) if start < b < stop]
    for first, last in zip([start, *borders], [*borders, stop], strict=True):
        for at in range(first, last, size):
            yield slice(at, min(at + size, last))


def shape_of(samples: Any) -> str:
    """The shapes of one sample, in words."""
    if isinstance(samples, Bundle):
        tensors = [leaf for leaf in samples.leaves if isinstance(leaf, Tensor)]
        return ", ".join(f"{tuple(t.shape[1:])} {_kind(t)}" for t in tensors) or "nothing"
    return f"{tuple(samples.shape[1:])}, {samples.dtype}"


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def placed(samples: Any, model: nn.Module) -> Any:
    """Samples on the device of the model, floating-point tensors in the type of its weights."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return samples

    def move(tensor: Tensor) -> Tensor:
        moved = tensor.to(first.device, first.dtype if tensor.is_floating_point() else tensor.dtype)
        return differentiable(moved)

    return samples.changed(move) if isinstance(samples, Bundle) else move(samples)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the CPU for one without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def moved(targets: Any, device: torch.device | str) -> Any:
    """Targets on a device, in their own types."""
    if isinstance(targets, Bundle):
        return targets.changed(lambda tensor: differentiable(tensor.to(device)))
    return differentiable(targets.to(device))


def arguments(samples: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: arguments by position and by keyword."""
    if isinstance(samples, Bundle):
        args, kwargs = samples.tree
        return tuple(args), dict(kwargs)
    return (samples,), {}


def call(model: nn.Module, samples: Any) -> Any:
    """Run a model on a tensor or a bundle."""
    args, kwargs = arguments(samples)
    return model(*args, **kwargs)


def checked_call(model: nn.Module, samples: Any, name: str = "") -> Any:
    """Run a model; raises `InstanceError` in one sentence where it does not take the inputs."""
    try:
        return call(model, samples)
    except torch.OutOfMemoryError:  # for smaller batches, or the CPU
        raise
    except Exception as error:  # whatever a user's network does with inputs that are not its own
        where = f"{name}: " if name else ""
        raise InstanceError(
            f"{where}the network does not take inputs of shape {shape_of(samples)}: {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """An error of external code in one line."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def on_cpu_instead(*networks: nn.Module) -> None:
    """Bring networks to the CPU, as the memory of the card is too short for them; raises where they are there.

    Raises
    ------
    InstanceError
    """
    release_memory()
    if all(p.device.type == "cpu" for network in networks for p in network.parameters()):
        raise InstanceError("the memory is too short for the network and few samples")
    logger.warning("the memory of the card is too short for the network: on the CPU instead")
    for network in networks:
        network.cpu()


def within_memory(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function of networks, with `chunk_bytes`, begin again with less where the memory of a card is short.

    When it is short even for few samples the networks go to the CPU, and stay there. `chunk_bytes` must be an
    argument by keyword with a default.
    """
    usual = (function.__kwdefaults__ or {})["chunk_bytes"]

    @wraps(function)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        networks = [arg for arg in args if isinstance(arg, nn.Module)]
        while True:
            try:
                return function(*args, **kwargs)
            except torch.OutOfMemoryError:
                size: Any = kwargs.get("chunk_bytes", usual)
                if size <= _LEAST_CHUNK:
                    on_cpu_instead(*networks)
                    continue
                release_memory()
                kwargs["chunk_bytes"] = smaller = size // _SMALLER
                logger.info(f"the memory of the card is short: {smaller >> 10} KiB of activations at a time")

    return again


def by_memory(
    route: Callable[[Any, Any], Tensor], model: nn.Module, inputs: Any, targets: Any, part: slice, divisible: bool
) -> Tensor:
    """Rows for some samples, on the CPU; by halves, if `divisible`, where the memory of a card is short.

    Raises
    ------
    InstanceError
        Where it is too short for one sample.
    """
    count = part.stop - part.start
    try:
        return route(placed(inputs[part], model), moved(targets[part], device_of(model))).cpu()
    except torch.OutOfMemoryError as error:
        release_memory()
        if not divisible:
            raise
        if count < 2:
            raise InstanceError(
                "the memory of the card is too short for the gradients of one sample: `--device cpu` has more"
            ) from error
        logger.info(f"the memory of the card is short: gradients of {count // 2} samples at a time, not {count}")
    middle = part.start + count // 2
    halves = slice(part.start, middle), slice(middle, part.stop)
    return torch.cat([by_memory(route, model, inputs, targets, half, divisible) for half in halves])
