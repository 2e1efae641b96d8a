"""`cbs-bench`: run solvers on instances, report the results, compare two runs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbs_opt.cli import common
from cbs_opt.cli.arguments import whole_option
from cbs_opt.errors import UsageError
from cbs_opt.files.toml_text import read_toml

logger = logging.getLogger("cbs_opt")

EXIT_WORSE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs-bench", _main, arguments)


def _main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    command: int = options.command(options)
    return command


def _parser() -> common.Parser:
    parser = common.Parser("cbs-bench", "Compare solvers: run them, make a report, compare two runs.")
    commands = parser.add_subparsers(metavar="run | paper | report | compare", required=True)
    run = commands.add_parser("run", help="make rows", description="Make the rows that the store lacks.")
    add = run.add_argument
    add("configuration", metavar="CONFIG.toml|NAME", help="a file, or a name from `cbs-bench list`")
    add("-o", "--output", type=Path, metavar="STORE", help="default: here, CONFIGURATION.sqlite")
    add("--engine", choices=("serial", "processes", "ray"), help="default: serial; processes with --workers")
    add("--workers", type=whole_option(1), metavar="N", help="runs at a time; default: the number of processors")
    add("--time-limit", type=_seconds, metavar="S", help="instead of every time limit of the configuration")
    add("--rerun-timeouts", action="store_true", help="repeat runs that ended at their time limit")
    add("--rerun-errors", action="store_true", help="repeat runs that are not ok")
    add("--dry-run", action="store_true", help="show what would be done")
    _talk(run)
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="tables and pictures", description="Make a report of a store.")
    report.add_argument("store", type=Path, metavar="STORE")
    add = report.add_argument
    add("-o", "--output", type=Path, metavar="NAME", help="its name, or a folder; default: next to the store")
    add("--title", metavar="TEXT")
    add("--profile", type=Path, metavar="FILE.svg", help="also draw the performance profile; .png, .pdf")
    add("--proofs", type=Path, metavar="FILE.md", help="also write seconds, nodes and gaps of exact solvers")
    _talk(report)
    report.set_defaults(command=_report)

    _add_paper(commands)

    compare = commands.add_parser(
        "compare", help="old against new", description="Compare two stores run by run, such as two versions."
    )
    compare.add_argument("old", type=Path, metavar="OLD")
    compare.add_argument("new", type=Path, metavar="NEW")
    compare.add_argument(
        "--fail-above",
        type=_seconds,
        metavar="R",
        help="exit code 1 if a mean ratio of time or loss exceeds R, or a run failed",
    )
    compare.add_argument("--json", metavar="FILE|-", help="write it as JSON; - for stdout")
    _talk(compare)
    compare.set_defaults(command=_compare)

    listing = commands.add_parser("list", help="shipped configurations", description="List what ships.")
    listing.set_defaults(command=_list)
    return parser


def _add_paper(commands: Any) -> None:
    paper = commands.add_parser(
        "paper",
        help="accuracy tables of pruned networks",
        description="Prune a network by the methods of the CBS paper and of this package, at several sparsities "
        "and for several seeds, score it on test images, and write the table beside the published figures.",
    )
    add = paper.add_argument
    add("study", metavar="NETWORK|STUDY.toml", help="mlpnet, cifarnet, resnet20, mobilenetv1, or a file")
    add("--checkpoint", type=Path, metavar="FILE", help="the trained weights, see cbs-export")
    add("--data", metavar="PATH", help="training images, see cbs-export")
    add("--test-data", metavar="PATH", help="test images; default: the test split of --data")
    add("-o", "--output", type=Path, metavar="STORE", help="default: here, paper-STUDY.sqlite")
    add("--report", type=Path, metavar="NAME", help="also write the report; as by `cbs-bench report STORE`")
    add("--seeds", type=whole_option(0), nargs="+", metavar="N", help="instead of those of the study")
    add("--sparsities", type=_share, nargs="+", metavar="F", help="only these")
    add("--methods", nargs="+", metavar="NAME", help="only these")
    add("--engine", choices=("serial", "processes", "ray"), help="default: serial; processes with --workers")
    add("--workers", type=whole_option(1), metavar="N", help="rows at a time")
    add("--rerun-errors", action="store_true", help="repeat rows that are not ok")
    add("--dry-run", action="store_true", help="show what would be done")
    _talk(paper)
    paper.set_defaults(command=_paper)


def _talk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="warnings and errors only")
    parser.add_argument("-v", "--verbose", action="store_true")


def _run(options: argparse.Namespace) -> int:
    with common.Interrupts(_INTERRUPTED) as interrupts:
        common.start_logging(options.quiet, options.verbose)
        from cbs_opt.bench.runs.configuration import read_configuration
        from cbs_opt.bench.runs.runner import due, make_plan, run_plan, summary
        from cbs_opt.bench.runs.show import duration, progress
        from cbs_opt.bench.runs.store import OK, Store
        from cbs_opt.engines import make_engine

        configuration = read_configuration(options.configuration, options.time_limit)
        name = options.engine or ("serial" if options.workers in (None, 1) else "processes")
        engine = make_engine(name, options.workers, configuration.threads)
        plan = make_plan(configuration)
        path = options.output or Path(f"{configuration.name}.sqlite")
        again = {"timeouts": options.rerun_timeouts, "errors": options.rerun_errors}
        if options.dry_run:
            there: dict[Any, Any] = {}
            if path.is_file():
                with Store(path) as store:
                    there = store.keys()
            tasks = due(plan, there, **again)
            common.say("\n".join(summary(plan, tasks, getattr(engine, "workers", 1))) + "\n")
            return common.EXIT_OK
        names = {instance.sha256: instance.name for instance in plan.instances}
        with Store(path, "w") as store, progress(names, options.quiet) as shown:
            outcome = run_plan(
                plan,
                store,
                engine,
                rerun_timeouts=options.rerun_timeouts,
                rerun_errors=options.rerun_errors,
                should_stop=interrupts,
                progress=shown,
            )
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.kinds.items()) if kind != OK)
    common.say(
        f"{path}: {outcome.made} rows made in {duration(outcome.seconds)}"
        + (f" ({bad})" if bad else "")
        + (f", {outcome.there} were there" if outcome.there else "")
        + (f", {outcome.refuted} refuted by a better selection" if outcome.refuted else "")
        + "\n"
    )
    if outcome.interrupted:
        left = outcome.planned - outcome.there - outcome.made
        common.say(f"interrupted: {left} rows are left; the same command resumes\n")
    return common.EXIT_OK


def _paper(options: argparse.Namespace) -> int:
    common.start_logging(options.quiet, options.verbose)
    from cbs_opt.bench.paper import rows
    from cbs_opt.bench.paper.report import write_study_report
    from cbs_opt.bench.paper.study_file import read_study
    from cbs_opt.bench.paper.subject import Files
    from cbs_opt.bench.reports.report import report_base
    from cbs_opt.bench.runs.runner import due, run_plan, summary
    from cbs_opt.bench.runs.show import duration, progress
    from cbs_opt.bench.runs.store import OK, Store
    from cbs_opt.engines import make_engine

    whole = read_study(options.study)
    study = rows.restricted(whole, options.seeds, options.sparsities, options.methods)
    name = options.engine or ("serial" if options.workers in (None, 1) else "processes")
    engine = make_engine(name, options.workers, study.threads)
    path = options.output or Path(f"paper-{study.name}.sqlite")
    common.check_outputs((options.checkpoint, options.data, options.test_data), (path,))
    if options.report is not None:
        report_base(path, options.report)
    plan = rows.plan_study(study, Files(options.checkpoint, options.data, options.test_data))
    if options.dry_run:
        there: dict[Any, Any] = {}
        if path.is_file():
            with Store(path) as store:
                there = store.keys()
        tasks = due(plan, there, False, options.rerun_errors)
        common.say("\n".join(summary(plan, tasks, getattr(engine, "workers", 1))) + "\n")
        return common.EXIT_OK
    names = {instance.sha256: instance.name for instance in plan.instances}
    with _AtOnce(), Store(path, "w") as store, progress(names, options.quiet) as shown:
        store.set_meta("study", whole.to_json())
        before = len(due(plan, store.keys(), False, options.rerun_errors))
        try:
            outcome = run_plan(
                plan,
                store,
                engine,
                rerun_errors=options.rerun_errors,
                progress=shown,
                work=rows.run_pruning,
            )
        except KeyboardInterrupt:
            left = len(due(plan, store.keys(), False, options.rerun_errors))
            common.say(
                f"{path}: {before - left} rows made\ninterrupted: {left} rows are left; the same command resumes\n"
            )
            return common.EXIT_OK
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.kinds.items()) if kind != OK)
    common.say(
        f"{path}: {outcome.made} rows made in {duration(outcome.seconds)}"
        + (f" ({bad})" if bad else "")
        + (f", {outcome.there} were there" if outcome.there else "")
        + "\n"
    )
    if options.report is not None:
        common.say("".join(f"{path}\n" for path in write_study_report(path, options.report)[:2]))
    return common.EXIT_OK


def _report(options: argparse.Namespace) -> int:
    common.start_logging(options.quiet, options.verbose)
    common.check_outputs((options.store,), (options.profile, options.proofs))
    from cbs_opt.bench.reports.report import profile_picture, write_proofs, write_report
    from cbs_opt.bench.runs.store import Store

    with Store(options.store) as store:
        study = "study" in store.meta
    if study:
        from cbs_opt.bench.paper.report import write_study_report

        if options.profile is not None or options.proofs is not None:
            raise UsageError(f"{options.store}: holds pruned networks: `--profile` and `--proofs` are of solvers")
        written = write_study_report(options.store, options.output, title=options.title)[:2]
    else:
        written = write_report(options.store, options.output, title=options.title)[:2]
    if options.profile is not None:
        written.append(profile_picture(options.store, options.profile))
    if options.proofs is not None:
        written.append(write_proofs(options.store, options.proofs))
    common.say("".join(f"{path}\n" for path in written))
    return common.EXIT_OK


def _compare(options: argparse.Namespace) -> int:
    common.start_logging(options.quiet, options.verbose)
    common.check_outputs((options.old, options.new), (None if options.json == "-" else options.json,))
    import dataclasses

    from cbs_opt.bench.runs.compare import compare_stores, comparison_text
    from cbs_opt.cli.report import write_json

    comparison = compare_stores(options.old, options.new)
    if options.json is not None:
        write_json(options.json, json.loads(json.dumps(dataclasses.asdict(comparison))))
    if options.json != "-":
        common.say(comparison_text(comparison, str(options.old), str(options.new)) + "\n")
    if options.fail_above is None:
        return common.EXIT_OK
    worse = comparison.exceeds(options.fail_above)
    for sentence in worse:
        logger.warning(sentence)
    return EXIT_WORSE if worse else common.EXIT_OK


def _list(options: argparse.Namespace) -> int:
    from cbs_opt.bench.paper.study_file import shipped_studies
    from cbs_opt.bench.runs.configuration import shipped

    for command, files in (("run", shipped()), ("paper", shipped_studies())):
        for name, path in files.items():
            content, _ = read_toml(path, UsageError)
            common.say(f"{command:<5} {name:<12} {content.get('description', '')}\n")
    return common.EXIT_OK


_INTERRUPTED = "every finished row is kept; once more to quit at once"


class _AtOnce(common.Interrupts):
    """Ends the row at once: rows are short, and finished ones are kept."""

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            os._exit(common.EXIT_KILLED)
        self.asked = True
        raise KeyboardInterrupt


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got '{text[:40]}'")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1e-3 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"must be a number >= 0.001, got '{text[:40]}'")
    return value


if __name__ == "__main__":
    sys.exit(main())
