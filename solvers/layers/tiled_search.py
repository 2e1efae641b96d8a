"""Joint search on layers with cross groups: exchanges of four weights in the rows of a band, then tabu search.

Room: layers, for `solve`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.parallel import RowPool
from cbs_opt.solvers.layers.problem import Layer
from cbs_opt.solvers.layers.refit import refit_row
from cbs_opt.solvers.layers.rows import RowState
from cbs_opt.solvers.layers.tile_kernels import search_band
from cbs_opt.solvers.layers.tiled_budget import Band, TiledBudget
from cbs_opt.typing import BoolArray, FloatArray

_CELLS_A_TURN = 12  # weights of a band for each exchange that four of them wait, at most
_NEVER = 1 << 60  # the exchange from which on a fixed weight may move
_MOST_BYTES = 1 << 30  # of the tableaus of the bands that the threads have at once

FEW_ROWS = 64
"""Rows of a band up to which it is searched on the tableaus of its rows, if these fit into memory."""


def fits_tableaus(bands: list[Band], columns: int, threads: int) -> bool:
    """Whether the tableaus of the rows of one band a thread fit into memory together: 3 K² numbers a row."""
    rows = max(band.rows.size for band in bands)
    at_once = min(threads, len(bands))
    return rows <= FEW_ROWS and at_once * rows * 24 * (columns + 1) ** 2 <= _MOST_BYTES


class BandState:
    """Workspace of the swap tableaus of the rows of one band; one per thread."""

    def __init__(self, rows: int, columns: int, tile: tuple[int, int]) -> None:
        R, K = rows, columns
        single = [RowState(K) for _ in range(R)]
        self.rows = single
        listed = single[0].VA.shape[0]
        self.U, self.A, self.T = (np.empty((R, K + 1, K + 1)) for _ in range(3))
        self.VA, self.VT = (np.zeros((R, listed, K + 1)) for _ in range(2))
        self.signs, self.sizes = np.zeros((R, 2, listed)), np.zeros((R, 3), dtype=np.int64)
        self.x, self.t, self.d, self.a = (np.zeros((R, K + 1)) for _ in range(4))
        self.pruned, self.kept = (np.zeros((R, K + 1), dtype=np.int64) for _ in range(2))
        for r, state in enumerate(single):
            for name in ("U", "A", "T", "VA", "VT", "signs", "sizes", "x", "t", "d", "a", "pruned", "kept"):
                setattr(state, name, getattr(self, name)[r])
        self.work = np.zeros((4, K + 1))
        self.mask, self.best = (np.zeros((R, K), dtype=np.uint8) for _ in range(2))
        self.place, self.release = (np.zeros((R, K), dtype=np.int64) for _ in range(2))
        self.prices = np.zeros((tile[0], tile[1], tile[1]))


class TiledSearch:
    """Rows of several layers whose weights two partitions divide; see `solve_layers`.

    The rows of a band are a problem of their own: the bands have nothing in common. Each has the tableaus of its
    rows in memory, from which the price of every exchange follows exactly. It keeps the best mask that it found,
    with its exact loss.

    Parameters
    ----------
    layers : list of Layer
    budget : TiledBudget
    incumbent : Incumbent
        Receives every better solution.
    pool : RowPool
    seed : int
    clock : callable
    """

    price = 0.0  # of a weight: the budget leaves no choice between rows

    def __init__(
        self,
        layers: list[Layer],
        budget: TiledBudget,
        bands: list[Band],
        incumbent: Incumbent,
        pool: RowPool,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.layers, self.budget, self.bands, self.incumbent, self.pool = layers, budget, bands, incumbent, pool
        self.seed, self.clock = seed, clock
        self.layer_of = np.repeat(np.arange(len(layers)), [layer.rows for layer in layers])
        self.row_of = np.concatenate([np.arange(layer.rows) for layer in layers])
        self.scale = np.concatenate([layer.scale for layer in layers])
        self.b = [layer.weights @ layer.hessian for layer in layers]
        self.masks: list[BoolArray] = []
        self.losses: FloatArray = np.full(self.layer_of.size, np.inf)  # doubled, without the scales
        self._known: dict[int, tuple[bytes, float]] = {}

    def start_from(self, pruned: list[BoolArray]) -> None:
        """Search from given masks."""
        self.masks = [mask.copy() for mask in pruned]
        self.losses = np.array([self._loss(r, self._mask(pruned, r)) for r in range(self.layer_of.size)])

    def objective_of(self, pruned: list[BoolArray]) -> float:
        """The joint loss of masks."""
        rows = range(self.layer_of.size)
        return 0.5 * float(sum(self.scale[r] * self._loss(r, self._mask(pruned, r)) for r in rows))

    def remember(self, k: int, mask: BoolArray, losses: FloatArray) -> None:
        """Exact losses of the rows of layer k with a mask, so that they are not computed again."""
        for r in np.flatnonzero(self.layer_of == k).tolist():
            i = int(self.row_of[r])
            self._known[r] = (np.packbits(mask[i]).tobytes(), 2.0 * float(losses[i]) / float(self.scale[r]))

    def estimate_price(self) -> None:
        """Nothing: there is no price, see `price`."""

    def _mask(self, pruned: list[BoolArray], r: int) -> BoolArray:
        mask: BoolArray = pruned[self.layer_of[r]][self.row_of[r]]
        return mask

    def _loss(self, r: int, mask: BoolArray) -> float:
        """The exact doubled loss of a row, without its scale."""
        key = np.packbits(mask).tobytes()
        known = self._known.get(r)
        if known is None or known[0] != key:
            k, i = self.layer_of[r], self.row_of[r]
            layer = self.layers[k]
            known = (key, refit_row(layer.hessian, self.b[k][i], layer.weights[i], mask)[1])
            self._known[r] = known
        return known[1]

    def search(self, steps: int, tenure: int, round_number: int = 0, until: float = np.inf) -> bool:
        """Visit every band once with up to `steps` exchanges; False if stopped or past `until` by the clock."""

        def visit(band: int) -> None:
            self._visit(band, steps, tenure, round_number)

        order = np.random.default_rng((self.seed, round_number)).permutation(len(self.bands)).tolist()
        return self.pool.in_batches(visit, order, self._offer, self.clock, until)

    def _offer(self) -> None:
        self.incumbent.offer(0.5 * float(self.scale @ self.losses), self.masks)

    def _visit(self, number: int, steps: int, tenure: int, round_number: int) -> None:
        band = self.bands[number]
        if not band.cells.size:
            return
        layers = [self.layers[k] for k in self.layer_of[band.rows].tolist()]
        state = self._state(band.rows.size, max(layer.columns for layer in layers), band.cells.shape[1:])
        losses = np.zeros(band.rows.size)
        state.mask[:], state.release[:] = 0, 0
        for place, (r, layer) in enumerate(zip(band.rows.tolist(), layers, strict=True)):
            k, i = int(self.layer_of[r]), int(self.row_of[r])
            mask, row = self.masks[k][i], state.rows[place]
            try:
                row.build(layer.hessian, self.b[k][i], layer.weights[i], mask)
            except np.linalg.LinAlgError:
                return
            losses[place] = row.loss
            state.mask[place, : layer.columns] = mask
            if layer.locked is not None:
                state.release[place, : layer.columns][layer.locked[i] != 0] = _NEVER
        before = float(self.scale[band.rows] @ self.losses[band.rows])
        tenure = min(tenure, max(1, int((band.cells >= 0).sum()) // _CELLS_A_TURN))  # so that some may always move
        search_band(
            state.U, state.A, state.T, state.VA, state.VT, state.signs, state.sizes, state.x, state.t, state.d,
            state.a, state.pruned, state.kept, state.work, state.mask, state.place, state.release, state.prices,
            band.tile_rows, band.cells, losses, self.scale[band.rows], state.best, 0, steps, tenure,
            1 + number + 7919 * round_number, self.pool.flag,
        )  # fmt: skip
        found = [state.best[place, : layer.columns] != 0 for place, layer in enumerate(layers)]
        exact = np.array([self._loss(r, mask) for r, mask in zip(band.rows.tolist(), found, strict=True)])
        if float(self.scale[band.rows] @ exact) < before:
            self.losses[band.rows] = exact
            for r, mask in zip(band.rows.tolist(), found, strict=True):
                self.masks[self.layer_of[r]][self.row_of[r]] = mask

    def _state(self, rows: int, columns: int, tile: tuple[int, ...]) -> BandState:
        states: dict[tuple[int, ...], BandState] = self.pool.local.__dict__.setdefault("bands", {})
        key = (rows, columns, *tile)
        if key not in states:
            states.clear()  # bands of one layer follow each other at random: few shapes, but large ones
            states[key] = BandState(rows, columns, (tile[0], tile[1]))
        return states[key]
