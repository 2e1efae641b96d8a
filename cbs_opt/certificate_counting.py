"""The least loss among all completions of a leaf of a certificate: plain NumPy, no code of a solver.

Used by `certificate_bounds` only. A leaf of the joint problem may leave few selections; a certificate then says so
instead of branching further, and the check looks at all of them.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from cbs_opt.errors import SolutionError
from cbs_opt.typing import FloatArray, IntArray

MOST_OF_LEAF = 10**7
"""Largest number of selections that one leaf may leave to be counted."""

MOST_OF_CERTIFICATE = 4 * 10**9
"""Largest number of selections of all leaves together: minutes of checking."""

_CHUNK = 1 << 20  # entries of a stack of matrices
_EPS = float(np.finfo(np.float64).eps)


def selections(free: int, kept: int) -> int:
    """How many ways there are to keep `kept` of `free` weights; zero where there is none."""
    return math.comb(free, kept) if 0 <= kept <= free else 0


def least_rise(M: FloatArray, v: FloatArray, kept: int) -> float:
    """A lower bound, up to rounding the minimum, of ½ (u − v)ᵀM(u − v) over all u with `kept` entries.

    Parameters
    ----------
    M : float64 (m, m), positive definite
    v : float64 (m,)
    kept : int, 0 … m

    Raises
    ------
    SolutionError
        When there are more than `MOST_OF_LEAF` supports, or M is singular to working precision.

    Notes
    -----
    The smaller side is enumerated: supports T lower the loss from ½ vᵀMv by ½ b_Tᵀ M_TT⁻¹ b_T, b = Mv; complements
    raise it from 0 by ½ v_Tᵀ ([M⁻¹]_TT)⁻¹ v_T. What rounding may add, by the least eigenvalue, is subtracted.
    """
    m = v.size
    if selections(m, kept) > MOST_OF_LEAF:
        raise SolutionError(
            f"a leaf leaves {selections(m, kept)} selections to be counted, at most {MOST_OF_LEAF}"
        )
    s = 1.0 / np.sqrt(np.diag(M))
    unit = M * s[:, None] * s
    values = np.linalg.eigvalsh(unit)
    if not values[0] > 8.0 * m * _EPS * values[-1]:
        raise SolutionError("the Hessian of a counted leaf is singular to working precision")
    doubt = 4.0 * m * _EPS * float(values[-1] / values[0])
    w = v / s
    b = unit @ w
    whole = 0.5 * float(w @ b)
    if kept <= m - kept:
        gain = _extreme(unit, b, kept, True)
        return whole - gain - doubt * (whole + gain)
    inverse = np.asarray(np.linalg.inv(unit), np.float64)
    rise = _extreme(0.5 * (inverse + inverse.T), w, m - kept, False)
    return rise - doubt * (rise + _EPS * whole)


def _extreme(S: FloatArray, b: FloatArray, r: int, largest: bool) -> float:
    """The largest or least ½ b_Tᵀ S_TT⁻¹ b_T over the sets T of r columns."""
    m, pick = b.size, np.max if largest else np.min
    if r == 0:
        return 0.0
    if r == 1:
        return float(pick(0.5 * b * b / np.diag(S)))
    i, j = np.triu_indices(m, 1)
    if r == 2:
        return float(pick(_pairs(S[None], b[None], i, j)))
    best = -np.inf if largest else np.inf
    prefixes = itertools.combinations(range(m - 2), r - 2)
    while True:
        chunk = list(itertools.islice(prefixes, max(1, _CHUNK // m**2)))
        if not chunk:
            return best
        P = np.array(chunk, np.int64)
        inner, cross = S[P[:, :, None], P[:, None, :]], S[P]
        solved = np.linalg.solve(inner, np.concatenate([cross, b[P][:, :, None]], axis=2))
        rest = S - np.einsum("npi,npj->nij", cross, solved[:, :, :m])
        slope = b - np.einsum("npi,np->ni", cross, solved[:, :, m])
        own = 0.5 * np.einsum("np,np->n", b[P], solved[:, :, m])
        last = P[:, -1]
        for at in np.unique(last):
            rows, later = last == at, i > at
            values = own[rows, None] + _pairs(rest[rows], slope[rows], i[later], j[later])
            best = float(pick([best, pick(values)]))


def _pairs(S: FloatArray, b: FloatArray, i: IntArray, j: IntArray) -> FloatArray:
    """½ b_Tᵀ S_TT⁻¹ b_T for the pairs T = {i, j} of every matrix of a stack."""
    first, cross = S[:, i, i], S[:, i, j]
    rest = S[:, j, j] - cross**2 / first
    return np.asarray(0.5 * (b[:, i] ** 2 / first + (b[:, j] - cross * b[:, i] / first) ** 2 / rest))
