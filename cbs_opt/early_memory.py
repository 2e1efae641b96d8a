"""Commands whose address space is too small for their libraries. Imports nothing that takes time or memory."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from cbs_opt.early_signals import is_command

_LIBRARIES = 600_000_000
"""Bytes of address space that Python, NumPy, SciPy and numba take together."""


def refuse_small_address_space() -> None:
    """End a command of this package in one sentence, with code 4, where `ulimit -v` does not let it load.

    Without memory some libraries end the process when they are imported, others wait without end.
    """
    if not is_command(sys.argv, sys.orig_argv):
        return
    try:
        import resource
    except ImportError:  # not on this system
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= _LIBRARIES:
        return
    with suppress(OSError):  # a closed stderr
        os.write(
            2,
            f"out of memory: the libraries take {_LIBRARIES / 1e9:.1f} GB of address space, `ulimit -v` allows "
            f"{limit / 1e9:.2f} GB\n".encode(),
        )
    os._exit(4)
