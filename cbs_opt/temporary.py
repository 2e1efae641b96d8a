"""Arrays in temporary files, for what is too large for memory. Room: the core, a leaf."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cbs_opt.errors import InstanceError


def temporary_array(shape: tuple[int, ...], dtype: DTypeLike, what: str) -> NDArray[Any]:
    """A writable array, mapped from a file without a name that ends with it.

    Raises
    ------
    InstanceError
        When there is no room for it; `what` begins the sentence.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+" if file.seek(0, 2) else "w+", shape=shape)
    except OSError as error:
        raise InstanceError(
            f"{what} {size / 1e9:.1f} GB cannot be written to a temporary file: {error.strerror or error}; TMPDIR "
            "names another folder"
        ) from None
