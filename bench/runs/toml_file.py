"""Configuration files in TOML: reading, and complaints that name the line of a key.

A file has keys at its top and one array of tables, such as `[[solvers]]`. What a key may hold is a `Check`: a
function that says whether a value is allowed, and the words for what is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cbs_opt.errors import CbsError, UsageError
from cbs_opt.files.toml_text import read_toml
from cbs_opt.scalars import is_integer

Check = tuple[Callable[[Any], bool], str]

WHOLE = "a whole number"


def is_whole(value: Any, lowest: int) -> bool:
    """Whether this is a whole number of at least `lowest`, within int64."""
    return isinstance(value, int) and is_integer(value) and value >= lowest


def is_number(value: Any, lowest: float, highest: float) -> bool:
    """Whether this is a number between the two, both included."""
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest


def is_list(value: Any, item: Callable[[Any], bool]) -> bool:
    """Whether this is a list with at least one entry, all of which are as `item` says."""
    return isinstance(value, list) and bool(value) and all(item(entry) for entry in value)


SEEDS: Check = (
    lambda v: is_list(v, lambda s: is_whole(s, 0)) and len(set(v)) == len(v),
    "a list of different whole numbers ≥ 0 and below 2^63",
)
TEXT: Check = (lambda v: isinstance(v, str) and bool(v), "a text")


def open_toml(source: Path | str, shipped: Mapping[str, Path], tables: str) -> TomlFile:
    """Read a file, or a shipped one by its name.

    Parameters
    ----------
    source : Path or str
    shipped : mapping of str to Path
    tables : str
        The name of the array of tables.

    Raises
    ------
    UsageError
        For a file that cannot be read or is no TOML.
    """
    path = Path(source)
    if path.suffix != ".toml" and not path.is_file():
        if str(source) not in shipped:
            raise UsageError(f"{source}: is neither a file nor one of the configurations {', '.join(shipped)}")
        path = shipped[str(source)]
    content, text = read_toml(path, UsageError)
    return TomlFile(path, text, content, tables)


class TomlFile:
    """A file that has been read.

    Attributes
    ----------
    path : Path
    content : dict
    """

    def __init__(self, path: Path, text: str, content: dict[str, Any], tables: str) -> None:
        self.path, self.content = path, content
        self._lines = text.splitlines()
        head = rf"\s*\[\[\s*{re.escape(tables)}\s*\]\]"
        self._heads = [i for i, line in enumerate(self._lines) if re.match(head, line)]

    def check(
        self, table: Mapping[str, Any], known: Mapping[str, Check], number: int | None = None, where: str = "here"
    ) -> None:
        """Raise `UsageError` for an unknown key or a value that is not allowed.

        Parameters
        ----------
        table : mapping
        known : mapping of str to Check
        number : int, optional
            Of the table in the array; None for the rest of the file.
        where : str
            What the table is, in words.
        """
        for key, value in table.items():
            if key not in known:
                raise self.error(number, key, f"there is no key `{key}` {where}; known: {', '.join(known)}")
            holds, expected = known[key]
            if not holds(value):
                raise self.error(number, key, f"`{key}` must be {expected}, got {str(value)[:60]!r}")

    def require(self, table: Mapping[str, Any], known: Mapping[str, Check], keys: Iterable[str]) -> None:
        """Raise `UsageError` for a key at the top that is missing."""
        for key in keys:
            if key not in table:
                raise UsageError(f"{self.path}: `{key}` is missing: {known[key][1]}")

    def error(self, number: int | None, key: str | None, sentence: str) -> CbsError:
        """A complaint with file and line."""
        return UsageError(f"{self.path}, line {self._line(number, key)}: {sentence}")

    def _line(self, number: int | None, key: str | None) -> int:
        """The line of a key at the top, or of the table with this number, from 1; TOML readers do not tell."""
        whole = (0, len(self._lines))
        if len(self._heads) <= (number or 0):
            start, stop = whole  # tables written as one inline array
        elif number is None:
            start, stop = 0, self._heads[0]
        else:
            ends = [*self._heads[1:], len(self._lines)]
            start, stop = self._heads[number], ends[number]
        if key is not None:
            for first, last in ((start, stop), whole):
                for i in range(first, last):
                    code = self._lines[i].partition("#")[0]
                    if re.search(rf"(^|[\s{{,.\[])[\"']?{re.escape(key)}[\"']?\s*(=|\.|\]|$)", code):
                        return i + 1
        return start + 1
