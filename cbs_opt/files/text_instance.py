"""Instances from text files of other programs: `.qplib`, `.ubqp` and `.qubo`.

Room: core, files; `read_instance` of this module is the one that the package exports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.instance_file import file_sha256
from cbs_opt.files.instance_file import read_instance as read_archive
from cbs_opt.files.paths import as_path
from cbs_opt.files.qplib_text import read_qplib
from cbs_opt.files.quadratic_text import QuadraticForm, read_qubo, read_ubqp
from cbs_opt.instance import Instance

READERS: dict[str, Callable[[Path], QuadraticForm]] = {
    ".qplib": read_qplib,
    ".ubqp": read_ubqp,
    ".qubo": read_qubo,
}
"""The reader of each extension."""


def is_text(path: Path | str) -> bool:
    """Whether a file is read as text, by its extension."""
    return Path(path).suffix.lower() in READERS


def read_form(path: Path | str) -> QuadraticForm:
    """Read a text file as a quadratic form; raises `InstanceError` as its reader does."""
    path = as_path(path)
    return READERS[path.suffix.lower()](path)


def read_instance(path: Path | str, budget: int | Callable[[int], int] | None = None) -> Instance:
    """Read an instance file, or a binary quadratic problem in a text format.

    Parameters
    ----------
    path : Path or str
        `.npz`, or `.qplib`, `.ubqp` or `.qubo`: a text format becomes an instance whose selection loss is its
        objective, a variable being 1 where a weight is pruned; see `docs/format.md`.
    budget : int, or callable, optional
        Number of variables that are 1, or a function of their number, for text that states none. Where the file
        states one, this takes precedence.

    Returns
    -------
    Instance
        Large arrays are memory-mapped if an `.npz` file stores them uncompressed.

    Raises
    ------
    InstanceError
        One sentence that names the file and the field or the line.
    UsageError
        When neither the file nor `budget` states how many variables are 1, or `budget` does not fit.

    Notes
    -----
    The file is read twice, once for its SHA-256 and once for its values; dense blocks are checked by Cholesky,
    O(Σ b_k³).
    """
    path = as_path(path)
    if not is_text(path):
        instance = read_archive(path)
        return instance if budget is None else instance.with_budget(_number(budget, instance.n))
    form = read_form(path)
    try:
        instance = form.to_instance(None if budget is None else _number(budget, form.n))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except InstanceError as error:
        text = str(error) if budget is None else f"the budget does not fit: {error}"
        raise (InstanceError if budget is None else UsageError)(f"{path}: {text}") from None
    return replace(instance, path=path, sha256=file_sha256(path))


def _number(budget: int | Callable[[int], int], n: int) -> int:
    return budget(n) if callable(budget) else budget
