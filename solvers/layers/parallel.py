"""Parallel work on rows; the calling thread checks the clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import numpy as np

from cbs_opt.threads import library_threads

_POLL = 0.02  # seconds between two checks whether to stop
_BATCH = 0.4  # seconds

StopFlag = np.ndarray[tuple[int], np.dtype[np.uint8]]


class RowPool:
    """Threads that work on rows; BLAS runs with one thread in each of them.

    Parameters
    ----------
    threads : int
    should_stop : callable
        Asked every 20 ms by the thread that waits; True sets `flag`, which the kernels read.
    """

    def __init__(self, threads: int, should_stop: Callable[[], bool]) -> None:
        self.threads = max(1, threads)
        self.flag: StopFlag = np.zeros(1, dtype=np.uint8)
        self._should_stop = should_stop
        self._pool = ThreadPoolExecutor(self.threads)
        self.local = threading.local()

    def __enter__(self) -> RowPool:
        self._limits = library_threads(1)
        self._limits.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flag[0] = 1
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._limits.__exit__(None, None, None)

    def stopped(self) -> bool:
        """Whether to stop, asked now."""
        if not self.flag[0] and self._should_stop():
            self.flag[0] = 1
        return bool(self.flag[0])

    def in_batches(
        self,
        task: Callable[[int], Any],
        order: Sequence[int],
        after: Callable[[], object],
        clock: Callable[[], float],
        until: float,
    ) -> bool:
        """`map` on some at a time, about `_BATCH` seconds each by the clock, and `after` each time.

        Returns whether all were done before a stop, and before `until`.
        """
        at, size = 0, 2 * self.threads
        while at < len(order):
            began = clock()
            done = self.map(task, order[at : at + size])
            at += size
            after()
            if not done or clock() > until:
                return False
            spent = clock() - began
            size = int(np.clip(size * _BATCH / max(spent, 1e-3), 2 * self.threads, 8 * size))
        return True

    def map(self, task: Callable[[int], Any], rows: Sequence[int]) -> bool:
        """Call `task` on every row; returns whether all were done before the stop."""
        if self.stopped():
            return False
        skipped = [False]

        def guarded(part: Sequence[int]) -> None:
            for row in part:
                if self.flag[0]:
                    skipped[0] = True
                    return
                task(row)

        parts = np.array_split(np.asarray(rows), min(len(rows), 8 * self.threads)) if len(rows) else []
        futures = [self._pool.submit(guarded, [int(row) for row in part]) for part in parts]
        try:
            for future in futures:
                while not wait((future,), _POLL).done:
                    self.stopped()
                future.result()
        except BaseException:
            self.flag[0] = 1
            wait(futures)
            raise
        return not skipped[0]
