"""`cbs-solve --sparsity .5 .6 …` or `--keep 20 10 …`: table, picture, JSON and CSV of objective and bound."""

from __future__ import annotations

import argparse
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from cbs_opt.cli import common
from cbs_opt.cli.arguments import engine_of, kept_of
from cbs_opt.cli.report import result_json, write_json
from cbs_opt.errors import CbsError, OutputError, UsageError
from cbs_opt.files import write_solution
from cbs_opt.files.atomic import atomic_write, write_csv
from cbs_opt.instance import Instance
from cbs_opt.path import solve_path
from cbs_opt.result import Result
from cbs_opt.stop import Stop
from cbs_opt.view.text import number, percent

SCHEMA = 1
FORMATS = (".png", ".svg", ".pdf")
_COLUMNS = ("pruned", "objective", "bound", "gap", "selection_loss", "joint_loss", "status", "seconds")


def path_of(options: argparse.Namespace) -> tuple[str, list[float]]:
    """What the path is over, "sparsity" or "keep", and its values in the order in which they are solved."""
    if options.keep is not None:
        return "keep", sorted(set(options.keep), reverse=True)
    return "sparsity", sorted(set(options.sparsity))


def solution_paths(path: Path, values: list[float]) -> list[Path]:
    """The files of the solutions: the sparsity, or the number kept, goes before the suffix.

    Raises
    ------
    OutputError
        For a path without a name, such as `.`.
    """
    if not path.name:
        raise OutputError(f"{path}: cannot be written: it is a directory")
    return [path.with_name(f"{path.stem}-{value:g}{path.suffix}") for value in values]


def check_path(options: argparse.Namespace) -> list[Path | None]:
    """The outputs of a path except `--json`; raises `UsageError` for options that apply to a single solve only."""
    if options.history is not None:
        raise UsageError("`--history` is for one budget; `--table` writes the path")
    if options.picture is not None and options.picture.suffix.lower() not in FORMATS:
        raise UsageError(f"{options.picture}: a picture must end in {', '.join(FORMATS)}")
    solutions = [] if options.solution is None else solution_paths(options.solution, path_of(options)[1])
    return [options.table, options.picture, *solutions]


def run_path(
    instance: Instance, options: argparse.Namespace, stop: Stop, read_seconds: float, warm_start: Any
) -> int:
    """Solve for every budget and write the requested outputs, each solution as soon as it is found."""
    name, values = path_of(options)
    rows: list[dict[str, Any]] = []
    results: list[tuple[float, Result]] = []
    failures: list[OutputError] = []
    written: list[Path] = []
    quiet_stdout = options.json == "-"
    if not quiet_stdout:
        common.say(_line((name, *_COLUMNS)) + "\n")

    def take(value: float, result: Result) -> None:
        results.append((value, result))
        rows.append(_row(name, value, result))
        if not quiet_stdout:
            common.say(_line([_text(key, value) for key, value in rows[-1].items()]) + "\n")
        if options.solution is not None:
            (path,) = solution_paths(options.solution, [value])
            try:
                write_solution(path, replace(result.to_solution(), result=content_of(result)))
                written.append(path)
            except OutputError as error:
                failures.append(error)

    def content_of(result: Result) -> dict[str, Any]:
        return result_json(result, read_seconds, metadata=instance.metadata)

    for value in values:  # what does not fit is refused before any work
        if name == "keep":
            instance.with_budget(instance.n - kept_of(int(value), instance.n))
        else:
            instance.with_sparsity(value)
    failed: CbsError | None = None
    try:
        solve_path(
            instance,
            None if name == "keep" else values,
            options.solver,
            keep=[int(value) for value in values] if name == "keep" else None,
            objective=options.objective,
            warm_start=warm_start,
            on_result=take,
            should_stop=stop.should_stop or (lambda: False),
            stop=stop,
            seed=options.seed,
            parameters=options.set,
            update=options.update,
            device=options.device,
            threads=options.threads,
            batch_size=options.batch_size,
            engine=engine_of(options),
        )
    except CbsError as error:
        if not results:
            raise
        failed = error  # what was found before is written first
    content = {
        "schema": SCHEMA,
        "path": [{name: value, **content_of(result)} for value, result in results],
    }
    attempts: list[tuple[Any, Any]] = [
        (options.table, lambda path: _write_csv(path, name, rows)),
        (options.picture, lambda path: draw_path(path, results, over=name)),
        (options.json, lambda target: write_json(target, content)),
    ]
    for target, write in attempts:
        if target is not None:
            try:
                write(target)
                written += [target] if isinstance(target, Path) else []
            except OutputError as error:
                failures.append(error)
    if written and not quiet_stdout:
        common.say(f"written  {', '.join(map(str, written))}\n")
    if failed is not None:
        raise failed
    if failures:
        raise OutputError("; ".join(str(failure) for failure in failures))
    return common.EXIT_OK


def _row(name: str, value: float, result: Result) -> dict[str, Any]:
    values = (
        value,
        int(result.pruned.sum()),
        result.objective,
        result.bound,
        result.gap,
        result.selection_loss,
        result.joint_loss,
        str(result.status),
        result.build_seconds + result.solve_seconds,
    )
    return dict(zip((name, *_COLUMNS), values, strict=True))


def _text(key: str, value: Any) -> str:
    if key in ("sparsity", "keep"):
        return f"{value:g}"
    if key == "gap":
        return percent(value)
    if key == "seconds":
        return f"{value:.2f}"
    return str(value) if isinstance(value, str | int) else number(value)


def _line(cells: Any) -> str:
    return "  ".join(f"{cell:>13}" for cell in cells)


def _write_csv(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    write_csv(path, (name, *_COLUMNS), (row.values() for row in rows))


def draw_path(
    path: Path | str,
    results: list[tuple[float, Result]],
    scores: list[float] | None = None,
    name: str = "accuracy",
    over: str = "sparsity",
) -> None:
    """Draw objective and bound over the budgets, and below them a score of the network if it is known.

    Parameters
    ----------
    path : Path or str
        `.png`, `.svg` or `.pdf`.
    results : list of (float, Result)
        Sparsity, or number of kept weights, and the result.
    scores : list of float, optional
        One for each result.
    name : str
        What the score is.
    over : {"sparsity", "keep"}

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    panels = 1 if scores is None else 2
    figure = Figure(figsize=(6.4, 3.4 * panels), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    x = [value for value, _ in results]
    objective = [result.objective for _, result in results]
    kind = results[0][1].objective_kind
    axes[0].plot(x, objective, "o-", color="#2a6f97", label=f"{kind} loss")
    bounds = [(s, result.bound) for s, result in results if result.bound is not None]
    if bounds:
        axes[0].plot(*zip(*bounds, strict=True), "s--", color="#d1495b", mfc="white", label="lower bound")
    if min([*objective, *(bound for _, bound in bounds)]) > 0:
        axes[0].set_yscale("log")
    axes[0].set_ylabel("predicted increase of the loss")
    axes[0].legend(frameon=False)
    if scores is not None:
        axes[1].plot(x, scores, "o-", color="#2a6f97")
        axes[1].set_ylabel(name)
    axes[-1].set_xlabel("weights that stay" if over == "keep" else over)
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=130)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
