"""Handling of Ctrl-C before a command has set its own handlers. Imports nothing that takes time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

_COMMANDS = {"cbs-solve", "cbs-info", "cbs-export", "cbs-apply", "cbs-prune", "cbs-bench"}
"""The commands, as in `project.scripts`."""


def end_quietly_while_importing() -> None:
    """Let Ctrl-C end a command of this package without a traceback while it still imports; code 130.

    Imports take most of a second, and the handlers of a command come after them. In a process that merely imports
    the package nothing changes.
    """
    if (
        is_command(sys.argv, sys.orig_argv)
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where the signal is ignored
    ):
        signal.signal(signal.SIGINT, _end)


class Noted:
    """Ctrl-C raises `KeyboardInterrupt` inside of this block, as usual, and is known afterwards.

    Extension modules that are being imported turn it into errors of their own.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Noted:
        ours = signal.getsignal(signal.SIGINT) in (_end, signal.default_int_handler)
        if ours and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt


def is_command(argv: list[str], original: list[str]) -> bool:
    """Whether a process with these arguments is one of our commands, by its script or as ``python -m cbs_opt.…``.

    While a package is imported for ``-m`` the first argument is still ``-m`` itself.
    """
    name = os.path.basename(argv[0]) if argv else ""  # noqa: PTH119
    if name.removesuffix(".exe").removesuffix("-script.py") in _COMMANDS:
        return True
    if not argv or argv[0] != "-m" or "-m" not in original:
        return False
    after = original[original.index("-m") + 1 :]
    return bool(after) and after[0].startswith(("cbs_opt.cli.", "cbs_opt.bench."))


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(130)
