"""Samples for a network: reading, drawing, checking and preparing them.

| `path` | what is read |
|---|---|
| a folder with `train-images-idx3-ubyte[.gz]` and so on, or one such file | MNIST and its like, IDX |
| a folder with `data_batch_1` … `test_batch`, python or `.bin`, or one such file | CIFAR-10 |
| `FILE.npz` | `x_train`/`y_train`/`x_test`/`y_test`, `x`/`y`, `images`/`labels`, or `jpeg`/`offset`/`y` |
| a folder with a sub-folder of pictures for each class, below `train`, `test` or `val` where these exist | any |
| `digits` | the digits of scikit-learn, uint8 0 … 16, split as by `cbs_opt.instances.digits` |
| None | what the network's own factory returned, see `own_data` |

A source without splits is used for both. Colours are red, green, blue. `Network.prepare` converts pixels to
inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.batches import slices
from cbs_opt.instances.image_files import (
    Images,
    Indices,
    Split,
    cifar_files,
    idx_files,
    labels_beside,
    read_cifar,
    read_idx_pair,
    read_image_folder,
    read_npz_images,
)
from cbs_opt.instances.networks import Network
from cbs_opt.instances.own_data import own_samples

logger = logging.getLogger("cbs_opt")

_CHUNK = 256


@dataclass(frozen=True)
class Samples:
    """Inputs and labels.

    Attributes
    ----------
    inputs : Tensor (m, …), or a bundle or pieces of these
        As the network takes them; float32, unless a factory brought something else.
    labels : Tensor (m, …), a bundle or pieces of these, or None
        int64 (m,) from files.
    """

    inputs: Any
    labels: Any


class SampleSource:
    """Samples that are read and prepared batch by batch.

    Parameters
    ----------
    name : str
        What error messages call it.
    images : Images
    network : Network
    chosen : int64 (m,)
        Which of the images, in which order.
    """

    def __init__(self, name: str, images: Images, network: Network, chosen: Indices) -> None:
        self.name = name
        self._images, self._network, self._chosen = images, network, chosen
        self.labels: Any = torch.from_numpy(images.labels[chosen])

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, start: int, stop: int) -> Any:
        """The inputs of some samples; raises `InstanceError` where the network cannot take them."""
        images = self._images.take(self._chosen[start:stop])
        if images.dtype.kind not in "uifb":
            raise InstanceError(f"{self.name}: images must be numbers, got {images.dtype}")
        raw = torch.from_numpy(np.ascontiguousarray(images, images.dtype.newbyteorder("=")))
        if raw.is_floating_point() and not bool(torch.isfinite(raw).all()):
            raise InstanceError(f"{self.name}: the images have NaN or infinite values")
        try:
            x = raw if self._network.prepare is None else self._network.prepare(raw)
        except InstanceError as error:
            raise InstanceError(f"{self.name}: {error}") from None
        return x.to(_input_type(self._network))

    @property
    def borders(self) -> Sequence[int]:
        """Where samples of another shape begin."""
        return getattr(self.labels, "borders", ())

    @property
    def inputs(self) -> Any:
        """The inputs as a sequence that can be sliced."""
        return _Inputs(self)

    def subset(self, indices: Indices) -> SampleSource:
        """Some of the samples, int64 (k,), in this order; of samples with several shapes, shape by shape."""
        return SampleSource(self.name, self._images, self._network, self._chosen[indices])

    def loaded(self) -> SampleSource:
        """The same samples, read into memory."""
        samples = self.read()
        return HeldSource(self.name, samples.inputs, samples.labels)

    def batches(self, size: int) -> Iterator[tuple[Any, Any]]:
        """Inputs and labels, `size` at a time."""
        for part in slices(self, size):  # type: ignore[arg-type]
            yield self.batch(part.start, part.stop), self.labels[part]

    def read(self) -> Samples:
        """All of them in memory."""
        first = self.batch(0, _CHUNK)
        inputs = first.new_empty((len(self), *first.shape[1:]))
        for start in range(0, len(self), _CHUNK):
            inputs[start : start + _CHUNK] = self.batch(start, start + _CHUNK) if start else first
        return Samples(inputs, self.labels)


class _Inputs:
    """The inputs of a source as a sequence that can be sliced."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @property
    def borders(self) -> Sequence[int]:
        """Where samples of another shape begin."""
        return self._source.borders

    def __getitem__(self, part: slice) -> Any:
        start, stop, _ = part.indices(len(self))
        return self._source.batch(start, stop)


class HeldSource(SampleSource):
    """Samples in memory, such as those of a user's factory; inputs are taken as they are.

    Parameters
    ----------
    name : str
        What error messages call it.
    inputs : Tensor, Bundle or Pieces (m, …)
    labels : the same, or None where there are none
    """

    def __init__(self, name: str, inputs: Any, labels: Any) -> None:
        self.name, self._inputs, self.labels = name, inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def borders(self) -> Sequence[int]:
        """Where samples of another shape begin."""
        return getattr(self.inputs, "borders", ())

    def batch(self, start: int, stop: int) -> Any:
        """The inputs of some samples."""
        return self._inputs[start:stop]

    @property
    def inputs(self) -> Any:
        """The inputs themselves."""
        return self._inputs

    def subset(self, indices: Indices) -> SampleSource:
        """Some of the samples, see `SampleSource.subset`."""
        chosen = torch.from_numpy(indices)
        return HeldSource(self.name, self._inputs[chosen], None if self.labels is None else self.labels[chosen])

    def loaded(self) -> SampleSource:
        """Itself."""
        return self

    def read(self) -> Samples:
        """All of them."""
        return Samples(self._inputs, self.labels)


