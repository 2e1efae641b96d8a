"""How much memory there is for large arrays. Room: the core; solvers ask before they copy all blocks.

Linux grants memory that it does not have, and ends the process when it is used: what is known to be too much is
refused before, in one sentence.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from cbs_opt.errors import MemoryShortageError

_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")

_PRODUCTS = 1 << 27  # bytes of address space that the first products of a thread take: buffers, and its stack
_SCIPY = 3 << 26  # bytes of address space that the linear algebra of SciPy takes when it is loaded
_ORDER = 256  # of matrices whose products need buffers

_stated: ContextVar[float] = ContextVar("memory", default=math.inf)
_holding = 0  # threads that linear algebra has its buffers for


@contextlib.contextmanager
def memory_limit(most: float | None) -> Iterator[None]:
    """Let solvers inside of this block take the process to so many bytes of its own; None for no such limit.

    Files that are mapped do not count. It is no guard: solvers that know what they would hold at once ask before,
    and take the blocks one at a time where it is too much.
    """
    token = _stated.set(math.inf if most is None else float(most))
    try:
        yield
    finally:
        _stated.reset(token)


def available_bytes() -> float:
    """Bytes that this process may still take, by `memory_limit` and, on Linux, without swapping; else infinity.

    Linux knows what is free, the limit of the container, and those of `ulimit -v` and `ulimit -d`.
    """
    found = [math.inf, *_left_to_process()]
    try:
        for line in _SYSTEM.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024.0 * int(line.split()[1]))
    except (OSError, ValueError):
        pass
    try:
        limit = (_GROUP / "memory.max").read_text().strip()
        if limit != "max":
            # Mapped files count as used but can be given back: only what cannot is subtracted.
            used = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
            found.append(int(limit) - float(used.get("anon", 0)))
    except (OSError, ValueError):
        pass
    return min(found)


def hold_products(threads: int = 1) -> None:
    """Let linear algebra take its buffers for so many threads now, where the memory of this process is limited.

    OpenBLAS, of which NumPy and SciPy have a copy each, ends the process or waits without end for a buffer that it
    does not get. It keeps those that it has. Without `ulimit -v` and `ulimit -d` this does nothing.

    Raises
    ------
    MemoryShortageError
        Where less than 128 MB a thread are left, and 192 MB for SciPy where it is not loaded yet.
    """
    global _holding
    if threads <= _holding or min(_limits()) == math.inf:
        return
    import numpy as np

    if "scipy.linalg" not in sys.modules:
        _probe(_SCIPY + _PRODUCTS)
    from scipy.linalg.lapack import dpotrf

    _probe((threads - _holding) * _PRODUCTS)
    matrices = [np.eye(_ORDER) for _ in range(threads)]
    meeting = threading.Barrier(threads)
    errors: list[Exception] = []

    def multiply(matrix: np.ndarray) -> None:
        try:
            meeting.wait()  # products at the same time take a buffer each
            dpotrf(matrix @ matrix)
        except threading.BrokenBarrierError:
            pass
        except MemoryError as error:
            errors.append(error)

    helpers = [threading.Thread(target=multiply, args=(matrix,), daemon=True) for matrix in matrices[1:]]
    try:
        for helper in helpers:
            helper.start()
        multiply(matrices[0])
        for helper in helpers:
            helper.join()
    except RuntimeError as error:  # no memory for another thread
        errors.append(error)
    finally:
        meeting.abort()
    if errors:
        raise MemoryShortageError(f"out of memory: {threads} threads do not fit") from errors[0]
    _holding = threads


def _probe(wanted: int) -> None:
    """Raise `MemoryShortageError` where so many bytes cannot be had."""
    import numpy as np

    try:
        np.empty(wanted, dtype=np.uint8)
    except MemoryError as error:
        left = max(available_bytes(), 0.0)
        raise MemoryShortageError(
            f"out of memory: linear algebra takes {wanted / 1e9:.2f} GB of address space, and {left / 1e9:.2f} GB "
            "are left: `ulimit -v` and `ulimit -d` limit it"
        ) from error


def _limits() -> tuple[float, float]:
    """Bytes of address space and of data that `ulimit` allows this process; infinity for no limit."""
    try:
        import resource
    except ImportError:
        return math.inf, math.inf
    found = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    whole, data = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in found)
    return whole, data


def _left_to_process() -> Iterator[float]:
    """Bytes until each limit of this process."""
    try:
        sizes = [float(part) * os.sysconf("SC_PAGE_SIZE") for part in (_PROCESS / "statm").read_text().split()]
    except (OSError, ValueError):
        return
    whole, resident, mapped, data = sizes[0], sizes[1], sizes[2], sizes[5]
    yield _stated.get() - (resident - mapped)
    for limit, used in zip(_limits(), (whole, data), strict=True):
        yield limit - used


def require_bytes(wanted: float, what: str) -> None:
    """Raise `MemoryShortageError` where `what` would take more bytes than there are."""
    available = available_bytes()
    if wanted > available:
        raise MemoryShortageError(
            f"{what} would take {wanted / 1e9:.1f} GB, {max(available, 0.0) / 1e9:.1f} GB of memory are free: "
            "'cbs', 'ls', 'rmp' and the rules by scores take the blocks one at a time"
        )
