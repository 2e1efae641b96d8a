"""From the store of a study to its report: tables beside the published figures, pictures, and what was not run."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from cbs_opt.bench.paper import pictures
from cbs_opt.bench.paper.results import Mean, Results, increase, mean_of, ratio, read_results
from cbs_opt.bench.paper.study import FAMILIES, NETWORK, OURS, PUBLISHED, UPDATES, Method
from cbs_opt.bench.reports.canvas import Style, as_svg, short
from cbs_opt.bench.reports.document import Block, Document, Folded, Heading, Paragraph, Picture, Points, Table
from cbs_opt.bench.reports.report import report_base, write_document
from cbs_opt.bench.reports.tables import NOTHING, seconds_text, seeds_text

NOT_RUN = "not run"

NEAR = 1.5
"""Points of accuracy from the published figure up to which a cell counts as reproduced."""

_HOW_TO_READ = (
    "**Accuracy** is in per cent on the test images, mean ± standard deviation over the seeds, which shuffle the "
    "training images. No test image decides about anything. In brackets: the published figure. A number of seeds "
    "in square brackets: fewer than the study asks for.",
    "**Images** are the training images that decide about the pruned network: those of the curvature, and those "
    "on which draws, steps or the scale of an update are chosen.",
    "**Predicted** is the increase of the loss by the quadratic model of the method's own curvature, "
    "gᵀδ + ½ δᵀHδ; **measured** is the increase of the mean cross entropy on the training images of the choice, "
    "which the curvature has not seen. Reconstruction predicts errors of layers, which do not compare: it is left "
    "out, and so are stages, which predict one step each.",
    "**Seconds** are of the processor: of the selection and the update, without the export of the instance.",
)


def write_study_report(
    store: Path | str, output: Path | str | None = None, *, title: str | None = None
) -> list[Path]:
    """Write the report of a store of `cbs-bench paper`; parameters and files as of `reports.write_report`."""
    base = report_base(Path(store), output)
    return write_document(make_study_document(read_results(store), title), base)


def make_study_document(results: Results, title: str | None = None) -> Document:
    """The report as a document, pictures drawn."""
    study, looks = results.study, pictures.looks_of(results)
    document = Document(title or study.title)
    document.add(Points([*_glance(results), *study.notes]))
    for family in FAMILIES:
        methods = [method for method in results.methods if method.family == family]
        if methods:
            document.add(Heading(f"Accuracy, {'methods ' if family == PUBLISHED else ''}{family}"))
            document.add(accuracy_table(results, methods, family))
    document.add(
        Picture(
            "accuracy",
            as_svg(pictures.over_sparsity(results, looks), "accuracy"),
            "Accuracy over sparsity, mean and deviation over the seeds. Dashes: the best published figure.",
        )
    )
    far = list(distances(results))
    if study.published:
        document.add(Heading("Distance from the published figures"))
        document.add(
            Points(far) if far else Paragraph(f"Every figure lies within {NEAR:g} points of the paper's.")
        )
    if any(results.increases(method, sparsity) for method in results.methods for sparsity in method.sparsities):
        document.add(*_predictions(results, looks))
    document.add(Heading("Methods, images and time"), methods_table(results))
    document.add(*_scales(results))
    document.add(Heading("Each sparsity"))
    there = {sparsity for _, sparsity in results.rows}
    document.add(*(Folded(f"Sparsity {s:g}", [detail_table(results, s)]) for s in study.sparsities if s in there))
    document.add(Heading("Failed, and not run"), Points(list(_missing(results))))
    document.add(Heading("How to read this"), Points(_HOW_TO_READ))
    return document


def _predictions(results: Results, looks: Mapping[str, Style]) -> Iterator[Block]:
    """How far the quadratic models can be trusted."""
    yield Heading("Predicted and measured increase of the loss")
    yield Paragraph(
        "Median over the seeds of measured / predicted: 1 where the quadratic model holds, more where it promises "
        "too much."
    )
    yield ratio_table(results)
    yield Picture(
        "losses",
        as_svg(pictures.scatter(results, looks), "losses"),
        "Increase of the loss, predicted by the quadratic model and measured on training images. A point for each "
        "network; on the line the two agree.",
    )


def _glance(results: Results) -> Iterator[str]:
    study = results.study
    rows = [row for part in results.rows.values() for row in part]
    scores = [dict(row.scores or {}) for row in rows]
    dense = mean_of([100 * float(s["dense_accuracy"]) for s in scores])
    published = "" if study.dense is None else f" ({study.dense:.2f} in the paper)"
    yield (
        f"{len(rows)} networks, seeds {seeds_text(row.seed for row in rows)}, {scores[0]['test_images']:,} test "
        f"images; the dense network has {dense.mean:.2f} %{published}. No training after pruning."
    )
    if study.training_images is not None:
        yield (
            f"Training and test images come from one file: each seed draws {study.training_images} for training, "
            f"and the other {scores[0]['test_images']} score."
        )
    if results.instances:
        yield f"`{_command(results)}`"
    machines = {str(found.get("processor")): found.get("cores") for found in results.environments}
    for processor, cores in machines.items():
        yield f"{processor}, {cores} cores, {study.threads} thread{'s' if study.threads > 1 else ''} a network."


def _command(results: Results) -> str:
    """The command that makes the store, with the names of the files."""
    files = results.instances[0].metadata["files"]
    parts = ["cbs-bench", "paper", results.study.name]
    for option in ("checkpoint", "data", "test_data"):
        name = files[option][0]
        if name is not None:
            parts += [f"--{option.replace('_', '-')}", name]
    return shlex.join([*parts, "-o", results.path.name])


def accuracy_table(results: Results, methods: list[Method], family: str) -> Table:
    """Sparsities as rows, methods as columns; for methods of ours the best published figure comes first."""
    best = pictures.best_published(results) if family == OURS else {}
    header = ["sparsity", *(["best published"] if best else []), *(method.name for method in methods)]
    rows = []
    for sparsity in results.study.sparsities:
        first = [f"{best[sparsity]:.2f}" if sparsity in best else NOTHING] if best else []
        cells = [_cell(results, method, sparsity) for method in methods]
        rows.append([f"{sparsity:g}", *first, *cells])
    return Table(header, rows)


def _cell(results: Results, method: Method, sparsity: float) -> str:
    if sparsity not in method.sparsities:
        return NOTHING
    mean = results.accuracy(method.name, sparsity)
    text = NOT_RUN if mean is None else _mean_text(mean, len(method.seeds))
    published = published_figure(results, method, sparsity)
    return text if published is None else f"{text} ({published:.2f})"


def published_figure(results: Results, method: Method, sparsity: float) -> float | None:
    """The published accuracy of a cell in per cent, None where there is none."""
    return None if method.published is None else results.study.published[method.published].get(sparsity)


def _mean_text(mean: Mean, planned: int, digits: int = 2) -> str:
    deviation = "" if mean.deviation is None else f" ± {mean.deviation:.{digits}f}"
    return f"{mean.mean:.{digits}f}{deviation}" + (f" [{mean.count}]" if mean.count < planned else "")


def distances(results: Results) -> Iterator[str]:
    """A sentence for every cell that lies further than `NEAR` points from the published figure."""
    for method in results.methods:
        for sparsity in method.sparsities:
            mean, published = results.accuracy(method.name, sparsity), published_figure(results, method, sparsity)
            if mean is not None and published is not None and abs(mean.mean - published) > NEAR:
                side = "above" if mean.mean > published else "below"
                yield (
                    f"{method.name} at {sparsity:g}: {mean.mean:.2f}, {abs(mean.mean - published):.2f} points "
                    f"{side} the paper's {published:.2f}."
                )


def ratio_table(results: Results) -> Table:
    """Measured / predicted by method and sparsity."""
    rows = []
    for method in results.methods:
        if not method.predicts_loss:
            continue
        cells = []
        for sparsity in results.study.sparsities:
            value = ratio(results.increases(method, sparsity))
            cells.append(NOTHING if math.isnan(value) else f"{value:.3g}")
        rows.append([method.name, *cells])
    return Table(["measured / predicted", *(f"{s:g}" for s in results.study.sparsities)], rows)


def methods_table(results: Results) -> Table:
    """What each method is, how many images it saw, how long it took."""
    rows = []
    for method in results.methods:
        found = [row for s in method.sparsities for row in results.rows.get((method.name, s), [])]
        images = f"{max(int((row.scores or {})['images']) for row in found):,}"
        seconds = [row.cpu_s for row in found if row.cpu_s is not None]
        mean = seconds_text(sum(seconds) / len(seconds)) if seconds else NOTHING
        most = seconds_text(max(seconds)) if seconds else NOTHING
        rows.append([method.name, method.family, _selection(method), _update(method), images, mean, most])
    header = ["method", "family", "selection", "update", "images", "mean seconds", "most"]
    return Table(header, rows, left=4)


def _selection(method: Method) -> str:
    if method.pruning is not None:
        return "`cbs_opt.prune`: " + ", ".join(f"{k} {v}" for k, v in json.loads(method.pruning).items())
    given = json.loads(method.parameters)
    settings = "".join(f", {key} {value}" for key, value in given.items())
    judge = ", draws and steps chosen by the network's loss" if method.judge == NETWORK else ""
    limit = "" if method.time_limit is None else f", at most {method.time_limit:g} s"
    objective = f" ({method.objective} loss)" if method.objective != "selection" else ""
    return f"`{method.select}`{objective} on {method.source.name}{settings}{judge}{limit}"


def _update(method: Method) -> str:
    return UPDATES[method.update] if method.pruning is None else "as chosen on training images"


def _scales(results: Results) -> Iterator[Block]:
    """The scales that were chosen for updates."""
    rows = []
    for method in results.methods:
        cells = []
        for sparsity in results.study.sparsities:
            found = [(row.scores or {}).get("scale") for row in results.rows.get((method.name, sparsity), [])]
            scales = sorted(float(scale) for scale in found if scale is not None)
            cells.append(", ".join(f"{scale:g}" for scale in scales) or NOTHING)
        if any(cell != NOTHING for cell in cells):
            rows.append([method.name, *cells])
    if rows:
        yield Heading("Scales of updates")
        yield Paragraph("The multiple of the best update with the least loss on training images, of each seed.")
        yield Table(["method", *(f"{s:g}" for s in results.study.sparsities)], rows)


def detail_table(results: Results, sparsity: float) -> Table:
    """Everything about one sparsity."""
    rows = []
    for method in results.study.methods:
        accuracy = results.accuracy(method.name, sparsity)
        if accuracy is None:
            continue
        loss = results.mean(method.name, sparsity, lambda scores, row: float(scores["test_loss"]))
        seconds = results.mean(method.name, sparsity, lambda scores, row: row.cpu_s or 0.0)
        images = results.mean(method.name, sparsity, lambda scores, row: float(scores["images"]))
        assert loss is not None and seconds is not None and images is not None
        pairs = results.increases(method, sparsity)
        measured = results.mean(method.name, sparsity, lambda scores, row: increase(row))
        assert measured is not None
        rows.append(
            [
                method.name,
                _mean_text(accuracy, len(method.seeds)),
                f"{loss.mean:.4f}",
                short(mean_of([predicted for predicted, _ in pairs]).mean, 2) if pairs else NOTHING,
                f"{measured.mean:.4f}",
                f"{images.mean:,.0f}",
                seconds_text(seconds.mean),
            ]
        )
    header = ["method", "accuracy", "test loss", "predicted", "measured", "images", "seconds"]
    return Table(header, rows)


def _missing(results: Results) -> Iterator[str]:
    for row in results.failed:
        yield f"{row.label} at {row.sparsity:g}, seed {row.seed}: {row.kind}: {row.message}"
    complete = not results.failed
    run = [method.name for method in results.methods]
    absent = [method.name for method in results.study.methods if method.name not in run]
    if absent:
        complete = False
        yield f"Not run: {'; '.join(absent)}."
    for method in results.methods:
        missing: dict[tuple[int, ...], list[str]] = {}
        for sparsity in method.sparsities:
            there = {row.seed for row in results.rows.get((method.name, sparsity), [])}
            seeds = tuple(seed for seed in method.seeds if seed not in there)
            if seeds:
                missing.setdefault(seeds, []).append(f"{sparsity:g}")
        if missing:
            complete = False
            parts = []
            for seeds, sparsities in missing.items():
                which = "" if len(seeds) == len(method.seeds) else f" (seeds {seeds_text(seeds)})"
                parts.append(f"{', '.join(sparsities)}{which}")
            yield f"{method.name} was not run at {'; '.join(parts)}."
    if complete:
        yield "None: every row of the study is there."
