"""The limitations of a benchmark report, as far as they follow from its rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from cbs_opt.bench.reports.analysis import FAILURES, Analysis, Section, reached
from cbs_opt.bench.reports.metrics import median
from cbs_opt.bench.runs.store import OK, UNSUPPORTED
from cbs_opt.result import Status

FEW_SEEDS = 5
"""Fewer seeds are not enough for a randomised method."""

_SHORT = 0.05  # seconds; the processor clock is too coarse for shorter runs
_BUSY = 0.8  # of the wall's seconds; with less the processor was shared


def limitations(analysis: Analysis) -> list[str]:
    """Sentences, the general ones last."""
    return [
        *(sentence for section in analysis.sections for sentence in _of_section(analysis, section)),
        *_of_rows(analysis),
        *_of_machines(analysis),
        "Times are those of this machine with these versions; ratios transfer better to others than seconds.",
        "Instances and settings were chosen for this benchmark; on other networks the order may differ. "
        "Solvers ran with the settings above, which need not be the best for each.",
    ]


def _of_section(analysis: Analysis, section: Section) -> Iterator[str]:
    several = len(analysis.sections) > 1
    where = f"{section.objective_kind.capitalize()}: " if several else ""
    open_problems = [p for p in section.problems if p.best is not None and not p.proven]
    if open_problems:
        yield (
            f"{where}{len(open_problems)} of {len(section.problems)} best known losses are not proven optimal: "
            "better ones may exist, and gaps to them are then too small."
        )
    unsolved = sum(p.best is None for p in section.problems)
    if unsolved:
        yield (
            f"{where}{unsolved} of {len(section.problems)} problems have no valid row at all; no gap is known "
            "there."
        )
    lonely = sum(
        len({name for name, runs in p.runs.items() if any(map(reached, runs))}) == 1 for p in open_problems
    )
    if lonely:
        yield f"{where}{lonely} of the unproven best known losses were found by one solver only."
    total = len(section.problems)
    partial = []
    for name in section.solvers:
        covered = sum(name in p.runs for p in section.problems)
        if covered < total:
            partial.append(f"{name} {covered}")
    if partial:
        yield (
            f"{where}not every solver was run on all {total} problems ({', '.join(partial)}). Their means and "
            "medians are over fewer problems (marked * in the tables); performance profiles count what was not "
            "run as not solved."
        )
    most = {name: max(len(p.runs.get(name, ())) for p in section.problems) for name in section.solvers}
    uneven = sum(len(runs) < most[name] for p in section.problems for name, runs in p.runs.items())
    if uneven:
        yield f"{where}{uneven} pairs of problem and solver have fewer runs than others of the same solver."


def _of_rows(analysis: Analysis) -> Iterator[str]:
    kinds = Counter(row.kind for row in analysis.rows)
    failed = {kind: kinds[kind] for kind in FAILURES if kinds[kind]}
    if failed:
        listed = ", ".join(f"{count} {kind}" for kind, count in failed.items())
        yield (
            f"{sum(failed.values())} of {len(analysis.rows)} rows failed ({listed}). They count as runs with an "
            "infinite gap and time; only geometric means of the gap and worst gaps leave them out."
        )
    if kinds[UNSUPPORTED]:
        yield f"{kinds[UNSUPPORTED]} rows were refused by their solver, which counts as not run."
    interrupted = sum(row.status == Status.INTERRUPTED and row.kind == OK for row in analysis.rows)
    if interrupted:
        yield f"{interrupted} runs were interrupted before their own end."
    limited = sum(row.status == Status.TIME_LIMIT for row in analysis.rows)
    if limited:
        yield (
            f"{limited} of {len(analysis.rows)} runs ended at their time limit: a longer one could change the "
            "order."
        )
    limits = {row.time_limit for row in analysis.rows}
    if len(limits) > 1:
        texts = ["none" if t is None else f"{t:g} s" for t in sorted(limits, key=lambda t: (t is None, t or 0.0))]
        yield f"Time limits differ between rows ({', '.join(texts)}): final gaps are not at equal time."
    seeds: dict[str, set[int]] = {}
    for row in analysis.rows:
        seeds.setdefault(analysis.names[row.id or 0], set()).add(row.seed)
    few = [name for name, found in seeds.items() if len(found) < FEW_SEEDS]
    if few:
        named = "No solver was" if len(few) == len(seeds) else f"{', '.join(few)} were not"
        yield (
            f"{named} run with {FEW_SEEDS} seeds or more: the spread of methods that draw at random is not known."
        )
    runs = [run for p in analysis.problems for part in p.runs.values() for run in part]
    coarse = Counter(
        analysis.names[run.row.id or 0]
        for run in runs
        if run.events is not None and run.events < 2 and run.total_s > _SHORT and math.isfinite(run.near_s)
    )
    if coarse:
        named = ", ".join(f"{name} {count}" for name, count in coarse.most_common())
        yield (
            f"Runs longer than {_SHORT:g} s with a trace of a single point, whose times to a target are too "
            f"long: {named}."
        )


def _of_machines(analysis: Analysis) -> Iterator[str]:
    shares = []
    for row in analysis.rows:
        wall = (row.build_s or 0.0) + (row.solve_s or 0.0)
        threads = analysis.environments.get(row.environment or 0, {}).get("threads")
        if row.cpu_s is not None and wall >= _SHORT and threads == 1:
            shares.append(row.cpu_s / wall)
    if shares:
        busy = sum(share < _BUSY for share in shares) / len(shares)
        yield (
            f"Seconds are wall-clock time. Runs of {_SHORT:g} s and more on one thread had {median(shares):.2f} "
            f"processor seconds per second in the median, {100 * busy:.0f} % of them less than {_BUSY:g}"
            + (": other work shared the processor, and times are noisy." if busy > 0.05 else ".")
        )
    used = {row.environment for row in analysis.rows if row.environment is not None}
    keys = ("processor", "cores", "cbs_opt", "python", "numpy", "threads", "device", "platform")
    facts = {tuple(analysis.environments.get(number, {}).get(key) for key in keys) for number in used}
    if len(facts) > 1:
        yield (
            f"The rows come from {len(facts)} different machines, versions or settings: their times do not "
            "compare."
        )
    if any(row.environment not in analysis.environments for row in analysis.rows if row.kind == OK):
        yield "The machine of some rows is unknown."
