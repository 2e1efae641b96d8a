"""Threads for independent tasks, with the same results whatever the timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

_POLL = 0.03  # seconds between two questions whether to stop


def run_tasks(
    threads: int, tasks: Sequence[Callable[[Callable[[], bool]], None]], should_stop: Callable[[], bool]
) -> bool:
    """Call all tasks in threads, and ask `should_stop` in this one; returns whether all were made.

    Every task is given a function that says whether to break off. What `should_stop` says between two calls must
    not depend on the tasks, or their results would depend on timing.
    """
    halt = False

    def halted() -> bool:
        return halt

    def guarded(task: Callable[[Callable[[], bool]], None]) -> None:
        if not halt:
            task(halted)

    if threads == 1:
        for task in tasks:
            task(should_stop)
            if should_stop():
                return False
        return True
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(guarded, task) for task in tasks]:
            while not wait((future,), _POLL).done:
                halt = halt or should_stop()
            future.result()
            halt = halt or should_stop()
    return not halt
