"""How much memory there is for large arrays. Room: the core; solvers ask before they copy all blocks.

Linux grants memory that it does not have, and ends the process when it is used: what is known to be too much is
refused before, in one sentence.
"""

from __future__ import annotations

from pathlib import Path

from cbs_opt.errors import SolverError

_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> float:
    """Bytes that this process may still take without swapping, by Linux and its container; infinity elsewhere."""
    found = [float("inf")]
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


def require_bytes(wanted: float, what: str) -> None:
    """Raise `SolverError` where `what` would take more bytes than there are."""
    available = available_bytes()
    if wanted > available:
        raise SolverError(
            f"{what} would take {wanted / 1e9:.1f} GB, {available / 1e9:.1f} GB of memory are free: 'cbs', 'ls', "
            "'rmp' and the rules by scores take the blocks one at a time"
        )
