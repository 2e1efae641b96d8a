"""Execution of independent tasks: in this process, in processes of this machine, or on a Ray cluster.

Room: the core; layers of an instance and the rows of benchmarks are such tasks.

An engine takes tasks and a function, and gives back the results as they come. A worker that is killed, for
example by the system because of its memory, loses only the task that it was running; that task is tried again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from cbs_opt.errors import SolverError, UsageError

logger = logging.getLogger("cbs_opt")

T = TypeVar("T")
R = TypeVar("R")

TRIES = 3
"""How often a task is given to a worker before it counts as lost."""

_POLL = 0.1  # seconds between checks for interrupts


def never() -> bool:
    """Whether to stop: no."""
    return False


class Engine(Protocol):
    """Runs tasks."""

    @property
    def workers(self) -> int:
        """Tasks at a time."""
        ...  # pragma: no cover

    def kept(self) -> AbstractContextManager[Engine]:
        """The same engine, for several runs: where it starts workers, they live until the end of the context."""
        ...  # pragma: no cover

    def run(
        self, tasks: Sequence[T], work: Callable[[T], R], should_stop: Callable[[], bool] = never
    ) -> Iterator[tuple[T, R | None]]:
        """Call `work` on every task; yields each task with its result as it ends, in any order.

        Parameters
        ----------
        tasks : sequence
            They are pickled, unless the engine is `Serial`.
        work : callable
            Must not raise. May be run more than once for a task whose worker was killed.
        should_stop : callable
            Asked between tasks, and several times a second while waiting; True ends the iteration at once: what is
            being worked on is given up.

        Yields
        ------
        task, result
            The result is None for a task that killed its worker at every try.
        """
        ...  # pragma: no cover


@dataclass(frozen=True)
class Serial:
    """One task after the other, in this process."""

    @property
    def workers(self) -> int:
        """1."""
        return 1

    @contextlib.contextmanager
    def kept(self) -> Iterator[Engine]:
        """Itself."""
        yield self

    def run(
        self, tasks: Sequence[T], work: Callable[[T], R], should_stop: Callable[[], bool] = never
    ) -> Iterator[tuple[T, R | None]]:
        """See `Engine.run`."""
        for task in tasks:
            if should_stop():
                return
            yield task, work(task)


@dataclass(frozen=True)
class Processes:
    """Worker processes of this machine, by joblib's loky.

    Every worker is an executor of its own: loky gives up all workers of an executor when one of them is killed,
    and could not say which task killed it.

    Parameters
    ----------
    workers : int
    threads : int
        Threads that the numerical libraries of a worker may start.
    tries : int
    """

    workers: int
    threads: int = 1
    tries: int = TRIES
    pool: list[Any] | None = field(default=None, repr=False, compare=False)  # of executors, see `kept`

    @contextlib.contextmanager
    def kept(self) -> Iterator[Engine]:
        """See `Engine.kept`."""
        if self.pool is not None:  # kept by whoever called
            yield self
            return
        pool: list[Any] = []
        try:
            yield replace(self, pool=pool)
        finally:
            for executor in pool:  # they are idle, and need not end by themselves
                executor.shutdown(wait=True, kill_workers=True)

    def run(
        self, tasks: Sequence[T], work: Callable[[T], R], should_stop: Callable[[], bool] = never
    ) -> Iterator[tuple[T, R | None]]:
        """See `Engine.run`."""
        waiting = collections.deque((task, 1) for task in tasks)
        idle = [self.pool.pop() if self.pool else self._executor() for _ in range(min(self.workers, len(tasks)))]
        busy: dict[concurrent.futures.Future[R], tuple[Any, T, int]] = {}
        try:
            while (waiting or busy) and not should_stop():
                while waiting and idle:
                    executor, (task, trial) = idle.pop(), waiting.popleft()
                    busy[executor.submit(work, task)] = executor, task, trial
                done, _ = concurrent.futures.wait(
                    busy, timeout=_POLL, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    executor, task, trial = busy.pop(future)
                    try:
                        result = future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        executor.shutdown(wait=False, kill_workers=True)
                        idle.append(self._executor())
                        if trial < self.tries:
                            logger.warning(f"a worker was killed; its task is run again (try {trial + 1})")
                            waiting.appendleft((task, trial + 1))
                        else:
                            yield task, None
                    else:
                        idle.append(executor)
                        yield task, result
        finally:
            for executor, *_ in busy.values():
                executor.shutdown(wait=True, kill_workers=True)
            if self.pool is not None:
                self.pool.extend(idle)
                idle = []
            for executor in idle:
                executor.shutdown(wait=True)

    def _executor(self) -> Any:
        from joblib.externals.loky.process_executor import ProcessPoolExecutor

        return ProcessPoolExecutor(
            max_workers=1,
            initializer=_start_worker,
            initargs=(os.getpid(),),
            env=thread_environment(self.threads),
        )


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables that limit the threads of numerical libraries."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def _start_worker(parent: int) -> None:
    """Leave interrupts to the parent, and end with it: a parent that is killed ends no worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


