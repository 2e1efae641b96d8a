"""Paths as callers pass them."""

from __future__ import annotations

import os
from pathlib import Path

from cbs_opt.errors import UsageError


def real_path(path: Path | str) -> Path:
    """The path without links, also where these form a loop, on which `Path.resolve` fails."""
    return Path(os.path.realpath(path))


def as_path(path: object) -> Path:
    """`path` as a Path; raises `UsageError` for anything but a text or a Path."""
    if isinstance(path, str | Path):
        return Path(path)
    raise UsageError(f"`path` must be a text or a Path, got {path!r:.60} ({type(path).__name__})")