def read_samples(
    path: Path | str | None,
    network: Network,
    split: Split,
    limit: int | None = None,
    seed: int | None = None,
) -> Samples:
    """Read samples into memory; parameters and errors as of `open_samples`."""
    return open_samples(path, network, split, limit, seed).read()


def open_samples(
    path: Path | str | None,
    network: Network,
    split: Split,
    limit: int | None = None,
    seed: int | None = None,
) -> SampleSource:
    """Find samples, check their labels, choose some; pixels are read when they are asked for.

    Parameters
    ----------
    path : Path, str or None
        See the table above; None for the data that the network's factory brought.
    network : Network
    split : {"train", "test"}
    limit : int, optional
        How many at most; a source that has fewer gives all, with a warning.
    seed : int, optional
        Draw them at random, without replacement; the first ones otherwise.

    Raises
    ------
    InstanceError
        When there is no such file, its layout is unknown, it has no samples, or labels that the network does not
        have.
    UsageError
        When `limit` is not positive, or a factory without data is asked for some.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of samples must be at least 1, got {limit}")
    if path is None:
        return _own_samples(network, split, limit, seed)
    images = _find(path, network, split)
    name = str(path)
    chosen = _choose(name, images.labels.size, limit, seed)
    _check_range(name, images.labels, network.classes)
    source = SampleSource(name, images, network, chosen)
    source.batch(0, 1)  # finds wrong shapes before any work is done
    return source


def own_source(data: Any, model: nn.Module, name: str, limit: int | None = None) -> SampleSource:
    """Samples of a Python caller in any of the forms of `own_data`, in memory; errors as of `own_samples`."""
    samples = own_samples(data, model, name, limit, None)
    return HeldSource(name, samples.inputs, samples.targets)


def _find(path: Path | str, network: Network, split: Split) -> Images:
    if str(path) == "digits":
        return _digits(split)
    path = Path(path)
    if not path.exists():
        raise InstanceError(f"{path}: no such file or folder")
    if not path.is_dir():
        return _in_file(path, network, split)
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin", path / "MNIST" / "raw"):
        if (pair := idx_files(folder, split)) is not None:
            return read_idx_pair(*pair)
        if batches := cifar_files(folder, split):
            return read_cifar(batches)
    names = ("train",) if split == "train" else ("test", "val", "validation")
    divided = next((path / name for name in names if (path / name).is_dir()), path)
    others = ("test", "val", "validation") if split == "train" else ("train",)
    for other in others if divided == path else ():
        # A division that lacks this split, rather than a class of that name: it has classes of its own.
        if (path / other).is_dir() and any(sub.is_dir() for sub in (path / other).iterdir()):
            raise InstanceError(
                f"{path}: has a folder {other}, but none of the {split} split ({', '.join(names)})"
            )
    images = read_image_folder(divided, network.image_shape)
    if images is None:
        raise InstanceError(
            f"{path}: holds no {split} data that we know: IDX files of MNIST's names, batches of CIFAR-10, or a "
            "sub-folder of pictures for each class"
        )
    return images


def _in_file(path: Path, network: Network, split: Split) -> Images:
    if path.suffix == ".npz":
        return read_npz_images(path, split, network.image_shape)
    if "idx3" in path.name:
        return read_idx_pair(path, labels_beside(path))
    if path.suffix == ".bin" or "batch" in path.name:
        return read_cifar([path])
    raise InstanceError(
        f"{path}: is no data that we know: .npz, IDX (…-images-idx3-ubyte[.gz]), a batch of CIFAR-10, or a folder"
    )


def _digits(split: Split) -> Images:
    from cbs_opt.instances.digits import read_digits

    digits = read_digits()
    x, y = (digits.x_train, digits.y_train) if split == "train" else (digits.x_test, digits.y_test)
    pixels = np.rint(x.numpy() * 16).astype(np.uint8).reshape(-1, 8, 8)
    return Images(y.numpy(), lambda indices: pixels[indices], 10)


def _own_samples(network: Network, split: Split, limit: int | None, seed: int | None) -> SampleSource:
    data = network.test_data if split == "test" and network.test_data is not None else network.data
    if data is None:
        raise UsageError(f"{network.name}: provides no data: give some with `--data`")
    name = f"the data of {network.name}"
    if split == "test" and network.test_data is None:
        logger.warning(f"{name}: there are no test data: the training data are used instead")
    samples = own_samples(data, network.model, name, limit, seed)
    if isinstance(samples.targets, Tensor) and network.classes is not None:
        _check_range(name, samples.targets.numpy(), network.classes)
    return HeldSource(name, samples.inputs, samples.targets)


def _choose(name: str, count: int, limit: int | None, seed: int | None) -> Indices:
    if count == 0:
        raise InstanceError(f"{name}: holds no samples")
    if limit is not None and limit > count:
        logger.warning(f"{name}: holds {count} samples, fewer than {limit}: all are used")
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    return order[:limit].astype(np.int64)


def _check_range(name: str, labels: NDArray[np.int64], classes: int | None) -> None:
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or (classes is not None and highest >= classes):
        allowed = "0 or more" if classes is None else f"between 0 and {classes - 1} for this network"
        raise InstanceError(f"{name}: labels must be {allowed}, got {lowest if lowest < 0 else highest}")


def _input_type(network: Network) -> torch.dtype:
    """The type of the network's own weights: float32, but for a user's network in another."""
    return next((p.dtype for p in network.model.parameters() if p.is_floating_point()), torch.float32)
