"""A flag that compiled kernels look at, so that a node of a tree ends within its work. Room: kernels, for `trees`.

A node of a thousand coupled weights takes seconds, and a kernel cannot ask Python. A thread asks instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from cbs_opt.typing import Int8Array

_PERIOD = 0.02  # seconds

NEVER: Int8Array = np.zeros(1, np.int8)
"""The flag of work that is not interrupted."""


@contextmanager
def stop_flag(should_stop: Callable[[], bool]) -> Iterator[Int8Array]:
    """Give an array, int8 (1,), whose entry is 1 from when `should_stop` holds.

    It is asked in another thread, every 20 ms. What that thread may see must not depend on what is half reported:
    ask for the clock and for interrupts only, as `Monitor.out_of_time` does.
    """
    flag, done = np.zeros(1, np.int8), threading.Event()

    def watch() -> None:
        while not done.wait(_PERIOD):
            try:
                stop = should_stop()
            except Exception:  # raised again where the caller asks
                stop = True
            if stop:
                flag[0] = 1
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield flag
    finally:
        done.set()
        thread.join()
