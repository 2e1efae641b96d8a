"""The diagonal of the perspective relaxation: the nearer to the best one, the better the bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg.lapack import dposv, dpotrf, dtrtri

from cbs_opt.interrupt import Interrupted, checkpoint
from cbs_opt.solvers.kernels.perspective_relaxation import relax
from cbs_opt.solvers.kernels.stop_flag import NEVER
from cbs_opt.typing import FloatArray, Int8Array, IntArray

_SHRINK = 0.25  # of the weight of the barriers, from one centre to the next
_CENTRING_STEPS = 12


class PerspectiveRelaxation:
    """Workspaces for calls of `perspective_relaxation.relax` at a root, where nothing is kept yet."""

    def __init__(self, starts: IntArray) -> None:
        m, G = int(starts[-1]), starts.size - 1
        self.starts = starts
        self._S, self._A = np.zeros(m + 2, np.int64), np.zeros((m + 2, m + 2))
        self._vectors = tuple(np.zeros(m + 2) for _ in range(4))
        self._prices = (np.zeros(G), np.zeros(G))

    def __call__(
        self,
        M: FloatArray,
        c: FloatArray,
        d: FloatArray,
        keep: IntArray,
        u: FloatArray,
        theta: FloatArray,
        constant: float,
    ) -> float:
        """Improve u and θ in place; the bound."""
        y = M @ u + c
        kept = np.zeros(u.size, np.int8)
        diagonal = np.diag(M).copy()
        best, _ = relax(
            u, y, M, c, diagonal, d, np.sqrt(d), kept, self.starts, keep.size, keep, theta, constant, np.inf,
            self._S, self._A, *self._vectors, *self._prices, NEVER,
        )  # fmt: skip
        return float(best)


def is_definite(M: FloatArray) -> bool:
    """Whether the Cholesky factorisation of M, scaled to a unit diagonal, succeeds."""
    if not (np.diag(M) > 0).all():
        return False
    s = 1 / np.sqrt(np.diag(M))
    try:
        np.linalg.cholesky(M * s[:, None] * s)
    except np.linalg.LinAlgError:
        return False
    return True


def least_pivot(H: FloatArray) -> float:
    """A lower bound on the pivots of all elimination orders, relative to the diagonal: the least eigenvalue."""
    s = 1 / np.sqrt(np.diag(H))
    return 0.9 * float(np.linalg.eigvalsh(H * s[:, None] * s)[0])


def safe_diagonal(A: FloatArray) -> FloatArray:
    """diag(1 / A_ii) over the largest eigenvalue of A scaled to a unit diagonal: never more than A⁻¹."""
    s = 1 / np.sqrt(np.diag(A))
    largest = np.linalg.eigvalsh(A * s[:, None] * s)[-1]
    return np.asarray(1 / np.diag(A) / (largest * (1 + 1e-9)))


@dataclass
class _Barrier:
    """The bound in (g, d, t, μ) with logarithmic barriers, of M scaled to a unit diagonal.

    With s = (M − D)u and g = b − s, b = Mv, the perspective bound is the maximum of
    ½ vᵀMv − ½ sᵀ(M − D)⁻¹s − Σ max(0, g_i²/2d_i − μ) − μ·keep, concave in (g, d, μ) together; t ≥ 0 replaces the
    maxima, with q_i = 2d_i(t_i + μ) − g_i² ≥ 0.
    """

    M: FloatArray
    b: FloatArray
    of_group: IntArray
    keep: FloatArray

    def __post_init__(self) -> None:
        self.members = np.zeros((self.b.size, self.keep.size))
        self.members[np.arange(self.b.size), self.of_group] = 1.0

    def value(self, x: tuple[FloatArray, ...], tau: float) -> tuple[float, FloatArray | None]:
        """What is minimised, and the inverse of the Cholesky factor of M − D; infinite outside the domain."""
        g, d, t, mu = x
        q = 2 * d * (t + mu[self.of_group]) - g * g
        if min(t.min(), mu.min(), d.min(), q.min()) <= 0:
            return np.inf, None
        L, failed = dpotrf(self.M - np.diag(d), lower=1, clean=1)
        if failed:
            return np.inf, None
        inverse, failed = dtrtri(L, lower=1)
        if failed:
            return np.inf, None
        e = inverse @ (self.b - g)
        logs = 2 * np.log(np.diag(L)).sum() + np.log(q).sum() + np.log(t).sum() + np.log(mu).sum()
        return float(0.5 * e @ e + t.sum() + mu @ self.keep - tau * logs), inverse

    def step(
        self, x: tuple[FloatArray, ...], inverse: FloatArray, tau: float
    ) -> tuple[tuple[FloatArray, ...], float] | None:
        """The Newton step and its decrement, squared; O(m³)."""
        g, d, t, mu = x
        m, G, E = g.size, mu.size, self.members
        W = inverse.T @ inverse
        u = W @ (self.b - g)
        sigma = t + mu[self.of_group]
        q = 2 * d * sigma - g * g
        first, second = tau / q, tau / q**2
        qg, qd, qt = -2 * g, 2 * sigma, 2 * d
        to_t = -first * qt
        grad_g, grad_d = -u - first * qg, 0.5 * u * u + tau * np.diag(W) - first * qd
        grad_t, grad_mu = 1 + to_t - tau / t, self.keep + E.T @ to_t - tau / mu
        gt, dt, tt = second * qg * qt, second * qd * qt - 2 * first, second * qt * qt
        pivot = tt + tau / t**2  # t is eliminated
        K = np.empty((2 * m + G, 2 * m + G))
        K[:m, :m], K[:m, m : 2 * m] = W, -W * u
        K[m : 2 * m, :m], K[m : 2 * m, m : 2 * m] = K[:m, m : 2 * m].T, W * (np.outer(u, u) + tau * W)
        at = np.arange(m)
        K[at, at] += second * qg * qg + 2 * first - gt * gt / pivot
        K[m + at, m + at] += second * qd * qd - dt * dt / pivot
        both = second * qg * qd - gt * dt / pivot
        K[at, m + at] += both
        K[m + at, at] += both
        left = 1 - tt / pivot
        K[:m, 2 * m :], K[m : 2 * m, 2 * m :] = (gt * left)[:, None] * E, (dt * left)[:, None] * E
        K[2 * m :, : 2 * m] = K[: 2 * m, 2 * m :].T
        K[2 * m :, 2 * m :] = np.diag(E.T @ (tt * left) + tau / mu**2)
        grad = np.concatenate([grad_g - gt * grad_t / pivot, grad_d - dt * grad_t / pivot])
        grad = np.concatenate([grad, grad_mu - E.T @ (tt * grad_t / pivot)])
        scale = 1 / np.sqrt(np.diag(K))
        K *= scale[:, None] * scale
        K[np.diag_indices_from(K)] += 1e-14
        _, move, failed = dposv(K, -scale * grad, lower=1, overwrite_a=1)
        if failed:
            return None
        move *= scale
        dg, dd, dmu = move[:m], move[m : 2 * m], move[2 * m :]
        dmove = -(grad_t + gt * dg + dt * dd + tt * dmu[self.of_group]) / pivot
        decrement = -float(grad_g @ dg + grad_d @ dd + grad_t @ dmove + grad_mu @ dmu)
        return (dg, dd, dmove, dmu), decrement


def best_diagonal(
    M: FloatArray,
    v: FloatArray,
    starts: IntArray,
    keep: IntArray,
    scale: float,
    rel: float = 2e-3,
    stop: Int8Array = NEVER,
) -> tuple[FloatArray, FloatArray]:
    """The diagonal of the best perspective bound, and the relaxed point there.

    An interior-point method: Newton steps on the bound with barriers, in u (through g = Mv − (M − D)u), d and the
    prices together. This is the semidefinite relaxation of Dong, Chen and Linderoth (2015), solved in the dual.

    Parameters
    ----------
    M : float64 (m, m)
        The Hessian of the subproblem.
    v : float64 (m,)
        Its free minimiser.
    starts, keep : int64 (G+1,), int64 (G,)
        Ranges of the groups, and how many weights of each stay.
    scale : float
        Size of the objective.
    rel : float
        What the barriers may cost at the end, in units of `scale`.
    stop : int8 (1,)
        See `kernels.stop_flag`.

    Returns
    -------
    d, u : float64 (m,), (m,)
        d > 0 with diag(d) ≼ M.

    Raises
    ------
    numpy.linalg.LinAlgError
        When M is not definite to working precision.
    Interrupted
        When the run is told to stop, or `stop` is set.

    Notes
    -----
    20 to 60 steps of O((2m + G)³); 150 for M with hundreds of eigenvalues at the ridge.
    """
    m = v.size
    scale = max(scale, 1e-10 * 0.5 * float(v @ M @ v)) or 1.0  # of a loss that the data hardly resolve: 0 included
    s = 1 / np.sqrt(np.diag(M))
    unit = M * s[:, None] * s
    w = v / s / np.sqrt(scale)
    of_group = np.repeat(np.arange(keep.size), np.diff(starts))
    # No price ends where a group keeps nothing: its columns are zero at any large price.
    barrier = _Barrier(unit, unit @ w, of_group, np.maximum(keep, 0.01).astype(np.float64))
    d = np.full(m, 0.9 * max(float(np.linalg.eigvalsh(unit)[0]), 1e-14))
    g, mu = d * w, 1.0 / barrier.keep
    half = 0.5 * g * g / d
    t = np.maximum(1.5 * half - mu[of_group], 0.2 * half) + 1e-3 / m
    x: tuple[FloatArray, ...] = (g, d, t, mu)
    parameter = 4 * m + keep.size
    tau = max(1.0, abs(0.5 * float(w @ barrier.b) - barrier.value(x, 0.0)[0])) / parameter
    tau = tau if np.isfinite(tau) else 1.0
    while True:
        x, fine = _centre(barrier, x, tau, stop)
        if not fine or tau <= rel / parameter:
            break
        tau = max(_SHRINK * tau, rel / parameter)
    inverse = barrier.value(x, tau)[1]
    u = w if inverse is None else inverse.T @ (inverse @ (barrier.b - x[0]))
    d = x[1] * (1 - 1e-9) / s**2
    if not is_definite(M - np.diag(d) * (1 + 1e-9)):
        raise np.linalg.LinAlgError("M is not definite to working precision")
    return d, u * s * np.sqrt(scale)


def _centre(
    barrier: _Barrier, x: tuple[FloatArray, ...], tau: float, stop: Int8Array
) -> tuple[tuple[FloatArray, ...], bool]:
    """Newton steps at one weight of the barriers; the point, and whether the method can go on."""
    value, inverse = barrier.value(x, tau)
    for _ in range(_CENTRING_STEPS):
        checkpoint()
        if stop[0]:
            raise Interrupted
        found = None if inverse is None else barrier.step(x, inverse, tau)
        if found is None:
            return x, False
        move, decrement = found
        length = 1.0
        while True:
            trial = tuple(a + length * b for a, b in zip(x, move, strict=True))
            new, factor = barrier.value(trial, tau)
            if new <= value - 0.1 * length * decrement:
                break
            length *= 0.5
            if length < 1e-8:
                return x, decrement <= tau
        x, value, inverse = trial, new, factor
        if decrement <= 0.5 * tau:
            break
    return x, True
