"""Parameters of the selection search."""

from __future__ import annotations

from dataclasses import dataclass

from cbs_opt.errors import UsageError
from cbs_opt.solver import Parameters, option
from cbs_opt.solvers.problem.columns import DENSE_BYTES, DOUBLE_BYTES
from cbs_opt.solvers.problem.selection_problem import THREADED_GRADIENTS

LARGE = 10_000
"""Variables of coupled blocks beyond which sweeps are the start of the search."""

MANY_BLOCKS = 8
"""Coupled blocks beyond which those of a large problem are searched one by one."""

SMALL_BLOCK = 200
"""Variables of a coupled block, on average, up to which they are not."""


@dataclass(frozen=True)
class SearchParameters(Parameters):
    """Sizes and patience; all free of scale."""

    core: int = option(1200, "variables of a core at most")
    working_set: int = option(256, "violating variables of a working set of the relaxation")
    cycles: int | None = option(
        None, "cycles without improvement after which a new core is chosen; 40 up to 500 open weights, else 20"
    )
    stall: int = option(500, "tabu steps without improvement that end a cycle")
    proof: int = option(250, "weights of a component up to which branch and bound takes over; 0 for never")
    ratio: float | None = option(
        None, "growth of the concave weight while a point hardens; 2.5 up to 500 open weights, else 1.6"
    )
    patience: int | None = option(
        None, "cycles without improvement after which the search ends; 150 without a limit on time or iterations"
    )
    bound_share: float = option(0.25, "share of the time limit for bounds, where rows share one Hessian")
    large: int = option(LARGE, "coupled weights beyond which the search starts with sweeps over all of them")
    many_blocks: int = option(
        MANY_BLOCKS, "coupled blocks beyond which a large problem is searched block by block"
    )
    small_block: int = option(SMALL_BLOCK, "weights of a coupled block, on average, up to which it is not")
    dense_bytes: int = option(DENSE_BYTES, "bytes up to which the blocks of a gradient matrix are expanded")
    double_bytes: int = option(DOUBLE_BYTES, "bytes up to which gradients not expanded are copied in float64")
    threaded_gradients: int = option(
        THREADED_GRADIENTS, "gradient entries beyond which losses and bounds are computed in threads"
    )

    def __post_init__(self) -> None:
        for name, smallest in (("core", 2), ("working_set", 2), ("cycles", 1), ("stall", 1), ("proof", 0)):
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise UsageError(f"`{name}` must be at least {smallest}, got {getattr(self, name)}")
        for name in ("large", "many_blocks", "small_block", "dense_bytes", "double_bytes", "threaded_gradients"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.bound_share < 1:
            raise UsageError(f"`bound_share` must be at least 0 and less than 1, got {self.bound_share}")
        if self.ratio is not None and self.ratio <= 1:
            raise UsageError(f"`ratio` must be more than 1, got {self.ratio}")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"`patience` must be at least 1, got {self.patience}")
