"""The diagonal of the perspective relaxation: the nearer to the best one, the better the bound."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.diagonal_passes import joint_pass
from cbs_opt.solvers.kernels.perspective_relaxation import relax
from cbs_opt.typing import FloatArray, IntArray


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
            self._S, self._A, *self._vectors, *self._prices,
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


def safe_diagonal(A: FloatArray) -> FloatArray:
    """diag(1 / A_ii) over the largest eigenvalue of A scaled to a unit diagonal: never more than A⁻¹."""
    s = 1 / np.sqrt(np.diag(A))
    largest = np.linalg.eigvalsh(A * s[:, None] * s)[-1]
    return np.asarray(1 / np.diag(A) / (largest * (1 + 1e-9)))


def best_diagonal(
    M: FloatArray,
    A: FloatArray,
    v: FloatArray,
    starts: IntArray,
    keep: IntArray,
    scale: float,
    passes: int = 12,
    rel: float = 3e-3,
) -> FloatArray:
    """Float64 (m,) d > 0 with diag(d) ≼ M, close to the one with the best perspective bound.

    Alternates the relaxation, whose u and z give the gradient ω of the bound in d, with barrier steps.

    Parameters
    ----------
    M, A : float64 (m, m)
        The Hessian of the subproblem and its inverse.
    v : float64 (m,)
        Its free minimiser.
    starts, keep : int64 (G+1,), int64 (G,)
        Ranges of the groups, and how many weights of each stay.
    scale : float
        Size of the objective.
    passes, rel
        Passes, and the smallest barrier weight in units of scale / m.
    """
    m = v.size
    c = -M @ v
    constant = 0.5 * float(v @ (M @ v))
    single = 1 / np.diag(A)
    low = 1e-4 * single / m
    d = safe_diagonal(A)
    relaxation = PerspectiveRelaxation(starts)
    u, theta = v.copy(), np.zeros(keep.size)
    of_group = np.repeat(np.arange(keep.size), np.diff(starts))
    best, best_d, omega = -np.inf, d, None
    mu, col = 0.3 * scale / m, np.empty(m)
    W: FloatArray = np.empty((0, 0))
    for step in range(passes + 1):
        if step:
            joint_pass(W, d, omega, mu, low, col)
            mu = max(rel * scale / m, 0.6 * mu)
        bound = relaxation(M, c, d, keep, u, theta, constant)
        if bound > best and (step == 0 or is_definite(M - np.diag(d) * (1 + 1e-9))):
            best, best_d = bound, d.copy()
        if step == passes:
            break
        if step % 4 == 0:
            try:
                W = np.asarray(np.linalg.inv(M - np.diag(d)), np.float64)
            except np.linalg.LinAlgError:
                break
        at = theta[of_group]
        with np.errstate(divide="ignore"):
            z = np.where(at > 0, np.minimum(1.0, np.sqrt(d) * np.abs(u) / np.where(at > 0, at, 1.0)), 1.0)
        new = np.where(u != 0, u * u * (1 / np.maximum(z, 1e-9) - 1), 0.0) + 0.02 * scale / m / single
        omega = new if omega is None else 0.4 * omega + 0.6 * new
    return best_d * (1 - 1e-9)
