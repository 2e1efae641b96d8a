"""Packages that the core needs only for one job: imported when the job is asked for, missed in one sentence."""

from __future__ import annotations

import importlib
from types import ModuleType

from cbs_opt.errors import RequirementError


def require(module: str, purpose: str, distribution: str | None = None) -> ModuleType:
    """Import a module that only `purpose` needs.

    Parameters
    ----------
    module : str
        Its dotted name.
    purpose : str
        What needs it, as the subject of the sentence: "a picture".
    distribution : str, optional
        What to install, where its name is not that of the top-level package.

    Raises
    ------
    RequirementError
        When it is not installed, with the command that helps.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        name = distribution or missing.partition(".")[0]
        raise RequirementError(
            f"{purpose} needs the package '{name}', which is not installed: pip install {name}"
        ) from error
