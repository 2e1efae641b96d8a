"""The options of `cbs-solve`, from the command line and from a TOML file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cbs_opt.arguments import MOST_THREADS
from cbs_opt.budget import number_of
from cbs_opt.cli.common import Parser
from cbs_opt.engines import ENGINES, Engine, make_engine
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.toml_text import read_toml
from cbs_opt.scalars import MOST_WHOLE
from cbs_opt.solve import DEFAULT_SOLVERS


def solve_parser() -> Parser:
    """The parser of `cbs-solve`."""
    parser = Parser("cbs-solve", "Choose which weights of a trained network to prune, and bound the gap.")
    add = parser.add_argument
    add(
        "instance",
        metavar="INSTANCE.npz",
        nargs="?",
        type=Path,
        help="instance file, library:NAME, or a binary quadratic problem as .qplib, .ubqp or .qubo",
    )
    defaults = ", ".join(f"{solver} for {objective}" for objective, solver in DEFAULT_SOLVERS.items())
    add("--solver", metavar="NAME", help=f"default: {defaults}")
    add(
        "--objective",
        choices=("selection", "joint"),
        help="loss to minimise; default: selection, unless the solver minimises only joint",
    )
    add(
        "--sparsity",
        action="append",
        type=share_option,
        metavar="F",
        help="prune this fraction, instead of the budget in the file; with several, such as .5 .6 .7, each "
        "solution is the warm start of the next",
    )
    add("--budget", type=whole_option(0), metavar="N", help="prune this many, instead of the budget in the file")
    add(
        "--keep",
        action="append",
        type=whole_option(0),
        metavar="K",
        help="keep this many and prune the others (best subset); with several, such as 20 10 5, each solution is "
        "the warm start of the next",
    )
    add("--update", action="store_true", help="also compute the best update of the kept weights (CBS-U)")
    add(
        "--damping",
        type=number_option(0),
        metavar="L",
        help="damping of a gradient factor, instead of that in the file",
    )
    add("--time-limit", type=number_option(0), metavar="S", help="seconds of solving")
    add("--max-iterations", type=whole_option(0), metavar="N", help="iterations, as the solver counts them")
    add("--no-improvement", type=whole_option(1), metavar="N", help="stop after N iterations without improvement")
    add("--target", type=number_option(), metavar="X", help="stop at this objective")
    add("--gap", type=number_option(0), metavar="G", help="stop at this relative gap")
    add("--seed", type=whole_option(0), default=0, metavar="N", help="default: 0")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add(
        "--threads",
        type=whole_option(1, MOST_THREADS),
        metavar="N",
        help="threads; default: all cores, but one for a tree of branch and bound that has no time limit, so that "
        "it can be repeated",
    )
    add("--batch-size", type=whole_option(1), metavar="R", help="candidates per batch")
    add(
        "--memory",
        type=number_option(0),
        metavar="GB",
        help="memory to use, without mapped files: blocks that do not fit together are solved one at a time; "
        "default: what is free",
    )
    add_engine_options(parser)
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameter of the solver; may be repeated",
    )
    add("--config", type=Path, metavar="FILE.toml", help="options from a file; the command line takes precedence")
    add("--warm-start", type=Path, metavar="FILE.npz", help="solution to start from")
    add("--solution", type=Path, metavar="FILE.npz", help="write the selection")
    add("--json", metavar="FILE|-", help="write the result as JSON; - for stdout, and nothing else there")
    add("--table", type=Path, metavar="FILE.csv", help="of several sparsities: write the table")
    add("--picture", type=Path, metavar="FILE.png", help="of several sparsities: draw objective and bound")
    add("--history", type=Path, metavar="FILE.csv", help="write objective and bound over time")
    add(
        "--check",
        type=Path,
        metavar="SOLUTION.npz",
        help="check a solution of the instance, or a certificate of `exact`; nothing is solved",
    )
    add("--list-solvers", action="store_true", help="list the solvers and their parameters")
    add(
        "-q",
        "--quiet",
        action="store_true",
        help="log warnings only, and print no report where a file holds the result",
    )
    add("-v", "--verbose", action="store_true", help="log more")
    return parser


def add_engine_options(parser: Parser) -> None:
    """`--engine` and `--workers`; of `cbs-solve` and `cbs-prune`."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="serial",
        help="for layers whose rows share a Hessian: solve them as tasks in processes of this machine or on a Ray "
        "cluster; --threads are then those of a worker, 1 by default; default: serial, in this process",
    )
    parser.add_argument(
        "--workers",
        type=whole_option(1),
        metavar="N",
        help="tasks of the engine at a time; default: as fit the cores",
    )


