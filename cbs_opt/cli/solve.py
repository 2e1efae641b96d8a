"""`cbs-solve`: solves an instance."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from cbs_opt.cli import common
from cbs_opt.cli.arguments import budget_in, engine_of, parse_solve
from cbs_opt.cli.path import check_path, run_path
from cbs_opt.cli.progress import ProgressTable
from cbs_opt.cli.report import result_json, result_text, write_history, write_json
from cbs_opt.errors import OutputError, SolverError, UsageError
from cbs_opt.files import read_instance, read_solution, write_solution
from cbs_opt.files.library_file import best_known, resolve
from cbs_opt.files.text_instance import is_text
from cbs_opt.instance import Instance
from cbs_opt.memory import memory_limit
from cbs_opt.registry import get_solver, solver_names
from cbs_opt.result import Result
from cbs_opt.solve import environment, solve
from cbs_opt.solver import parse_parameters, written_files
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray
from cbs_opt.version import __version__

logger = logging.getLogger("cbs_opt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs-solve", _main, arguments)


def _main(arguments: list[str]) -> int:
    with common.Interrupts() as interrupts, ExitStack() as stack:
        options = parse_solve(arguments)
        common.start_logging(options.quiet, options.verbose)
        if options.list_solvers:
            _list_solvers()
            return common.EXIT_OK
        several = max(len(set(options.sparsity or ())), len(set(options.keep or ()))) > 1
        written: list[Any] = []
        if options.check is None:
            # Wrong names or parameters are reported before a large file is read.
            chosen = get_solver(options.solver)
            written = written_files(parse_parameters(options.solver, chosen.parameters_type, options.set))
            engine_of(options)
            if several and any(path is not None for path in written):
                raise UsageError("`certificate` names one file, and several budgets would each write it")
        common.check_outputs(
            (resolve(options.instance), options.warm_start, options.config, options.check),
            (
                *(check_path(options) if several else (options.solution, options.history)),
                None if options.json == "-" else options.json,
                *written,
            ),
        )
        stack.enter_context(memory_limit(None if options.memory is None else 1e9 * options.memory))
        started = time.perf_counter()
        instance = _read(options)
        read_seconds = time.perf_counter() - started
        if options.check is not None:
            from cbs_opt.cli.check import check_solution

            return check_solution(instance, options.check, options.json)
        if several:
            budget = budget_in(options)
            assert budget is not None
            first = instance.with_budget(budget(instance.n))
            warm_start = None if options.warm_start is None else _warm_start(first, options)
            return run_path(instance, options, _stop(options, interrupts), read_seconds, warm_start)
        result = _solve(instance, options, interrupts)
        return _write(instance, result, read_seconds, options)


def _read(options: argparse.Namespace) -> Instance:
    several = max(len(set(options.sparsity or ())), len(set(options.keep or ()))) > 1
    budget, path = budget_in(options), resolve(options.instance)
    # Of several budgets each is set later, but text that states none needs one to be read.
    instance = read_instance(path, budget if not several or is_text(path) else None)
    if options.damping is not None:
        instance = instance.with_damping(options.damping)
    logger.info(f"cbs-solve {__version__}: {options.instance}: {instance.describe()}")
    return instance


def _solve(instance: Instance, options: argparse.Namespace, interrupts: common.Interrupts) -> Result:
    warm_start = None if options.warm_start is None else _warm_start(instance, options)
    stop = _stop(options, interrupts)
    logger.info(f"solver {options.solver}: {get_solver(options.solver).summary}; seed {options.seed}")
    logger.debug(", ".join(f"{key} {value}" for key, value in environment().items()))
    table = ProgressTable()
    result = solve(
        instance,
        options.solver,
        objective=options.objective,
        stop=stop,
        seed=options.seed,
        parameters=options.set,
        update=options.update,
        warm_start=warm_start,
        device=options.device,
        threads=options.threads,
        batch_size=options.batch_size,
        engine=engine_of(options),
        callback=table,
    )
    table.finish(result.solve_seconds, result.iterations, result.objective, result.bound, result.gap)
    return result


def _warm_start(instance: Instance, options: argparse.Namespace) -> BoolArray:
    warm_start = read_solution(options.warm_start, instance).pruned
    if not instance.admits(warm_start):
        raise UsageError(
            f"{options.warm_start}: the selection, {int(warm_start.sum())} weights, does not meet the budget "
            f"of {instance.budget.total}, the groups or `fixed` of the instance"
        )
    return warm_start


def _stop(options: argparse.Namespace, interrupts: common.Interrupts) -> Stop:
    return Stop(
        time_limit=options.time_limit,
        max_iterations=options.max_iterations,
        no_improvement=options.no_improvement,
        target=options.target,
        gap=options.gap,
        should_stop=interrupts,
    )


def _write(instance: Instance, result: Result, read_seconds: float, options: argparse.Namespace) -> int:
    """Write every requested output, even if one of them fails."""
    known = best_known(instance, result.objective_kind)
    content = result_json(result, read_seconds, known, instance.metadata)
    failures: list[OutputError] = []

    def attempt(target: Any, write: Any, *arguments: Any) -> None:
        if target is not None:
            try:
                write(target, *arguments)
            except OutputError as error:
                failures.append(error)

    attempt(options.solution, write_solution, replace(result.to_solution(), result=content))
    attempt(options.history, write_history, result)
    attempt(None if options.json == "-" else options.json, write_json, content)
    if options.json == "-":  # last, so that a closed pipe does not prevent files
        write_json("-", content)
    elif not (options.quiet and (options.solution or options.json)):
        common.say(result_text(result, read_seconds, known, instance.metadata) + "\n")
    if failures:
        raise OutputError("; ".join(str(failure) for failure in failures))
    return common.EXIT_OK


def _list_solvers() -> None:
    lines = []
    for name in solver_names():
        try:
            solver = get_solver(name)
        except SolverError as error:
            lines.append(f"{name:<12} not available: {error}")
            continue
        supports = solver.supports
        abilities = [f"minimises {' and '.join(sorted(supports.objectives, reverse=True))}"]
        abilities += [
            text
            for claimed, text in (
                (supports.bound, "lower bound"),
                (supports.warm_start, "warm start"),
                (supports.batched, "batched"),
                (supports.on_card, "CPU, CUDA"),
                (not supports.groups, "no groups"),
                (supports.cross_groups, "cross groups"),
                (not supports.several_blocks, "one block only"),
                (not supports.linear, "no first-order term"),
                (not supports.fixed, "no fixed weights"),
                (not supports.indefinite, "no indefinite Hessian"),
            )
            if claimed
        ]
        lines.append(f"{name:<12} {solver.summary}\n{'':<13}{'; '.join(abilities)}")
        for field in dataclasses.fields(solver.parameters_type):
            default = "" if field.default is None else f" [{field.default}]"
            lines.append(f"{'':<15}--set {field.name}=…  {field.metadata.get('help', '')}{default}")
    common.say("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
