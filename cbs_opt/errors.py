"""The errors that a user can cause, each with its exit code on the command line."""

from __future__ import annotations

import re
from typing import ClassVar

# Control characters but tab and line feed, and those that end lines or turn the direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text with control characters written out: what comes from a file must not command the terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def bounded(text: str, most: int = 2000) -> str:
    """A text of at most about `most` characters: what it quotes may be as long as a file."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text)} characters)"


class CbsError(Exception):
    """Base of all errors whose message is one sentence for the user.

    As text it has no control characters and at most about 2000 characters, whatever it quotes of a file.
    """

    exit_code: ClassVar[int] = 4

    def __str__(self) -> str:
        return bounded(visible(bounded(super().__str__())))


class UsageError(CbsError):
    """An invalid option or parameter, or an invalid combination of them."""

    exit_code = 2


class InstanceError(CbsError):
    """An invalid instance or instance file; the message names the field."""

    exit_code = 3


class SolutionError(CbsError):
    """An invalid solution file, or one that does not belong to the instance."""

    exit_code = 3


class OutputError(CbsError):
    """A file could not be written."""

    exit_code = 3


class SolverError(CbsError):
    """A solver is missing, cannot take this instance, or failed."""

    exit_code = 4


class CrossGroupsError(SolverError):
    """A solver cannot take a second partition of the weights; `registry.check_supports` adds which ones can."""


class MemoryShortageError(SolverError):
    """What a solver would hold at once is more than the memory that there is."""


class RequirementError(CbsError):
    """A required package is not installed."""

    exit_code = 4


class UnboundedError(CbsError):
    """The update problem has no minimum: H is singular along a descent direction of the linear term."""
