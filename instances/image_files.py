"""Labelled images in common file formats: IDX, CIFAR-10 batches, `.npz`, folders of pictures.

Every reader gives `Images`: the labels at once, the pixels of any choice of images when they are asked for.
Nothing is unpickled: the python batches of CIFAR-10 are read by a decoder that can only put together arrays.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cbs_opt.errors import InstanceError
from cbs_opt.files.npz import NpzReader
from cbs_opt.instances.cifar_batch import decode_batch
from cbs_opt.optional import require

Split = Literal["train", "test"]
Indices = NDArray[np.int64]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
"""Files of an image folder that are pictures."""


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes
    ----------
    labels : int64 (m,)
    take : callable
        From indices, int64 (k,), to those images: uint8 (k, H, W[, C]), or the file's own type.
    classes : int or None
        Number of classes of the source, if known.
    """

    labels: NDArray[np.int64]
    take: Callable[[Indices], NDArray[Any]]
    classes: int | None = None


def images_of(name: str, array: NDArray[Any], labels: NDArray[Any], classes: int | None = None) -> Images:
    """Images that lie in memory; raises `InstanceError` unless there is one label for each."""
    count = len(array) if array.ndim else 0
    return Images(checked_labels(name, labels, count), lambda indices: array[indices], classes)


# IDX -------------------------------------------------------------------------------------------------------

_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_IDX_NAMES = {
    (split, kind): [f"{stem}-{kind}{dot}idx{axes}-ubyte{end}" for dot in ("-", ".") for end in ("", ".gz")]
    for split, stem in (("train", "train"), ("test", "t10k"))
    for kind, axes in (("images", 3), ("labels", 1))
}


def read_idx(path: Path) -> NDArray[Any]:
    """The array of an IDX file, plain or compressed by gzip.

    Raises
    ------
    InstanceError
        When the file is not IDX, or its length does not fit its header.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InstanceError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise InstanceError(f"{path}: is no IDX file: it starts with {content[:4]!r}")
    axes, dtype = content[3], np.dtype(_IDX_TYPES[content[2]])
    start = 4 + 4 * axes
    shape = tuple(int(length) for length in np.frombuffer(content[4 : min(start, len(content) // 4 * 4)], ">u4"))
    expected = dtype.itemsize
    for length in shape:
        expected *= length
    if len(shape) != axes or len(content) - start != expected:
        raise InstanceError(
            f"{path}: is damaged: its header tells of {expected} bytes of shape {shape}, "
            f"{max(len(content) - start, 0)} are there"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def idx_files(folder: Path, split: Split) -> tuple[Path, Path] | None:
    """The images and labels of a split in a folder with MNIST's names, or None."""
    found = [
        next((folder / name for name in _IDX_NAMES[split, kind] if (folder / name).is_file()), None)
        for kind in ("images", "labels")
    ]
    images, labels = found
    return None if images is None or labels is None else (images, labels)


def labels_beside(path: Path) -> Path:
    """The label file that belongs to an IDX file of images; raises `InstanceError` when it is not there."""
    labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels == path or not labels.is_file():
        raise InstanceError(f"{path}: its labels are missing: {labels.name} was expected in the same folder")
    return labels


def read_idx_pair(images: Path, labels: Path) -> Images:
    """Images and labels of two IDX files."""
    return images_of(str(labels), read_idx(images), read_idx(labels))


# CIFAR-10 --------------------------------------------------------------------------------------------------


