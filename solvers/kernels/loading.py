"""Compiles kernels in background processes, while the solver continues as far as possible without them.

A *unit* is a set of kernels that are needed together; its function calls each of them once. `request` loads units
that this machine has compiled before and starts the compilation of the others in child processes, which store
their results in the cache: numba compiles under one lock, so that threads would run neither in parallel nor
together with the solver. `wait` returns when units are loaded, or at once when it is stopped. The results of a
solver do not depend on whether it had to wait.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbs_opt.solver import usable_threads
from cbs_opt.solvers.kernels.compilation import how_often, is_ready, kernel_folder, mark_ready

logger = logging.getLogger("cbs_opt")


class Unit(NamedTuple):
    """Where the function of a unit is, and processor seconds that its compilation takes, roughly.

    `needs` are units whose kernels it calls: another process may compile them meanwhile.
    """

    function: str
    seconds: float
    needs: tuple[str, ...] = ()


UNITS = {
    "selection": Unit("cbs_opt.solvers.kernels.warm_up:warm_up_selection", 4.0),
    "sweeps": Unit("cbs_opt.solvers.kernels.warm_up_sweeps:warm_up_sweeps", 4.0),
    "selection_relaxation": Unit("cbs_opt.solvers.kernels.warm_up_relaxation:warm_up_relaxation", 3.5),
    "selection_tree": Unit("cbs_opt.solvers.trees.warm_up:selection_tree", 5.5, ("selection_relaxation",)),
    "selection_tables": Unit("cbs_opt.solvers.trees.warm_up:selection_tables", 3.0),
    "joint": Unit("cbs_opt.solvers.joint.warm_up:warm_up_joint", 3.0),
    "joint_tree": Unit("cbs_opt.solvers.trees.warm_up:joint_tree", 10.0),
    "layers_joint": Unit("cbs_opt.solvers.layers.warm_up:layers_joint", 12.0),
    "layers_selection": Unit("cbs_opt.solvers.layers.warm_up:layers_selection", 8.0),
    "joint_tables": Unit("cbs_opt.solvers.trees.warm_up:joint_tables", 3.0),
}

_POLL = 0.02  # seconds
_TO_LOAD = 1 << 27  # bytes that must be there before kernels are loaded
_TO_COMPILE = 1 << 29  # and before they are compiled in this process
_LEAVING = 5.0  # seconds that the end of the process waits for a compilation in a thread to notice

_loaded: set[str] = set()
_jobs: dict[str, _Job] = {}
_started: list[_Job] = []
_lock = threading.RLock()


def request(*units: str) -> None:
    """Load units that are already compiled, start the compilation of the others, and return."""
    with _lock:
        wanted = [unit for unit in units if unit not in _loaded and unit not in _jobs]
        for unit in [unit for unit in wanted if is_ready([unit])]:
            _load(unit)
            wanted.remove(unit)
        if not wanted:
            return
        needs = dict.fromkeys(need for unit in wanted for need in UNITS[unit].needs)
        wanted = [
            unit for unit in needs if unit not in wanted and unit not in _jobs and not is_ready([unit])
        ] + wanted
        if not _started:
            logger.info(f"compiling kernels beside the solver, {how_often()}")
        for part in _shares(wanted, min(usable_threads(), len(wanted))):
            _started.append(job := _start(part))
            _jobs.update(dict.fromkeys(part, job))


def seconds_to_compile(*units: str) -> float:
    """Processor seconds, roughly, until units can be used that this machine has not compiled before."""
    wanted = dict.fromkeys(part for unit in units for part in (*UNITS[unit].needs, unit))
    return sum(UNITS[unit].seconds for unit in wanted if unit not in _loaded and not is_ready([unit]))


def is_loaded(*units: str) -> bool:
    """Whether `wait` would return at once."""
    return all(unit in _loaded or (unit in _jobs and _jobs[unit].is_done(unit)) for unit in units)


def wait(*units: str, should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Wait until the units are loaded; False when told to stop before that.

    Raises
    ------
    Exception
        The exception of a compilation in this process.
    """
    request(*units)
    for unit in units:
        while unit not in _loaded:
            if should_stop():
                return False
            with _lock:
                job = _jobs.get(unit)
                if job is None or job.is_done(unit):
                    _load(unit)
                elif job.has_ended():  # without the unit
                    _started.append(_InThread([unit]))
                    _jobs[unit] = _started[-1]
            if unit not in _loaded:
                time.sleep(_POLL)
    return True


def finish() -> None:
    """Wait for everything that has been requested: before a clock that should not count compilation."""
    wait(*list(_jobs))


