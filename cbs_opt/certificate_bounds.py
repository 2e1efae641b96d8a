"""The lower bounds of a certificate, recomputed from the instance: plain NumPy, no code of a solver.

A *part* is a connected component (a piece) as the checker sees it. A *frame* is a part at a node, with a diagonal.
It turns points into a constant and a price per weight: no selection costs less than the constant plus the prices
of the weights that it prunes. A *state*, int8 (m,), is 1 for pruned, 0 for kept and −1 for open weights.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cbs_opt.certificate_counting import least_rise
from cbs_opt.errors import SolutionError
from cbs_opt.typing import BoolArray, FloatArray, IntArray

States = NDArray[np.int8]

Products = tuple[IntArray, IntArray, FloatArray]
"""Pairs of weights, int64 (e,) and (e,), and their multipliers, float64 (e,) > 0."""

_EPS = float(np.finfo(np.float64).eps)


class Frame(Protocol):
    """Bounds by points."""

    def prices(self, points: FloatArray, states: States) -> tuple[FloatArray, FloatArray]:
        """Constants (B,), less what rounding may have added, and prices (B, m), of points (B, m)."""


class Part(Protocol):
    """A piece of the problem; `open` are the weights that it decides, all others have a state already."""

    index: IntArray
    state: States
    group: IntArray
    left: IntArray
    needs_diagonal: bool
    """Whether its frames do; its trees settle groups without a choice at every node then."""

    def frame(
        self, state: States, diagonal: FloatArray | None, left: IntArray, products: Products | None = None
    ) -> Frame:
        """The frame of a node; `left` weights are to be pruned in each group."""

    def value(self, state: States) -> float:
        """A lower bound on the loss of all selections that prune at least these weights."""

    def leaps(self, state: States) -> FloatArray:
        """The same with one more weight, float64 (m,), for each open one."""

    def floor(self) -> tuple[float, FloatArray]:
        """A cheap lower bound: a constant, and a price (m,) for every pruned weight."""

    def counted(self, state: States, kept: int) -> float:
        """A lower bound on the loss of all selections that keep this many of the open weights, by enumeration."""

    def undecided(self, state: States, frame_state: States) -> BoolArray:
        """The weights that a point at a node has an entry for, bool (m,)."""


class SelectionPart:
    """½ yᵀQy + cᵀy over binary y with a number of ones per group.

    Parameters
    ----------
    index : int64 (m,)
        Its weights in the instance.
    Q, c : float64 (m, m), (m,)
    group, left : int64 (m,), (G,)
    """

    needs_diagonal = False

    def __init__(self, index: IntArray, Q: FloatArray, c: FloatArray, group: IntArray, left: IntArray) -> None:
        # An uncoupled weight costs c + ½ Q_ii or nothing, as y² = y.
        diagonal = Q.diagonal()
        alone = np.count_nonzero(Q, axis=0) == (diagonal != 0)
        Q = np.where(np.eye(index.size, dtype=bool) & alone, 0.0, Q)
        self.index, self.Q, self.c, self.group, self.left = index, Q, c + 0.5 * diagonal * alone, group, left
        self.state = np.full(index.size, -1, np.int8)

    def frame(
        self, state: States, diagonal: FloatArray | None, left: IntArray, products: Products | None = None
    ) -> Frame:
        """Q − diag(d) − N where d, and the multipliers of products, are given."""
        return SelectionFrame(self, state, diagonal, left, products)

    def value(self, state: States) -> float:
        """The loss of a complete selection; −∞ for others, because their entries of Q may be negative."""
        if (state < 0).any():
            return -np.inf
        y = (state == 1).astype(np.float64)
        Qy = self.Q @ y
        return float(0.5 * y @ Qy + self.c @ y) - _doubt(y.size) * float(
            y @ np.abs(self.Q) @ y + np.abs(self.c) @ y
        )

    def leaps(self, state: States) -> FloatArray:
        """Nothing."""
        return np.full(self.index.size, -np.inf)

    def counted(self, state: States, kept: int) -> float:
        """Not offered: trees of the selection problem have no counted leaves."""
        raise SolutionError("only leaves of the joint problem can be counted")

    def floor(self) -> tuple[float, FloatArray]:
        """c, by Q ⪰ 0."""
        return -0.5 * float(SelectionFrame(self, self.state, None, self.left).lift.sum()), self.c

    def undecided(self, state: States, frame_state: States) -> BoolArray:
        """The open ones: at the others the point is what was decided."""
        return np.asarray(state < 0)


class SelectionFrame:
    """With R = Q − D − N, ½ yᵀQy = ½ yᵀRy + ½ dᵀy + ½ yᵀNy for binary y. ½ (y − x)ᵀR(y − x) ≥ 0 gives, at any x,

    ½ yᵀQy + cᵀy ≥ −½ xᵀRx + (Rx + c + d/2)ᵀy + ½ yᵀNy.

    N ≥ 0 are multipliers of products, and y ≥ s with s the weights pruned so far: ½ yᵀNy ≥ (Ns)ᵀy − ½ sᵀNs.

    It needs R ⪰ 0, with a diagonal only where all group sums of the open weights are zero: x is brought to the
    right sums then. If Cholesky shows a deficit of R, it is subtracted from the bound.
    """

    def __init__(
        self,
        part: SelectionPart,
        state: States,
        diagonal: FloatArray | None,
        left: IntArray,
        products: Products | None = None,
    ) -> None:
        self.part, self.exact_sums = part, diagonal is not None
        self.R, self.linear = part.Q, part.c
        at = np.flatnonzero(state < 0)
        group = None
        if diagonal is not None:
            d = np.zeros(part.index.size)
            d[at] = diagonal
            self.R, self.linear = part.Q - np.diag(d), part.c + 0.5 * d
            group = part.group[at]
        self.N: FloatArray | None = None
        if products is not None:
            first, second, price = products
            self.N = np.zeros(part.Q.shape)
            self.N[first, second] = self.N[second, first] = price
            self.R = self.R - self.N
            # What the subtraction may lose, in units of `_doubt`.
            self._lost = self.N + np.abs(self.R) * (self.N > 0)
        self.open = state < 0
        self.left = left - np.bincount(part.group[state == 1], minlength=left.size)
        self.lift = np.zeros(part.index.size)
        self.lift[at] = _missing_curvature(self.R[np.ix_(at, at)], np.diag(part.Q)[at], group)

    def prices(self, points: FloatArray, states: States) -> tuple[FloatArray, FloatArray]:
        """O(B m²)."""
        X, slip = self._with_sums(points) if self.exact_sums else (points, 0.0)
        RX = X @ self.R
        size = np.abs(X) @ np.abs(self.R)
        far = np.where(states < 0, np.maximum(np.abs(X), np.abs(1.0 - X)), np.abs(X - states))
        weight = 0.5 * np.abs(X) + (states != 0)
        lost = (weight * size).sum(1) + np.abs(self.linear) @ (states != 0).T
        base = -0.5 * (X * RX).sum(1) - 0.5 * (far**2 @ self.lift)
        price = RX + self.linear
        if self.N is not None:
            pruned, possible = (states == 1).astype(np.float64), (states != 0).astype(np.float64)
            by_pruned = pruned @ self.N
            base = base - 0.5 * (by_pruned * pruned).sum(1)
            price = price + by_pruned
            lost = lost + 1.5 * ((possible @ self._lost) * possible).sum(1)
        return base - _doubt(X.shape[1]) * (lost + slip), price

    def _with_sums(self, points: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The points, clipped to [0, 1], with what their sums lack put on one fractional entry of each group.

        Also returns, float64 (B,), what the rounding of the sums may add to the bound, in units of `_doubt`: R
        need not be semidefinite off the exact sums. Unclipped, a sum of huge entries could be wrong by anything.
        """
        X = np.clip(points, 0.0, 1.0)
        rows = np.arange(len(X))
        changed = []
        for a in range(self.left.size):
            at = np.flatnonzero(self.open & (self.part.group == a))
            if at.size:
                part = X[:, at]
                middle = at[np.argmax(part * (1.0 - part), axis=1)]
                changed.append((middle, np.abs(part).sum(1) + self.left[a]))
                X[rows, middle] += self.left[a] - part.sum(1)
        slip = np.zeros(len(X))
        for middle, size in changed:
            slip += 2.0 * size * (np.abs(self.R[middle]) * (1.0 + np.abs(X))).sum(1)
        return X, slip


