"""The cache folder for files that can be regenerated.

In this order: ``CBS_OPT_CACHE``; the cache directory of the user, according to the system; a private temporary
directory, removed when the process ends. The source tree and site-packages are never written to, so that a
read-only installation works as an editable one does.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger("cbs_opt")

VARIABLE = "CBS_OPT_CACHE"
"""Environment variable that names the cache folder."""

_private: set[Path] = set()


@functools.cache
def cache_folder() -> Path | None:
    """The cache folder of this process, or None if nothing can be written.

    Child processes share it, a temporary one included: the environment variable is set for them.
    """
    given = os.environ.get(VARIABLE)
    wanted = Path(given).expanduser() if given else _of_the_user()
    if wanted is not None and is_writable(wanted):
        return wanted.absolute()
    what = "no cache folder is known" if wanted is None else f"{wanted}: cannot be written"
    try:
        private = Path(tempfile.mkdtemp(prefix="cbs-opt-"))
    except OSError:
        logger.info(f"{what}, nor can a temporary one: kernels are compiled again by every process ({VARIABLE})")
        return None
    logger.info(f"{what}: kernels are kept for this process only; {VARIABLE} names another folder")
    owner = os.getpid()
    _private.add(private)
    os.environ[VARIABLE] = str(private)
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(private, ignore_errors=True))
    return private


def is_lasting() -> bool:
    """Whether later processes find what this one stores."""
    return cache_folder() not in (None, *_private)


def is_writable(folder: Path) -> bool:
    """Whether files can be written to a folder, which is created if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _of_the_user() -> Path | None:
    """The cache folder of the user, by the conventions of the system."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA")
        return Path(root) / "cbs-opt" / "cache" if root else None
    root = os.environ.get("XDG_CACHE_HOME")
    if root and Path(root).is_absolute():
        return Path(root) / "cbs-opt"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "cbs-opt"
