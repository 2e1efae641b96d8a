"""The moves of the joint search over all blocks: swaps within a block, and exchanges between blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.solvers.joint.tableau import NEVER, Tableau
from cbs_opt.solvers.joint.uncoupled import UncoupledWeights
from cbs_opt.typing import BoolArray, FloatArray, Int8Array, IntArray

CORE_LIMIT = 5000
"""Largest number of weights of a block in swaps; of a larger block the kept and the most promising others."""

KEPT_LIMIT = 4500
"""A block that keeps more weights than this has no tableau."""

CORE_BYTES = 3 << 30
"""Memory of all tableaux together, roughly: with many large blocks each gets a smaller core."""


_SPREAD = 1e6
"""Ratio of diagonal entries of H up to which a tableau takes H as it is."""


class Move(NamedTuple):
    """A weight that is removed and one that returns, each with its block, and the change of the loss."""

    leaving_block: int
    column: int
    coming_block: int
    row: int
    change: float  # of the doubled loss


class JointMoves:
    """One `Tableau` for each block of an instance, at a common selection; uncoupled weights by themselves.

    Parameters
    ----------
    instance : Instance
    pruned : bool (n,)
        A feasible selection.
    pool : ThreadPoolExecutor or None
    threads : int
        Threads of the pool that one block uses.

    Attributes
    ----------
    weights_of : list of int64 arrays
        The weights that take part in each tableau, by their index among all n.
    """

    def __init__(
        self, instance: Instance, pruned: BoolArray, pool: ThreadPoolExecutor | None = None, threads: int = 1
    ) -> None:
        self.instance = instance
        self.outside = pruned.copy()  # the selection of the weights without a tableau, or outside a core
        self.base = 0.0  # doubled loss of the blocks without a tableau
        self.drift = 0.0  # largest relative error of the doubled loss that a refactoring has found
        self.weights_of: list[IntArray] = []
        self.tableaux: list[Tableau | UncoupledWeights] = []
        self.skipped: list[int] = []
        self.core_limit = core_limit(instance.curvature.block_sizes)
        self.kept_limit = min(KEPT_LIMIT, int(0.9 * self.core_limit))
        group = instance.budget.group_of(instance.n)
        fixed = np.zeros(instance.n, dtype=np.int8) if instance.fixed is None else instance.fixed
        for k in range(instance.curvature.number_of_blocks):
            self._add_block(k, pruned, group, fixed, pool, threads)
        self._swaps: list[tuple[int, int, float] | None] = [None] * len(self.tableaux)
        self._exchanges: list[dict[int, tuple[float, int, float, int]] | None] = [None] * len(self.tableaux)
        self._saved: dict[int, Tableau | UncoupledWeights] = {}
        self._changed = set(range(len(self.tableaux)))  # since `save`
        spans = [set(np.unique(group[weights]).tolist()) for weights in self.weights_of]
        seen: set[int] = set()
        self._shared: set[int] = set()
        for groups in spans:
            self._shared |= seen & groups
            seen |= groups

    def _add_block(
        self,
        k: int,
        pruned: BoolArray,
        group: IntArray,
        fixed: Int8Array,
        pool: ThreadPoolExecutor | None,
        threads: int,
    ) -> None:
        instance, curvature = self.instance, self.instance.curvature
        part = curvature.block_slice(k)
        w, local = instance.weights[part], pruned[part]
        b = curvature.block_matmul(k, w)
        constant = 0.5 * float(w @ b)
        if instance.linear is not None:
            constant -= float(instance.linear[part] @ w)
            b = b - instance.linear[part]
        if int((~local).sum()) > self.kept_limit:
            self.skipped.append(k)
            g = None if instance.linear is None else instance.linear[part]
            delta = curvature.best_update(k, w, local, g)
            self.base += curvature.block_quadratic(k, delta) + (0.0 if g is None else 2.0 * float(g @ delta))
            return
        open_ = ~(local & (fixed[part] == 1))
        coupled = curvature.coupled(k)
        alone = np.flatnonzero(open_ & ~coupled)
        inside = np.flatnonzero(open_ & coupled)
        outside = 0.0  # doubled constant of the uncoupled weights
        if alone.size:
            index = part.start + alone
            own = instance.weights[index] * b[alone]
            if instance.linear is not None:
                own -= instance.linear[index] * instance.weights[index]
            outside = float(own.sum())
            self.weights_of.append(index)
            values = b[alone] ** 2 / curvature.diagonal()[index]
            self.tableaux.append(UncoupledWeights(values, outside, ~local[alone], group[index], fixed[index] == 0))
        if not inside.size:
            return
        if inside.size > self.core_limit:
            inside = self._core(k, local, inside, w, instance.linear)
        whole = inside.size == w.size
        H = curvature.block(k) if whole else curvature.submatrix(k, inside, inside)
        scale = _balancing(H.diagonal())
        if scale is not None:
            H = H * scale[:, None] * scale
        scale = np.ones(inside.size) if scale is None else scale
        factor = curvature.as_factor()
        least = (0.0 if factor is None else factor.damping) * scale**2
        index = part.start + inside
        self.weights_of.append(index)
        constant -= outside / 2
        self.tableaux.append(
            Tableau(
                H,
                b[inside] * scale,
                constant,
                ~local[inside],
                group[index],
                fixed[index] == 0,
                pool,
                threads,
                least,
            )
        )

    def _core(
        self, k: int, local: BoolArray, inside: IntArray, w: FloatArray, linear: FloatArray | None
    ) -> IntArray:
        """The kept weights of a large block, and the pruned ones with the largest d²/H_ii."""
        curvature = self.instance.curvature
        part = curvature.block_slice(k)
        g = None if linear is None else linear[part]
        residual = -curvature.block_matmul(k, curvature.best_update(k, w, local, g))
        if g is not None:
            residual = residual - g
        promise = residual**2 / np.maximum(curvature.diagonal()[part], 1e-300)
        promise[~local] = np.inf
        order = inside[np.argsort(-promise[inside], kind="stable")]
        return np.sort(order[: self.core_limit])

    @property
    def doubled(self) -> float:
        """The doubled joint loss."""
        return self.base + sum(tableau.doubled for tableau in self.tableaux)

    def pruned(self) -> BoolArray:
        """The selection, bool (n,)."""
        out = self.outside.copy()
        for index, tableau in zip(self.weights_of, self.tableaux, strict=True):
            out[index] = ~tableau.kept
        return out

    def save(self) -> None:
        """Store this point for `go_back`; parts that have not changed since the last time cost nothing."""
        for k, tableau in enumerate(self.tableaux):
            if k in self._changed:
                self._saved[k] = tableau.copy()
        self._changed.clear()

    def go_back(self) -> None:
        """Return to the point that was saved last; without one, which rounding may cause, stay here."""
        for k in self._changed & self._saved.keys():
            saved: Any = self._saved[k]  # of the same kind
            self.tableaux[k].restore(saved)
            self._swaps[k] = self._exchanges[k] = None
        self._changed -= self._saved.keys()

    def refactor(self) -> float:
        """Recompute every tableau from its set; returns the error found, relative to the whole loss."""
        error = 0.0
        for k, tableau in enumerate(self.tableaux):
            error += tableau.refactor()
            self.forget(k)
        error /= max(abs(self.doubled), 1e-300)
        self.drift = max(self.drift, error)
        return error

    def forbid(self, block: int, weight: int, forbidden: bool) -> None:
        """Make a weight of a tableau tabu, or free it."""
        self.tableaux[block].forbid(weight, forbidden)
        self._swaps[block] = self._exchanges[block] = None

    def forget(self, k: int) -> None:
        """Tableau k has changed."""
        self._changed.add(k)
        self._swaps[k] = self._exchanges[k] = None

    def best_move(self) -> Move | None:
        """The move with the smallest change of the loss; None if there is none."""
        best: Move | None = None
        for k, tableau in enumerate(self.tableaux):
            found = self._swaps[k]
            if found is None:
                found = self._swaps[k] = tableau.best_swap()
            row, column, change = found
            if row >= 0 and (best is None or change < best.change):
                best = Move(k, column, k, row, change)
        for group in self._shared:
            move = self._best_exchange(group)
            if move is not None and (best is None or move.change < best.change):
                best = move
        return best

    def _best_exchange(self, group: int) -> Move | None:
        """The cheapest removal of one block with the largest return of another, within one group."""
        costs: list[tuple[float, int, int]] = []
        gains: list[tuple[float, int, int]] = []
        for k in range(len(self.tableaux)):
            cost, column, gain, row = self._exchange_ends(k).get(group, (NEVER, -1, -NEVER, -1))
            if column >= 0:
                costs.append((cost, k, column))
            if row >= 0:
                gains.append((-gain, k, row))
        costs.sort()
        gains.sort()
        pairs = [
            Move(k, column, j, row, cost + minus_gain)
            for cost, k, column in costs[:2]
            for minus_gain, j, row in gains[:2]
            if k != j
        ]
        return min(pairs, key=lambda move: move.change, default=None)

    def _exchange_ends(self, k: int) -> dict[int, tuple[float, int, float, int]]:
        """For each shared group: cheapest removal with its column, largest gain with its row."""
        ends = self._exchanges[k]
        if ends is None:
            tableau = self.tableaux[k]
            costs, gains = tableau.removal_costs(), tableau.return_gains()
            ends = {}
            here = set(np.unique(tableau.group).tolist()) & self._shared
            for group in here:
                cost = np.where(tableau.group[tableau.S] == group, costs, NEVER)
                gain = np.where(tableau.group[tableau.P] == group, gains, -NEVER)
                s = int(np.argmin(cost)) if cost.size and cost.min() < NEVER / 2 else -1
                r = int(np.argmax(gain)) if gain.size and gain.max() > -NEVER / 2 else -1
                ends[group] = (
                    float(cost[s]) if s >= 0 else NEVER,
                    s,
                    float(gain[r]) if r >= 0 else -NEVER,
                    r,
                )
            self._exchanges[k] = ends
        return ends

    def apply(self, move: Move) -> tuple[tuple[int, int], tuple[int, int]]:
        """Make a move; returns (block, weight) of the one that left and of the one that came back."""
        giver, taker = self.tableaux[move.leaving_block], self.tableaux[move.coming_block]
        leaving, coming = int(giver.S[move.column]), int(taker.P[move.row])
        if giver is taker:
            giver.swap(move.row, move.column)
        else:
            taker.bring_back(move.row)
            giver.remove(move.column)
        self.forget(move.leaving_block)
        self.forget(move.coming_block)
        return (move.leaving_block, leaving), (move.coming_block, coming)


def core_limit(block_sizes: IntArray) -> int:
    """The largest c ≤ `CORE_LIMIT` such that tableaux of min(b_k, c) weights of all blocks fit `CORE_BYTES`."""
    sizes = np.sort(np.minimum(block_sizes, CORE_LIMIT))[::-1].astype(np.float64)
    entries = CORE_BYTES / 24  # H, the inverse and U of each block
    if float((sizes**2).sum()) <= entries:
        return CORE_LIMIT
    smaller = np.append(sizes[1:], 0.0)  # the next block, which is whole if c reaches it
    whole = np.append(np.cumsum((sizes**2)[::-1])[::-1][1:], 0.0)
    cut = np.sqrt(np.maximum(entries - whole, 0.0) / np.arange(1, sizes.size + 1))
    return max(1, int(cut[np.argmax(cut >= smaller)]))


def _balancing(diagonal: FloatArray) -> FloatArray | None:
    """Units of the weights, powers of two, that bring all diagonal entries of H near 1; None where they are close.

    Changes of an inverse by rank-one terms cancel badly where the entries of one weight are far above the others.
    Losses do not depend on the units, and powers of two add no rounding.
    """
    positive = diagonal > 0
    if not positive.any() or diagonal.max() <= _SPREAD * diagonal[positive].min():
        return None
    exponents = np.frexp(np.sqrt(np.where(positive, diagonal, 0.5)))[1]
    return np.ldexp(1.0, -exponents)
