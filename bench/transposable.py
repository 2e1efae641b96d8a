"""Transposable N:M on layers: `python -m cbs_opt.bench.transposable FOLDER` prints a Markdown table.

For every layer of FOLDER (see `layers`), and N:M along its rows and along both sides: magnitude with an exact
refit, ADMM with an exact refit, and `solvers.layers` after some seconds, with its bound. Magnitude and ADMM take
the masks that are cheapest in every group, or in every tile, exactly. Errors are relative, as in `layers`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cbs_opt.bench.anytime import CLOCKS, load
from cbs_opt.bench.layers import Case, read_layer, table
from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.errors import UsageError
from cbs_opt.instances.recipe import transposable_budget
from cbs_opt.solvers.layers.problem import LayerBudget
from cbs_opt.solvers.layers.refit import refit_layer
from cbs_opt.solvers.layers.starts import admm
from cbs_opt.solvers.layers.tiled_budget import tiled_budget
from cbs_opt.solvers.layers.warm_up import layers_joint
from cbs_opt.typing import FloatArray


def budgets(case: Case, keep: int, of: int) -> dict[str, LayerBudget]:
    """N:M along the rows, and along both sides; raises `UsageError` where the sides are no multiples of M."""
    shape = (case.layer.rows, case.layer.columns)
    if shape[0] % of or shape[1] % of:
        raise UsageError(f"{case.name}: {shape[0]} × {shape[1]} are no multiples of {of}")
    along = LayerBudget(pattern=(of - keep, of))
    index = np.arange(case.layer.weights.size).reshape(shape)
    both = tiled_budget(transposable_budget([shape], keep, of), along, [index])
    assert both is not None
    return {f"{keep}:{of}": along, f"transposable {keep}:{of}": both}


def rows(case: Case, keep: int, of: int, seconds: float) -> Iterator[list[object]]:
    """One row for each of the budgets."""
    layer = case.layer
    for name, budget in budgets(case, keep, of).items():

        def magnitude(budget: LayerBudget = budget) -> FloatArray:
            return refit_layer(layer, budget.cheapest([layer], [np.abs(layer.weights)])[0])

        def split(budget: LayerBudget = budget) -> FloatArray:
            masks = admm([layer], budget)
            assert masks is not None
            return refit_layer(layer, masks[0])

        found = [case.timed(method) for method in (magnitude, split)]
        solution = case.solve(budget, seconds, bound_share=0.3)
        error, bound = case.error(solution.weights[0]), 2 * (solution.bound or 0.0) / case.reference
        ours = f"{error:.4e} ({100 * (error / min(peer.error for peer in found) - 1):+.2f} %)"
        yield [case.name, name, *found, ours, f"{bound:.4e}", f"{100 * (1 - bound / error):.1f} %"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.transposable", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.transposable", "Print errors of transposable N:M patterns on layers.")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="layers as .npz files of `weight` and `covariance`")
    add("--keep", type=int, default=2, metavar="N")
    add("--of", type=int, default=4, metavar="M")
    add("--seconds", type=float, default=10.0, metavar="S", help="of our own runs; default: %(default)s")
    add("--threads", type=int, default=1, metavar="N")
    add("--clock", choices=tuple(CLOCKS), default="processor", help="default: processor")
    options = parser.parse_args(arguments)
    if not (0 < options.keep < options.of and options.seconds > 0):
        raise UsageError("`--keep` must be positive and less than `--of`, and `--seconds` positive")
    paths = sorted(options.folder.glob("*.npz"))
    if not paths:
        raise UsageError(f"{options.folder}: no layers (*.npz)")
    layers_joint()
    sys.stdout.write(f"{machine()}, {options.threads} thread(s), {options.clock} seconds. {load()}\n\n")
    ours = f"ours after {options.seconds:g} s"
    header = ["layer", "pattern", "magnitude, refit", "ADMM, refit", ours, "bound", "gap"]
    found: list[list[object]] = []
    for path in paths:
        case = read_layer(path, CLOCKS[options.clock], options.threads)
        found += rows(case, options.keep, options.of, options.seconds)
    sys.stdout.write(table(header, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
