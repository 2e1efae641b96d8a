"""The tables of a benchmark report: settings, machines, summaries, failures, and one for each instance."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cbs_opt.bench.reports.analysis import FAILURES, Analysis, Problem, Run, Section, reached
from cbs_opt.bench.reports.canvas import short
from cbs_opt.bench.reports.document import Block, Folded, Paragraph, Table
from cbs_opt.bench.reports.metrics import TOLERANCE, mean_ratio_gap, median, shifted_geometric_mean
from cbs_opt.bench.runs.store import KINDS, OK, UNSUPPORTED, Row

NOTHING = "–"

_ENVIRONMENTS = 4  # columns of the table of machines
_BUDGETS = 4  # problems side by side in the table of an instance
_LONGEST = 160  # characters of a message
_FOLDED = 3  # with more instances each table is folded


def gap_text(gap: float | None) -> str:
    """A relative gap in few characters; 0 up to the tolerance, ∞ for a failure."""
    if gap is None or math.isnan(gap):
        return NOTHING
    if math.isinf(gap):
        return "∞"
    if gap <= TOLERANCE:
        return "0"
    if gap < 1e-4:
        return short(gap, 1)
    if gap < 100:
        return f"{100 * gap:.2g} %" if gap < 0.995 else f"{100 * gap:,.0f} %"
    return f"{short(100 * gap, 1).replace('e+', 'e')} %"


def seconds_text(seconds: float | None) -> str:
    """Seconds in few characters."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    return "< 0.001" if seconds < 1e-3 else f"{seconds:.3g}" if seconds < 1000 else f"{seconds:,.0f}"


def loss_text(loss: float) -> str:
    """A loss with five digits."""
    return short(loss, 4)


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds, runs of them joined: 0-4, 7."""
    parts: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], seed]
        else:
            parts.append([seed])
    texts = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:5], "…"])


def settings(analysis: Analysis) -> Table:
    """What every solver was run with."""
    rows = []
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in analysis.rows:
        grouped[analysis.names[row.id or 0]].append(row)
    for name, part in grouped.items():
        threads = {analysis.environments.get(row.environment or 0, {}).get("threads") for row in part} - {None}
        given = part[0].parameters
        rows.append(
            [
                name,
                part[0].solver,
                f"`{given}`" if given not in ("", "{}") else "defaults",
                ", ".join(sorted({row.objective_kind for row in part}, reverse=True)),
                "none" if part[0].time_limit is None else f"{part[0].time_limit:g}",
                seeds_text(row.seed for row in part),
                ", ".join(map(str, sorted(threads, key=str))) or NOTHING,
                str(len(part)),
            ]
        )
    header = ["label", "solver", "parameters", "objective", "time limit, s", "seeds", "threads", "rows"]
    return Table(header, rows, left=4)


def machines(analysis: Analysis) -> Table | None:
    """Machine and versions, one column for each environment that rows were made in; None where none is known."""
    counts = Counter(row.environment for row in analysis.rows if row.environment in analysis.environments)
    if not counts:
        return None
    ids = [number for number, _ in counts.most_common(_ENVIRONMENTS) if number is not None]
    keys = list(dict.fromkeys(key for number in ids for key in analysis.environments[number]))
    rows = [[key, *(_value(analysis.environments[number].get(key)) for number in ids)] for key in keys]
    return Table(["", *(f"{counts[number]} rows" for number in ids)], rows, left=1 + len(ids))


def machine_sentence(analysis: Analysis) -> str:
    """The machine that most rows were made on, in one sentence."""
    counts = Counter(row.environment for row in analysis.rows if row.environment in analysis.environments)
    if not counts:
        return "The store does not say on which machine."
    number, count = counts.most_common(1)[0]
    facts = analysis.environments[number or 0]
    parts = [
        str(facts[key]) if not form else form.format(facts[key])
        for key, form in (
            ("processor", ""),
            ("cores", "{} cores"),
            ("memory_gb", "{} GB"),
            ("platform", ""),
            ("python", "Python {}"),
            ("numpy", "numpy {}"),
            ("cbs_opt", "cbs-opt {}"),
        )
        if facts.get(key) is not None
    ]
    others = "" if count == len(analysis.rows) else f" ({count} of {len(analysis.rows)} rows)"
    return f"{', '.join(parts) or 'Machine unknown'}{others}."


def _value(value: object) -> str:
    return NOTHING if value is None else str(value)


def ranked(section: Section) -> list[str]:
    """Solvers by the share of their problems' best known losses that they reach, then by the time until then."""
    return sorted(
        section.solvers,
        key=lambda name: (-_covered(section, name), mean_time(section.runs(name), "exact_s", section.cap)),
    )


