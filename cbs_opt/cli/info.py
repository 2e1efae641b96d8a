"""`cbs-info`: describes an instance, a solution or a certificate, as text, as JSON, or as a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cbs_opt.cli import common
from cbs_opt.cli.arguments import add_file_budget_options, budget_in, check_budget_options
from cbs_opt.cli.describe import describe_certificate, describe_instance, describe_solution
from cbs_opt.cli.page import page
from cbs_opt.cli.report import write_json
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files import certificate_file, instance_file, read_instance, read_solution, solution_file
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.certificate_file import read_certificate
from cbs_opt.files.instance_file import read_outline
from cbs_opt.files.library_file import PREFIX, library_entries, resolve
from cbs_opt.files.npz import NpzReader
from cbs_opt.files.text_instance import is_text
from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray

PICTURES = (".png", ".svg", ".pdf")
"""Endings of the files that a picture can be written to."""

LARGE_BYTES = 100_000_000
"""Of an instance file that is larger only the outline is read, unless more is asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs-info", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = common.Parser("cbs-info", "Describe an instance, a solution or a certificate.")
    parser.add_argument(
        "file",
        metavar="FILE.npz",
        type=Path,
        help="or .qplib, .ubqp, .qubo, or library:NAME; library: alone lists the shipped instances",
    )
    add_file_budget_options(parser)
    parser.add_argument(
        "--solution", metavar="S.npz", type=Path, help="a solution of the instance, to be shown with it"
    )
    parser.add_argument(
        "--picture",
        metavar="OUT.{png,svg,pdf}",
        type=Path,
        help="draw spectra, couplings, and the pairs that cancel most; with a solution also which pairs it cuts",
    )
    parser.add_argument("--json", metavar="FILE|-", help="write it as JSON; - for stdout")
    parser.add_argument(
        "--export",
        metavar="OUT.{lp,mps,qplib,ubqp,qubo}",
        type=Path,
        help="write the selection problem as text for other solvers",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help=f"read and check all values also of a file of more than {LARGE_BYTES // 10**6} MB",
    )
    options = parser.parse_args(arguments)
    check_budget_options(options)
    if str(options.file) == PREFIX:
        return _library(options.json)
    options.file = resolve(options.file)
    _check_options(options)
    if is_text(options.file) or _format(options.file) == instance_file.FORMAT:
        content, text = _instance(options)
    else:
        content, text = _other(options)
    if options.json is not None:
        write_json(options.json, content)
    if options.json != "-":
        common.say(text)
    return common.EXIT_OK


def _check_options(options: argparse.Namespace) -> None:
    if options.picture is not None and options.picture.suffix not in PICTURES:
        raise UsageError(
            f"{options.picture}: a picture is written as {', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
        )
    common.check_outputs(
        (options.file, options.solution),
        (options.picture, options.export, None if options.json == "-" else options.json),
    )


def _format(path: Path) -> str:
    with NpzReader(path, InstanceError) as npz:
        return npz.text("format") if "format" in npz.headers else ""


def _instance(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    needs_values = options.verify or options.solution or options.picture or options.export or is_text(options.file)
    budget = budget_in(options)
    if not needs_values and options.file.stat().st_size > LARGE_BYTES:
        instance = read_outline(options.file)
        instance = instance if budget is None else instance.with_budget(budget(instance.n))
    else:
        instance = read_instance(options.file, budget)
    content = describe_instance(instance)
    text, pruned = page(content, instance), None
    if options.solution is not None:
        solution = read_solution(options.solution, instance)
        content["solution"] = describe_solution(options.solution, solution, instance)
        text, pruned = f"{text}\n{page(content['solution'])}", solution.pruned
    if options.picture is not None:
        _draw(options.picture, instance, pruned)
        content["picture"] = str(options.picture)
    if options.export is not None:
        from cbs_opt.solvers.mip.text_formats import export_instance

        export_instance(options.export, instance)
        content["exported"] = str(options.export)
    return content, text


def _other(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """A solution or a certificate."""
    kind = _format(options.file)
    readers = {solution_file.FORMAT: "a solution", certificate_file.FORMAT: "a certificate"}
    if kind not in readers:
        raise InstanceError(
            f"{options.file}: `format` is none of 'cbs-instance', 'cbs-solution' and 'cbs-certificate'"
        )
    for name in ("export", "picture", "solution", "sparsity", "budget", "keep"):
        if getattr(options, name) is not None:
            raise UsageError(
                f"{options.file}: `--{name}` needs an instance, and this is {readers[kind]}: "
                "cbs-info INSTANCE --solution SOLUTION shows both"
            )
    if kind == solution_file.FORMAT:
        content = describe_solution(options.file, read_solution(options.file))
    else:
        content = describe_certificate(options.file, read_certificate(options.file))
    return content, page(content)


def _draw(path: Path, instance: Instance, pruned: BoolArray | None) -> None:
    from cbs_opt.view.instance_picture import draw_instance

    figure = draw_instance(instance, pruned)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


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


if __name__ == "__main__":
    sys.exit(main())
