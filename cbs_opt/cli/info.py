"""`cbs-info`: what an instance or solution file holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.cli import common
from cbs_opt.cli.report import write_json
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files import instance_file, read_instance, read_solution, solution_file
from cbs_opt.files.atomic import check_writable
from cbs_opt.files.library_file import PREFIX, library_entries, resolve
from cbs_opt.files.npz import NpzReader
from cbs_opt.instance import Instance


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs-info", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = common.Parser("cbs-info", "Say what an instance or solution file holds.")
    parser.add_argument(
        "file", metavar="FILE.npz", type=Path, help="or library:NAME; library: alone lists the instances that ship"
    )
    parser.add_argument("--json", metavar="FILE|-", help="write it as JSON; - for stdout")
    parser.add_argument(
        "--export",
        metavar="OUT.{lp,mps,qplib,ubqp,qubo}",
        type=Path,
        help="write the selection problem as text for other solvers",
    )
    options = parser.parse_args(arguments)
    if str(options.file) == PREFIX:
        return _library(options.json)
    options.file = resolve(options.file)
    with NpzReader(options.file, InstanceError) as npz:
        kind = npz.text("format") if "format" in npz.headers else ""
    if options.export is not None:
        if kind == solution_file.FORMAT:
            raise UsageError(f"{options.file}: only an instance can be exported, this is a solution")
        check_writable(options.export)
    if kind == solution_file.FORMAT:
        content = _solution(options.file)
    elif kind == instance_file.FORMAT:
        instance = read_instance(options.file)
        content = _instance(instance)
        if options.export is not None:
            from cbs_opt.solvers.mip.text_formats import export_instance

            export_instance(options.export, instance)
            content["exported"] = str(options.export)
    else:
        raise InstanceError(f"{options.file}: `format` is neither 'cbs-instance' nor 'cbs-solution'")
    if options.json is not None:
        write_json(options.json, content)
    if options.json != "-":
        width = max(len(key) for key in content)
        for key, value in content.items():
            text = value if isinstance(value, str) else json.dumps(value)
            common.say(f"{key.replace('_', ' '):<{width}}  {text}\n")
    return common.EXIT_OK


def _library(json_target: str | None) -> int:
    """List the library: name, size, budget, best-known selection and joint loss, origin."""
    entries = library_entries()
    if json_target is not None:
        write_json(json_target, {"instances": [asdict(entry) for entry in entries]})
    if json_target == "-":
        return common.EXIT_OK
    width = max(len(entry.name) for entry in entries)
    lines = [f"{'name':<{width}}  {'n':>5}  {'blocks':>6}  {'prune':>5}  {'selection':>12}  {'joint':>12}  origin"]
    for entry in entries:
        cells = []
        for objective in ("selection", "joint"):
            best = entry.best(objective)
            cells.append("-" if best is None else f"{best.value:.4e}{'*' if best.proven else ' '}")
        lines.append(
            f"{entry.name:<{width}}  {entry.n:>5}  {entry.blocks:>6}  {entry.budget:>5}  {cells[0]:>12}  "
            f"{cells[1]:>12}  {entry.origin}"
        )
    lines.append("* proven optimal; the others are the best known")
    common.say("\n".join(lines) + "\n")
    return common.EXIT_OK


def _instance(instance: Instance) -> dict[str, Any]:
    curvature, sizes = instance.curvature, instance.curvature.block_sizes
    diagonal = curvature.diagonal()
    content: dict[str, Any] = {
        "format": instance_file.FORMAT,
        "path": str(instance.path),
        "sha256": instance.sha256,
        "weights": instance.n,
        "budget": instance.budget.total,
        "sparsity": instance.budget.total / instance.n,
        "curvature": curvature.kind,
        "blocks": sizes.size,
        "block_sizes": _few(sizes.tolist()),
    }
    factor = curvature.as_factor()
    if factor is not None:
        content |= {"gradients": factor.m, "damping": factor.damping}
    if instance.budget.groups is not None:
        content |= {
            "groups": instance.budget.number_of_groups,
            "group_budgets": _few(instance.budget.per_group.tolist()),
        }
    content |= {
        "linear": instance.linear is not None,
        "fixed": 0 if instance.fixed is None else int(np.count_nonzero(instance.fixed)),
        "hessian_diagonal": [float(diagonal.min()), float(diagonal.max())],
        "free_weights": int(np.count_nonzero(instance.weights**2 * diagonal == 0)),
        "metadata": dict(instance.metadata),
    }
    return content


def _solution(path: Path) -> dict[str, Any]:
    solution = read_solution(path)
    kept = ("solver", "objective_kind", "status", "objective", "selection_loss", "joint_loss", "bound", "gap")
    return {
        "format": solution_file.FORMAT,
        "path": str(path),
        "instance_sha256": solution.instance_sha256,
        "weights": solution.pruned.size,
        "pruned": int(solution.pruned.sum()),
        "updated_weights": solution.weights is not None,
        **{key: solution.result[key] for key in kept if key in solution.result},
    }


def _few(values: list[Any]) -> list[Any]:
    """At most a dozen values, the middle left out."""
    return values if len(values) <= 12 else [*values[:10], "…", values[-1]]


if __name__ == "__main__":
    sys.exit(main())