def cifar_files(folder: Path, split: Split) -> list[Path]:
    """The batches of a split in a folder of CIFAR-10, python or binary; empty when there are none."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for end in ("", ".bin"):
        there = [folder / (name + end) for name in names if (folder / (name + end)).is_file()]
        if there:
            return there
    return []


def read_cifar(paths: Sequence[Path]) -> Images:
    """The images of batches of CIFAR-10, one after the other; uint8 (m, 32, 32, 3)."""
    parts = [_cifar_binary(path) if path.suffix == ".bin" else decode_batch(path) for path in paths]
    planes = np.concatenate([data for data, _ in parts])
    labels = np.concatenate([y for _, y in parts])
    return images_of(str(paths[0]), planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, 10)


def _cifar_binary(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read: {error.strerror or error}") from None
    if content.size % 3073:
        raise InstanceError(
            f"{path}: is no binary batch of CIFAR-10: its {content.size} bytes are no multiple of 3073"
        )
    records = content.reshape(-1, 3073)
    return records[:, 1:], records[:, 0].astype(np.int64)


# .npz ------------------------------------------------------------------------------------------------------


def read_npz_images(path: Path, split: Split, image_shape: tuple[int, ...] | None) -> Images:
    """Images and labels of an `.npz` file.

    Known keys: `x_train`, `y_train`, `x_test`, `y_test`; `x`, `y` or `images`, `labels`, which serve both
    splits; `jpeg` (uint8, all files one after the other), `offset` (m+1,) and `y` or `labels`.
    """
    with NpzReader(path, InstanceError) as npz:
        keys = npz.headers.keys()
        pairs = [
            (f"x_{split}", f"y_{split}"),
            (f"{split}_images", f"{split}_labels"),
            ("x", "y"),
            ("images", "labels"),
        ]
        pair = next((pair for pair in pairs if keys >= {*pair}), None)
        if pair is not None:
            return images_of(f"{path}: `{pair[1]}`", npz.read(pair[0]), npz.read(pair[1]))
        y = "y" if "y" in keys else "labels"
        if keys >= {"jpeg", "offset", y}:
            npz.expect("offset", "integer", (None,))
            content, offset = npz.read("jpeg"), npz.read("offset").astype(np.int64)
            if content.dtype != np.uint8 or content.ndim != 1:
                raise InstanceError(
                    f"{path}: `jpeg` must be uint8 of one axis, got {content.dtype} {content.shape}"
                )
            if offset.size < 1 or offset[0] < 0 or (np.diff(offset) < 0).any() or offset[-1] > content.size:
                raise InstanceError(f"{path}: `offset` must rise from 0 to {content.size}, the size of `jpeg`")
            labels = checked_labels(f"{path}: `{y}`", npz.read(y), offset.size - 1)

            def take(indices: Indices) -> NDArray[Any]:
                files = ((f"{path}: image {i}", content[offset[i] : offset[i + 1]].tobytes()) for i in indices)
                return _stack([(name, _picture(name, io.BytesIO(data), image_shape)) for name, data in files])

            return Images(labels, take)
        raise InstanceError(
            f"{path}: holds no images and labels of the {split} split under names that we know: `x_{split}` and "
            f"`y_{split}`, `x` and `y`, `images` and `labels`, or `jpeg`, `offset` and `y`; it has "
            f"{', '.join(f'`{key}`' for key in list(keys)[:8]) or 'nothing'}"
        )


# Folders of pictures ---------------------------------------------------------------------------------------


def read_image_folder(folder: Path, image_shape: tuple[int, ...] | None) -> Images | None:
    """Pictures in one sub-folder per class, with the sorted names as classes; None if there are none.

    Pictures of another size than the network's are scaled until their shorter side is 8/7 of it (256 for 224)
    and cropped in the middle, as is usual for ImageNet.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [
        (path, label)
        for label, sub in enumerate(classes)
        for path in sorted(sub.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not files:
        return None

    def take(indices: Indices) -> NDArray[Any]:
        return _stack([(str(files[i][0]), _picture(str(files[i][0]), files[i][0], image_shape)) for i in indices])

    return Images(np.array([label for _, label in files], dtype=np.int64), take, len(classes))


def _picture(name: str, file: Path | io.BytesIO, image_shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
    """The pixels of a picture, uint8, in the network's shape where that is known."""
    Image = require("PIL.Image", "a picture")
    grey = image_shape is not None and len(image_shape) == 2
    try:
        with Image.open(file) as picture:
            image = picture.convert("L" if grey else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is no picture, or damaged" if "BytesIO" in str(error) else error
        raise InstanceError(f"{name}: cannot be read: {reason}") from None
    if image_shape is not None and (image.height, image.width) != image_shape[:2]:
        height, width = image_shape[:2]
        scale = 8 / 7 * max(height / image.height, width / image.width)
        size = round(image.width * scale), round(image.height * scale)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image)


def _stack(pictures: list[tuple[str, NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    first_name, first = pictures[0]
    for name, picture in pictures:
        if picture.shape != first.shape:
            raise InstanceError(
                f"{name}: is of {picture.shape[0]} × {picture.shape[1]} pixels, {first_name} of "
                f"{first.shape[0]} × {first.shape[1]}: the pictures for a network of your own must be of one size"
            )
    return np.stack([picture for _, picture in pictures])


def checked_labels(name: str, labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Labels as int64 (count,); raises `InstanceError` for another shape or type."""
    whole = labels.dtype.kind in "iu" or (
        labels.dtype.kind == "f" and labels.size > 0 and bool((labels == np.floor(labels)).all())
    )
    if labels.ndim != 1 or not whole:
        raise InstanceError(
            f"{name}: labels must be whole numbers, one per image, got {labels.dtype} of shape {labels.shape}"
        )
    if labels.size != count:
        raise InstanceError(f"{name}: there are {labels.size} labels for {count} images")
    return labels.astype(np.int64)
