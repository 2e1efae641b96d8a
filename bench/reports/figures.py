"""The pictures of a benchmark report, drawn from an analysis; every function gives a matplotlib figure.

Each solver has one colour and line style throughout a report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbs_opt.bench.reports.analysis import Problem, Run, Section
from cbs_opt.bench.reports.canvas import (
    POINTS,
    Style,
    clock_text,
    draw_points,
    draw_steps,
    gap_axis,
    log_ticks,
    new_figure,
    percent,
    seconds_axis,
    share_axis,
    short,
    shown,
    ticks,
)
from cbs_opt.bench.reports.document import INK
from cbs_opt.bench.reports.metrics import ROUNDING, TOLERANCE, median, on_grid, performance_profiles, shares
from cbs_opt.bench.runs.store import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SECONDS = 1e-3
"""Shorter times count as this in profiles; traces are no finer."""

LEVELS = (*(k / 10 for k in range(10)), 0.95, 0.98, 0.99)
"""Sparsities that near ones are counted with: a budget is a whole number, 80 % of 36 weights are 80.6 %."""

MOST_OVER_TIME = 8
"""Lines of more solvers than these hide each other in a picture over time."""

_MOST_LEVELS = 12  # with more, each sparsity goes to the nearest of `LEVELS`, however far
_NEAR_LEVEL = 0.035
_MOST_BANDS = 6  # bands of more solvers hide each other
_HIGHEST_GAP = 1e6
_TTT_RUNS = 4  # a time-to-target plot of one problem needs as many runs of some solver


def profiles(sections: Sequence[Section], looks: Mapping[str, Style], targets: Sequence[str]) -> Figure | None:
    """Dolan-Moré profiles over time: a panel for each section and target.

    Parameters
    ----------
    sections : sequence of Section
    looks : mapping of str to Style
    targets : sequence of {"exact_s", "near_s", "proof_s"}

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no solver reached a target of any problem.
    """
    panels = []
    for section in sections:
        solvers = section.drawn()
        for what in targets:
            times = np.array([[problem.time(name, what) for name in solvers] for problem in section.problems])
            if times.size and np.isfinite(times).any():
                panels.append((section, what, solvers, performance_profiles(times, LEAST_SECONDS)))
    if not panels:
        return None
    with new_figure(len(panels), looks) as (figure, grid):
        for axes, (section, what, solvers, steps) in zip(grid, panels, strict=True):
            last = max(10.0, *(float(line.x[-1]) for line in steps if line.x.size)) * 1.1
            for name, line in zip(solvers, steps, strict=True):
                if what == "proof_s" and not line.x.size:
                    continue
                draw_steps(axes, line, looks[name], name, 1.0, last)
            kind = f"{section.objective_kind}, " if len(sections) > 1 else ""
            share_axis(axes, f"share of {len(section.problems)} problems")
            seconds_axis(axes, 1.0, last, "time, as a multiple of the fastest solver's", lambda x: f"{x:g}")
            axes.set_title(f"{kind}{TARGETS[what]}", loc="left")
    return figure


TARGETS = {
    "exact_s": "within 1e-6 of the best known",
    "near_s": "within 1 % of the best known",
    "proof_s": "proven by the solver itself",
}
"""What the times of a run are until, in words."""


def gaps(section: Section, looks: Mapping[str, Style]) -> Figure | None:
    """The share of the runs within a gap: to proven optima, to the best known, and to their own bounds."""
    proven = [problem for problem in section.problems if problem.proven]
    known = [problem for problem in section.problems if problem.best is not None]
    if not known:
        return None

    def of(problems: Sequence[Problem], get: Callable[[Run], float | None]) -> dict[str, list[float]]:
        found = {}
        for name in section.drawn():
            runs = [run for problem in problems for run in problem.runs.get(name, [])]
            values = [get(run) for run in runs]
            if any(value is not None and math.isfinite(value) for value in values):
                found[name] = [math.inf if value is None else value for value in values]
        return found

    panels = []
    if proven:
        title = f"to the optimum: {len(proven)} proven problems"
        panels.append((title, of(proven, lambda run: run.gap)))
    if len(proven) < len(known):
        panels.append((f"to the best known: all {len(known)} problems", of(known, lambda run: run.gap)))
    certified = of(known, lambda run: run.certified)
    if certified:
        panels.append((f"to their own bound: all {len(known)} problems", certified))
    with new_figure(len(panels), looks) as (figure, grid):
        for axes, (title, values) in zip(grid, panels, strict=True):
            high = max((g for part in values.values() for g in part if math.isfinite(g)), default=1.0)
            high = min(max(high, 1e-2) * 1.3, _HIGHEST_GAP)
            for name, part in values.items():
                draw_steps(axes, shares(np.maximum(part, TOLERANCE)), looks[name], name, TOLERANCE, high)
            share_axis(axes, "share of the runs")
            gap_axis(axes, "x", high, most=8 if len(panels) < 3 else 5)
            axes.set_xlabel("relative gap")
            axes.set_title(title, loc="left")
    return figure


def targets(section: Section, looks: Mapping[str, Style], chosen: Sequence[Problem]) -> Figure | None:
    """Time-to-target plots: over all runs for both targets, and of single problems that were run often."""
    everything = {name: section.runs(name) for name in section.drawn()}
    panels = [(f"{TARGETS[what]}: all problems", what, everything) for what in ("exact_s", "near_s")]
    for problem in chosen:
        if max(map(len, problem.runs.values()), default=0) >= _TTT_RUNS:
            panels.append((f"{_named(problem)}: within 1 %", "near_s", problem.runs))
    panels = [panel for panel in panels if any(math.isfinite(t) for t in _times(panel[2], panel[1]))][:4]
    if not panels:
        return None
    with new_figure(len(panels), looks) as (figure, grid):
        for axes, (title, what, runs) in zip(grid, panels, strict=True):
            clock = [max(t, LEAST_SECONDS) for t in _times(runs, what) if math.isfinite(t)]
            first, last = min(clock) * 0.8, max(clock) * 1.5
            for name, part in runs.items():
                times = np.maximum([getattr(run, what) for run in part], LEAST_SECONDS)
                draw_steps(axes, shares(times), looks[name], name, first, last)
            share_axis(axes, "share of the runs")
            seconds_axis(axes, first, last)
            axes.set_title(title, loc="left")
    return figure


def _times(runs: Mapping[str, Sequence[Run]], what: str) -> list[float]:
    return [getattr(run, what) for part in runs.values() for run in part]


def over_sparsity(section: Section, looks: Mapping[str, Style]) -> Figure | None:
    """The median gap over the sparsity: to the best known, and to the solvers' own bounds."""
    level = levels(sorted({problem.sparsity for problem in section.problems}))
    groups = _grouped(section, lambda problem: level[problem.sparsity])
    known = _medians(section, groups, lambda run: run.gap)
    certified = _medians(section, groups, lambda run: run.certified)
    panels = [panel for panel in (("to the best known", known), ("to their own bound", certified)) if panel[1]]
    if len(groups) < 2 or not panels:
        return None
    with new_figure(len(panels), looks) as (figure, grid):
        for axes, (title, lines) in zip(grid, panels, strict=True):
            finite = [y for line in lines.values() for _, y in line if math.isfinite(y)]
            high = min(max([*finite, 1e-2]) * 3, _HIGHEST_GAP)
            for name, line in lines.items():
                draw_points(axes, [(x, max(y, TOLERANCE)) for x, y in line], looks[name], name, high)
            gap_axis(axes, "y", high)
            ticks(axes.xaxis, _apart(list(groups)), lambda s: f"{100 * s:.3g} %")
            axes.set_xlabel("sparsity: share of the weights pruned")
            axes.set_ylabel("median relative gap")
            axes.set_title(title, loc="left")
    return figure


