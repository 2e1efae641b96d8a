"""Tabu search on one large dense block for many starts: launches recorded once and replayed as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise

import torch

from cbs_opt.device import DeviceError

logger = logging.getLogger("cbs_opt")

TILE = 2048
"""Variables of a program."""

BRANCHES = 4
"""Parts of the starts whose launches overlap: while one waits for its row, another streams."""

LONGEST_TENURE = 16

_SLOTS = 64  # at least two for every step that a variable can wait
_GRAPH_STEPS = 32  # of a replay
_REFRESH_BYTES = 1 << 29  # of rows of Q that are converted to float64 at a time
_REPLAYS = 8  # between two questions whether to stop


class Branch:
    """Some of the starts of `DenseTabu`, with all that their kernels read and write at fixed addresses."""

    def __init__(
        self,
        y: torch.Tensor,
        still: torch.Tensor,
        seeds: torch.Tensor,
        tenure: torch.Tensor,
        steps: int,
        tiles: int,
    ) -> None:
        S, n, device = int(y.shape[0]), int(y.shape[1]), y.device

        def make(*shape: int, dtype: torch.dtype = torch.int32, fill: float = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.S, self.n, self.tiles = S, n, tiles
        self.begin = y.to(torch.int8).contiguous()
        self.best = self.begin.clone()
        self.state = self.begin + 2 * still.to(torch.int8)
        self.cost = make(S, n, dtype=torch.float32)
        self.drop_value, self.add_value = (make(S, tiles, dtype=torch.float32) for _ in range(2))
        self.drop_index, self.add_index = make(S, tiles), make(S, tiles)
        self.dropped, self.gain = make(S), make(S, dtype=torch.float32)
        self.clock, self.next_clock, self.best_clock = make(S), make(S), make(S)
        self.began = make(1)
        self.tabu_index, self.tabu_release = make(S, _SLOTS), make(S, _SLOTS, fill=-1)
        self.seed, self.tenure = seeds, tenure
        self.f, self.f_best = (make(S, dtype=torch.float64) for _ in range(2))
        self.moves = make(steps, S, 2, fill=-1)

    def steps(self, q: torch.Tensor, count: int) -> None:
        """Launch so many steps."""
        from cbs_opt.solvers.device.dense_kernels import add_step, drop_step

        grid = (self.S, self.tiles)
        sizes = {"TILES": max(2, 1 << (self.tiles - 1).bit_length()), "TILE": TILE, "num_warps": 4}
        found = (self.drop_value, self.drop_index, self.add_value, self.add_index, self.dropped, self.gain)
        for _ in range(count):
            drop_step[grid](
                q, self.cost, self.state, *found, self.clock, self.next_clock, self.n, self.tiles, **sizes
            )
            add_step[grid](
                q, self.cost, self.state, *found, self.clock, self.next_clock, self.tabu_index, self.tabu_release,
                self.seed, self.tenure, self.f, self.f_best, self.best_clock, self.moves, self.began, self.n,
                self.tiles, SLOTS=_SLOTS, **sizes,
            )  # fmt: skip

    def points(self) -> torch.Tensor:
        """The present points and the best ones, float64 (2 S, n)."""
        return torch.cat([self.state & 1, self.best]).to(torch.float64)

    def restart(self, gradients: torch.Tensor, half: torch.Tensor, linear: torch.Tensor) -> float:
        """Costs and objectives from scratch; returns the largest relative drift since then.

        Parameters
        ----------
        gradients : float64 (2 S, n)
            Qy + c of `points`.
        half : float64 (n,)
            The halved diagonal of Q.
        linear : float64 (n,)
        """
        y = self.points()
        f = 0.5 * (y * (gradients + linear)).sum(1)
        kept = torch.cat([self.f, self.f_best])
        if not bool(torch.isfinite(kept).all() & torch.isfinite(f).all()):
            raise DeviceError("an objective of the tabu search is not a number")
        drift = float(((kept - f).abs() / f.abs().clamp_min(1e-300)).max())
        self.f.copy_(f[: self.S])
        self.f_best.copy_(f[self.S :])
        self.cost.copy_(half + (1.0 - 2.0 * y[: self.S]) * gradients[: self.S])
        self.begin.copy_(self.state & 1)
        self.began.copy_(self.clock[:1])
        self.best_clock.copy_(self.clock)
        self.first()
        return drift

    def first(self) -> None:
        """Launch the search for the first candidates, from which steps go on."""
        from cbs_opt.solvers.device.dense_kernels import first_candidates

        first_candidates[(self.S, self.tiles)](
            self.cost, self.state, self.drop_value, self.drop_index, self.n, self.tiles, TILE=TILE, num_warps=4
        )

    def follow(self) -> None:
        """Take the best point of every start from the list of its moves."""
        last = self.best_clock - self.began  # moves that lead to the best point; 0 where none is better
        number = torch.arange(self.moves.shape[0], device=last.device)[:, None, None]
        taken = (number < last[None, :, None]) & (self.moves >= 0)
        at = self.moves.clamp_min(0).to(torch.int64) + (torch.arange(self.S, device=last.device) * self.n)[:, None]
        flips = torch.zeros(self.S * self.n, dtype=torch.int32, device=last.device)
        flips.index_add_(0, at.view(-1), taken.reshape(-1).to(torch.int32))
        found = (self.begin.view(-1) + flips.remainder(2)).remainder(2).view(self.S, self.n).to(torch.int8)
        self.best = torch.where((last > 0)[:, None], found, self.best)


class DenseTabu:
    """Drop/add tabu search from many starts on one dense Q.

    Parameters
    ----------
    q : float32 (n, n)
        Symmetric, on the card.
    linear : float64 (n,)
    y : bool (S, n)
        Starts, with equal numbers of ones.
    seeds : int64 (S,)
    tenure : int32 (S,)
        Each step makes two variables wait for tenure … 2 tenure − 1 steps; at most 16.
    steps : int
        Steps between two refreshes in float64.
    still : bool (n,), optional
        Variables that never move, such as those that pad n to a multiple of 16, at which rows are read fastest.

    Attributes
    ----------
    drift : float
        The largest relative difference between an objective kept up in steps and the recomputed one.

    Notes
    -----
    A step reads two rows of Q and, for each variable and start, reads and writes one number of float32 twice.
    """

    def __init__(
        self,
        q: torch.Tensor,
        linear: torch.Tensor,
        y: torch.Tensor,
        seeds: torch.Tensor,
        tenure: torch.Tensor,
        steps: int = 2048,
        still: torch.Tensor | None = None,
    ) -> None:
        self.q, self.linear = q, linear
        self.steps_at_once = max(_GRAPH_STEPS, steps // _GRAPH_STEPS * _GRAPH_STEPS)
        n, S = int(q.shape[0]), int(y.shape[0])
        tiles = -(-n // TILE)
        still = torch.zeros(n, dtype=torch.bool, device=q.device) if still is None else still
        tenure = tenure.clamp(1, LONGEST_TENURE).to(torch.int32)
        count = max(1, min(BRANCHES, S // 4))
        cuts = [S * k // count for k in range(count + 1)]
        self.branches = [
            Branch(y[a:b], still, seeds[a:b].clone(), tenure[a:b].clone(), self.steps_at_once, tiles)
            for a, b in pairwise(cuts)
        ]
        self.drift = 0.0
        self.graph: torch.cuda.CUDAGraph | None = None
        self._restart()

    @property
    def best(self) -> torch.Tensor:
        """The best points, int8 (S, n)."""
        return torch.cat([branch.best for branch in self.branches])

    @property
    def objectives(self) -> torch.Tensor:
        """Their objectives as kept up, float64 (S,)."""
        return torch.cat([branch.f_best for branch in self.branches])

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> int:
        """`steps_at_once` steps of every start, then a refresh; returns the steps made, fewer when stopped.

        Raises
        ------
        DeviceError
            When an objective is not a number.
        """
        made = self.launch_all(should_stop)
        self.refresh()
        return made

    def refresh(self) -> None:
        """Take the best points from the lists of moves, which then begin anew; recompute costs in float64."""
        for branch in self.branches:
            branch.follow()
        self.drift = max(self.drift, self._restart())

    def _restart(self) -> float:
        """Costs and objectives of all branches in float64, in one pass over Q; the largest relative drift."""
        points = torch.cat([branch.points() for branch in self.branches])
        n = int(self.q.shape[0])
        gradients = self.linear.repeat(points.shape[0], 1)
        rows = max(1, _REFRESH_BYTES // (8 * n))
        for first in range(0, n, rows):
            part = slice(first, min(first + rows, n))
            gradients[:, part] += points @ self.q[part].to(torch.float64).T
        half = 0.5 * self.q.diagonal().to(torch.float64)
        parts = torch.split(gradients, [2 * branch.S for branch in self.branches])
        return max(
            branch.restart(part, half, self.linear) for branch, part in zip(self.branches, parts, strict=True)
        )

    def launch_all(self, should_stop: Callable[[], bool] = lambda: False) -> int:
        """The steps of `run` without the refresh, which must follow: the lists of moves are full."""
        made = 0
        if self.q.device.type == "cuda" and self.graph is None:
            made = self._record()
        while made < self.steps_at_once:
            for _ in range(_REPLAYS):
                if made < self.steps_at_once:
                    self._launch()
                    made += _GRAPH_STEPS
            if self.q.device.type == "cuda":
                torch.cuda.synchronize()
            if should_stop():
                break
        return made

    def _launch(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for branch in self.branches:
            branch.steps(self.q, _GRAPH_STEPS)

    def _record(self) -> int:
        """Compile by launching once, then record; returns the steps made. Without a recording, launches it is."""
        self._launch()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            side = [torch.cuda.Stream() for _ in self.branches[1:]]  # type: ignore[no-untyped-call]
            with torch.cuda.graph(graph):
                main = torch.cuda.current_stream()
                for branch, stream in zip(self.branches[1:], side, strict=True):
                    stream.wait_stream(main)
                    with torch.cuda.stream(stream):
                        branch.steps(self.q, _GRAPH_STEPS)
                self.branches[0].steps(self.q, _GRAPH_STEPS)
                for stream in side:
                    main.wait_stream(stream)
            self.graph = graph
        except RuntimeError as error:
            logger.info(f"CUDA graphs do not work here ({str(error).splitlines()[0]}): single launches")
            torch.cuda.synchronize()
        return _GRAPH_STEPS
