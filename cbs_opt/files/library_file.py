"""The shipped instances, by name: `library:NAME` wherever an instance file is expected."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from cbs_opt.errors import InstanceError
from cbs_opt.files.instance_file import read_instance
from cbs_opt.files.paths import as_path
from cbs_opt.instance import Instance

logger = logging.getLogger("cbs_opt")

PREFIX = "library:"
INDEX = "index.json"
INDEX_FORMAT = "cbs-library"
INDEX_VERSION = 1


@dataclass(frozen=True)
class BestKnown:
    """The best known value of a problem of the library.

    Parameters
    ----------
    objective : {"selection", "joint"}
    budget : int
        Weights to prune.
    value : float
        The loss.
    bound : float or None
        Proven lower bound.
    proven : bool
        Whether `value` is optimal to 1e-6 relative.
    solver : str
        The solver that found it.
    """

    objective: str
    budget: int
    value: float
    bound: float | None
    proven: bool
    solver: str


@dataclass(frozen=True)
class LibraryEntry:
    """An entry of the index: description, origin and best known values of an instance."""

    name: str
    sha256: str
    origin: str
    n: int
    blocks: int
    curvature: str
    budget: int
    groups: int
    best_known: tuple[BestKnown, ...]

    @property
    def path(self) -> Path:
        """The instance file."""
        return _folder() / f"{self.name}.npz"

    def best(self, objective: str, budget: int | None = None) -> BestKnown | None:
        """The best-known value for an objective and a budget, the file's own when None; None if there is none."""
        wanted = objective, self.budget if budget is None else budget
        return next((best for best in self.best_known if (best.objective, best.budget) == wanted), None)


def library(name: str) -> Instance:
    """Read an instance that ships with the package.

    Parameters
    ----------
    name : str
        One of `library_names()`.

    Returns
    -------
    Instance

    Raises
    ------
    InstanceError
        For a name that is not in the library.

    Examples
    --------
    >>> import cbs_opt
    >>> cbs_opt.library("mlp-output-20").n
    20
    """
    return read_instance(library_path(name))


def library_names() -> list[str]:
    """The names of the instances that ship with the package."""
    return [entry.name for entry in library_entries()]


def library_path(name: str) -> Path:
    """The file of an instance that ships with the package; raises `InstanceError` for an unknown name."""
    path = _folder() / f"{name}.npz"
    return path if re.fullmatch(r"[\w.-]+", name) and path.is_file() else library_entry(name).path


def library_entry(name: str) -> LibraryEntry:
    """The line of the index with this name; raises `InstanceError` for an unknown name."""
    entries = {entry.name: entry for entry in library_entries()}
    if name not in entries:
        raise InstanceError(f"{PREFIX}{name}: no instance of the library; it has {', '.join(entries)}")
    return entries[name]


@cache
def library_entries() -> tuple[LibraryEntry, ...]:
    """The index of the library, small instances first.

    Raises
    ------
    InstanceError
        When the index is missing or from a newer version.
    """
    path = _folder() / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InstanceError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (
        INDEX_FORMAT,
        INDEX_VERSION,
    ):
        raise InstanceError(f"{path}: is not an index of version {INDEX_VERSION}")
    try:
        return tuple(_entry(item) for item in content["instances"])
    except (TypeError, LookupError) as error:
        raise InstanceError(f"{path}: is damaged: {error}") from None


def best_known(instance: Instance, objective: str) -> BestKnown | None:
    """The best known value of `instance`, or None if there is none.

    Instances are recognised by the hash of their file and by their budget. An index that cannot be read is
    mentioned in the log: it is not needed to solve.
    """
    damping = instance.curvature.damping
    if damping is not None and damping != instance.metadata.get("damping"):
        return None
    try:
        entry = next((entry for entry in library_entries() if entry.sha256 == instance.sha256), None)
    except InstanceError as error:
        logger.warning(f"best known values are not available: {error}")
        return None
    groups = 0 if instance.budget.groups is None else instance.budget.number_of_groups
    crossed = instance.budget.cross_groups is not None
    if entry is None or crossed or groups != entry.groups:  # the same budget with other groups is another problem
        return None
    return entry.best(objective, instance.budget.total)


def resolve(path: Path | str) -> Path:
    """The file that `library:NAME` denotes; any other path unchanged."""
    text = str(path)
    return library_path(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else as_path(path)


def _entry(item: dict[str, Any]) -> LibraryEntry:
    return LibraryEntry(**{**item, "best_known": tuple(BestKnown(**best) for best in item["best_known"])})


def _folder() -> Path:
    # The files are data of another package, of which only the empty `__init__` is imported.
    return Path(str(resources.files("cbs_opt.instances.library")))
