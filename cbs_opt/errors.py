"""The errors that a user can cause, each with its exit code on the command line."""

from __future__ import annotations

from typing import ClassVar


class CbsError(Exception):
    """Base of all errors whose message is one sentence for the user."""

    exit_code: ClassVar[int] = 4


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


class MemoryShortageError(SolverError):
    """What a solver would hold at once is more than the memory that there is."""


class RequirementError(CbsError):
    """A required package is not installed."""

    exit_code = 4


class UnboundedError(CbsError):
    """The update problem has no minimum: H is singular along a descent direction of the linear term."""
