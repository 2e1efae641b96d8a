"""Whether the status of a result is true. Room: cbs_opt.testing, for the contract of solvers."""

from __future__ import annotations

from cbs_opt.result import Result, Status
from cbs_opt.stop import Stop
from cbs_opt.testing.contract import require


def require_true_status(result: Result, stop: Stop) -> None:
    """Check that the rule that a status names was given and holds; a target that can be reached is reached."""
    text = f"status '{result.status}' with {stop}"
    rules = {
        Status.TARGET_REACHED: stop.target is not None and result.objective <= stop.target,
        Status.GAP_REACHED: stop.gap is not None and result.gap is not None and result.gap <= stop.gap,
        Status.ITERATION_LIMIT: stop.max_iterations is not None and result.iterations >= stop.max_iterations,
        Status.NO_IMPROVEMENT: stop.no_improvement is not None,
        Status.TIME_LIMIT: stop.time_limit is not None,
    }
    if result.status in rules:
        require(rules[result.status], f"{text} is not true: objective {result.objective:.9g}, gap {result.gap}")
    else:
        require(result.status in (Status.OPTIMAL, Status.CONVERGED), f"{text}: no rule of these")
    if stop.target is not None:
        require(
            result.objective <= stop.target, f"the target can be reached, {result.objective:.9g} is left: {text}"
        )
