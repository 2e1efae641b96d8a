"""How much memory there is for large arrays. Room: the core; solvers ask before they copy all blocks.

Linux grants memory that it does not have, and ends the process when it is used: what is known to be too much is
refused before, in one sentence.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from cbs_opt.errors import MemoryShortageError

_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")

_stated: ContextVar[float] = ContextVar("memory", default=math.inf)


@contextmanager
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


def _left_to_process() -> Iterator[float]:
    """Bytes until each limit of this process."""
    try:
        import resource

        sizes = [float(part) * os.sysconf("SC_PAGE_SIZE") for part in (_PROCESS / "statm").read_text().split()]
    except (ImportError, OSError, ValueError):
        return
    whole, resident, mapped, data = sizes[0], sizes[1], sizes[2], sizes[5]
    yield _stated.get() - (resident - mapped)
    for kind, used in ((resource.RLIMIT_AS, whole), (resource.RLIMIT_DATA, data)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - used


def require_bytes(wanted: float, what: str) -> None:
    """Raise `MemoryShortageError` where `what` would take more bytes than there are."""
    available = available_bytes()
    if wanted > available:
        raise MemoryShortageError(
            f"{what} would take {wanted / 1e9:.1f} GB, {max(available, 0.0) / 1e9:.1f} GB of memory are free: "
            "'cbs', 'ls', 'rmp' and the rules by scores take the blocks one at a time"
        )
