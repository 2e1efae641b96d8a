"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

Facts = list[tuple[str, str]]
"""Names and values in the order in which they are shown."""


def number(value: float | None) -> str:
    """A loss with seven digits, or a dash."""
    return "-" if value is None else f"{value:.6e}"


def short(value: float | None) -> str:
    """A number with four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    """A gap in percent, or a dash."""
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if value < 100 else "> 1e4 %"


def share(part: int, whole: int) -> str:
    """A part of a whole in percent, or a dash where the whole is empty."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def count(value: int, noun: str) -> str:
    """A number and its noun: "1 block", "3,560 weights"."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def shape(lengths: Iterable[int]) -> str:
    """A shape: "40 × 64"."""
    return " × ".join(str(length) for length in lengths)


def sizes(values: ArrayLike) -> str:
    """Sizes with their multiplicities, "40 of 64, 20 of 40"; only the range where they are many."""
    different, counts = np.unique(np.asarray(values), return_counts=True)
    if different.size > 4:
        return f"{different[0]:,} to {different[-1]:,}"
    pairs = zip(different[::-1].tolist(), counts[::-1].tolist(), strict=True)
    if different.size == 1:
        return f"{different[0]:,}"
    return ", ".join(f"{times:,} of {size:,}" for size, times in pairs)


def facts(rows: Facts, indent: str = "", width: int = 0) -> str:
    """Names and values as two columns, the first at least `width` wide; lines of one value are aligned."""
    width = max([width, *(len(name) for name, _ in rows)])
    gap = "\n" + indent + " " * (width + 2)
    return "\n".join(f"{indent}{name:<{width}}  {value.replace(chr(10), gap)}".rstrip() for name, value in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, indent: str = "") -> str:
    """A table of text; the first `left` columns are aligned on the left, the others on the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]
    out = []
    for line in lines:
        cells = [
            f"{cell:<{width}}" if c < left else f"{cell:>{width}}"
            for c, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(out)
