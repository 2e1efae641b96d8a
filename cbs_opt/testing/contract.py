"""Checks: their names, how they fail, how all of them are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


class ContractError(AssertionError):
    """A failed check; the message states what was expected and what was found."""


@dataclass(frozen=True)
class Check:
    """One check; call it to run it.

    Attributes
    ----------
    name : str
    body : callable
        Raises `ContractError` when the check fails.
    """

    name: str
    body: Callable[[], None]

    def __call__(self) -> None:
        """Run the check."""
        self.body()

    def __str__(self) -> str:
        return self.name


def run_all(subject: str, checks: Iterable[Check]) -> list[str]:
    """Run every check and return their names.

    Raises
    ------
    ContractError
        When any check failed, with a line for each; any other exception of a check counts as a failure.
    """
    names, failures = [], []
    for check in checks:
        names.append(check.name)
        try:
            check()
        except Exception as error:
            kind = "" if isinstance(error, ContractError) else f"{type(error).__name__}: "
            failures.append(f"  {check.name}: {kind}{error}")
    if failures:
        lines = "\n".join(failures)
        raise ContractError(f"{subject} fails {len(failures)} of {len(names)} checks:\n{lines}")
    return names


def require(condition: bool, sentence: str) -> None:
    """Raise `ContractError` unless `condition` holds."""
    if not condition:
        raise ContractError(sentence)


def require_close(
    found: ArrayLike, expected: ArrayLike, what: str, *, rel: float = 1e-7, scale: float | None = None
) -> None:
    """Raise `ContractError` unless two arrays have one shape and agree.

    Parameters
    ----------
    found, expected : array_like
    what : str
        What is compared, for the message.
    rel : float
        Tolerance relative to `scale`.
    scale : float, optional
        The largest absolute entry of `expected` when not given.
    """
    a, b = np.asarray(found), np.asarray(expected)
    require(a.shape == b.shape, f"{what} must have shape {b.shape}, got {a.shape}")
    size = float(np.max(np.abs(b), initial=0.0)) if scale is None else scale
    difference = float(np.max(np.abs(a - b), initial=0.0))
    require(
        difference <= rel * size + 1e-300,
        f"{what} is wrong by {difference:.3g}, where the entries are about {size:.3g}",
    )
