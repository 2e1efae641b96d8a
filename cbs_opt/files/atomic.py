"""Atomic writing: a file is complete or absent."""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cbs_opt.errors import OutputError

_READER_SECONDS = 3.0


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
            with tempfile.TemporaryFile() as file, _open_device(path) as device:
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


def write_text(path: Path | str, text: str) -> None:
    """Write a text as UTF-8; bytes of file names that are no text are written out. See `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_csv(path: Path | str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table as CSV with a header; None is an empty cell. See `write_text`."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    write_text(path, text.getvalue())


def _open_device(path: Path) -> IO[bytes]:
    """Open a device or a pipe; raises `OSError` for a pipe that no process reads for some seconds."""
    if not path.is_fifo():
        return path.open("wb")
    ends = time.monotonic() + _READER_SECONDS
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > ends:
                raise OSError(errno.ENXIO, "no process reads this pipe", str(path)) from None
            time.sleep(0.05)
        else:
            os.set_blocking(handle, True)
            return os.fdopen(handle, "wb")


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
