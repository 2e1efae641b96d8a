"""Measurements in a file of JSON lines, one a line: what a run that was ended has measured is not measured again.

Room: bench; its commands use it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_lines(path: Path, kind: Callable[..., T]) -> list[T]:
    """What `kind` makes of the objects of a file; an unfinished line, of a run that was ended, is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(kind(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def add_line(path: Path, value: Any) -> None:
    """Append a dataclass to a file, whatever its last line is."""
    before = path.read_bytes() if path.exists() else b""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * (before[-1:] not in (b"", b"\n")) + json.dumps(vars(value)) + "\n")


def once(path: Path | None, kind: Callable[..., T], is_it: Callable[[T], bool], make: Callable[[], T]) -> T:
    """The measurement for which `is_it` holds: from the file, or made, and added to it."""
    if path is not None:
        for found in read_lines(path, kind):
            if is_it(found):
                return found
    made = make()
    if path is not None:
        add_line(path, made)
    return made
