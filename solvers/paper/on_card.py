"""Algorithm 1 of the solvers `ls` and `cbs` on a card, all starts at once.

Room: paper; imported by its solvers where a card is asked for or chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from cbs_opt.device import Work, choose, or_on_cpu
from cbs_opt.solver import Context
from cbs_opt.solvers.device.all_pairs import AllPairs
from cbs_opt.solvers.device.local_search import MOST_GROUPS, DeviceLocalSearch
from cbs_opt.solvers.device.objective import DeviceObjective
from cbs_opt.typing import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from cbs_opt.solvers.paper.ls import LocalSearch

logger = logging.getLogger("cbs_opt")

_COLUMNS = 60.0  # of Q that a step on the CPU makes, roughly


def local_search(
    search: LocalSearch,
    context: Context,
    starts: int,
    objective: DeviceObjective | None = None,
) -> DeviceLocalSearch | None:
    """The search on a card, with Q formed there; None where the CPU is to do it, which the log says.

    Parameters
    ----------
    search : LocalSearch
    context : Context
    starts : int
    objective : DeviceObjective, optional
        The objective where it is on a card already.
    """
    problem, parameters = search.problem, search.parameters
    curvature, factor = problem.curvature, problem.curvature.as_factor()
    sizes = curvature.block_sizes
    squares = float((sizes.astype(np.float64) ** 2).sum())
    entries = squares if factor is None else float(factor.gradients.size)
    forming = 0.0 if factor is None else 2.0 * factor.m * squares
    work = Work(
        what=f"local search from {starts} start{'s' * (starts != 1)}",
        flops64=forming + 4.0 * entries * starts * parameters.steps,
        moved=24.0 * squares,
        upload=0.0 if objective is not None else 8.0 * entries,
        launches=30.0 * parameters.steps * len(search.groups),
        memory=DeviceLocalSearch.memory(sizes, starts) + (8.0 * entries if objective is None else 0.0),
        cpu_seconds=starts * parameters.steps * (_COLUMNS * 2.0 * entries + 100.0 * curvature.n) / 4e10,
        card_seconds=parameters.steps * 2e-3,
        triton=True,
    )
    if len(search.groups) > MOST_GROUPS:
        logger.info(f"{work.what}: on the CPU, as a card is no faster for more than {MOST_GROUPS} groups")
        return None
    card = choose(context.device, work, context.workers)
    if card is None:
        return None
    found: list[DeviceLocalSearch] = []
    with or_on_cpu(work.what, context.extras):
        objective = objective or DeviceObjective(problem, card)
        found.append(
            DeviceLocalSearch(objective, search.groups, parameters.threshold, parameters.rho, parameters.tau)
        )
        if context.extras.get("device", "cpu") == "cpu":
            context.extras["device"] = card.name
    return found[0] if found else None


def walk_all(search: LocalSearch, on_card: DeviceLocalSearch, starts: list[BoolArray], context: Context) -> int:
    """Improve all starts, reporting to the monitor; returns the number of swaps. An iteration is a step of one.

    Where the card fails the CPU begins again.
    """
    monitor = context.monitor
    first: list[bool] = [True]

    def report(values: FloatArray, selection: Callable[[int], BoolArray], taken: IntArray) -> bool:
        if not first[0]:
            monitor.advance(max(int(taken.size), 1))
        for k, value in enumerate(values.tolist()):
            if first[0] or monitor.objective is None or value < monitor.objective:
                monitor.report(value, selection(k))
        first[0] = False
        return monitor.should_stop()

    with or_on_cpu("local search", context.extras):
        x = torch.tensor(np.stack(starts), device=on_card.objective.device)
        return on_card.walk(x, search.parameters.steps, report)
    swaps = 0
    for start in starts:
        if monitor.should_stop():
            break
        swaps += search.walk(start, context)
    return swaps


def improve_by_all_pairs_on(
    on_card: DeviceLocalSearch, start: BoolArray, gain: float, context: Context
) -> int | None:
    """`all_swaps.improve_by_all_pairs` on a card; None where the card failed, and the CPU has to do it."""
    monitor = context.monitor
    with or_on_cpu("all swaps", context.extras):
        x = torch.tensor(start, device=on_card.objective.device)
        return AllPairs(on_card, gain).improve(x, monitor.should_stop, monitor.report)
    return None
