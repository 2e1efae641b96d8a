"""The python batches of CIFAR-10, read without executing their contents.

A batch is a pickle of a dictionary with an array and lists. The decoder below hands every object that the file
constructs to an inert record, accepts five names in all, and refuses any other.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.errors import InstanceError


class _Record:
    """Stands for NumPy's `ndarray`, `dtype` and their makers: keeps what it is given, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Bytes as Python 3 writes them in old pickles."""
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else b""


_NAMES: dict[tuple[str, str], Any] = {
    (module, name): _Record
    for module, names in (
        ("numpy.core.multiarray", ("_reconstruct",)),
        ("numpy._core.multiarray", ("_reconstruct",)),
        ("numpy", ("ndarray", "dtype")),
    )
    for name in names
} | {("_codecs", "encode"): _encode}


class _Decoder(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Whatever the file names, only a record can be made."""
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it holds {f'{module}.{name}'[:60]!r}")
        return _NAMES[module, name]

    def persistent_load(self, _: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside")


def decode_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels, uint8 (m, 3072) in planes of red, green and blue, and labels, int64 (m,).

    Raises
    ------
    InstanceError
        When the file is no batch of CIFAR-10, or holds any other object than arrays, lists, texts and numbers.
    """
    try:
        with path.open("rb") as file:
            content = _Decoder(file, encoding="latin1").load()
        table = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        labels = table["labels"]
        labels = _array(labels) if isinstance(labels, _Record) else np.asarray(labels)
        data = _array(table["data"])
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        raise InstanceError(
            f"{path}: is refused: a batch of CIFAR-10 has arrays and lists only, {error}"
        ) from None
    except Exception:  # a damaged pickle raises a dozen kinds
        raise InstanceError(f"{path}: is no python batch of CIFAR-10: `data` and `labels` were expected") from None
    if data.ndim != 2 or data.shape[1] != 3072 or data.dtype != np.uint8:
        raise InstanceError(f"{path}: `data` must be uint8 of shape (m, 3072), got {data.dtype} {data.shape}")
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise InstanceError(f"{path}: `labels` must be {len(data)} whole numbers, got shape {labels.shape}")
    return data, labels.astype(np.int64)


def _array(record: _Record) -> NDArray[Any]:
    """The array that a record describes: its state is (version, shape, dtype, by columns, bytes)."""
    _, shape, dtype, by_columns, content = record.state
    content = content.encode("latin1") if isinstance(content, str) else content
    code = {"u1": "u1", "i8": "<i8", "i4": "<i4"}[dtype.arguments[0]]
    return np.frombuffer(content, code).reshape(shape, order="F" if by_columns else "C")