def overall(analysis: Analysis) -> list[str]:
    """All solvers by the mean of that share over the sections that they ran in: the order of colours."""

    def mean(name: str) -> float:
        found = [_covered(section, name) for section in analysis.sections if name in section.solvers]
        return sum(found) / max(len(found), 1)

    return sorted(analysis.solvers, key=mean, reverse=True)


def _covered(section: Section, name: str) -> float:
    """The share of the problems whose best known loss is reached, each by the share of its runs."""
    hits = 0.0
    for problem in section.problems:
        runs = problem.runs.get(name)
        hits += sum(map(reached, runs)) / len(runs) if runs else 0.0
    return hits / max(len(section.problems), 1)


def mean_time(runs: Sequence[Run], what: str, cap: float) -> float:
    """Shifted geometric mean of the seconds until `what`; a run that never gets there counts with `cap`."""
    times = [getattr(run, what) for run in runs]
    return shifted_geometric_mean([time if math.isfinite(time) else cap for time in times])


def quality(section: Section) -> Table:
    """How good the selections of each solver are."""
    rows = []
    for name in ranked(section):
        runs = section.runs(name)
        proven = [run for p in section.problems if p.proven for run in p.runs.get(name, [])]
        bounds = [run.certified for run in runs if run.certified is not None]
        known = [run for p in section.problems if p.best is not None for run in p.runs.get(name, [])]
        certified = gap_text(median([math.inf if run.certified is None else run.certified for run in runs]))
        rows.append(
            [
                _starred(section, name),
                f"{sum(name in p.runs for p in section.problems)} / {len(section.problems)}",
                str(len(runs)),
                f"{sum(map(reached, proven))} / {len(proven)}" if proven else NOTHING,
                f"{sum(map(reached, known))} / {len(known)}" if known else NOTHING,
                gap_text(median([run.gap for run in runs])),
                gap_text(mean_ratio_gap([run.gap for run in runs])),
                gap_text(max((run.gap for run in runs if run.valid), default=None)),
                certified if bounds else NOTHING,
                str(sum(not run.valid for run in runs)),
            ]
        )
    header = [
        "solver",
        "problems",
        "runs",
        "optima reached",
        "best known reached",
        "gap, median",
        "gap, geometric mean",
        "gap, worst",
        "own gap, median",
        "failed",
    ]
    return Table(header, rows)


def times(section: Section) -> Table:
    """How long each solver takes."""
    rows = []
    for name in ranked(section):
        runs = section.runs(name)
        bounded = any(run.certified is not None for run in runs)
        proofs = sum(math.isfinite(run.proof_s) for run in runs)
        rows.append(
            [
                _starred(section, name),
                seconds_text(mean_time(runs, "near_s", section.cap)),
                seconds_text(mean_time(runs, "exact_s", section.cap)),
                seconds_text(mean_time(runs, "proof_s", section.cap)) if bounded else NOTHING,
                f"{proofs} / {len(runs)}" if bounded else NOTHING,
                seconds_text(median([run.total_s for run in runs])),
                seconds_text(max((run.total_s for run in runs), default=None)),
            ]
        )
    header = [
        "solver",
        "s to 1 %",
        "s to 1e-6",
        "s to proof",
        "proofs",
        "whole run, median s",
        "whole run, longest s",
    ]
    return Table(header, rows)


