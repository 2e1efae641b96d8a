"""How many threads the numerical libraries use.

Room: the core; all rooms may import it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext


def library_threads(threads: int | None, blas_only: bool = False) -> AbstractContextManager[object]:
    """Limit BLAS, and OpenMP unless `blas_only`; from now on, and until the end of the context.

    None sets no limit, and undoes at the end those that others have left.
    Without threadpoolctl, as on a machine where the package runs from a bare checkout, there is no limit.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        return nullcontext()
    limits: AbstractContextManager[object] = threadpool_limits(threads, user_api="blas" if blas_only else None)
    return limits


@contextmanager
def thread_limit(threads: int | None) -> Iterator[None]:
    """Limit BLAS, OpenMP and, where it is loaded, torch to `threads`; None for no limit. All are restored."""
    with ExitStack() as stack:
        stack.enter_context(library_threads(threads))
        if threads is not None and (torch := sys.modules.get("torch")) is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield
