"""Atomic writing: a file is complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cbs_opt.errors import OutputError


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """Open a temporary file in the folder of `path`, and rename it to `path` if the block succeeds.

    Raises
    ------
    OutputError
        When the file cannot be written; `path` is then as it was before.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        if _is_device(path):
            with tempfile.TemporaryFile() as file, path.open("wb") as device:
                yield file
                file.seek(0)
                shutil.copyfileobj(file, device)
            return
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """Whether `path` is a device or a pipe, such as /dev/null, which a file must not replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: Path | str) -> None:
    """Raise `OutputError` unless a file could be written at `path` now."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: cannot be written: it is a directory")
    if _is_device(path):
        return
    if not path.parent.is_dir():
        raise OutputError(f"{path}: cannot be written: there is no directory {path.parent}")
    try:
        handle, probe = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    os.close(handle)
    Path(probe).unlink()
