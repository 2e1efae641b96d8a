"""Compilation of kernels, and the cache of the results.

Compiled kernels are stored under `cbs_opt.cache`, in a folder named after everything that they depend on: the
source of all kernels (numba alone would overlook that a kernel called from another file has changed), the
versions of Python and numba, and the processor. `NUMBA_CACHE_DIR` takes precedence over the cache folder of the
user.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba

from cbs_opt.cache import VARIABLE, cache_folder, is_lasting, is_writable

_FAST = {"reassoc", "contract", "arcp", "nsz"}  # sums may be reordered; infinities and NaN keep their meaning
_OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_UNUSED_DAYS = 60  # after which the kernels of another version are removed


def sources() -> list[Path]:
    """The files that hold kernels."""
    solvers = Path(__file__).resolve().parent.parent
    return sorted([*(solvers / "kernels").glob("*.py"), *(solvers / "layers").glob("*kernels.py")])


@functools.cache
def kernel_folder() -> Path | None:
    """The folder of the compiled kernels of this version on this machine; None where nothing can be written."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    root: Path | None = None
    if given and not os.environ.get(VARIABLE) and is_writable(Path(given)):
        root = Path(given).absolute()
    root = root or cache_folder()
    if root is None:
        return None
    digest = hashlib.sha256()
    processor = (llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten())
    for part in (sys.version, numba.__version__, platform.machine(), *processor):
        digest.update(part.encode())
    for path in sources():
        # numba, too, tells the files apart by place and time.
        digest.update(f"{path}\0{path.stat().st_mtime_ns}\0".encode() + path.read_bytes())
    folder = root / f"kernels-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        _remove_unused(root)
    if not is_writable(folder):
        return None
    os.utime(folder)
    return folder


def how_often() -> str:
    """How often kernels are compiled, for a message."""
    if kernel_folder() is not None and (os.environ.get("NUMBA_CACHE_DIR") or is_lasting()):
        return "once for this machine"
    return "for this process alone"


def _remove_unused(root: Path) -> None:
    """Remove the kernels of versions that have not been used for a long time."""
    oldest = time.time() - _UNUSED_DAYS * 86400
    for other in root.glob("kernels-*"):
        try:
            if other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)
        except OSError:
            continue


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that turns a function into a kernel; numba compiles it at its first call."""

    def decorate(function: Callable[..., Any]) -> Any:
        folder = kernel_folder()
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = "" if folder is None else str(folder)  # read where a kernel is declared
        try:
            return numba.njit(**_OPTIONS, **options, cache=folder is not None)(function)
        finally:
            numba.config.CACHE_DIR = before

    return decorate


entry = compiled()
"""A kernel that Python calls."""
entry_fast = compiled(fastmath=_FAST)
inner = compiled(no_cpython_wrapper=True, _nrt=False)
"""A kernel that only kernels call, and that neither allocates nor returns an array: without a wrapper for Python
and without counting references it compiles in half the time."""
inner_fast = compiled(no_cpython_wrapper=True, _nrt=False, fastmath=_FAST)
inner_counted = compiled(no_cpython_wrapper=True)
"""The same for one that allocates or returns arrays."""


def is_ready(units: Iterable[str]) -> bool:
    """Whether these units have been compiled on this machine before; see `loading`."""
    folder = kernel_folder()
    return folder is not None and all((folder / f"{unit}.ready").exists() for unit in units)


def mark_ready(unit: str) -> None:
    """Note that a unit is compiled."""
    folder = kernel_folder()
    if folder is not None:
        (folder / f"{unit}.ready").touch()
