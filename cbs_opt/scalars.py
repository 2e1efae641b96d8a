"""Checks for numbers as arguments: those of Python and NumPy, but no booleans and no text."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from cbs_opt.errors import UsageError

MOST_WHOLE = 2**63 - 1
"""The largest whole number of int64."""


def checked_seed(value: Any) -> int:
    """A seed; raises `UsageError` for anything but a whole number from 0 to 2**63 - 1."""
    whole = not isinstance(value, bool) and isinstance(value, Integral)
    if whole and int(value) > MOST_WHOLE:
        raise UsageError(f"`seed` must be a whole number of at most {MOST_WHOLE}, got {value}")
    if not whole or value < 0:
        raise UsageError(f"`seed` must be a whole number of at least 0, got {value!r:.60}")
    return int(value)


def is_finite(value: Any) -> bool:
    """Whether a value is a real number that is neither NaN nor infinite, nor beyond float64."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, 3.0 included."""
    return is_finite(value) and int(value) == value


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number of an integer type, within int64."""
    return not isinstance(value, bool) and isinstance(value, Integral) and abs(int(value)) <= MOST_WHOLE