def _starred(section: Section, name: str) -> str:
    """The name, with a star where its figures are of fewer problems than the section has."""
    covered = sum(name in problem.runs for problem in section.problems)
    return name if covered == len(section.problems) else f"{name} *"


def failures(analysis: Analysis) -> Table | None:
    """Rows that are not `ok`, by solver, kind and message; None where all are."""
    messages: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in analysis.rows:
        if row.kind != OK:
            messages[(analysis.names[row.id or 0], row.kind)][row.message or "no message"] += 1
    rows = []
    for (name, kind), found in sorted(messages.items(), key=lambda item: (KINDS.index(item[0][1]), item[0][0])):
        message, count = found.most_common(1)[0]
        message = message if len(message) <= _LONGEST else message[: _LONGEST - 1] + "…"
        others = sum(found.values()) - count
        kind_text = "refused (unsupported)" if kind == UNSUPPORTED else kind
        rows.append(
            [
                name,
                kind_text,
                message + (f" ({others} with other messages)" if others else ""),
                str(others + count),
            ]
        )
    return Table(["solver", "kind", "message", "rows"], rows, left=3) if rows else None


def each_instance(section: Section) -> Iterator[Block]:
    """A table for each instance: gap and time of every solver on every budget."""
    grouped: dict[str, list[Problem]] = defaultdict(list)
    for problem in section.problems:
        grouped[problem.instance.sha256].append(problem)
    for problems in grouped.values():
        instance = problems[0].instance
        blocks = (
            ""
            if not instance.blocks
            else " in 1 block"
            if instance.blocks == 1
            else f" in {instance.blocks} blocks"
        )
        title = f"{instance.name}: {instance.n} weights{blocks}, {instance.curvature}"
        pieces: list[Block] = [
            _instance_table(section, problems[k : k + _BUDGETS]) for k in range(0, len(problems), _BUDGETS)
        ]
        origin = instance.metadata.get("origin") if isinstance(instance.metadata, Mapping) else None
        if isinstance(origin, str):
            pieces.insert(0, Paragraph(origin))
        yield Folded(title, pieces, opened=len(grouped) <= _FOLDED)


def _instance_table(section: Section, problems: Sequence[Problem]) -> Table:
    header = ["solver"]
    best = ["**best known**"]
    for problem in problems:
        share = 100 * problem.budget / max(problem.instance.n, 1)
        header += [f"{problem.budget} pruned ({share:.3g} %): gap", "s to 1e-6"]
        best += [_best(problem), ""]
    rows = [best]
    for name in section.solvers:
        cells = [name]
        for problem in problems:
            cells += _cells(problem, name)
        if any(cells[1:]):
            rows.append(cells)
    return Table(header, rows)


def _best(problem: Problem) -> str:
    if problem.best is None:
        return "none"
    if problem.proven:
        return f"{loss_text(problem.best)}, proven"
    return loss_text(problem.best) + ("" if problem.lower is None else f", bound {loss_text(problem.lower)}")


def _cells(problem: Problem, name: str) -> tuple[str, str]:
    runs = problem.runs.get(name, [])
    if not runs:
        return ("refused", "") if problem.refused.get(name) else ("", "")
    gaps = sorted(run.gap for run in runs)
    failed = Counter(run.row.kind for run in runs if not run.valid)
    if len(runs) == sum(failed.values()):
        return ", ".join(kind for kind in FAILURES if failed[kind]), ""
    text = gap_text(median(gaps))
    if gap_text(gaps[0]) != gap_text(gaps[-1]):
        text += f" [{gap_text(gaps[0])}, {gap_text(gaps[-1])}]"
    return text, seconds_text(problem.time(name, "exact_s"))
