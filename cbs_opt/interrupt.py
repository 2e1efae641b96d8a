"""Ends long computations of linear algebra when the run that they belong to is told to stop.

`run_solver` states for the whole run whom to ask; the loops over large matrices in `linalg`, `curvature` and
the solvers call `checkpoint` between two pieces of work. Where nobody is to be asked a checkpoint does nothing,
so that losses outside of a run are always computed to the end. Threads that a solver starts by itself are not
covered: hand them `question`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Interrupted(Exception):  # noqa: N818 - not an error: the run was told to stop
    """Raised by `checkpoint`; what was being computed is lost, and the incumbent is kept."""


_should_stop: ContextVar[Callable[[], bool] | None] = ContextVar("should_stop", default=None)


@contextmanager
def interruptible(should_stop: Callable[[], bool] | None) -> Iterator[None]:
    """Let `checkpoint` ask `should_stop` inside of this block; None for nobody, as outside of a run."""
    token = _should_stop.set(should_stop)
    try:
        yield
    finally:
        _should_stop.reset(token)


def question() -> Callable[[], bool]:
    """The function that `checkpoint` would ask here, for threads, in which there is nobody to be asked."""
    return _should_stop.get() or (lambda: False)


def checkpoint() -> None:
    """Raise `Interrupted` if the run is told to stop. For pieces of work of 20 ms or more."""
    should_stop = _should_stop.get()
    if should_stop is not None and should_stop():
        raise Interrupted
