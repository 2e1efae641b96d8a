"""TOML files of users: options, budgets, benchmarks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from cbs_opt.errors import CbsError

_LARGEST = 1 << 24  # bytes
_DEEPEST = 100  # dots of a key, with which the time and the memory of tomllib grow quadratically


def read_toml(path: Path, error: type[CbsError]) -> tuple[dict[str, Any], str]:
    """The content of a TOML file, and its text.

    Raises
    ------
    CbsError
        The given class, for a file that cannot be read or is no TOML.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise error(f"{path}: is longer than {_LARGEST >> 20} MB, too long for a file of options")
        text = path.read_text(encoding="utf-8")
        if any(_has_deep_key(line) for line in text.splitlines()):
            raise error(f"{path}: is not valid TOML: a key is nested too deeply")
        return tomllib.loads(text), text
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror or failure}") from None
    except UnicodeDecodeError as failure:
        raise error(f"{path}: cannot be read: it is not UTF-8 text ({failure.reason})") from None
    except ValueError as failure:  # the sentence has the line
        raise error(f"{path}: is not valid TOML: {failure}") from None
    except RecursionError:
        raise error(f"{path}: is not valid TOML: it is nested too deeply") from None


def _has_deep_key(line: str) -> bool:
    """Whether a line holds a key of very many parts; numbers of an array have commas between them."""
    return line.count(".") > _DEEPEST and any(
        part.count(".") > _DEEPEST and "," not in part for part in line.split("=")
    )