@dataclass(frozen=True)
class Ray:
    """Workers of a Ray cluster: the one that the environment variable RAY_ADDRESS names, else one of this machine.

    All nodes of a cluster must have the package, and see the instances under the same path.

    Parameters
    ----------
    workers : int
        Tasks at a time.
    threads : int
        Processors that a task takes.
    tries : int
    """

    workers: int
    threads: int = 1
    tries: int = TRIES

    @contextlib.contextmanager
    def kept(self) -> Iterator[Engine]:
        """See `Engine.kept`."""
        with self._cluster(_ray()):
            yield self

    def run(
        self, tasks: Sequence[T], work: Callable[[T], R], should_stop: Callable[[], bool] = never
    ) -> Iterator[tuple[T, R | None]]:
        """See `Engine.run`."""
        ray = _ray()
        with self._cluster(ray):
            # Ray's own retries would not be counted, and are not told of.
            remote = ray.remote(num_cpus=self.threads, max_retries=0)(work)
            waiting = collections.deque((task, 1) for task in tasks)
            busy: dict[Any, tuple[T, int]] = {}
            while (waiting or busy) and not should_stop():
                while waiting and len(busy) < self.workers:
                    task, trial = waiting.popleft()
                    busy[remote.remote(task)] = task, trial
                done, _ = ray.wait(list(busy), num_returns=1, timeout=_POLL)
                for reference in done:
                    task, trial = busy.pop(reference)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        reason = str(error).strip().splitlines()[-1]
                        raise SolverError(f"a worker of Ray failed: {reason}") from None
                    except ray.exceptions.RayError as error:
                        if trial < self.tries:
                            logger.warning(
                                f"a worker was killed ({type(error).__name__}); its task is run again "
                                f"(try {trial + 1})"
                            )
                            waiting.appendleft((task, trial + 1))
                        else:
                            yield task, None
                    else:
                        yield task, result
            for reference in busy:
                ray.cancel(reference, force=True)

    @contextlib.contextmanager
    def _cluster(self, ray: Any) -> Iterator[None]:
        """Connect to a cluster or start one, and leave signals to whoever had them."""
        if ray.is_initialized():
            yield
            return
        main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        if "RAY_ADDRESS" not in os.environ:
            options |= {"address": "local", "num_cpus": self.workers * self.threads}
        try:
            ray.init(configure_logging=True, **options)
        except Exception as error:
            raise SolverError(f"Ray cannot be started: {' '.join(str(error).split())[:300]}") from error
        try:
            if main:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            yield
        finally:
            ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns about devices of the future
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError:
        raise SolverError('the engine `ray` needs Ray: pip install "cbs-opt[ray]"') from None
    return ray


ENGINES = ("serial", "processes", "ray")


def make_engine(name: str, workers: int | None = None, threads: int = 1) -> Engine:
    """The engine of this name.

    Parameters
    ----------
    name : {"serial", "processes", "ray"}
    workers : int, optional
        Default: as many as fit the cores with so many threads each.
    threads : int
        Of each worker.

    Raises
    ------
    UsageError
        For an unknown name, or more than one worker of `serial`.
    """
    if name not in ENGINES:
        raise UsageError(f"there is no engine '{name}'; known: {', '.join(ENGINES)}")
    if name == "serial":
        if workers not in (None, 1):
            raise UsageError(f"the engine `serial` has one worker, not {workers}: take `processes` or `ray`")
        return Serial()
    workers = workers or max(1, _cores() // threads)
    return Processes(workers, threads) if name == "processes" else Ray(workers, threads)


def _cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
