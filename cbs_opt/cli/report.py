"""What a solve says: JSON, text, CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from cbs_opt.cli.common import say
from cbs_opt.cli.progress import number, percent
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.library_file import BestKnown
from cbs_opt.instance import Instance
from cbs_opt.result import Result

SCHEMA = 1


def result_json(
    instance: Instance, result: Result, read_seconds: float, known: BestKnown | None = None
) -> dict[str, Any]:
    """The JSON of a solve, schema 1; every number is finite; `best_known` for instances of the library."""
    content = {
        "schema": SCHEMA,
        "instance": {
            "path": None if instance.path is None else str(instance.path),
            "sha256": instance.sha256,
            "n": instance.n,
            "blocks": instance.curvature.number_of_blocks,
            "budget": instance.budget.total,
        },
        "solver": result.solver,
        "objective_kind": result.objective_kind,
        "parameters": dict(result.parameters),
        "seed": result.seed,
        "status": str(result.status),
        "objective": result.objective,
        "selection_loss": result.selection_loss,
        "joint_loss": result.joint_loss,
        "bound": result.bound,
        "gap": result.gap,
        "pruned_count": int(result.pruned.sum()),
        "iterations": result.iterations,
        "runtime": {"read_s": read_seconds, **result.runtime},
        "history": [list(row) for row in result.history],
        "environment": dict(result.environment),
        "extras": dict(result.extras),
    }
    if known is not None:
        content["best_known"] = {"value": known.value, "proven": known.proven, "solver": known.solver}
    finite: dict[str, Any] = _finite(content)
    return finite


def _finite(value: Any) -> Any:
    """`value` with numbers that JSON cannot hold replaced by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def result_text(instance: Instance, result: Result, read_seconds: float, known: BestKnown | None = None) -> str:
    """The result for a person."""
    updated = "" if result.weights is None else ", weights updated"
    lines = [
        ("status", str(result.status)),
        ("pruned", f"{int(result.pruned.sum())} of {instance.n} weights{updated}"),
        ("objective", f"{number(result.objective)}  ({result.objective_kind})"),
        ("selection loss", number(result.selection_loss)),
        ("joint loss", number(result.joint_loss)),
        ("bound", number(result.bound)),
        ("gap", percent(result.gap)),
        (
            "time",
            f"{read_seconds:.2f} s reading, {result.build_seconds:.2f} s building, "
            f"{result.solve_seconds:.2f} s solving, {result.iterations} iterations",
        ),
    ]
    if known is not None:
        above = (result.objective - known.value) / max(abs(known.value), 1e-300)
        state = "proven optimal" if known.proven else f"found by {known.solver}"
        lines.insert(-1, ("best known", f"{number(known.value)}  ({state}; this is {100 * above:+.4f} %)"))
    return "\n".join(f"{name:<15} {value}" for name, value in lines)


def write_json(target: str, content: dict[str, Any]) -> None:
    """Write JSON to a file, or to stdout for '-'."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
    if target == "-":
        say(text)
        return
    with atomic_write(target) as file:
        file.write(text.encode())


def write_history(path: Path, result: Result) -> None:
    """Write the history as CSV with a header; unknown values are empty."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["seconds", "iteration", "objective", "bound"])
    rows.writerows(result.history)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
