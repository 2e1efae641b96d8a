"""Checks for numbers as arguments: those of Python and NumPy, but no booleans and no text."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

MOST_WHOLE = 2**63 - 1
"""The largest whole number of int64."""


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
