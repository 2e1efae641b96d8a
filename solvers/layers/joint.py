"""Joint search over all rows: elimination paths, then tabu search on each row's swap tableau, under one budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from cbs_opt.linalg import inverse_pd
from cbs_opt.solvers.layers.allocation import choose_counts, merge_paths
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.parallel import RowPool
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.layers.refit import refit_row
from cbs_opt.solvers.layers.rows import RowState, RowTable, elimination_path
from cbs_opt.typing import BoolArray, FloatArray, IntArray

logger = logging.getLogger("cbs_opt")

_WIDTH = 4  # counts on either side of the present one that a row explores
_PROBES = 12  # rows whose whole path is followed to learn the price of a weight
_MARGIN = 3.0  # how much dearer than that price a path is followed


class JointSearch:
    """Rows of several layers under one budget; see `solve_layers`.

    Parameters
    ----------
    layers : list of Layer
    budget : LayerBudget
    incumbent : Incumbent
        Receives every better solution.
    pool : RowPool
    seed : int
    clock : callable
    """

    def __init__(
        self,
        layers: list[Layer],
        budget: LayerBudget,
        incumbent: Incumbent,
        pool: RowPool,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.layers, self.budget, self.incumbent, self.pool = layers, budget, incumbent, pool
        self.seed = seed
        self.layer_of = np.repeat(np.arange(len(layers)), [layer.rows for layer in layers])
        self.row_of = np.concatenate([np.arange(layer.rows) for layer in layers])
        self.scale = np.concatenate([layer.scale for layer in layers])
        self.b = [layer.weights @ layer.hessian for layer in layers]
        self.n_rows = self.layer_of.size
        must, stay = [layer.must_prune() for layer in layers], [layer.must_stay() for layer in layers]
        self.must_prune, self.must_stay = must, stay
        self.low = np.concatenate([m.sum(1) for m in must])
        self.high = np.concatenate([layer.columns - s.sum(1) for layer, s in zip(layers, stay, strict=True)])
        if budget.per_row is not None:
            self.low = self.high = np.concatenate([np.asarray(c, dtype=np.int64) for c in budget.per_row])
        self.groups: list[IntArray | None] = [None] * len(layers)
        if budget.pattern is not None:
            n, m = budget.pattern
            self.groups = [np.arange(layer.columns) // m for layer in layers]
            self.low = self.high = np.concatenate([np.full(la.rows, n * (la.columns // m)) for la in layers])
        self.tables: list[RowTable] = []
        self.counts = np.zeros(self.n_rows, dtype=np.int64)
        self.price = 0.0
        self._exact: list[tuple[bytes, float]] = [(b"", 0.0)] * self.n_rows

    # Start ---------------------------------------------------------------------------------------------------

    def start_from(self, pruned: list[BoolArray]) -> None:
        """Centre the tables on given masks and write them there, with exact values."""
        self._make_tables(np.concatenate([mask.sum(1) for mask in pruned]))
        self.objective_of(pruned)

    def objective_of(self, pruned: list[BoolArray]) -> float:
        """The joint loss of masks, which are also offered to the tables."""
        total = 0.0
        for r in range(self.n_rows):
            mask = pruned[self.layer_of[r]][self.row_of[r]]
            value = self._exact_value(r, mask)
            if self.tables:
                self.tables[r].offer(mask, value)
            total += 0.5 * self.scale[r] * value
        return total

    def remember(self, k: int, mask: BoolArray, losses: FloatArray) -> None:
        """Exact losses of the rows of layer k with a mask, so that they are not computed again."""
        for r in np.flatnonzero(self.layer_of == k):
            i = int(self.row_of[r])
            self._exact[r] = (np.packbits(mask[i]).tobytes(), 2.0 * float(losses[i]) / float(self.scale[r]))

    def eliminate(self) -> bool:
        """Follow the elimination paths of all rows and share the budget out among them; False if stopped."""
        inverses = [inverse_pd(layer.hessian) for layer in self.layers]
        if any(inverse is None for inverse in inverses):
            return False
        paths: list[tuple[IntArray, FloatArray]] = [(np.empty(0, np.int64), np.empty(0))] * self.n_rows
        dearest = np.inf

        def follow(r: int) -> None:
            k, i = self.layer_of[r], self.row_of[r]
            group, quota = self._quota(r)
            paths[r] = elimination_path(
                inverses[k], self.layers[k].weights[i], self.must_prune[k][i], self.must_stay[k][i],
                group, quota, dearest / self.scale[r],
            )  # fmt: skip

        rows = np.random.default_rng(self.seed).permutation(self.n_rows)
        if self.budget.total is None:
            if not self.pool.map(follow, rows.tolist()):
                return False
            self._follow_paths(paths, self.low)
            return True
        probes = rows[: max(_PROBES, 2 * len(self.layers))]
        if not self.pool.map(follow, probes.tolist()):
            return False
        share = self.budget.total * probes.size / self.n_rows
        _, price = self._merge([paths[r] for r in probes], self.scale[probes], self.low[probes], round(share))
        dearest = _MARGIN * max(price, 1e-300)
        if not self.pool.map(follow, rows[probes.size :].tolist()):
            return False
        if sum(costs.size for _, costs in paths) < self.budget.total:
            dearest = np.inf
            if not self.pool.map(follow, rows[probes.size :].tolist()):
                return False
        counts, self.price = self._merge(paths, self.scale, self.low, self.budget.total)
        self._follow_paths(paths, counts)
        return True

    def _merge(
        self, paths: list[tuple[IntArray, FloatArray]], scales: FloatArray, low: IntArray, total: int
    ) -> tuple[IntArray, float]:
        return merge_paths([costs for _, costs in paths], scales, low, total)

    def _quota(self, r: int) -> tuple[IntArray, IntArray]:
        columns = self.layers[self.layer_of[r]].columns
        group = self.groups[self.layer_of[r]]
        if group is None:
            return np.zeros(columns, dtype=np.int64), np.array([self.high[r]])
        assert self.budget.pattern is not None
        return group, np.full(int(group[-1]) + 1, self.budget.pattern[0])

    def _follow_paths(self, paths: list[tuple[IntArray, FloatArray]], counts: IntArray) -> None:
        self._make_tables(counts)
        for r, (order, costs) in enumerate(paths):
            table = self.tables[r]
            reached = np.cumsum(costs)
            for entry in range(table.values.size):
                number = table.lowest + entry
                if number > order.size:
                    break
                table.masks[entry, order[:number]] = 1
                table.values[entry] = reached[number - 1] if number else 0.0
        self.allocate()

    def _make_tables(self, counts: IntArray) -> None:
        width = _WIDTH if self.budget.total is not None else 0
        old = self.tables
        self.tables = [
            RowTable.around(int(counts[r]), width, int(self.low[r]), int(self.high[r]), self._columns(r))
            if not old
            else old[r].recentre(int(counts[r]), width, int(self.low[r]), int(self.high[r]))
            for r in range(self.n_rows)
        ]
        self.counts = np.array(counts)

    def _columns(self, r: int) -> int:
        return int(self.layers[self.layer_of[r]].columns)

    # Allocation ----------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Choose each row's number of pruned weights, check the values, report, and move the tables along."""
        if self.budget.total is not None:
            for _ in range(4):
                size = max(table.values.size for table in self.tables)
                values = np.full((self.n_rows, size), np.inf)
                for r, table in enumerate(self.tables):
                    values[r, : table.values.size] = 0.5 * self.scale[r] * table.values
                found = choose_counts(values, np.array([table.lowest for table in self.tables]), self.budget.total)
                if found is None:
                    return
                entries, self.price = found
                if self._verify(entries):
                    break
            counts = np.array([table.lowest for table in self.tables]) + entries
        else:
            entries = np.zeros(self.n_rows, dtype=np.int64)
            if not all(np.isfinite(table.values[0]) for table in self.tables):
                return
            self._verify(entries)
            counts = self.low
        masks = [np.zeros(layer.weights.shape, dtype=bool) for layer in self.layers]
        objective = 0.0
        for r, table in enumerate(self.tables):
            masks[self.layer_of[r]][self.row_of[r]] = table.masks[entries[r]] != 0
            objective += 0.5 * self.scale[r] * table.values[entries[r]]
        self.incumbent.offer(objective, masks)
        self._make_tables(counts)

    def _verify(self, entries: IntArray) -> bool:
        """Replace the chosen values by exact ones; False where one was far too good."""
        honest = True
        for r, entry in enumerate(entries):
            table = self.tables[r]
            value = self._exact_value(r, table.masks[entry] != 0)
            if value > table.values[entry] * (1 + 1e-6) + 1e-300:
                honest = False
            table.values[entry] = value
        return honest

    def _exact_value(self, r: int, mask: BoolArray) -> float:
        key = np.packbits(mask).tobytes()
        if self._exact[r][0] != key:
            k, i = self.layer_of[r], self.row_of[r]
            layer = self.layers[k]
            self._exact[r] = (key, refit_row(layer.hessian, self.b[k][i], layer.weights[i], mask)[1])
        return self._exact[r][1]

    # Search --------------------------------------------------------------------------------------------------

    def estimate_price(self) -> None:
        """The price of a weight, from the cheapest removal and the best return of some rows."""
        if self.budget.total is None:
            return
        prices = []
        rows = np.random.default_rng(self.seed).permutation(self.n_rows)[: max(4, len(self.layers))]
        for r in rows.tolist():
            k, i = int(self.layer_of[r]), int(self.row_of[r])
            state, table = self._state(k), self.tables[r]
            mask = table.masks[int(self.counts[r]) - table.lowest] != 0
            if self.pool.stopped() or mask.all() or not mask.any():
                continue
            try:
                state.build(self.layers[k].hessian, self.b[k][i], self.layers[k].weights[i], mask)
            except np.linalg.LinAlgError:
                continue
            p, q = int(state.sizes[0]), int(state.sizes[1])
            removal = float((state.x[:q] ** 2 / state.t[:q]).min())
            gain = float((state.d[:p] ** 2 / state.a[:p]).max())
            prices.append(0.5 * self.scale[r] * np.sqrt(removal * gain))
        if prices:
            self.price = float(np.median(prices))

    def search(self, steps: int, tenure: int, round_number: int = 0, until: float = np.inf) -> bool:
        """Visit every row once with a search of `steps` moves; False if stopped or past `until` by the clock."""

        def visit(r: int) -> None:
            self._visit(r, steps, tenure, round_number)

        rows = np.random.default_rng((self.seed, round_number)).permutation(self.n_rows).tolist()
        return self.pool.in_batches(visit, rows, self.allocate, self.clock, until)

    def _visit(self, r: int, steps: int, tenure: int, round_number: int) -> None:
        k, i = int(self.layer_of[r]), int(self.row_of[r])
        layer, table = self.layers[k], self.tables[r]
        state = self._state(k)
        entry = int(self.counts[r]) - table.lowest
        if not np.isfinite(table.values[entry]):
            return
        state.locked[:] = 0 if layer.locked is None else layer.locked[i] != 0
        try:
            state.build(layer.hessian, self.b[k][i], layer.weights[i], table.masks[entry] != 0)
        except np.linalg.LinAlgError:
            return
        state.release[:] = 0
        state.clock = 0
        price = 2.0 * self.price / self.scale[r]
        tenure = self._tenure(r, tenure)
        state.search(table, price, self.pool.flag, steps, tenure, seed=1 + r + 7919 * round_number)

    def _tenure(self, r: int, tenure: int) -> int:
        """Shorter where few weights are on one side, so that some may always move."""
        fewer = min(int(self.counts[r]), self._columns(r) - int(self.counts[r]))
        return min(tenure, max(1, fewer // 6))

    def _state(self, k: int) -> RowState:
        states: dict[int, RowState] = self.pool.local.__dict__.setdefault("states", {})
        key = k if self.groups[k] is not None else -self.layers[k].columns
        if key not in states:
            states[key] = RowState(self.layers[k].columns, self.groups[k])
        return states[key]
