"""Shared by all command lines: options, errors and exit codes, logging, signals."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from cbs_opt import early_signals
from cbs_opt.device import is_out_of_memory
from cbs_opt.errors import CbsError, OutputError, UsageError, bounded, visible
from cbs_opt.files.atomic import check_writable
from cbs_opt.files.paths import real_path
from cbs_opt.memory import available_bytes, hold_products
from cbs_opt.optional import missing
from cbs_opt.version import __version__

logger = logging.getLogger("cbs_opt")

_LONGEST = 2500  # characters of what is printed about an error, which has a limit of its own

EXIT_OK, EXIT_NONE, EXIT_FILE, EXIT_SOLVER, EXIT_KILLED = 0, 1, 3, 4, 130


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`, takes underscores for dashes, and knows `--version`."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(message)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """The arguments with underscores in option names replaced by dashes."""
    out = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        out.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return out


def run_main(program: str, body: Callable[[list[str]], int], arguments: Sequence[str] | None) -> int:
    """Run the body of a command; errors become one sentence on stderr and an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    _keep_printing(sys.stdout)
    with early_signals.Noted() as interrupt:
        return _run(program, body, given, interrupt)


def _run(program: str, body: Callable[[list[str]], int], given: list[str], interrupt: early_signals.Noted) -> int:
    try:
        with warnings.catch_warnings():
            if "--debug" not in given:
                warnings.simplefilter("ignore")  # of NumPy, as on overflow: results are checked to be finite
            hold_products()
            return body(with_dashes(given))
    except CbsError as error:
        if "--debug" in given:
            raise
        hint = f" ({program} --help lists the options)" if isinstance(error, UsageError) else ""
        _complain(f"{program}: {error}{hint}")
        return error.exit_code
    except BrokenPipeError:
        # The reader of stdout has closed it; redirect stdout so that the interpreter's flush is silent.
        _drop_stdout()
        return EXIT_OK
    except KeyboardInterrupt:
        return EXIT_KILLED
    except ModuleNotFoundError as error:
        if "--debug" in given:
            raise
        _complain(f"{program}: this {missing(error)}")
        return EXIT_SOLVER
    except MemoryError:
        if "--debug" in given:
            raise
        left = available_bytes()
        known = f": {max(left, 0.0) / 1e9:.1f} GB are left to this process" if left < math.inf else ""
        _complain(f"{program}: out of memory{known}")
        return EXIT_SOLVER
    except ImportError as error:  # as without memory for a shared library
        if interrupt.asked or _is_of_interrupt(error):
            return EXIT_KILLED
        if "--debug" in given:
            raise
        _complain(f"{program}: a library cannot be loaded: {error}")
        return EXIT_SOLVER
    except OSError as error:
        if "--debug" in given:
            raise
        _complain(f"{program}: {_in_words(error)}")
        return EXIT_FILE
    except Exception as error:
        if _is_of_interrupt(error):
            return EXIT_KILLED
        if "--debug" in given:
            raise
        if os.strerror(errno.EMFILE) in str(error):  # libraries that do not raise OSError
            _complain(f"{program}: {os.strerror(errno.EMFILE)}: `ulimit -n` sets how many may be")
            return EXIT_FILE
        if is_out_of_memory(error):
            _complain(f"{program}: the memory of the card is too short: `--device cpu` has more")
            return EXIT_SOLVER
        _complain(f"{program}: unexpected {type(error).__name__}: {error}; --debug shows where: please report it")
        return EXIT_SOLVER


def _is_of_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error, as where Python makes one of what a class raises while it is defined."""
    seen: BaseException | None = error
    for _ in range(50):
        if seen is None or isinstance(seen, KeyboardInterrupt):
            break
        seen = seen.__cause__ or seen.__context__
    return isinstance(seen, KeyboardInterrupt)


def _open_streams() -> None:
    """Put streams that lead nowhere in the place of a closed stdout or stderr."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def _complain(sentence: str) -> None:
    print(bounded(visible(sentence), _LONGEST), file=sys.stderr)  # noqa: T201


def _in_words(error: OSError) -> str:
    """The sentence of an error of the operating system."""
    try:
        Path.cwd()
    except OSError:
        return "the working directory has been removed: change to one that exists"
    name = "" if error.filename is None else f"{error.filename}: "
    return f"{name}{error.strerror or error}"


def _keep_printing(stream: object) -> None:
    """Replace characters that the terminal cannot show, such as `ᵀ`, instead of raising."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Write to stdout and flush, so that an error is reported now and not at interpreter exit."""
    try:
        sys.stdout.write(visible(text))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_stdout()
        raise OutputError(f"stdout: cannot be written: {error.strerror or error}") from error


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_outputs(inputs: Iterable[Path | str | None], outputs: Iterable[Path | str | None]) -> None:
    """Check before the work that its results can be written and do not overwrite an input.

    None denotes an output that was not requested.

    Raises
    ------
    UsageError
        For an output that is an input, or is named twice.
    OutputError
        For one that cannot be written.
    """
    taken = {real_path(path) for path in inputs if path is not None}
    seen: set[Path] = set()
    for path in outputs:
        if path is None:
            continue
        resolved = real_path(path)
        if resolved in taken:
            raise UsageError(f"{path}: is an input; the output would overwrite it")
        if resolved in seen:
            raise UsageError(f"{path}: is named for two outputs")
        seen.add(resolved)
        check_writable(path)


def start_logging(quiet: bool, verbose: bool) -> None:
    """Send the package's log to stderr, as plain lines; raises `UsageError` for both options together."""
    if quiet and verbose:
        raise UsageError("`-q` and `-v` exclude each other")
    for handler in [h for h in logger.handlers if isinstance(h, logging.StreamHandler)]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


class _PlainFormatter(logging.Formatter):
    """Plain messages; warnings and errors are labelled; tracebacks only when debugging."""

    def format(self, record: logging.LogRecord) -> str:
        text = visible(record.getMessage())
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
            if logger.isEnabledFor(logging.DEBUG):
                text += "\n" + self.formatException(record.exc_info)
        return text


class Interrupts:
    """SIGINT and SIGTERM: the first asks the run to stop, the second ends the process with code 130.

    Use as a context manager and pass it as `Stop.should_stop`.

    Parameters
    ----------
    message : str
        What the first signal does, for stderr.
    """

    def __init__(
        self, message: str = "stopping with the best selection so far; once more to quit at once"
    ) -> None:
        self.asked = False
        self._message = f"interrupted: {message}\n".encode()
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        """Whether a stop has been asked for."""
        return self.asked

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: signals are not handled here
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            os._exit(EXIT_KILLED)
        self.asked = True
        os.write(2, self._message)
