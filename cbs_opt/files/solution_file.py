"""Reading and writing solution files, `cbs-solution` version 1; `docs/format.md` is the specification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.errors import SolutionError, UsageError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.npz import NpzReader, json_text, write_npz
from cbs_opt.files.paths import as_path
from cbs_opt.instance import Instance
from cbs_opt.jsonable import finite
from cbs_opt.solution import HasSolution, Solution

FORMAT = "cbs-solution"
VERSION = 1


def read_solution(path: Path | str, instance: Instance | None = None) -> Solution:
    """Read a solution file.

    Parameters
    ----------
    path : Path or str
    instance : Instance, optional
        Check that the solution belongs to it, by hash where both have one, and by size.

    Raises
    ------
    SolutionError
        One sentence that names the file and the field.
    """
    path = as_path(path)
    with NpzReader(path, SolutionError) as npz:
        npz.check_format(FORMAT, VERSION)
        npz.check_keys({"format", "version", "instance_sha256", "pruned", "result"}, {"weights"})
        (n,) = npz.expect("pruned", "bool", (None,)).shape
        weights = None
        if "weights" in npz.headers:
            npz.expect("weights", "float", (n,))
            weights = npz.read("weights").astype(np.float64)
            if not np.isfinite(weights).all():
                raise SolutionError(f"{path}: `weights` has NaN or infinite entries")
        result = npz.json_object("result")
        solution = Solution(npz.read("pruned"), npz.text("instance_sha256"), weights, result)
    if instance is not None:
        if solution.pruned.size != instance.n:
            raise SolutionError(f"{path}: `pruned` must have shape ({instance.n},) for this instance, got ({n},)")
        if solution.instance_sha256 and instance.sha256 and solution.instance_sha256 != instance.sha256:
            raise SolutionError(
                f"{path}: `instance_sha256` is {solution.instance_sha256[:12]}…, the instance has "
                f"{instance.sha256[:12]}…: the solution belongs to another instance"
            )
    return solution


def write_solution(path: Path | str, solution: Solution | HasSolution) -> None:
    """Write a solution file.

    Parameters
    ----------
    path : Path or str
    solution : Solution or Result
        The result of `solve`, or a selection with any JSON object.

    Raises
    ------
    UsageError
        For anything else.
    OutputError
        When the file cannot be written; nothing is left behind then.
    """
    if not isinstance(solution, Solution) and hasattr(solution, "to_solution"):
        solution = solution.to_solution()
    if not isinstance(solution, Solution):
        raise UsageError(
            f"`solution` must be a Result or a Solution, got {type(solution).__name__}: "
            "write_solution(path, solution)"
        )
    arrays: dict[str, NDArray[Any]] = {
        "format": np.array(FORMAT),
        "version": np.array(VERSION, dtype=np.int64),
        "instance_sha256": np.array(solution.instance_sha256),
        "pruned": solution.pruned,
    }
    if solution.weights is not None:
        arrays["weights"] = solution.weights
    try:
        arrays["result"] = json_text(solution.result)
    except (TypeError, ValueError) as error:
        raise SolutionError(f"`result` cannot be written as JSON: {error}") from None
    write_npz(path, arrays)


def write_json(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write a JSON object, NaN and infinities as null; raises `OutputError` when the file cannot be written."""
    with atomic_write(path) as file:
        file.write((json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode())
