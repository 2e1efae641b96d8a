"""Accuracy of a pruned network: `python -m cbs_opt.bench.accuracy INSTANCE.npz --checkpoint FILE --data PATH`.

For every sparsity and every method of selection and update, the network of one exported instance is pruned
one-shot, without any training, and scored on test images. A view of `cbs_opt.bench.paper` for an instance that is
there already: `cbs-bench paper` exports its own, for several seeds, and keeps its rows in a store.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cbs_opt import Instance, Solution, read_instance
from cbs_opt.bench.paper.pruning import select, update
from cbs_opt.bench.paper.results import Results
from cbs_opt.bench.paper.study import BEST, NONE, OURS, Method, Source, Study
from cbs_opt.bench.paper.subject import score
from cbs_opt.bench.runs.store import OK, Key, Row
from cbs_opt.cli.common import Parser, check_outputs, run_main
from cbs_opt.errors import UsageError
from cbs_opt.files.atomic import atomic_write

if TYPE_CHECKING:
    from cbs_opt.instances.data import SampleSource
    from cbs_opt.instances.networks import Network

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)

WAYS = {
    "magnitude": ("magnitude", "selection", NONE),
    "obs": ("obs", "selection", NONE),
    "cbs": ("cbs", "selection", NONE),
    "search": ("search", "selection", NONE),
    "magnitude + update": ("magnitude", "selection", BEST),
    "obs + update": ("obs", "selection", BEST),
    "cbs + update": ("cbs", "selection", BEST),
    "joint": ("joint", "joint", BEST),
}
"""Solver, objective and update of each method."""


def study_of(
    name: str,
    ways: Sequence[str] = tuple(WAYS),
    sparsities: Sequence[float] = SPARSITIES,
    time_limit: float | None = None,
    seed: int = 0,
) -> Study:
    """A study of one instance: methods that the quadratic model judges.

    Parameters
    ----------
    name : str
        Of the network.
    ways : sequence of str
        Names of `WAYS`.
    sparsities : sequence of float
    time_limit : float, optional
        Processor seconds of each solve.
    seed : int
    """
    source = Source("the instance", 0, "{}")
    methods = []
    for way in ways:
        solver, objective, move = WAYS[way]
        methods.append(
            Method(
                name=way,
                family=OURS,
                source=source,
                select=solver,
                objective=objective,
                judge="model",
                parameters="{}",
                update=move,
                time_limit=time_limit,
                iterations=None,
                sparsities=tuple(sparsities),
                seeds=(seed,),
                published=None,
            )
        )
    return Study(name, f"{name}, pruned one-shot", name, None, None, None, 0, 1, tuple(methods), {}, None, ())


def prune_and_score(
    study: Study, instance: Instance, network: Network, samples: SampleSource, dense: float, seed: int = 0
) -> Iterator[Row]:
    """Prune and score; yields a row for every sparsity and method.

    Parameters
    ----------
    study : Study
        Of `study_of`.
    instance : Instance
        Exported from `network`.
    network : Network
        With the weights of its checkpoint.
    samples : SampleSource
        Test images.
    dense : float
        The accuracy before.
    seed : int
    """
    from cbs_opt.instances.apply import apply

    for sparsity in study.sparsities:
        problem = instance.with_sparsity(sparsity)
        for method in study.methods:
            chosen = select(method, problem, lambda weights: float("nan"), seed)
            updated = update(method, problem, chosen.pruned, lambda weights: float("nan"))
            model = copy.deepcopy(network.model)
            apply(model, problem, Solution(chosen.pruned, weights=updated.weights))
            found = score(model, samples)
            kind = "selection" if method.update == NONE else "joint"
            key = Key("", method.select, method.settings, kind, problem.budget.total, seed, method.time_limit)
            yield Row(
                *key,
                label=method.name,
                sparsity=sparsity,
                kind=OK,
                status=chosen.status,
                objective=updated.predicted,
                cpu_s=chosen.seconds + updated.seconds,
                scores={"accuracy": found.accuracy, "test_loss": found.loss, "dense_accuracy": dense},
            )


def results_of(study: Study, rows: Sequence[Row]) -> Results:
    """The rows by method and sparsity, for tables and pictures."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row.label, row.sparsity), []).append(row)
    return Results(study, Path(), found, [], [], [])


def table(results: Results, dense: float) -> str:
    """Accuracies in percent as Markdown, a column for each method."""
    from cbs_opt.bench.paper.report import accuracy_table
    from cbs_opt.bench.reports.document import Document, Paragraph

    document = Document(results.study.title)
    document.add(accuracy_table(results, results.methods, OURS), Paragraph(f"Dense: {100 * dense:.2f} %."))
    return document.markdown("")


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
    add("--time-limit", type=float, metavar="S", help="processor seconds of each solve")
    add("--seed", type=int, default=0)
    add("--title", default="", help="of the table")
    add("-o", "--output", type=Path, metavar="FILE.png", help="the picture")
    options = parser.parse_args(arguments)
    instance = read_instance(options.instance)
    spec = options.network or instance.metadata.get("network")
    if not isinstance(spec, str):
        raise UsageError(f"{options.instance}: does not name its network: give it with `--network`")
    if options.network is None and is_factory(spec):
        raise UsageError(f"'{spec}' is a factory, which is code: repeat it as `--network {spec}` to run it")
    check_outputs((options.instance, options.checkpoint), (options.output,))
    noted = instance.metadata.get("normalisation")
    noted = noted if isinstance(noted, dict) else {}
    network = load_network(spec, noted.get("mean"), noted.get("std"))
    if options.checkpoint is not None:
        load_checkpoint(network.model, options.checkpoint)
    samples = open_samples(options.data, network, "test")
    dense = score(network.model, samples).accuracy
    study = study_of(options.title or spec, options.ways, options.sparsities, options.time_limit, options.seed)
    rows = []
    for row in prune_and_score(study, instance, network, samples, dense, options.seed):
        rows.append(row)
        sys.stderr.write(json.dumps({"method": row.label, "sparsity": row.sparsity, **(row.scores or {})}) + "\n")
    results = results_of(study, rows)
    sys.stdout.write(table(results, dense))
    if options.output is not None:
        from cbs_opt.bench.paper.pictures import looks_of, over_sparsity

        figure = over_sparsity(results, looks_of(results))
        with atomic_write(options.output) as file:
            figure.savefig(file, format=options.output.suffix[1:] or "png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
