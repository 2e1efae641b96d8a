"""Selection over all rows: the weights stay as they are, and only the pruned set is chosen."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.layers.joint import JointSearch
from cbs_opt.solvers.layers.selection_kernels import greedy_row, quadratic, search_selection_row
from cbs_opt.typing import BoolArray, FloatArray, IntArray


class SelectionSearch(JointSearch):
    """The search of `JointSearch` with the loss ½ w_Pᵀ H w_P: greedy paths, then tabu exchanges row by row.

    With q the number of kept weights, an exchange costs O(K + p K) in one pass over the pruned rows of
    Q = diag(w) S diag(w). After the first visits of all rows no exchange improves one, whenever the run stops.
    """

    def eliminate(self) -> bool:
        """Greedy paths of all rows, and the budget shared out among them; False if stopped."""
        paths: list[tuple[IntArray, FloatArray]] = [(np.empty(0, np.int64), np.empty(0))] * self.n_rows

        def follow(r: int) -> None:
            k, i = self.layer_of[r], self.row_of[r]
            group, quota = self._quota(r)
            quota = np.array(quota, dtype=np.int64)
            Q = self._quadratic(r)
            must, may = self.must_prune[k][i], ~self.must_stay[k][i]
            y, h = np.zeros(Q.shape[0], dtype=np.uint8), np.zeros(Q.shape[0])
            pieces = []
            for allowed, most in ((must, int(must.sum())), (may, int(quota.sum() - must.sum()))):
                order, costs = np.empty(most, dtype=np.int64), np.empty(most)
                done = greedy_row(Q, y, h, allowed.astype(np.uint8), group, quota, order, costs)
                pieces.append((order[:done], costs[:done]))
            paths[r] = (np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces]))

        if not self.pool.map(follow, range(self.n_rows)):
            return False
        counts = self.low
        if self.budget.total is not None:
            counts, self.price = self._merge(paths, self.scale, self.low, self.budget.total)
        self._follow_paths(paths, counts)
        return True

    def _quadratic(self, r: int) -> FloatArray:
        layer = self.layers[self.layer_of[r]]
        matrices: dict[int, FloatArray] = self.pool.local.__dict__.setdefault("quadratics", {})
        Q = matrices.setdefault(layer.columns, np.empty((layer.columns, layer.columns)))
        quadratic(layer.hessian, layer.weights[self.row_of[r]], Q)
        return Q

    def _exact_value(self, r: int, mask: BoolArray) -> float:
        key = np.packbits(mask).tobytes()
        if self._exact[r][0] != key:
            layer = self.layers[self.layer_of[r]]
            w = np.where(mask, layer.weights[self.row_of[r]], 0.0)
            self._exact[r] = (key, float(w @ layer.hessian @ w))
        return self._exact[r][1]

    def estimate_price(self) -> None:
        """The price is known from the greedy paths."""

    def _visit(self, r: int, steps: int, tenure: int, round_number: int) -> None:
        k, i = int(self.layer_of[r]), int(self.row_of[r])
        table = self.tables[r]
        at = int(self.counts[r]) - table.lowest
        if not np.isfinite(table.values[at]):
            return
        layer = self.layers[k]
        Q = self._quadratic(r)
        size = table.masks.shape[1]
        locked = np.zeros(size, dtype=np.uint8) if layer.locked is None else (layer.locked[i] != 0).view(np.uint8)
        group = self.groups[k]
        groups = np.zeros(size, dtype=np.int64) if group is None else group
        searches = [(10_000, 0, self.pool.flag)]
        if tenure:
            # The best mask of a tabu search need not be a local optimum: a descent follows, also after a stop.
            searches = [(steps, self._tenure(r, tenure), self.pool.flag), (10_000, 0, np.zeros(1, dtype=np.uint8))]
        for moves, wait, flag in searches:
            y = table.masks[at].copy()
            h = Q @ y
            search_selection_row(
                Q, y, h, locked, groups, group is not None, float(y @ h), 2.0 * self.price / self.scale[r],
                table.lowest, table.values, table.masks, np.zeros(y.size, dtype=np.int64), 0, moves, wait,
                1 + r + 7919 * round_number, flag,
            )  # fmt: skip
