"""Commands of the package in child processes, forked from this one or fresh; with limits, signals, time limits."""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cbs_opt
from cbs_opt.bench.faults.verdict import FINE, Finding, Verdict

COMMANDS = ("solve", "info", "export", "apply", "prune", "bench")
"""The commands of the package, without `cbs-`."""

PATIENCE = 120.0
"""Seconds that a command may take, on a busy machine too."""

_CODES = (0, 1, 2, 3, 4, 130)
_POLL = 0.004
_STOPPED = 2.0  # seconds between two polls
_MEMORY = 1 << 30  # that a reader of a small file may ask for
_ROOT = f'File "{Path(cbs_opt.__file__).resolve().parent.parent}{os.sep}'
_UNEXPECTED = ("Traceback (most recent call last)", "please report it")
_NO_ROOT_CAPABILITIES = 28, 0b11  # PR_SET_SECUREBITS: a process of uid 0 has no power, and keeps none


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    Attributes
    ----------
    code : int
        Exit code; the negative number of the signal that ended it.
    hung : bool
        Whether it was killed because it took too long.
    out, err : str
    sent : tuple of int
        Signals that it was sent while it ran.
    """

    code: int
    hung: bool
    out: str
    err: str
    sent: tuple[int, ...] = ()

    def finding(self, codes: Sequence[int] = _CODES) -> Finding:
        """What is wrong with how it ended; `codes` are the exit codes that are allowed."""
        shown = f"exit code {self.code}, stderr: {self.err[-600:]!r}"
        if self.hung:
            return Finding(Verdict.HUNG, shown)
        for word in _UNEXPECTED:
            at = max(self.err.find(word), self.out.find(word))
            # Of the interpreter itself there may be one, before it has come to the package.
            if at >= 0 and (word != _UNEXPECTED[0] or _ROOT in self.err[at:] + self.out):
                return Finding(Verdict.TRACEBACK, shown)
        if self.code < 0 and -self.code in self.sent:
            return FINE
        if self.code not in codes:
            return Finding(Verdict.CRASHED, shown)
        if self.code not in (0, 130) and not self.sent and not self.err.strip():
            return Finding(Verdict.CRASHED, f"exit code {self.code} without a word")
        return FINE


@dataclass(frozen=True)
class Surroundings:
    """Where and how a command runs.

    Attributes
    ----------
    folder : Path
        Its working directory.
    environment : mapping
        Variables to be set; None removes one.
    prepare : callable, optional
        Called in the child before the command.
    signals : sequence of (seconds, number)
        Sent to the process, each so long after the one before.
    patience : float
        Seconds until it is killed, and counts as hung.
    streams : mapping of int to object
        For 0, 1, 2 a file to be used in place of the usual one; None closes the stream.
    """

    folder: Path
    environment: Mapping[str, str | None] | None = None
    prepare: Callable[[], None] | None = None
    signals: Sequence[tuple[float, int]] = ()
    patience: float = PATIENCE
    streams: Mapping[int, Any] | None = None


def run(command: str, arguments: Sequence[object], there: Surroundings) -> Finished:
    """Run a command in a process that is forked from this one: no start-up, whatever is loaded is shared."""
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become(command, given, there, out, err)
        code, hung, sent = _wait(child, there)
        return Finished(code, hung, _text(out), _text(err), sent)


def run_fresh(command: str, arguments: Sequence[object], there: Surroundings) -> Finished:
    """Run a command in an interpreter of its own, as a user would."""
    environment = dict(os.environ)
    for name, value in (there.environment or {}).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    streams = dict(there.streams or {})
    closed = [number for number, stream in streams.items() if stream is None]

    def prepare() -> None:
        for number in closed:
            os.close(number)
        if there.prepare is not None:
            there.prepare()

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-m", f"cbs_opt.cli.{command}", *(os.fsencode(str(a)) for a in arguments)],
            cwd=there.folder,
            env=environment,
            stdin=streams.get(0) or subprocess.DEVNULL,
            stdout=streams.get(1) or out,
            stderr=streams.get(2) or err,
            preexec_fn=prepare,
            start_new_session=True,
        )
        code, hung, sent = _wait(process.pid, there)
        process.returncode = code
        return Finished(code, hung, _text(out), _text(err), sent)


def isolated(body: Callable[[], Finding], patience: float = PATIENCE, memory: int | None = _MEMORY) -> Finding:
    """Call a function in a forked process that may ask for so much more memory."""
    with tempfile.TemporaryFile() as result:
        child = os.fork()
        if child == 0:
            try:
                if memory is not None:
                    limit_memory(memory)
                pickle.dump(body(), result)
                result.flush()
            except BaseException as error:
                result.seek(0)
                pickle.dump(Finding(Verdict.TRACEBACK, f"{type(error).__name__}: {error}"), result)
                result.flush()
            finally:
                os._exit(0)
        code, hung, _ = _wait(child, Surroundings(Path(), patience=patience))
        if hung:
            return Finding(Verdict.HUNG, f"not ended after {patience:g} s")
        if code != 0:
            return Finding(Verdict.CRASHED, f"ended with code {code}")
        result.seek(0)
        found = pickle.load(result)
        assert isinstance(found, Finding)
        return found


def limit_memory(more: int) -> None:
    """Let this process have so many bytes of address space more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def drop_privileges() -> None:
    """Make the permissions of files hold for this process, although it may run as root."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    libc.prctl(*_NO_ROOT_CAPABILITIES, 0, 0, 0)
    if libc.capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def mount_small_disk(folder: Path, size: int) -> None:
    """Put an empty file system of so many bytes over a folder, for this process only; raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    private = 1 << 18 | 1 << 14  # MS_PRIVATE, MS_REC
    if libc.mount(b"none", b"/", None, private, None) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount")


def _become(
    command: str, arguments: list[str], there: Surroundings, out: IO[bytes], err: IO[bytes]
) -> None:  # pragma: no cover - in the child
    code = 99
    try:
        os.setsid()
        os.chdir(there.folder)
        for name, value in (there.environment or {}).items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", line_buffering=True)
        sys.argv = [f"cbs-{command}", *arguments]
        if there.prepare is not None:
            there.prepare()
        code = importlib.import_module(f"cbs_opt.cli.{command}").main(arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            # Not the other functions of `atexit`, which would remove temporary folders of the parent.
            if (loading := sys.modules.get("cbs_opt.solvers.kernels.loading")) is not None:
                loading.end_jobs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _wait(process: int, there: Surroundings) -> tuple[int, bool, tuple[int, ...]]:
    """Exit code, whether it was killed for taking too long, and the signals that it was sent."""
    began = time.monotonic()
    waiting = list(there.signals)
    due = began + waiting[0][0] if waiting else float("inf")
    sent: list[int] = []
    ends = began + there.patience
    last = began
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), False, tuple(sent)
        now = time.monotonic()
        if now - last > _STOPPED:  # this process, and then the other one too, was stopped meanwhile
            ends += now - last
        last = now
        if now >= due:
            number = waiting.pop(0)[1]
            os.kill(process, number)
            sent.append(number)
            due = now + waiting[0][0] if waiting else float("inf")
            ends = max(ends, now + 60.0)
        if now > ends:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return -signal.SIGKILL, True, tuple(sent)
        time.sleep(_POLL)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