class JointPart:
    """gᵀδ + ½ δᵀHδ, δ = u − w, over u that are zero on the pruned weights.

    Parameters
    ----------
    index : int64 (m,)
    H, w, g : float64 (m, m), (m,), (m,)
    state : int8 (m,)
    group, left : int64 (m,), (G,)
    """

    needs_diagonal = True

    def __init__(
        self,
        index: IntArray,
        H: FloatArray,
        w: FloatArray,
        g: FloatArray,
        state: States,
        group: IntArray,
        left: IntArray,
    ) -> None:
        self.index, self.H, self.w, self.g = index, H, w, g
        self.state, self.group, self.left = state, group, left
        self._sizes = np.abs(H)

    def minimum(
        self, state: States, last: BoolArray
    ) -> tuple[IntArray, FloatArray, FloatArray, FloatArray, float]:
        """The best weights with the pruned ones at zero.

        Returns the others, those of `last` at the end, the lower Cholesky factor of their H scaled by s to a unit
        diagonal, s, their weights and the loss.
        """
        rest = np.flatnonzero(state != 1)
        rest = np.concatenate([rest[~last[rest]], rest[last[rest]]])
        H = self.H[np.ix_(rest, rest)]
        s = 1.0 / np.sqrt(np.diag(H))
        try:
            L = np.asarray(np.linalg.cholesky(H * s[:, None] * s), np.float64)
        except np.linalg.LinAlgError:
            raise SolutionError(
                "the Hessian is singular to working precision: the joint problem cannot be checked"
            ) from None
        delta = -self.w * (state == 1)
        u = np.zeros(rest.size)
        for _ in range(2):  # the second time is a refinement
            delta[rest] = u - self.w[rest]
            slope = (self.H @ delta + self.g)[rest] * s
            u = u - s * _solve(L.T, _solve(L, slope, True), False)
        delta[rest] = u - self.w[rest]
        Hd = self.H @ delta
        loss = float(0.5 * delta @ Hd + self.g @ delta)
        size = np.abs(delta)
        lost = float(0.5 * size @ self._sizes @ size + np.abs(self.g) @ size)
        return rest, L, s, u, loss - _doubt(self.w.size) * lost

    def frame(
        self, state: States, diagonal: FloatArray | None, left: IntArray, products: Products | None = None
    ) -> Frame:
        """The open weights after the kept ones have been eliminated."""
        if products is not None:
            raise SolutionError("only the selection problem has multipliers of products")
        return JointFrame(self, state, diagonal)

    def value(self, state: States) -> float:
        """Pruning more weights never costs less."""
        return self.minimum(state, np.zeros(state.size, bool))[4]

    def leaps(self, state: States) -> FloatArray:
        """The minimum, plus v_i² / 2 [H⁻¹]_ii among the weights that are left."""
        rest, L, s, u, loss = self.minimum(state, np.zeros(state.size, bool))
        inverse = (_solve(L, np.diag(s), True) ** 2).sum(0)
        out = np.full(state.size, -np.inf)
        out[rest] = loss + 0.5 * u**2 / inverse * (1.0 - 1e-12)
        return out

    def reduced(self, state: States) -> tuple[IntArray, FloatArray, FloatArray, float]:
        """The open weights with the kept ones eliminated: their places, Hessian, minimiser, and the loss there."""
        is_open = state < 0
        rest, L, s, u, loss = self.minimum(state, is_open)
        first = rest.size - int(is_open.sum())
        corner, s = L[first:, first:], s[first:]
        return rest[first:], (corner @ corner.T) / s[:, None] / s, u[first:], loss

    def counted(self, state: States, kept: int) -> float:
        """The loss without a choice, plus the least rise among the open weights."""
        _, M, v, loss = self.reduced(state)
        return loss + least_rise(M, v, kept)

    def floor(self) -> tuple[float, FloatArray]:
        """What is pruned already."""
        return self.value(self.state), np.zeros(self.state.size)

    def undecided(self, state: States, frame_state: States) -> BoolArray:
        """All that are not pruned, but for what the frame has eliminated."""
        return np.asarray((frame_state < 0) & (state != 1))


