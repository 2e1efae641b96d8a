"""Paths as callers pass them."""

from __future__ import annotations

from pathlib import Path

from cbs_opt.errors import UsageError


def as_path(path: object) -> Path:
    """`path` as a Path; raises `UsageError` for anything but a text or a Path."""
    if isinstance(path, str | Path):
        return Path(path)
    raise UsageError(f"`path` must be a text or a Path, got {path!r:.60} ({type(path).__name__})")
