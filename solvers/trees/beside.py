"""What works beside the nodes of a tree: turns of something else, and how many cores a worker takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from cbs_opt.threads import library_threads


class Turns(Protocol):
    """When something else has a turn between nodes, such as a search for better incumbents."""

    def due(self, workers: int) -> bool:
        """Whether it is time for a turn, where one of so many workers would rest."""

    def take(self, over: Callable[[], bool] = ...) -> None:
        """Work until `over` holds at the latest; what is found is reported to the monitor of the run."""


class NoTurns:
    """Never."""

    def due(self, workers: int) -> bool:
        """Whether it is time for a turn."""
        return False

    def take(self, over: Callable[[], bool] = lambda: False) -> None:
        """Nothing."""


def one_core_each(workers: int) -> AbstractContextManager[object]:
    """Leave BLAS one thread where there are several workers: its threads would wait for the cores of others."""
    return library_threads(1, blas_only=True) if workers > 1 else nullcontext()
