"""From a store to a report: `write_report` makes a Markdown file, one HTML page, and the figures.

Everything is computed from the store alone; the same store gives the same report.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cbs_opt.bench.reports import figures, tables
from cbs_opt.bench.reports.analysis import Analysis, Section, analyse
from cbs_opt.bench.reports.canvas import Style, as_svg, styles
from cbs_opt.bench.reports.document import Block, Document, Folded, Heading, Paragraph, Picture, Points
from cbs_opt.bench.reports.limitations import limitations
from cbs_opt.bench.reports.proofs import proofs
from cbs_opt.bench.runs.store import KINDS, OK, Store
from cbs_opt.errors import CbsError, OutputError, UsageError
from cbs_opt.files.atomic import atomic_write, check_writable, write_text
from cbs_opt.files.paths import real_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("cbs_opt")

_HOW_TO_READ = (
    "A **problem** is an instance with a number of weights to prune and a loss to minimise. **Best known** is "
    "the least loss of all valid rows of this store; it is **proven** where a solver's lower bound agrees with "
    "it to 1e-6, or its search was finished. Losses are recomputed outside the solvers; rows that claim what is "
    "not so are **wrong**, also where another row's selection refutes a bound.",
    "**Gap** is (loss − best known) / |best known|; up to 1e-6 it is shown as 0. A failed run has the gap ∞, "
    "and counts in medians and shares. The geometric mean is that of loss / best known, less 1; it and the "
    "worst gap are of the runs that did not fail. **Own gap** is (loss − bound) / |loss| with the bound of the "
    "same run: what the solver itself proves.",
    "**Seconds to 1 %, to 1e-6, to proof** are of building and solving until the loss was within that of the "
    "best known, or the solver's own bound agreed with its loss to 1e-6: shifted geometric means, "
    "exp(mean(log(t + 1 s))) − 1 s, as in Mittelmann's benchmarks. A run that never gets there counts with the "
    "largest time limit, or the longest time that any run took to get there, if that is more.",
    "**Performance profile** (Dolan and Moré 2002): the share of the problems that a solver solves within a "
    "multiple of the fastest solver's time, where its time is the median over its seeds; the line's left end is "
    "the share on which it is fastest, its right end the share that it solves at all. **Time-to-target plots** "
    "(Aiex, Resende and Ribeiro 2007) show the share of single runs that have reached the target by a time.",
)


def write_report(store: Path | str, output: Path | str | None = None, *, title: str | None = None) -> list[Path]:
    """Write the report of a store.

    Parameters
    ----------
    store : Path
        Written by `cbs-bench run`.
    output : Path, optional
        The report's name, with or without an ending; a folder for a report named as the store. Without one it
        is written next to the store.
    title : str, optional

    Returns
    -------
    list of Path
        NAME.md, NAME.html, and the pictures of the Markdown, NAME-pictures/*.svg. The page holds its own.

    Raises
    ------
    StoreError
        For a store that cannot be read.
    CbsError
        For a store without rows.
    OutputError
        When a file cannot be written.

    Notes
    -----
    O(rows) time and memory, the traces apart, of which only those of a few problems are kept.
    """
    base = report_base(Path(store), output)
    return write_document(make_document(_analysed(store), title), base)


def write_document(document: Document, base: Path) -> list[Path]:
    """Write a document as Markdown with its pictures beside it, and as one HTML page.

    Parameters
    ----------
    document : Document
    base : Path
        Of `report_base`: its name without an ending.

    Returns
    -------
    list of Path
        NAME.md, NAME.html, then NAME-pictures/*.svg.

    Raises
    ------
    OutputError
        When a file cannot be written.
    """
    folder = base.with_name(f"{base.name}-pictures")
    written = []
    if document.pictures:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made: {error.strerror or error}") from error
    for picture in document.pictures:
        written.append(_write(folder / f"{picture.name}.svg", _on_paper(picture.svg)))
    markdown = _write(base.with_name(f"{base.name}.md"), document.markdown(folder.name))
    page = _write(base.with_name(f"{base.name}.html"), document.page())
    return [markdown, page, *written]


def profile_picture(store: Path | str, path: Path | str) -> Path:
    """Draw the performance profile alone: seconds until within 1e-6 of the best known, a panel for each objective.

    Parameters
    ----------
    store : Path
    path : Path
        .png, .svg or .pdf.

    Raises
    ------
    CbsError
        For a store without rows, or in which no run is valid.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UsageError(f"{path}: a picture must end in .png, .svg or .pdf")
    check_writable(path)
    analysis = _analysed(store)
    figure = figures.profiles(analysis.sections, styles(tables.overall(analysis)), ["exact_s"])
    if figure is None:
        raise CbsError(f"{store}: there is nothing to draw: no run is valid")
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=150, metadata={"CreationDate": None} if kind == "pdf" else None)
    return path


def write_proofs(store: Path | str, path: Path | str) -> Path:
    """Write the table of exact solvers as Markdown: seconds, nodes and gaps of every problem.

    Raises
    ------
    CbsError
        For a store without rows.
    """
    check_writable(Path(path))
    return _write(Path(path), proofs(_analysed(store)))


def make_document(analysis: Analysis, title: str | None = None) -> Document:
    """The report as a document, pictures drawn."""
    document = Document(title or f"Benchmark report: {analysis.path.stem}")
    document.add(Points(list(_glance(analysis))), *_what_was_run(analysis))
    looks = styles(tables.overall(analysis))
    for section in analysis.sections:
        logger.info("report: %s loss, %d problems", section.objective_kind, len(section.problems))
        document.add(*_section(analysis, section, looks))
    failed = tables.failures(analysis)
    document.add(Heading("Rows that failed or were refused"))
    document.add(failed if failed else Paragraph("None."))
    document.add(Heading("Known limitations"), Points(limitations(analysis)))
    document.add(Heading("How to read this"), Points(_HOW_TO_READ))
    return document


def _glance(analysis: Analysis) -> Iterator[str]:
    kinds = Counter(row.kind for row in analysis.rows)
    others = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kind != OK and kinds[kind])
    yield (
        f"{len(analysis.rows)} rows: {kinds[OK]} valid"
        + (f", {others}" if others else ", none failed")
        + f"; {len(analysis.solvers)} solver settings."
    )
    for section in analysis.sections:
        problems = section.problems
        proven = sum(problem.proven for problem in problems)
        instances = {problem.instance.sha256 for problem in problems}
        sizes = [problem.instance.n for problem in problems]
        weights = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        yield (
            f"{section.objective_kind.capitalize()} loss: {len(problems)} problems from {len(instances)} "
            f"instances of {weights} weights. **{proven} of the {len(problems)} best known losses are proven "
            "optimal.**"
        )


def _what_was_run(analysis: Analysis) -> Iterator[Block]:
    yield Heading("What was run")
    yield tables.settings(analysis)
    starts = sorted(row.started for row in analysis.rows if row.started)
    if starts:
        yield Paragraph(f"Rows made from {_minute(starts[0])} to {_minute(starts[-1])} UTC.")
    yield Paragraph(tables.machine_sentence(analysis))
    machines = tables.machines(analysis)
    if machines is not None:
        yield Folded("Machine and versions", [machines])


def _minute(started: str) -> str:
    return started[:16].replace("T", " ")


def _section(analysis: Analysis, section: Section, looks: dict[str, Style]) -> Iterator[Block]:
    kind = section.objective_kind
    yield Heading(f"{kind.capitalize()} loss")
    yield Heading(f"Quality, {kind} loss", 3)
    yield tables.quality(section)
    yield Heading(f"Time, {kind} loss", 3)
    yield tables.times(section)
    if any(problem.keys() != set(section.solvers) for problem in (p.runs for p in section.problems)):
        yield Paragraph("* Not run on every problem: these figures are over fewer of them and do not compare.")
    yield Paragraph(
        f"A run that does not get there counts with {tables.seconds_text(section.cap)} s. Ranked by the share of "
        "all problems whose best known loss is reached, then by the time until then."
    )
    chosen = figures.choose(section)
    with Store(analysis.path) as store:
        wanted = [run.row.id for problem in chosen for run in problem.valid if run.row.id is not None]
        traces = store.traces(wanted)
    count = len(section.problems)
    drawn: list[tuple[str, Figure | None, str]] = [
        (
            "profile",
            figures.profiles([section], looks, ["exact_s", "near_s"]),
            f"Performance profiles over {count} problems, {kind} loss. Times under 1 ms count as 1 ms; a problem "
            "on which a solver was not run counts as not solved.",
        ),
        (
            "proofs",
            figures.profiles([section], looks, ["proof_s"]),
            f"Performance profile of the time to a proof, over {count} problems; solvers that prove nothing "
            "have no line.",
        ),
        (
            "gaps",
            figures.gaps(section, looks),
            "Share of each solver's runs whose final gap is at most the one on the axis. Failed runs, and runs "
            "without a bound in the panel of own bounds, count as infinite.",
        ),
        (
            "targets",
            figures.targets(section, looks, chosen),
            "Time-to-target plots: share of each solver's runs that have reached the target by that time.",
        ),
        (
            "trajectories",
            figures.over_time(section, looks, chosen, traces),
            "Objective (thick) and proven bound (thin, below zero) over time as relative distances from the "
            "best known loss; median over the seeds, for few solvers with a band from the least to the largest. "
            "Of more than eight solvers on a problem the eight that reach the most best known losses are drawn.",
        ),
        (
            "sparsity",
            figures.over_sparsity(section, looks),
            "Median gap over the sparsity. A cross at the top: more than half of the runs have none.",
        ),
        (
            "size",
            figures.over_n(section, looks),
            "Median seconds over the number of weights. A cross at the top: more than half of the runs never "
            "get there.",
        ),
    ]
    for name, figure, caption in drawn:
        if figure is not None:
            yield Picture(f"{name}-{kind}", as_svg(figure, f"{name}-{kind}"), caption)
    yield Heading(f"Each instance, {kind} loss", 3)
    yield Paragraph(
        "Gap to the best known, median over the seeds [least, largest], and the median of the seconds until "
        "within 1e-6 of it."
    )
    yield from tables.each_instance(section)


def _analysed(store: Path | str) -> Analysis:
    with Store(store) as opened:
        analysis = analyse(opened)
    if not analysis.rows:
        raise CbsError(f"{store}: the store has no rows yet: there is nothing to report")
    return analysis


def report_base(store: Path, output: Path | str | None) -> Path:
    """The report's path without an ending, next to the store where none is given; checked to be writable."""
    path = store.with_suffix("") if output is None else Path(output)
    if output is not None and path.is_dir():
        path = path / store.stem
    elif path.suffix in (".md", ".html"):
        path = path.with_suffix("")
    for ending in (".md", ".html"):
        written = path.with_name(path.name + ending)
        if real_path(written) == real_path(store):
            raise UsageError(f"{written}: is an input; the output would overwrite it")
        check_writable(written)
    return path


def _on_paper(svg: str) -> str:
    """The picture on white, for readers that show it on a dark page."""
    end = svg.index(">", svg.index("<svg")) + 1
    return f'{svg[:end]}\n <rect width="100%" height="100%" fill="#ffffff"/>{svg[end:]}'


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path