def engine_of(options: argparse.Namespace) -> Engine | None:
    """The engine that the options name; None for this process.

    Raises
    ------
    UsageError
        For workers without an engine.
    """
    if options.engine == "serial":
        if options.workers is not None:
            raise UsageError("`--workers` needs `--engine processes` or `--engine ray`")
        return None
    return make_engine(options.engine, options.workers, options.threads or 1)


def add_loss_options(parser: Parser) -> None:
    """The options that declare what a network was trained for; of `cbs-export` and `cbs-apply`."""
    add = parser.add_argument
    add(
        "--loss",
        metavar="NAME|module:function",
        help="cross-entropy, next-token, nll, mse, l1, huber, bce (logits), or a function of (outputs, targets); "
        "default: what the factory declares, else cross-entropy where outputs and labels are a classifier's",
    )
    add(
        "--metric",
        metavar="NAME|module:function",
        help="accuracy, top-5, r2, mse, mean-iou, perplexity, none, or a function; default: that of the loss",
    )
    add("--output-key", metavar="NAME", help="the part of a structured output that the loss is about")


def parse_solve(arguments: list[str]) -> argparse.Namespace:
    """Parse the options, those of `--config` included.

    Raises
    ------
    UsageError
        With one sentence.
    """
    parser = solve_parser()
    arguments = _one_by_one(arguments)
    options = parser.parse_args(arguments)
    if options.config is not None:
        options = parser.parse_args(_from_toml(parser, options.config, arguments) + arguments)
    check_budget_options(options)
    if max(len(options.sparsity or ()), len(options.keep or ())) < 2:
        for name in ("table", "picture"):
            if getattr(options, name) is not None:
                raise UsageError(f"`--{name}` needs several budgets, such as `--sparsity .5 .6` or `--keep 20 10`")
    if options.instance is None and not options.list_solvers:
        raise UsageError("an instance file is needed")
    if options.solver is None:
        options.solver = DEFAULT_SOLVERS[options.objective or "selection"]
    options.set = dict(_key_value(text) for text in options.set)
    return options


_SEVERAL = ("--sparsity", "--keep")


def check_budget_options(options: argparse.Namespace) -> None:
    """Refuse two of `--sparsity`, `--budget` and `--keep` together."""
    given = [f"`--{name}`" for name in ("sparsity", "budget", "keep") if getattr(options, name) is not None]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other")


def add_file_budget_options(parser: Parser) -> None:
    """Another budget than that of the file; of `cbs-info`."""
    add = parser.add_argument
    add(
        "--sparsity",
        type=share_option,
        metavar="F",
        help="with this fraction to prune, not the file's",
    )
    add("--budget", type=whole_option(0), metavar="N", help="with this many to prune")
    add("--keep", type=whole_option(0), metavar="K", help="with this many to keep")


def budget_in(options: argparse.Namespace) -> Callable[[int], int] | None:
    """The budget that the options ask for, the least one if several, as a function of n; None without them."""
    if options.budget is not None:
        return lambda n: int(options.budget)
    if options.sparsity is not None:
        least = min(options.sparsity) if isinstance(options.sparsity, list) else options.sparsity
        return lambda n: number_of(least, n)
    if options.keep is not None:
        most = max(options.keep) if isinstance(options.keep, list) else options.keep
        return lambda n: n - kept_of(most, n)
    return None


