"""Incumbents and bounds of a solver at given times, and tables of them over seeds."""

from __future__ import annotations

import bisect
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cbs_opt import Context, Instance, Monitor, Stop, get_solver, joint_loss, selection_loss
from cbs_opt.bench.reports import canvas
from cbs_opt.compilation import finish_compilation
from cbs_opt.run import run_solver
from cbs_opt.typing import BoolArray

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""What seconds are counted in."""


@dataclass
class Anytime:
    """Incumbents and bounds of one run in the order in which they were found.

    Attributes
    ----------
    seconds : list of float
        Since the start of solving; building and compilation are not counted.
    selections : list of bool (n,)
    bounds : list of float or None
        The best bound by then.
    """

    seconds: list[float] = field(default_factory=list)
    selections: list[BoolArray] = field(default_factory=list)
    bounds: list[float | None] = field(default_factory=list)

    def __call__(self, monitor: Monitor) -> None:
        """Record the state of a run; to be used as its callback."""
        if monitor.pruned is not None:
            self.seconds.append(monitor.elapsed)
            self.selections.append(monitor.pruned)
            self.bounds.append(monitor.bound)

    def _last(self, seconds: float) -> int:
        return bisect.bisect_right(self.seconds, seconds) - 1

    def at(self, seconds: float) -> BoolArray | None:
        """The incumbent after the given number of seconds, bool (n,), or None."""
        k = self._last(seconds)
        return None if k < 0 else self.selections[k]

    def bound_at(self, seconds: float) -> float | None:
        """The bound after the given number of seconds, or None."""
        k = self._last(seconds)
        return None if k < 0 else self.bounds[k]


def run_for(
    instance: Instance,
    solver: str,
    seconds: float,
    *,
    objective: str,
    seed: int,
    threads: int = 1,
    clock: str = "wall",
) -> Anytime:
    """Run a solver for the given time after an untimed warm-up of one iteration.

    Parameters
    ----------
    instance : Instance
    solver : str
    seconds : float
    objective : {"selection", "joint"}
    seed : int
    threads : int
    clock : {"wall", "processor"}
        Key of `CLOCKS`. Processor seconds compare runs of one thread fairly where others use the machine.
    """
    taken = Anytime()
    for stop, callback in ((Stop(max_iterations=1, time_limit=1.0), None), (Stop(time_limit=seconds), taken)):
        monitor = Monitor(stop, callback, CLOCKS[clock])
        context = Context(objective, seed, monitor, threads=threads)
        run = run_solver(get_solver(solver)(), instance, context, finish_compilation)
        if run.error is not None:
            raise run.error
    return taken


def losses_at(instance: Instance, run: Anytime, times: Sequence[float], objective: str) -> list[float | None]:
    """The objective at each of the times, recomputed by the package's evaluator."""
    loss = selection_loss if objective == "selection" else joint_loss
    known: dict[int, float] = {}
    out: list[float | None] = []
    for limit in times:
        pruned = run.at(limit)
        if pruned is None:
            out.append(None)
            continue
        if id(pruned) not in known:
            known[id(pruned)] = loss(instance, pruned)
        out.append(known[id(pruned)])
    return out


def spread(values: Sequence[float | None]) -> str:
    """Median and, where they differ, least and largest of the values of all seeds; a dash where one is missing."""
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return "–"
    median = short(statistics.median(there))
    low, high = short(min(there)), short(max(there))
    return median if low == high else f"{median} [{low}, {high}]"


def short(value: float) -> str:
    """Four digits without the zeros of the exponent: 3.420e-4."""
    return canvas.short(value, 3).replace("e+", "e")


def table(times: Sequence[float], rows: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table with a column for each time."""
    lines = ["| | " + " | ".join(f"{limit:g} s" for limit in times) + " |", "|---" * (len(times) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


def load() -> str:
    """A sentence about how busy the machine is, or nothing where the system does not tell."""
    if not hasattr(os, "getloadavg"):
        return ""
    return f"Load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores."
