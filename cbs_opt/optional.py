"""Optional packages: imported when they are needed; if missing, the error is one sentence."""

from __future__ import annotations

import importlib
from types import ModuleType

from cbs_opt.errors import RequirementError

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "dwave": "dwave-samplers"}
"""Names under which packages are installed, if they differ from those under which they are imported."""


def require(module: str, purpose: str) -> ModuleType:
    """Import a module that only `purpose` needs.

    Parameters
    ----------
    module : str
        Its dotted name.
    purpose : str
        What needs the module, as the subject of the sentence: "a picture".

    Raises
    ------
    RequirementError
        When it is not installed; the message gives the command to install it.
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
