"""Accuracy of a pruned network: `python -m cbs_opt.bench.accuracy INSTANCE.npz --checkpoint FILE --data PATH`.

For every sparsity and every method of selection and update, the network of an exported instance is pruned
one-shot, without any training, and scored on test images: the columns of the tables 1 to 5 of the CBS paper and
of ours.

No view of `cbs-bench`: a store holds losses of the quadratic model, not selections to apply to a network.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cbs_opt import Instance, Stop, read_instance, solve
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.errors import UsageError
from cbs_opt.files.atomic import atomic_write, check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn import Module

    from cbs_opt.instances.data import SampleSource
    from cbs_opt.instances.networks import Network

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


class Way(NamedTuple):
    """A pruning method: its name in the paper, solver, objective, whether kept weights change, its colour."""

    paper: str
    solver: str
    objective: str
    update: bool
    colour: str


WAYS = {
    "magnitude": Way("MP", "magnitude", "selection", False, "#7a7a7a"),
    "obs": Way("WF-S", "obs", "selection", False, "#e69f00"),
    "cbs": Way("CBS-S", "cbs", "selection", False, "#d55e00"),
    "search": Way("", "search", "selection", False, "#cc79a7"),
    "magnitude + update": Way("", "magnitude", "selection", True, "#999999"),
    "obs + update": Way("WF", "obs", "selection", True, "#f0c060"),
    "cbs + update": Way("CBS", "cbs", "selection", True, "#56b4e9"),
    "joint": Way("", "joint", "joint", True, "#0072b2"),
}


@dataclass(frozen=True)
class Row:
    """One network pruned: way, sparsity, losses of the quadratic model, accuracy, mean cross entropy, seconds."""

    way: str
    sparsity: float
    selection_loss: float
    joint_loss: float | None
    accuracy: float
    loss: float
    seconds: float


def study(
    instance: Instance,
    network: Network,
    samples: SampleSource,
    *,
    ways: Sequence[str] = tuple(WAYS),
    sparsities: Sequence[float] = SPARSITIES,
    time_limit: float | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Prune and score; yields a row for every sparsity and way.

    Parameters
    ----------
    instance : Instance
        Exported from `network`.
    network : Network
        With the weights of its checkpoint.
    samples : SampleSource
        Test images.
    ways : sequence of str
        Names of `WAYS`.
    sparsities : sequence of float
    time_limit : float, optional
        Seconds for each solve.
    seed : int
    """
    from cbs_opt.instances.apply import apply

    for sparsity in sparsities:
        problem = instance.with_sparsity(sparsity)
        for name in ways:
            way = WAYS[name]
            result = solve(
                problem,
                way.solver,
                objective=way.objective if way.solver == "joint" else None,
                stop=Stop(time_limit=time_limit),
                seed=seed,
                update=way.update,
            )
            model = copy.deepcopy(network.model)
            apply(model, problem, result)
            accuracy, loss = score(model, samples)
            seconds = result.build_seconds + result.solve_seconds
            yield Row(name, sparsity, result.selection_loss, result.joint_loss, accuracy, loss, seconds)


def score(model: Module, samples: SampleSource) -> tuple[float, float]:
    """Accuracy and mean cross entropy of a network.

    Raises
    ------
    UsageError
        For samples without labels of classes.
    """
    from cbs_opt.instances.scores import evaluate

    found = evaluate(model, samples)
    if found is None or found.accuracy is None:
        raise UsageError("the test samples have no labels of classes: accuracy needs them")
    return found.accuracy, found.loss


def table(rows: Sequence[Row], dense: float) -> str:
    """Accuracies in percent as a Markdown table, a column for each way."""
    ways = list(dict.fromkeys(row.way for row in rows))
    found = {(row.way, row.sparsity): row for row in rows}
    heads = [f"{way} ({WAYS[way].paper})" if WAYS[way].paper else way for way in ways]
    lines = [f"| sparsity | {' | '.join(heads)} |", "|---" * (len(ways) + 1) + "|"]
    for sparsity in dict.fromkeys(row.sparsity for row in rows):
        cells = [f"{100 * found[way, sparsity].accuracy:.2f}" for way in ways if (way, sparsity) in found]
        lines.append(f"| {sparsity:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nDense: {100 * dense:.2f} %."


def draw(rows: Sequence[Row], dense: float, title: str) -> Figure:
    """Accuracy over sparsity, a line for each way; the axis of sparsity is even in log(1 − sparsity)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sparsities = list(dict.fromkeys(row.sparsity for row in rows))
    axes.axhline(100 * dense, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        "dense", (-np.log(1 - sparsities[0]), 100 * dense), (2, 3), textcoords="offset points", fontsize=8
    )
    for way in dict.fromkeys(row.way for row in rows):
        mine = [row for row in rows if row.way == way]
        axes.plot(
            [-np.log(1 - row.sparsity) for row in mine],
            [100 * row.accuracy for row in mine],
            marker="o",
            markersize=3.5,
            linewidth=1.6,
            linestyle="-" if WAYS[way].update else "--",
            color=WAYS[way].colour,
            label=way,
        )
    axes.set_xticks([-np.log(1 - s) for s in sparsities], [f"{s:g}" for s in sparsities])
    axes.set_xlabel("sparsity")
    axes.set_ylabel("accuracy on test images, %")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.accuracy", _main, arguments)


def _main(arguments: list[str]) -> int:
    from cbs_opt.instances.checkpoints import load_checkpoint
    from cbs_opt.instances.data import open_samples
    from cbs_opt.instances.networks import is_factory, load_network

    parser = Parser(
        "python -m cbs_opt.bench.accuracy", "Accuracy of a network over sparsity, pruned by several methods."
    )
    add = parser.add_argument
    add("instance", type=Path, metavar="INSTANCE.npz", help="exported by cbs-export")
    add("--network", metavar="NAME|module:factory", help="default: as in the instance")
    add("--checkpoint", type=Path, metavar="FILE", help="default: as returned by a factory")
    add("--data", metavar="PATH", help="test images; default: a factory's own")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="F")
    add("--time-limit", type=float, metavar="S", help="of each solve")
    add("--seed", type=int, default=0)
    add("--title", default="", help="of the picture")
    add("-o", "--output", type=Path, metavar="FILE.png", help="the picture")
    options = parser.parse_args(arguments)
    instance = read_instance(options.instance)
    spec = options.network or instance.metadata.get("network")
    if not isinstance(spec, str):
        raise UsageError(f"{options.instance}: does not name its network: give it with `--network`")
    if options.network is None and is_factory(spec):
        raise UsageError(f"'{spec}' is a factory, which is code: repeat it as `--network {spec}` to run it")
    if options.output is not None:
        check_writable(options.output)
    noted = instance.metadata.get("normalisation")
    noted = noted if isinstance(noted, dict) else {}
    network = load_network(spec, noted.get("mean"), noted.get("std"))
    if options.checkpoint is not None:
        load_checkpoint(network.model, options.checkpoint)
    samples = open_samples(options.data, network, "test")
    dense, _ = score(network.model, samples)
    rows = []
    for row in study(
        instance,
        network,
        samples,
        ways=options.ways,
        sparsities=options.sparsities,
        time_limit=options.time_limit,
        seed=options.seed,
    ):
        rows.append(row)
        sys.stderr.write(f"{json.dumps(row.__dict__)}\n")
    sys.stdout.write(table(rows, dense) + "\n")
    if options.output is not None:
        figure = draw(rows, dense, options.title or f"{spec}, pruned one-shot, {len(samples)} test images")
        with atomic_write(options.output) as file:
            figure.savefig(file, format=options.output.suffix[1:] or "png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
