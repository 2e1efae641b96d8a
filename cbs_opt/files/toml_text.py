"""TOML files of users: options, budgets, benchmarks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from cbs_opt.errors import CbsError


def read_toml(path: Path, error: type[CbsError]) -> tuple[dict[str, Any], str]:
    """The content of a TOML file, and its text.

    Raises
    ------
    CbsError
        The given class, for a file that cannot be read or is no TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror or failure}") from None
    except UnicodeDecodeError as failure:
        raise error(f"{path}: cannot be read: it is not UTF-8 text ({failure.reason})") from None
    except ValueError as failure:  # the sentence has the line
        raise error(f"{path}: is not valid TOML: {failure}") from None
    except RecursionError:
        raise error(f"{path}: is not valid TOML: it is nested too deeply") from None