def over_n(section: Section, looks: Mapping[str, Style]) -> Figure | None:
    """Median seconds until the best known loss, and until the proof, over the number of weights."""
    sizes = sorted({problem.instance.n for problem in section.problems})
    group = dict(zip(sizes, _binned(sizes), strict=True))
    groups = _grouped(section, lambda problem: group[problem.instance.n])
    cap = section.cap
    panels = []
    for what in ("exact_s", "proof_s"):
        lines = _medians(section, groups, lambda run, what=what: getattr(run, what))  # type: ignore[misc]
        lines = {name: line for name, line in lines.items() if any(math.isfinite(y) for _, y in line)}
        if lines:
            panels.append((TARGETS[what] if what == "exact_s" else "until the proof", lines))
    if len(groups) < 2 or not panels:
        return None
    with new_figure(len(panels), looks) as (figure, grid):
        for axes, (title, lines) in zip(grid, panels, strict=True):
            for name, line in lines.items():
                points = [(x, max(y, LEAST_SECONDS)) for x, y in line]
                draw_points(axes, points, looks[name], name, cap * 1.5)
            axes.set_xscale("log")
            axes.set_yscale("log")
            log_ticks(axes.xaxis, lambda x: f"{x:g}", axes.get_xlim())
            log_ticks(axes.yaxis, clock_text, axes.get_ylim())
            axes.set_xlabel("weights n")
            axes.set_ylabel("median seconds")
            axes.set_title(title, loc="left")
    return figure


