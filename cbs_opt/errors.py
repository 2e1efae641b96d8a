"""The errors that a user can cause, each with the exit code that the command lines give it."""

from __future__ import annotations

from typing import ClassVar


class CbsError(Exception):
    """Base of every error that has one clear sentence for its reader."""

    exit_code: ClassVar[int] = 4


class UsageError(CbsError):
    """An option, a parameter or a combination of them that makes no sense."""

    exit_code = 2


class InstanceError(CbsError):
    """An instance, or the file that holds it, is wrong: the sentence names the field."""

    exit_code = 3


class SolutionError(CbsError):
    """A solution file is wrong, or does not belong to the instance."""

    exit_code = 3


class OutputError(CbsError):
    """A file could not be written."""

    exit_code = 3


class SolverError(CbsError):
    """A solver is missing, cannot take this instance, or failed."""

    exit_code = 4


class RequirementError(CbsError):
    """A package that the job needs is not installed."""

    exit_code = 4


class UnboundedError(CbsError):
    """The update problem has no minimum: H is singular along a direction that the linear term favours."""