class JointFrame:
    """With M the Hessian of the open weights, R = M − D ⪰ 0, v their minimiser and p = u − v at any u,

    ½ δᵀMδ ≥ (Rp)ᵀδ − ½ pᵀRp + ½ δᵀDδ:

    a kept weight gives −s²/2d, s = Rp, and to prune it (δ = −v) costs ½ d (v − s/d)² more.
    """

    def __init__(self, part: JointPart, state: States, diagonal: FloatArray | None) -> None:
        if diagonal is None or not (diagonal > 0).all():
            raise SolutionError("a bound of the joint problem needs a positive diagonal")
        self.at, M, self.v, self.extra = part.reduced(state)
        self.d = diagonal  # of the open weights in their order
        self.R = M
        for back in (1e-13, 1e-11, 1e-9, 1e-6, 1e-4, 1e-2, 1.0):
            d = diagonal * (1.0 - back)
            if back == 1.0 or _is_definite(M - np.diag(d), np.diag(M)):
                self.d, self.R = d, M - np.diag(d)
                break

    def prices(self, points: FloatArray, states: States) -> tuple[FloatArray, FloatArray]:
        """O(B m²)."""
        price = np.zeros(points.shape)
        if not self.d.any():  # D ⪯ M could not be shown: only that no more pruned weights cost less
            return np.full(len(points), self.extra), price
        P = points[:, self.at] - self.v
        S = P @ self.R
        half = 0.5 * S**2 / self.d
        lost = 1.5 * (np.abs(P) * (np.abs(P) @ np.abs(self.R))).sum(1) + half.sum(1)
        base = self.extra - 0.5 * (P * S).sum(1) - half.sum(1) - _doubt(self.v.size) * lost
        price[:, self.at] = 0.5 * self.d * (self.v - S / self.d) ** 2
        return base, price


