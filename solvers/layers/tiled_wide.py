"""The joint problem on layers with many columns and cross groups: ADMM, then exchanges in many tiles at once.

Room: layers, for `solve`.
"""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.layers.large import BulkExchange, refit_in_place, refit_rows
from cbs_opt.solvers.layers.tile_kernels import best_exchanges
from cbs_opt.solvers.layers.tiled_budget import TiledBudget
from cbs_opt.solvers.layers.wide import GAIN, Found, WideSearch
from cbs_opt.solvers.layers.wide_admm import Single, WideLayer
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_SHARE, _MOST = 0.05, 1024  # of the tiles of a band that one round may change at first, and tiles of a band, later
_ITERATIONS = 8  # of the refit after a round


class TiledWideSearch(WideSearch):
    """`WideSearch` with exchanges of four weights of a tile, at two rows and two columns.

    The weights have the separate prices of `BulkExchange`. Every tile has its best exchange, every band makes
    those that promise most, at most one in a tile, and keeps them only if the loss of its rows fell. The number
    that a band may make grows with success and is halved without.
    """

    def exchange(self, wide: list[WideLayer], start: Found) -> None:
        """A refit and exchanges, until a round gains little."""
        masks, weights, _ = start
        self.incumbent.adopt(masks, weights)
        for w, mask, x in zip(wide, masks, weights, strict=True):
            refit_in_place(w, mask, x)
        engines = [BulkExchange(w, None, mask, x) for w, mask, x in zip(wide, masks, weights, strict=True)]
        assert isinstance(self.budget, TiledBudget)
        rounds = _Rounds(engines, self.budget)
        value = sum(engine.objective for engine in engines)
        self.incumbent.offer(value, [e.pruned for e in engines], [e.X for e in engines])
        while self.rounds_left >= 1 and (rounds.moves > 0).any():
            self.rounds_left -= 1
            improved = rounds.make()
            before, value = value, sum(engine.objective for engine in engines)
            self.incumbent.offer(value, [e.pruned for e in engines], [e.X for e in engines])
            if improved and before - value < GAIN * before:
                return


class _Rounds:
    """Rounds of exchanges in all bands.

    Attributes
    ----------
    moves : int64 (bands,)
        Exchanges that each band may make in the next round.
    """

    def __init__(self, engines: list[BulkExchange], budget: TiledBudget) -> None:
        self.engines, self.tiles = engines, budget.crossed.tiles
        bands = budget.bands([engine.layer for engine in engines])
        rows = sum(engine.layer.rows for engine in engines)
        self.band_of = np.zeros(rows, dtype=np.int64)
        for number, band in enumerate(bands):
            self.band_of[band.rows] = number
        self.scale = np.concatenate([engine.layer.scale for engine in engines])
        tiles = np.array([band.cells.shape[0] for band in bands])
        self.moves = np.where(tiles > 0, np.maximum(1, _SHARE * tiles), 0).astype(np.int64)
        sizes = [engine.pruned.size for engine in engines]
        self.ends = np.cumsum(sizes)
        widths = np.repeat([engine.layer.columns for engine in engines], sizes)
        at = np.arange(int(self.ends[-1])) - np.repeat(self.ends - sizes, sizes)
        first = np.cumsum([engine.layer.rows for engine in engines]) - [engine.layer.rows for engine in engines]
        self.row_of = np.repeat(first, sizes) + at // widths

    def make(self) -> int:
        """One round; the number of bands that improved."""
        cost, gain, step = (np.concatenate(parts) for parts in zip(*map(self._prices, self.engines), strict=True))
        chosen = self._chosen(cost, gain)
        tried, flipped = np.zeros(self.moves.size, dtype=bool), np.zeros(cost.size, dtype=bool)
        tried[self.band_of[self.row_of[chosen]]], flipped[chosen] = True, True
        before, after, found, first = [], [], [], 0
        parts = (np.split(array, self.ends[:-1]) for array in (flipped, step))
        for engine, flips, steps in zip(self.engines, *parts, strict=True):
            rows = np.flatnonzero(tried[self.band_of[first : first + engine.layer.rows]])
            moved = flips.reshape(engine.pruned.shape)[rows]
            new, back = engine.pruned[rows] ^ moved, engine.pruned[rows] & moved
            X = np.where(new, np.float32(0), engine.X[rows])
            X += np.where(back, np.float32(0.5) * steps.reshape(engine.pruned.shape)[rows], np.float32(0))
            X = refit_rows(engine.wide, new, X, _ITERATIONS, rows)
            before.append(engine.losses[rows])
            after.append(engine.wide.losses(X, rows))
            found.append((rows, new, X))
            first += engine.layer.rows
        return self._accept(tried, before, after, found)

    def _prices(self, engine: BulkExchange) -> tuple[Single, Single, Single]:
        """Costs, gains and steps of all weights of a layer, in units of the objective doubled; (rows K,) each."""
        cost, gain, step = engine.prices(np.arange(engine.layer.rows))
        scale = engine.layer.scale.astype(np.float32)[:, None]
        return (cost * scale).ravel(), (gain * scale).ravel(), step.ravel()

    def _chosen(self, cost: Single, gain: Single) -> IntArray:
        """The weights that change sides, int64."""
        changes, weights = [], []
        for part in self.tiles:
            change, four = np.zeros(len(part.index)), np.zeros((len(part.index), 4), dtype=np.int64)
            best_exchanges(cost, gain, part.index, change, four)
            changes.append(change)
            weights.append(four)
        change, four = np.concatenate(changes), np.concatenate(weights)
        change, four = change[change < 0], four[change < 0]
        band = self.band_of[self.row_of[four[:, 0]]]
        order = np.lexsort((change, band))
        rank = np.arange(order.size) - np.searchsorted(band[order], band[order])
        return np.asarray(four[order[rank < self.moves[band[order]]]].ravel())

    def _accept(
        self,
        tried: BoolArray,
        before: list[FloatArray],
        after: list[FloatArray],
        found: list[tuple[IntArray, BoolArray, Single]],
    ) -> int:
        """Keep what was found in the bands whose loss fell; the number of these."""
        sums = np.zeros((2, self.moves.size))
        first, places = 0, []
        for engine, old, new, (rows, _, _) in zip(self.engines, before, after, found, strict=True):
            places.append(band := self.band_of[first + rows])
            scale = self.scale[first + rows]
            np.add.at(sums[0], band, scale * old)
            np.add.at(sums[1], band, scale * new)
            first += engine.layer.rows
        better = tried & (sums[1] < sums[0] * (1 - 1e-6))
        for engine, band, new, (rows, pruned, X) in zip(self.engines, places, after, found, strict=True):
            kept = better[band]
            engine.pruned[rows[kept]], engine.X[rows[kept]] = pruned[kept], X[kept]
            engine.losses[rows[kept]] = new[kept]
        self.moves[better] = np.minimum(_MOST, np.ceil(self.moves[better] * 1.3)).astype(np.int64)
        self.moves[tried & ~better] //= 2
        self.moves[~tried] = 0
        return int(better.sum())