def _load(unit: str) -> None:
    """Call every kernel of a unit once, in this process."""
    _call(unit)
    _loaded.add(unit)
    _jobs.pop(unit, None)
    if not is_ready([unit]):
        mark_ready(unit)


def _call(unit: str) -> None:
    """Compile a unit, or load it; `MemoryError` where LLVM would end the process for want of memory."""
    np.empty(_TO_LOAD if is_ready([unit]) else _TO_COMPILE, dtype=np.uint8)
    _function(unit)()


def _function(unit: str) -> Callable[[], None]:
    module, name = UNITS[unit].function.split(":")
    function: Callable[[], None] = getattr(importlib.import_module(module), name)
    return function


def _shares(units: Sequence[str], workers: int) -> list[list[str]]:
    """Units for each of the workers, the work shared out evenly, in the order in which they are wanted.

    Those that need others come last, so that these are compiled by then.
    """
    shares: list[list[str]] = [[] for _ in range(workers)]
    for unit in sorted(units, key=lambda unit: -UNITS[unit].seconds):
        min(shares, key=lambda share: sum(UNITS[other].seconds for other in share)).append(unit)
    return [
        sorted(share, key=lambda unit: (bool(UNITS[unit].needs), units.index(unit))) for share in shares if share
    ]


# Jobs --------------------------------------------------------------------------------------------------------


class _Job:
    """A running compilation."""

    def is_done(self, unit: str) -> bool:
        """Whether a unit is compiled."""
        raise NotImplementedError

    def has_ended(self) -> bool:
        """Whether it has ended."""
        raise NotImplementedError

    def end(self) -> None:
        """Stop."""
        raise NotImplementedError


class _InProcess(_Job):
    """A child process; without standard streams, and not reached by Ctrl-C in the terminal."""

    def __init__(self, units: Sequence[str]) -> None:
        import cbs_opt

        environment = dict(os.environ)
        root = Path(cbs_opt.__file__).resolve().parent.parent
        if (root / "pyproject.toml").is_file():  # a checkout, maybe not installed
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cbs_opt.solvers.kernels.loading", str(os.getpid()), *units],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._owner = os.getpid()

    def is_done(self, unit: str) -> bool:
        return is_ready([unit])

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        if self._owner == os.getpid() and not self.has_ended():
            self._process.kill()
            with suppress(KeyboardInterrupt):  # a process that ends by itself needs none
                self._process.wait()


class _Leave(BaseException):
    """Raised in a thread that compiles when the process ends."""


class _InThread(_Job):
    """A thread of this process, where no other process can be started or could hand its results over."""

    def __init__(self, units: Sequence[str]) -> None:
        self._units, self._done, self._error = units, set[str](), None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(_Leave):
            try:
                for unit in self._units:
                    _call(unit)
                    self._done.add(unit)
            except Exception:
                logger.debug("compilation failed", exc_info=True)  # `wait` meets it again in its own thread

    def is_done(self, unit: str) -> bool:
        return unit in self._done or not self._thread.is_alive()

    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def end(self) -> None:
        if self._thread.is_alive() and self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(_Leave)
            )
            self._thread.join(_LEAVING)


def _start(units: Sequence[str]) -> _Job:
    if kernel_folder() is not None and sys.executable and not getattr(sys, "frozen", False):
        with suppress(OSError):
            return _InProcess(units)
    return _InThread(units)


@atexit.register
def end_jobs() -> None:
    """End all processes, and threads in the compiler before its library is unloaded."""
    for job in _started:
        job.end()


# The child process -------------------------------------------------------------------------------------------


def _compile(parent: int, units: Sequence[str]) -> None:
    """Compile units into the cache; end with the process that requested them."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    gc.set_threshold(100_000, 50, 50)  # a compiler makes many objects that live on
    for unit in [part for wanted in units for part in (*UNITS[wanted].needs, wanted)]:
        with _alone(unit):
            if not is_ready([unit]):
                _call(unit)
                mark_ready(unit)


def _end_with(parent: int) -> None:
    while os.getppid() == parent or os.name == "nt":
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def _alone(unit: str) -> Iterator[None]:
    """Hold a lock on a unit, so that processes which start together do not all compile it."""
    folder = kernel_folder()
    try:
        import fcntl

        if folder is None:
            raise OSError
        file = (folder / f"{unit}.lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):  # no locks here: the work is done twice, with the same results
        yield
        return
    with file:
        yield


if __name__ == "__main__":
    _compile(int(sys.argv[1]), sys.argv[2:])