def over_time(
    section: Section, looks: Mapping[str, Style], chosen: Sequence[Problem], traces: Mapping[int, Trace]
) -> Figure | None:
    """Objective and bound of chosen problems over time, as relative distances from the best known.

    The median over the seeds; where there are three or more, and few solvers, with a band from least to largest.
    Of many solvers the first `MOST_OVER_TIME` of `looks` are drawn.
    """
    panels = [p for p in chosen if any(traces.get(run.row.id or 0) for run in p.valid)]
    if not panels:
        return None
    with new_figure(len(panels), looks, across=2) as (figure, grid):
        for axes, problem in zip(grid, panels, strict=True):
            _draw_problem(axes, problem, looks, traces)
    return figure


def _draw_problem(axes: Axes, problem: Problem, looks: Mapping[str, Style], traces: Mapping[int, Trace]) -> None:
    assert problem.best is not None
    unit = max(abs(problem.best), ROUNDING * problem.scale, 1e-300)
    lines: dict[str, list[Trace]] = {}
    for name in [name for name in looks if name in problem.runs]:
        for run in problem.runs[name] if len(lines) < MOST_OVER_TIME or name in lines else ():
            events = traces.get(run.row.id or 0) if run.valid else None
            if events:
                build = run.row.build_s or 0.0
                shifted = [(max(build + t, LEAST_SECONDS / 10), f, b) for t, f, b in events]
                lines.setdefault(name, []).append(shifted)
    first = min(events[0][0] for part in lines.values() for events in part)
    last = 1.15 * max([*(run.total_s for run in problem.valid), first * 10])
    grid = np.geomspace(first, last, POINTS)
    highest = lowest = 0.0
    for name, part in lines.items():
        look = looks[name]
        values = np.array([on_grid(events, grid) for events in part])
        distance = (np.sort(values, axis=0) - problem.best) / unit
        seen = np.isfinite(values).all(axis=0)
        if seen.any():
            middle = np.median(distance[:, seen], axis=0)
            axes.step(
                grid[seen],
                middle,
                where="post",
                color=look.colour,
                linestyle=look.dashes,
                label=shown(name),
                lw=look.width,
                zorder=look.order,
            )
            axes.plot(grid[seen][0], middle[0], "o", color=look.colour, markersize=4, zorder=look.order)
            highest = max(highest, float(middle[0]))
            if len(part) >= 3 and len(lines) <= _MOST_BANDS:
                least, most = distance[0, seen], distance[-1, seen]
                axes.fill_between(grid[seen], least, most, step="post", color=look.colour, alpha=0.15, lw=0)
        proofs = np.array([on_grid(events, grid, 2) for events in part])
        known = np.isfinite(proofs).any(axis=0)
        if known.any():
            best = (np.nanmax(proofs[:, known], axis=0) - problem.best) / unit
            axes.step(grid[known], best, where="post", color=look.colour, linestyle=look.dashes, lw=0.9)
            lowest = min(lowest, float(best.min()))
    axes.axhline(0.0, color=INK, lw=0.6)
    axes.set_yscale("symlog", linthresh=1e-4, linscale=0.6)
    axes.set_ylim(-min(max(-lowest * 2, 1e-4), 10.0), min(max(highest * 2, 1e-3), _HIGHEST_GAP))
    low, high = axes.get_ylim()
    decades = [10.0**k for k in range(-2, 7, 2)]
    ticks(axes.yaxis, [x for x in (*(-x for x in decades), 0.0, *decades) if low <= x <= high], percent)
    seconds_axis(axes, first, last)
    axes.set_ylabel("above / below the best known")
    word = "proven" if problem.proven else "not proven"
    axes.set_title(f"{_named(problem)}\nbest known {short(problem.best, 3)}, {word}", loc="left")


