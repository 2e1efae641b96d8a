"""One row of a layer: its OBS elimination path, its swap tableau, and its table of best masks by number pruned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.solvers.layers.kernels import eliminate, search_row
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_CHUNK = 48  # eliminations between two products that bring the conditional inverse up to date
_LISTED = 64  # moves that are kept as vectors


def elimination_path(
    inverse: FloatArray,
    w: FloatArray,
    must_prune: BoolArray,
    must_stay: BoolArray,
    group: IntArray,
    quota: IntArray,
    dearest: float = np.inf,
) -> tuple[IntArray, FloatArray]:
    """Order in which optimal brain surgeon removes the weights of a row, and the rise of the doubled loss by each.

    The weights that must go are removed first. Ends when a chunk of removals costs more than `dearest` each, or
    when nothing is left that may go. O(K³), most of it in matrix products.

    inverse : S⁻¹ (K, K), w : (K,), must_prune, must_stay : bool (K,), group, quota : int64 (K,), (G,), how many
    weights of each group may go.
    """
    alive = np.arange(w.size)
    T, x, t = inverse, w.copy(), inverse.diagonal().copy()
    quota = np.array(quota, dtype=np.int64)
    order: list[IntArray] = []
    costs: list[FloatArray] = []
    first, removed = int(must_prune.sum()), 0
    while alive.size and quota.any():
        forced = removed < first
        removable = must_prune[alive] if forced else ~must_stay[alive]
        limit = first - removed if forced else int(quota.sum())
        steps = min(_CHUNK, int(removable.sum()), limit)
        if steps == 0:
            break
        V, taken, losses = np.empty((steps, alive.size)), np.empty(steps, dtype=np.int64), np.empty(steps)
        done = eliminate(T, V, x, t, removable.copy(), group[alive], quota, taken, losses)
        order.append(alive[taken[:done]])
        costs.append(losses[:done])
        removed += done
        if done < steps or (removed > first and losses[:done].min() > dearest):
            break
        stays = np.ones(alive.size, dtype=bool)
        stays[taken[:done]] = False
        V = V[:, stays]
        T = T[np.ix_(stays, stays)]
        T -= V.T @ V
        alive, x, t = alive[stays], x[stays], np.maximum(t[stays], 1e-300)
    if not order:
        return np.empty(0, dtype=np.int64), np.empty(0)
    return np.concatenate(order), np.concatenate(costs)


@dataclass
class RowTable:
    """Best known masks of a row around one number of pruned weights.

    values : doubled loss without the row's scale (c,), infinite where unknown; masks : uint8 (c, K), 1 = pruned.
    """

    lowest: int
    values: FloatArray
    masks: np.ndarray[tuple[int, int], np.dtype[np.uint8]]

    @classmethod
    def around(cls, count: int, width: int, low: int, high: int, columns: int) -> RowTable:
        """An empty table of the counts within `width` of `count` and within [low, high]."""
        first, last = max(low, count - width), min(high, count + width)
        return cls(first, np.full(last - first + 1, np.inf), np.zeros((last - first + 1, columns), dtype=np.uint8))

    def offer(self, mask: BoolArray, value: float) -> None:
        """Write a mask if it is better than what is there."""
        entry = int(mask.sum()) - self.lowest
        if 0 <= entry < self.values.size and value < self.values[entry]:
            self.values[entry], self.masks[entry] = value, mask

    def recentre(self, count: int, width: int, low: int, high: int) -> RowTable:
        """The same knowledge around another count."""
        new = RowTable.around(count, width, low, high, self.masks.shape[1])
        for entry in range(self.values.size):
            target = self.lowest + entry - new.lowest
            if 0 <= target < new.values.size:
                new.values[target], new.masks[target] = self.values[entry], self.masks[entry]
        return new


class RowState:
    """Workspace of the swap tableau of one row at a time; one per thread. Memory 3 K² numbers."""

    def __init__(self, columns: int, groups: IntArray | None = None) -> None:
        K = columns
        self.columns = K
        self.grouped = groups is not None
        self.group = np.zeros(K, dtype=np.int64) if groups is None else groups
        self.U, self.A, self.T = np.empty((K + 1, K + 1)), np.empty((K + 1, K + 1)), np.empty((K + 1, K + 1))
        self.VA, self.VT = np.zeros((_LISTED, K + 1)), np.zeros((_LISTED, K + 1))
        self.signs = np.zeros((2, _LISTED))
        self.sizes = np.zeros(3, dtype=np.int64)
        self.x, self.t, self.d, self.a = (np.zeros(K + 1) for _ in range(4))
        self.pruned, self.kept = np.zeros(K + 1, dtype=np.int64), np.zeros(K + 1, dtype=np.int64)
        self.work = np.zeros((8, K + 1))
        self.release = np.zeros(K, dtype=np.int64)
        self.locked = np.zeros(K, dtype=np.uint8)
        self.clock = 0
        self.loss = 0.0

    def build(self, S: FloatArray, b: FloatArray, w: FloatArray, mask: BoolArray) -> None:
        """Start from a mask, True = pruned; O(K³). Raises `numpy.linalg.LinAlgError` where S_QQ is singular."""
        P, Q = np.flatnonzero(mask), np.flatnonzero(~mask)
        p, q = P.size, Q.size
        cross = S[np.ix_(P, Q)]
        T = np.linalg.inv(S[np.ix_(Q, Q)])
        T = 0.5 * (T + T.T)
        U = cross @ T
        A = S[np.ix_(P, P)] - U @ cross.T
        self.U[:p, :q], self.A[:p, :p], self.T[:q, :q] = U, A, T
        x = T @ b[Q]
        self.x[:q], self.t[:q] = x, np.maximum(T.diagonal(), 1e-300)
        self.d[:p] = b[P] - cross @ x
        self.a[:p] = np.maximum(A.diagonal(), 1e-14 * S.diagonal()[P] + 1e-300)
        self.pruned[:p], self.kept[:q] = P, Q
        self.sizes[:] = p, q, 0
        change = -w.copy()
        change[Q] += x
        self.loss = float(change @ (S @ change))

    def mask(self) -> BoolArray:
        """The mask of the state, bool (K,)."""
        out = np.zeros(self.columns, dtype=bool)
        out[self.pruned[: self.sizes[0]]] = True
        return out

    def search(
        self,
        table: RowTable,
        price: float,
        stop: np.ndarray[tuple[int], np.dtype[np.uint8]],
        steps: int,
        tenure: int = 0,
        patience: int = 1 << 60,
        seed: int = 1,
    ) -> None:
        """Descend (tenure 0) or search with tabu; see `kernels.search_row`."""
        self.loss, self.clock = search_row(
            self.U, self.A, self.T, self.VA, self.VT, self.signs, self.sizes, self.x, self.t, self.d, self.a,
            self.pruned, self.kept, self.work, self.locked, self.group, self.grouped, self.loss, price,
            table.lowest, table.values, table.masks, self.release, self.clock, steps, tenure, patience,
            seed, stop,
        )  # fmt: skip
