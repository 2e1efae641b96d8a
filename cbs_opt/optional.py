"""Packages that the core needs only for one job: imported when the job is asked for, missed in one sentence."""

from __future__ import annotations

import importlib
from types import ModuleType

from cbs_opt.errors import RequirementError

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "dwave": "dwave-samplers"}
"""Names under which packages are installed, where they are imported under others."""


def require(module: str, purpose: str) -> ModuleType:
    """Import a module that only `purpose` needs.

    Parameters
    ----------
    module : str
        Its dotted name.
    purpose : str
        What needs it, as the subject of the sentence: "a picture".

    Raises
    ------
    RequirementError
        When it is not installed, with the command that helps.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RequirementError(f"{purpose} {missing(error)}") from error


def missing(error: ModuleNotFoundError) -> str:
    """The end of a sentence about what could not be imported: "needs the package …, which is not installed …"."""
    name = (error.name or "").partition(".")[0] or "that it imports"
    name = _DISTRIBUTIONS.get(name, name)
    return f"needs the package '{name}', which is not installed: pip install {name}"