def choose(section: Section, count: int = 4) -> list[Problem]:
    """Problems for single figures: many solvers, hard for many of them, large; at most one per instance."""

    def interest(problem: Problem) -> tuple[int, int, int]:
        late = [name for name in problem.runs if median([run.exact_s for run in problem.runs[name]]) > 0.05]
        return len(problem.runs), len(late), problem.instance.n

    chosen: dict[str, Problem] = {}
    known = [problem for problem in section.problems if problem.best is not None]
    for problem in sorted(known, key=interest, reverse=True):
        chosen.setdefault(problem.instance.sha256, problem)
        if len(chosen) == count:
            break
    return sorted(chosen.values(), key=lambda problem: (problem.instance.n, problem.instance.name))


def _named(problem: Problem) -> str:
    return f"{shown(problem.instance.name)}, {problem.budget} of {problem.instance.n} pruned"


def levels(sparsities: Sequence[float]) -> dict[float, float]:
    """The level that each sparsity is counted with: the nearest of `LEVELS`, or itself if that is far."""
    nearest = {s: min(LEVELS, key=lambda level: abs(level - s)) for s in sparsities}
    if len({round(s, 2) for s in sparsities}) > _MOST_LEVELS:
        return nearest
    return {s: level if abs(level - s) <= _NEAR_LEVEL else round(s, 3) for s, level in nearest.items()}


def _apart(places: Sequence[float]) -> list[float]:
    """Those of the places, in order, that are far enough from the one before for a label each."""
    kept = [places[0]]
    for place in places[1:]:
        if place - kept[-1] > 0.07 * (places[-1] - places[0]):
            kept.append(place)
    return kept


def _binned(sizes: Sequence[int]) -> list[float]:
    """Sizes as they are where there are few, else the geometric centres of twelve bins."""
    if len(sizes) <= 12 or sizes[0] < 1:
        return [float(n) for n in sizes]
    edges = np.geomspace(sizes[0], sizes[-1], 13)
    centres = np.sqrt(edges[1:] * edges[:-1])
    return [float(centres[min(int(np.searchsorted(edges, n, side="right")) - 1, 11)]) for n in sizes]


def _grouped(section: Section, key: Callable[[Problem], float]) -> dict[float, list[Problem]]:
    groups: dict[float, list[Problem]] = {}
    for problem in section.problems:
        groups.setdefault(key(problem), []).append(problem)
    return dict(sorted(groups.items()))


def _medians(
    section: Section, groups: Mapping[float, Sequence[Problem]], get: Callable[[Run], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """Points of a line for each solver; solvers without any value are left out, a run without one is infinite."""
    lines = {}
    for name in section.drawn():
        line = []
        for x, problems in groups.items():
            values = [get(run) for problem in problems for run in problem.runs.get(name, [])]
            if values:
                line.append((x, median([math.inf if value is None else value for value in values])))
        if any(math.isfinite(y) for _, y in line):
            lines[name] = line
    return lines
