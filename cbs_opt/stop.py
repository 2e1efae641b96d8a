"""When to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cbs_opt.errors import UsageError
from cbs_opt.scalars import MOST_WHOLE, is_finite


@dataclass(frozen=True)
class Stop:
    """The rules that end a run. The first one that holds ends it and is the status of the result.

    Parameters
    ----------
    time_limit : float, optional
        Seconds of building, solving and evaluating together, after the instance is read. The selection loss,
        and the joint loss where it is the objective or the update is wanted, are computed in any case; another
        joint loss takes a tenth of the limit, or a quarter of a second, or is left out.
    max_iterations : int, optional
        Iterations as the solver counts them (draws, steps, nodes).
    no_improvement : int, optional
        Iterations without a better objective.
    target : float, optional
        Stop once the objective is at most this.
    gap : float, optional
        Stop once (objective − bound) / |objective| is at most this; needs a solver with a bound.
    should_stop : callable, optional
        Called inside long loops; True ends the run with status `interrupted`.

    Raises
    ------
    UsageError
        For a negative limit or one that is not a number.
    """

    time_limit: float | None = None
    max_iterations: int | None = None
    no_improvement: int | None = None
    target: float | None = None
    gap: float | None = None
    should_stop: Callable[[], bool] | None = None

    @property
    def limits_iterations(self) -> bool:
        """Whether a rule counts iterations: a run then does not depend on how long anything takes."""
        return self.max_iterations is not None or self.no_improvement is not None

    @property
    def limits_work(self) -> bool:
        """Whether a rule ends every run; a target or a gap may never be reached."""
        return any(rule is not None for rule in (self.time_limit, self.max_iterations, self.no_improvement))

    def __post_init__(self) -> None:
        for name in ("time_limit", "max_iterations", "no_improvement", "gap"):
            value = getattr(self, name)
            counts = name in ("max_iterations", "no_improvement")
            if value is not None and not (is_finite(value) and 0 <= value <= (MOST_WHOLE if counts else math.inf)):
                raise UsageError(
                    f"`{name}` must be a finite number ≥ 0{' and below 2^63' if counts else ''}, got {value!r}"
                )
        if self.target is not None and not is_finite(self.target):
            raise UsageError(f"`target` must be a finite number, got {self.target!r}")
        if self.should_stop is not None and not callable(self.should_stop):
            raise UsageError(
                f"`should_stop` must be a callable without arguments, got {type(self.should_stop).__name__}"
            )
