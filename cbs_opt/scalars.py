"""Checks for numbers as arguments: those of Python and NumPy, but no booleans and no text."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def is_finite(value: Any) -> bool:
    """Whether a value is a real number that is neither NaN nor infinite."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, 3.0 included."""
    return is_finite(value) and int(value) == value


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number of an integer type."""
    return not isinstance(value, bool) and isinstance(value, Integral)