def kept_of(keep: int, n: int) -> int:
    """`keep`, if that many of n weights can be kept; raises `UsageError` otherwise."""
    if keep > n:
        raise UsageError(f"`--keep` must be at most {n}, the number of weights, got {keep}")
    return keep


def _one_by_one(arguments: list[str]) -> list[str]:
    """`--keep 5 6 FILE` as `--keep=5 --keep=6 FILE`; the numbers end where the file begins."""
    out: list[str] = []
    option: str | None = None  # that is being read
    values = 0
    for argument in arguments:
        if option is not None and _is_share(argument):
            out.append(f"{option}={argument}")
            values += 1
            continue
        out += [option] if option is not None and not values else []  # without a number: argparse reports it
        option, values = (argument, 0) if argument in _SEVERAL else (None, 0)
        out += [] if option is not None else [argument]
    return out + ([option] if option is not None and not values else [])


def _is_share(text: str) -> bool:
    try:
        float(text.removesuffix("%"))
    except ValueError:
        return False
    return True


def share_option(text: str) -> float:
    """The type of an option that takes a fraction, 0.5 or 50%."""
    if text.endswith("%"):
        return number_option(0, 100)(text[:-1]) / 100
    return number_option(0, 1)(text)


def _from_toml(parser: Parser, path: Path, arguments: list[str]) -> list[str]:
    """The options of a TOML file as command-line arguments: keys are option names, [set] the parameters."""
    table, _ = read_toml(path, InstanceError)
    skip = {"help", "version", "config", "instance", "list_solvers", "check"}
    known = {action.dest: action for action in parser._actions if action.dest not in skip}
    given = {argument.partition("=")[0] for argument in arguments}
    out: list[str] = []
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            listed = ", ".join(sorted(k.replace("_", "-") for k in known))
            raise UsageError(f"{path}: '{key}' is not an option; known: {listed}")
        if name in ("sparsity", "budget", "keep") and given & {"--sparsity", "--budget", "--keep"}:
            continue  # the command line takes precedence over all three
        option = known[name].option_strings[-1]
        if name == "set":
            if not isinstance(value, dict):
                raise UsageError(f"{path}: 'set' must be a table of parameters, got {value!r}")
            for parameter, setting in value.items():
                out.append(f"--set={parameter}={_toml_text(path, parameter, setting)}")
        elif known[name].nargs == 0:
            if not isinstance(value, bool):
                raise UsageError(f"{path}: '{key}' must be true or false, got {value!r}")
            out += [option] if value else []
        elif name in ("sparsity", "keep") and isinstance(value, list):
            out += [f"{option}={_toml_text(path, key, item)}" for item in value]
        else:
            out.append(f"{option}={_toml_text(path, key, value)}")
    return out


def _toml_text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str | int | float | bool):
        raise UsageError(f"{path}: '{key}' must be a text or a number, got {value!r}")
    return str(value)


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"`--set` takes KEY=VALUE, got '{text}'")
    return key.replace("-", "_"), value


def number_option(lowest: float = -math.inf, highest: float = math.inf) -> Callable[[str], float]:
    """The type of an option that takes a finite number within limits."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and lowest <= value <= highest):
            limits = {
                (-math.inf, math.inf): "a finite number",
                (0, math.inf): "a finite number ≥ 0",
            }.get((lowest, highest), f"a number between {lowest:g} and {highest:g}")
            raise argparse.ArgumentTypeError(f"must be {limits}, got '{text}'")
        return value

    return convert


def whole_option(lowest: int, highest: int = MOST_WHOLE) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `lowest` on, or up to `highest`."""
    bounded = f"from {lowest} to {highest}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            expected = f"≥ {lowest}" if highest == MOST_WHOLE and value < lowest else bounded
            raise argparse.ArgumentTypeError(f"must be a whole number {expected}, got '{text[:40]}'")
        return value

    return convert