def _doubt(m: int) -> float:
    """Bound on the rounding error of sums of m products, relative to the sum of their absolute values.

    The worst case of two nested sums, not the typical one: a forger chooses points whose errors all add up.
    """
    return _EPS * (m + 4.0)


def _solve(L: FloatArray, b: FloatArray, lower: bool) -> FloatArray:
    from scipy.linalg import solve_triangular

    return np.asarray(solve_triangular(L, b, lower=lower, check_finite=False))


def _is_definite(R: FloatArray, diagonal: FloatArray) -> bool:
    """Whether R is positive definite beyond rounding, in units of `diagonal`."""
    if not (np.diag(R) > 0).all():
        return False
    s = 1.0 / np.sqrt(diagonal)
    unit = R * s[:, None] * s
    unit[np.diag_indices_from(unit)] -= _EPS * len(R)
    try:
        np.linalg.cholesky(unit)
    except np.linalg.LinAlgError:
        return False
    return True


def _missing_curvature(R: FloatArray, diagonal: FloatArray, group: IntArray | None) -> FloatArray:
    """A diagonal, float64 (m,) ≥ 0, that makes R semidefinite: on the zero sums of `group` where it is given."""
    largest = float(diagonal.max(initial=0.0))
    if largest == 0.0:
        if R.any():
            raise SolutionError("a diagonal is no part of a semidefinite matrix")
        return np.zeros(diagonal.size)
    unit = np.maximum(diagonal, _EPS * largest)
    s = 1.0 / np.sqrt(unit)
    B = None if group is None else _zero_sums(unit, group)
    if B is not None and B.shape[1] == 0:
        return np.zeros(diagonal.size)
    plain = R * s[:, None] * s if B is None else B.T @ R @ B
    gain = None if B is None else B.T @ (unit[:, None] * B)
    scale = np.ones(len(plain)) if gain is None else 1.0 / np.sqrt(np.diag(gain))
    plain = plain * scale[:, None] * scale
    gain = np.eye(len(plain)) if gain is None else gain * scale[:, None] * scale
    for lift in (0.0, *(10.0**k for k in range(-15, 9))):
        if _is_definite(plain + lift * gain, np.ones(len(plain))):
            return np.asarray(lift * unit)
    raise SolutionError("a matrix that must be positive semidefinite is not")


def _zero_sums(unit: FloatArray, group: IntArray) -> FloatArray:
    """A basis, float64 (m, r), of the vectors whose sum over every group is zero."""
    columns = []
    for a in np.unique(group):
        at = np.flatnonzero(group == a)
        reference = at[np.argmin(unit[at])]
        for i in at[at != reference]:
            column = np.zeros(group.size)
            column[i], column[reference] = 1.0, -1.0
            columns.append(column)
    return np.array(columns).T if columns else np.zeros((group.size, 0))
