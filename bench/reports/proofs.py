"""A view of a store for exact solvers: seconds and nodes until the proof, or the gap that is left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from cbs_opt.bench.reports import tables
from cbs_opt.bench.reports.analysis import Analysis, Problem, Run, Section
from cbs_opt.bench.reports.canvas import short
from cbs_opt.bench.reports.document import Document, Paragraph, Table
from cbs_opt.bench.reports.metrics import TOLERANCE
from cbs_opt.result import Status

MEDIAN_UP_TO = 100
"""Weights of the instances over which the median times are taken."""


def proofs(analysis: Analysis, roots: Mapping[tuple[str, str, int], float] | None = None) -> str:
    """The view as Markdown: a row for each problem, a column for each solver that was run on one.

    Parameters
    ----------
    analysis : Analysis
        Of several seeds the first counts.
    roots : mapping, optional
        Bounds of root nodes, by hash of the instance, objective and budget: one more column, the gap of the root.
    """
    document = Document(f"Exact solvers side by side: {analysis.path.stem}")
    document.add(
        Paragraph(
            "Seconds of solving, start and model building included, reading and compilation not; in brackets the "
            "seconds that an outside solver reports for itself. A cell without a gap is proven optimal to 1e-6. "
            f"{tables.machine_sentence(analysis)}"
        ),
        tables.settings(analysis),
        _each_problem(analysis, roots or {}),
    )
    for section in analysis.sections:
        document.add(*_medians(section))
    failed = tables.failures(analysis)
    document.add(*([failed] if failed else []))
    return document.markdown("")


def _each_problem(analysis: Analysis, roots: Mapping[tuple[str, str, int], float]) -> Table:
    solvers = [name for name in analysis.solvers if any(name in problem.runs for problem in analysis.problems)]
    header = [
        "instance",
        "n",
        "sparsity",
        "objective",
        "value",
        "bound",
        *solvers,
        *(["root gap"] if roots else []),
    ]
    rows = []
    for problem in analysis.problems:
        row = [problem.instance.name, str(problem.instance.n), f"{problem.sparsity:.3g}", problem.objective_kind]
        row += [tables.NOTHING if v is None else f"{v:.6e}" for v in (problem.best, problem.lower)]
        row += [_cell(problem, problem.runs.get(name, [])) for name in solvers]
        if roots:
            root = roots.get((problem.instance.sha256, problem.objective_kind, problem.budget))
            known = root is not None and problem.best is not None and problem.best > 0
            row.append(f"{100 * (problem.best - root) / problem.best:.2g} %" if known else tables.NOTHING)  # type: ignore[operator]
        rows.append(row)
    return Table(header, rows, left=len(header))


def _cell(problem: Problem, runs: list[Run]) -> str:
    """Seconds (the solver's own in brackets), nodes, and the gap where there is one."""
    if not runs:
        return tables.NOTHING
    row = runs[0].row
    if not runs[0].valid or row.solve_s is None or row.objective is None:
        return f"**{row.kind}**"
    text = f"{_seconds(row.solve_s)} s" + ("" if row.own_s is None else f" ({_seconds(row.own_s)})")
    if row.nodes is not None:
        text += f", {row.nodes:,} node{'' if row.nodes == 1 else 's'}"
    if row.status != Status.OPTIMAL:
        gap = "no bound" if row.gap is None else f"gap {100 * row.gap:.2g} %"
        text += f", **{gap}**" + ("" if row.bound is None else f", bound {short(row.bound, 3)}")
    return text + (f", value {short(row.objective, 3)}" if runs[0].gap > TOLERANCE else "")


def _seconds(value: float) -> str:
    """Milliseconds below ten seconds, else tenths."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _medians(section: Section) -> list[Paragraph | Table]:
    """Median times of each solver over the problems of at most `MEDIAN_UP_TO` weights that all of them took."""
    small = [problem for problem in section.problems if problem.instance.n <= MEDIAN_UP_TO]
    able = [name for name in section.solvers if any(name in problem.runs for problem in small)]
    small = [problem for problem in small if all(name in problem.runs for name in able)]
    if not small:
        return []
    rows = []
    for name in able:
        runs = [problem.runs[name][0].row for problem in small]
        waits = [math.inf if row.solve_s is None else row.solve_s for row in runs]
        own = [wait if row.own_s is None else row.own_s for wait, row in zip(waits, runs, strict=True)]
        proven = sum(row.status == Status.OPTIMAL for row in runs)
        median = f"{statistics.median(waits):.4f} s"
        rows.append(
            [name, f"{proven} of {len(runs)}", median, f"{statistics.median(own):.4f} s", f"{sum(waits):.1f} s"]
        )
    kind = section.objective_kind.capitalize()
    return [
        Paragraph(
            f"{kind}, n ≤ {MEDIAN_UP_TO}, the {len(small)} problems that every solver took; one that was not "
            "proven counts with the time it was given:"
        ),
        Table(["solver", "proven", "median", "of the solver's own seconds", "total"], rows),
    ]
