"""The output of a solve: JSON, text, CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbs_opt.cli.common import say
from cbs_opt.files.atomic import write_csv
from cbs_opt.files.library_file import BestKnown
from cbs_opt.files.quadratic_text import STATED, stated_value
from cbs_opt.files.solution_file import write_json as write_json_file
from cbs_opt.jsonable import finite
from cbs_opt.result import SCHEMA as SCHEMA
from cbs_opt.result import Result
from cbs_opt.view.text import facts, number


def result_json(
    result: Result,
    read_seconds: float,
    known: BestKnown | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON of a solve, schema 1; every number is finite.

    `best_known` for instances of the library, `stated` with the objective and the bound of the file where the
    `metadata` of the instance say that these are not the loss.
    """
    content = result.to_dict()
    stated = stated_value(metadata or {}, result.objective)
    if metadata is not None and stated is not None:
        bound = stated_value(metadata, result.bound)
        content["stated"] = {"sense": metadata[STATED].get("sense"), "objective": stated, "bound": bound}
    content["runtime"] = {"read_s": read_seconds, **content["runtime"]}
    if known is not None:
        content["best_known"] = {"value": known.value, "proven": known.proven, "solver": known.solver}
    return content


def result_text(
    result: Result,
    read_seconds: float,
    known: BestKnown | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """The result as text; arguments as for `result_json`."""
    *rows, (name, seconds) = result.facts()
    stated = stated_value(metadata or {}, result.objective)
    if metadata is not None and stated is not None:
        sense, bound = metadata[STATED].get("sense"), stated_value(metadata, result.bound)
        limit = "" if bound is None else f", bound {number(bound)}"
        rows.append(("as stated", f"{sense} {number(stated)}{limit}"))
    if known is not None:
        above = (result.objective - known.value) / max(abs(known.value), 1e-300)
        state = "proven optimal" if known.proven else f"found by {known.solver}"
        rows.append(("best known", f"{number(known.value)}  ({state}; this is {100 * above:+.4f} %)"))
    return facts([*rows, (name, f"{read_seconds:.2f} s reading, {seconds}")])


def write_json(target: str, content: dict[str, Any]) -> None:
    """Write JSON to a file, or to stdout for '-'."""
    if target == "-":
        say(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")
    else:
        write_json_file(target, content)


def write_history(path: Path, result: Result) -> None:
    """Write the history as CSV with a header; unknown values are empty."""
    write_csv(path, ("seconds", "iteration", "objective", "bound"), result.history)
