"""Samples of users: pairs, dictionaries, loaders, data sets, calibration loops.

| data | what is taken |
|---|---|
| (inputs, labels), arrays or tensors | as they are; inputs may be a tuple or a dictionary of tensors |
| (inputs, labels), lists of numbers | as tensors |
| a list of samples (input, label) | collated; the label is a number, or a dictionary or tuple with one |
| (inputs, {"y": …, "z": …}), (inputs, (y, z)) | several labels of each sample, for a loss of your own |
| {"x": …, "labels": …} | labels by one of the usual names, everything else that `forward` takes by keyword |
| inputs alone | without labels: for `--source reconstruction`, or kfac with `--fisher exact` or `sampled` |
| an iterable of such batches, a DataLoader | one after the other, `UNSIZED` samples where it has no length |
| a `torch.utils.data.Dataset`, or (data set, collate function) | the samples that are drawn, collated |
| a function of the model | is called with it, and what the model is called with is taken, without labels |

Of a batch with more parts, such as (x, y, index), `forward` gets as many as it needs, the next one is the label,
and the rest is ignored and logged.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.errors import CbsError, InstanceError
from cbs_opt.instances.batches import Bundle, Pieces, Samples, joined, leaves_of, map_leaves, reason
from cbs_opt.instances.modes import differentiable, outside_inference
from cbs_opt.instances.own_loss import LABELS, Item, with_labels

logger = logging.getLogger("cbs_opt")

UNSIZED = 10_000
"""Samples read from a loader of unknown length if no number is requested."""

_COLLATED = 64  # samples of a data set that are collated at a time


@dataclass(frozen=True)
class Owned:
    """Samples that are ready for a network.

    Attributes
    ----------
    inputs : Tensor, Bundle or Pieces (m, …)
    targets : the same, or None where there are no labels
    """

    inputs: Samples
    targets: Samples | None


def is_pair(data: Any, inputs: int = 1) -> bool:
    """Whether `data` is (inputs, labels) rather than a loader or a list of batches.

    `inputs` is how many the network needs: ((a, b), (c, d)) are two inputs and two labels for a network that needs
    two, and two batches for one that needs one.
    """
    if not isinstance(data, tuple | list) or len(data) != 2 or _is_collate(data):
        return False
    if _is_array(data[1]):
        return True
    if not isinstance(data, tuple) or not _are_arrays(data[1]):
        return False
    if isinstance(data[1], Mapping) or _is_array(data[0]) or isinstance(data[0], Mapping):
        return True
    lengths = {len(part) for part in (*data[0], *data[1])} if _are_arrays(data[0]) else set()
    return inputs == len(data[0]) and len(lengths) == 1


@outside_inference()
def own_samples(data: Any, model: nn.Module, name: str, limit: int | None, seed: int | None) -> Owned:
    """Read samples of a factory or a Python caller.

    Parameters
    ----------
    data : object
        See the table above.
    model : torch.nn.Module
        Determines the arguments of `forward`.
    name : str
        What error messages call the data.
    limit : int, optional
        How many at most.
    seed : int, optional
        Draw them at random from all; the first ones otherwise, and where the data have no length.

    Raises
    ------
    InstanceError
        When the data have another form, hold no samples, or reading them fails.
    """
    if isinstance(data, tuple) and len(data) == 2 and not _is_collate(data):
        data = tuple(map(_tensor_of_numbers, data))
    fitting = _Fitting(model, name)
    indices: torch.Tensor | None = None
    batches, count = _drawable(data, limit, seed, fitting.needed)
    if batches is None:
        batches, sized = _batches(data, model, name, limit, fitting.needed)
        most = limit if seed is None or not sized else None
        if not sized and limit is None:
            most = UNSIZED
        items = _items(batches, fitting, name, most)
        count = sum(item[2] for item in items)
        if not sized and limit is None and count >= UNSIZED:
            logger.warning(
                f"{name}: has no length: its first {count} samples are taken; `--samples` sets how many"
            )
        indices = _choose(name, count, limit, seed if sized else None)
    else:
        items = _items(batches, fitting, name, None)
        if limit is not None and limit > count:
            logger.warning(f"{name}: holds {count} samples, fewer than {limit}: all are used")
    return _put_together(with_labels(items, model), indices, name)


# Batches ----------------------------------------------------------------------------------------------------


def _drawable(data: Any, limit: int | None, seed: int | None, inputs: int) -> tuple[Iterable[Any] | None, int]:
    """Batches of the samples drawn, where the data set can be asked for single ones."""
    from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

    collate, size = None, _COLLATED
    if _is_collate(data):
        data, collate = data
        if isinstance(data, list | tuple):
            data = _Listed(data)
    elif isinstance(data, list | tuple) and data and not is_pair(data, inputs) and _is_sample(data[0]):
        data = _Listed(data)
    elif isinstance(data, DataLoader) and isinstance(data.batch_size, int) and seed is not None:
        collate, size, data = data.collate_fn, data.batch_size, data.dataset
    if not isinstance(data, Dataset) or isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        return None, 0
    count = len(data)
    if count == 0:
        return None, 0
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    chosen = order[:limit].tolist()
    return DataLoader(Subset(data, chosen), batch_size=size, collate_fn=collate), count


def _is_sample(item: Any) -> bool:
    """Whether a part of a list is one sample: its label is a single number, or has one among its parts."""
    label = None
    if isinstance(item, Mapping):
        label = next((item[key] for key in LABELS if key in item), None)
    elif isinstance(item, tuple | list) and len(item) > 1:
        label = item[1]
    parts = [label]
    if isinstance(label, Mapping):
        parts = list(label.values())
    elif isinstance(label, tuple):
        parts = list(label)
    return any(
        isinstance(part, int | float | np.number) or (isinstance(part, Tensor | np.ndarray) and part.ndim == 0)
        for part in parts
    )


def _tensor_of_numbers(part: Any) -> Any:
    """A list of numbers, or of such lists of one length, as a tensor; everything else as it is."""
    first = part
    while isinstance(first, list) and first:
        first = first[0]
    if not isinstance(part, list) or not isinstance(first, int | float):
        return part
    try:
        return torch.tensor(part)
    except (TypeError, ValueError, RuntimeError):
        return part


class _Listed(torch.utils.data.Dataset[Any]):
    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def _batches(data: Any, model: nn.Module, name: str, limit: int | None, inputs: int) -> tuple[Iterable[Any], bool]:
    """An iterable of batches, and whether it has an end that is known."""
    from torch.utils.data import DataLoader, IterableDataset

    if is_pair(data, inputs) or _is_array(data) or isinstance(data, Mapping):
        return [data], True
    if isinstance(data, tuple) and len(data) > 1 and all(_is_array(part) for part in data):
        return [data], True
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=_COLLATED)
    if not isinstance(data, Iterable):
        if callable(data):
            return _recorded(data, model, name, limit), True
        raise InstanceError(
            f"{name}: must be (inputs, labels), a dictionary, a loader of such batches, a data set, or a function "
            f"that runs the model, got {type(data).__name__}"
        )
    try:
        sized = len(data) >= 0  # type: ignore[arg-type]
    except TypeError:
        sized = False
    return data, sized


class _EnoughError(Exception):
    """Ends a calibration loop."""


def _recorded(loop: Callable[..., Any], model: nn.Module, name: str, limit: int | None) -> list[Any]:
    """The calls that a user's calibration loop makes of the model, as bundles of inputs."""
    calls: list[Any] = []
    count = 0

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        tree = map_leaves(
            lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        m = next((len(leaf) for leaf in leaves_of(tree) if isinstance(leaf, Tensor) and leaf.dim() > 0), 0)
        calls.append(_Call(tree, m))
        count += m
        if count >= (limit or UNSIZED):
            raise _EnoughError

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            loop(model)
    except _EnoughError:
        pass
    except Exception as error:  # whatever a user's loop does
        raise InstanceError(
            f"{name}: the function fails with {reason(error)}; it is called with the model and must run it on "
            "samples"
        ) from error
    finally:
        hook.remove()
    if not calls:
        raise InstanceError(f"{name}: the function does not call the model it is given")
    return calls


@dataclass(frozen=True)
class _Call:
    tree: Any
    m: int


def _items(batches: Iterable[Any], fitting: _Fitting, name: str, most: int | None) -> list[Item]:
    """The batches, fitted to the network, until there are `most` samples."""
    items: list[Item] = []
    count = 0
    stream = _guarded(batches, name)
    for batch in stream:
        item = fitting(batch)
        items.append(item)
        count += item[2]
        if most is not None and count >= most:
            break
    if not count:
        raise InstanceError(f"{name}: holds no samples: there must be at least one")
    return items


def _guarded(batches: Iterable[Any], name: str) -> Iterator[Any]:
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except CbsError:
            raise
        except Exception as error:  # whatever a user's loader does
            raise InstanceError(f"{name}: reading a batch fails with {reason(error)}") from error
        yield batch


# What goes into the network ---------------------------------------------------------------------------------


class _Fitting:
    """Divides a batch into what `forward` takes and the labels."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._name = name
        self._told: set[str] = set()
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.needed = sum(p.default is p.empty for p in positional)
        self._most = 99 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)
        self._names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._required = [p.name for p in positional if p.default is p.empty]
        self._first = [p.name for p in positional[:1]]
        self._any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._embeds = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())

    def __call__(self, batch: Any) -> Item:
        if isinstance(batch, _Call):
            args, kwargs = batch.tree
            return self._item(tuple(args), dict(kwargs), None)
        if _is_array(batch):
            return self._item((batch,), {}, None)
        if isinstance(batch, Mapping):
            args, kwargs, target = self._of_mapping(batch)
            return self._item(args, kwargs, target)
        if isinstance(batch, tuple | list) and len(batch) > 0:
            return self._of_sequence(batch)
        raise InstanceError(
            f"{self._name}: a batch must be (inputs, labels), a dictionary of tensors, or a tensor of inputs, got "
            f"{type(batch).__name__}"
        )

    def _of_mapping(self, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        label = next((key for key in LABELS if key in batch), None)
        rest = {str(key): part for key, part in batch.items() if key != label}
        taken = {key: part for key, part in rest.items() if self._any_name or key in self._names}
        target = None if label is None else batch[label]
        if not taken or any(key not in taken for key in self._required):
            arrays = {key: part for key, part in rest.items() if _is_array(part)}
            if len(arrays) == 1 and self.needed <= 1:
                return (next(iter(arrays.values())),), {}, target
            if not taken and self.needed == 1 and arrays:
                return (arrays,), {}, target
            missing = [key for key in self._required if key not in taken]
            raise InstanceError(
                f"{self._name}: a batch has {', '.join(map(str, batch)) or 'nothing'}, and the network's forward "
                f"needs {', '.join(missing) or 'other names'}: rename the parts of the batch"
            )
        self._leave_out([key for key in rest if key not in taken])
        if list(taken) == self._first:
            return tuple(taken.values()), {}, target
        return (), taken, target

    def _of_sequence(self, batch: Any) -> Item:
        parts = list(batch)
        if hasattr(batch, "_fields") and any(field in LABELS for field in batch._fields):
            return self(dict(zip(batch._fields, parts, strict=True)))
        if len(parts) == 1:
            return self(parts[0]) if not _is_array(parts[0]) else self._item((parts[0],), {}, None)
        first = parts[0]
        if isinstance(first, Mapping):
            args, kwargs, _ = self._of_mapping(first)
            self._leave_out([f"part {k + 1}" for k in range(2, len(parts))])
            return self._item(args, kwargs, parts[1])
        if isinstance(first, tuple | list) and first and all(_is_array(part) for part in first):
            args = tuple(first) if len(first) <= self._most else (tuple(first),)
            self._leave_out([f"part {k + 1}" for k in range(2, len(parts))])
            return self._item(args, {}, parts[1])
        if len(parts) == self.needed:  # as many as the network needs: there are no labels among them
            return self._item(tuple(parts), {}, None)
        several = max(1, self.needed)
        if len(parts) <= several:
            raise InstanceError(
                f"{self._name}: a batch has {len(parts)} parts, and the network's forward needs {self.needed}"
            )
        self._leave_out([f"part {k + 1}" for k in range(several + 1, len(parts))])
        return self._item(tuple(parts[:several]), {}, parts[several])

    def _leave_out(self, names: list[str]) -> None:
        text = ", ".join(names)
        if names and text not in self._told:
            self._told.add(text)
            logger.warning(
                f"{self._name}: of each batch {text} is left out: the network's forward does not take it; "
                "several labels of a sample are a tuple or a dictionary of arrays, (inputs, (y, z))"
            )

    def _item(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Item:
        args, kwargs = (map_leaves(self._tensor, part) for part in (args, kwargs))
        y = None if target is None else map_leaves(self._tensor, target)
        m = self._count(y) if y is not None else self._count((args, kwargs))
        inputs: Any
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            inputs = args[0]
            if inputs.dtype in (torch.uint8, torch.bool):
                inputs = inputs.long() if self._embeds else inputs.float()
            if inputs.dim() == 0:
                raise InstanceError(
                    f"{self._name}: a batch of inputs must have an axis of samples, got one number"
                )
            if len(inputs) != m:
                raise InstanceError(f"{self._name}: a batch has {len(inputs)} inputs and {m} labels")
        else:
            inputs = Bundle((args, kwargs), m)
            if not any(inputs.varying):
                lengths = sorted({len(t) for t in inputs.leaves if isinstance(t, Tensor) and t.dim() > 0})
                raise InstanceError(f"{self._name}: a batch has {lengths} inputs and {m} labels")
        if y is not None and not isinstance(y, Tensor):
            y = Bundle(y, m)
        return inputs, y, m

    def _tensor(self, leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, bool | str | int | float):
            return leaf
        try:
            tensor = torch.as_tensor(leaf) if _is_array(leaf) else leaf
        except (TypeError, ValueError) as error:
            raise InstanceError(
                f"{self._name}: holds {type(leaf).__name__}, which is no tensor: {error}"
            ) from None
        if not isinstance(tensor, Tensor):
            raise InstanceError(
                f"{self._name}: must be tensors or arrays, (inputs, labels) or batches of these, got "
                f"{type(leaf).__name__}"
            )
        return differentiable(tensor.detach().cpu())

    def _count(self, tree: Any) -> int:
        for leaf in leaves_of(tree):
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                return len(leaf)
        raise InstanceError(f"{self._name}: a batch holds no tensor with an axis of samples")


# Samples ----------------------------------------------------------------------------------------------------


def _put_together(items: list[Item], indices: Tensor | None, name: str) -> Owned:
    """One tensor or bundle where the shapes of all batches agree, else one piece for each shape."""
    labelled = [y is not None for _, y, _ in items]
    if any(labelled) and not all(labelled):
        raise InstanceError(
            f"{name}: are taken for {len(items)} batches, {sum(labelled)} of them with labels and the others "
            "without: give (inputs, labels), a tuple, or batches that all have labels or have none; several "
            "labels of a sample are a tuple or a dictionary of arrays, (inputs, (y, z))"
        )
    groups: dict[Any, list[int]] = {}
    for number, (x, y, _) in enumerate(items):
        groups.setdefault((_signature(x), _signature(y)), []).append(number)
    starts = np.cumsum([0, *(item[2] for item in items)])
    pieces: list[tuple[Any, Any]] = []
    for numbers in groups.values():
        x = joined([items[k][0] for k in numbers])
        y = joined([items[k][1] for k in numbers]) if labelled[0] else None
        if indices is not None:
            mine = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in numbers])
            place = {int(sample): row for row, sample in enumerate(mine)}
            rows = torch.tensor([place[s] for s in indices.tolist() if s in place], dtype=torch.int64)
            if not len(rows):
                continue
            x, y = x[rows], None if y is None else y[rows]
        pieces.append((x, y))
    if len(pieces) == 1:
        return Owned(*pieces[0])
    logger.info(f"{name}: samples have {len(pieces)} shapes, which go through the network one after the other")
    targets = Pieces([y for _, y in pieces]) if labelled[0] else None
    return Owned(Pieces([x for x, _ in pieces]), targets)


def _signature(samples: Any) -> Any:
    if samples is None:
        return None
    if isinstance(samples, Bundle):
        constants = tuple(
            (leaf.tolist() if leaf.numel() < 10_000 else id(leaf)).__repr__()
            if isinstance(leaf, Tensor)
            else repr(leaf)
            for leaf, varies in zip(samples.leaves, samples.varying, strict=True)
            if not varies
        )
        shapes = tuple(
            (tuple(leaf.shape[1:]), leaf.dtype) if varies else None
            for leaf, varies in zip(samples.leaves, samples.varying, strict=True)
        )
        return repr(samples.layout), shapes, constants
    return tuple(samples.shape[1:]), samples.dtype


def _choose(name: str, count: int, limit: int | None, seed: int | None) -> Tensor | None:
    if limit is not None and limit > count:
        logger.warning(f"{name}: holds {count} samples, fewer than {limit}: all are used")
    if seed is None:
        return None if limit is None or limit >= count else torch.arange(limit)
    return torch.from_numpy(np.random.default_rng(seed).permutation(count)[:limit].astype(np.int64))


def _are_arrays(parts: Any) -> bool:
    """Whether `parts` are several arrays, each with an axis of samples."""
    if not isinstance(parts, Mapping | tuple | list) or not parts:
        return False
    listed = parts.values() if isinstance(parts, Mapping) else parts
    return all(_is_array(part) and part.ndim > 0 for part in listed)


def _is_array(part: Any) -> bool:
    return isinstance(part, Tensor | np.ndarray)


def _is_collate(data: Any) -> bool:
    """Whether `data` is (data set, collate function)."""
    return (
        isinstance(data, tuple)
        and len(data) == 2
        and hasattr(data[0], "__getitem__")
        and callable(data[1])
        and not isinstance(data[1], Tensor | nn.Module)
    )
