"""Kinds of curvature, by the array that identifies them in an instance file."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from cbs_opt.curvature.base import Curvature
from cbs_opt.errors import InstanceError

GROUP = "cbs_opt.curvatures"
"""Entry-point group through which third parties add kinds: ``name = "module:CurvatureClass"``."""

C = TypeVar("C", bound=type[Curvature])

_registered: dict[str, type[Curvature]] = {}


def register_curvature(kind: str) -> Callable[[C], C]:
    """Class decorator that adds a kind of curvature to the file format, in this process.

    Parameters
    ----------
    kind : str
        The first of the class's `members`: the array by which a file is recognised.

    Raises
    ------
    InstanceError
        When the class has no such member, or shares a member with another kind. A class that is defined again, as
        in notebooks, replaces the old one.
    """

    def add(curvature: C) -> C:
        if next(iter(curvature.members), None) != kind:
            raise InstanceError(f"the first of the `members` of {curvature.__name__} must be '{kind}'")
        for name, other in _registered.items():
            redefined = (other.__module__, other.__qualname__) == (curvature.__module__, curvature.__qualname__)
            if not redefined and (shared := curvature.members.keys() & other.members.keys()):
                raise InstanceError(
                    f"the array '{sorted(shared)[0]}' belongs to the kind of curvature '{name}' already"
                )
        curvature.kind = kind
        _registered[kind] = curvature
        return curvature

    return add


def curvature_kinds() -> dict[str, type[Curvature]]:
    """All kinds by name, those of the package first, then those of installed third parties.

    Raises
    ------
    InstanceError
        When a third party's kind cannot be loaded.
    """
    for entry in entry_points(group=GROUP):
        if entry.name not in _registered:
            try:
                register_curvature(entry.name)(entry.load())
            except Exception as error:
                raise InstanceError(
                    f"the kind of curvature '{entry.name}' of {entry.value} cannot be loaded: {error}"
                ) from error
    return dict(_registered)
