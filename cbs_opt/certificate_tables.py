"""Tables for checking a certificate: small pieces by enumeration, and the best sum of all tables."""

from __future__ import annotations

import numpy as np

from cbs_opt.certificate_bounds import JointPart, Part, SelectionPart
from cbs_opt.errors import SolutionError
from cbs_opt.typing import FloatArray, IntArray

_EPS = float(np.finfo(np.float64).eps)


def small_table(part: Part, most: int) -> FloatArray | None:
    """Least loss for every number of pruned open weights, float64 (k+1,), by enumeration.

    None if the weights are coupled and more than `most`.
    """
    at = np.flatnonzero(part.state < 0)
    if isinstance(part, SelectionPart):
        off = part.Q.copy()
        np.fill_diagonal(off, 0.0)
        if not off.any():
            price = np.sort(0.5 * np.diag(part.Q) + part.c)
            sums = np.concatenate([[0.0], np.cumsum(price)])
            return np.asarray(sums - 2 * _EPS * price.size * np.concatenate([[0.0], np.cumsum(np.abs(price))]))
    if at.size > most:
        return None
    if isinstance(part, SelectionPart):
        value, number, lost = _selections(part.Q, part.c)
    elif isinstance(part, JointPart):
        rest, L, s, u, loss = part.minimum(part.state, part.state < 0)
        keep = slice(rest.size - at.size, None)
        corner = np.linalg.inv(L[keep, keep] / s[keep, None]) if at.size else np.zeros((0, 0))
        value, number, lost = _joint(corner.T @ corner, u[keep])
        value = value + loss
    else:
        raise SolutionError("a piece of unknown kind")
    out = np.full(at.size + 1, np.inf)
    np.minimum.at(out, number, value - lost)
    return out


def _selections(Q: FloatArray, c: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
    """½ yᵀQy + cᵀy of all binary y, their numbers of ones, and bounds on the rounding errors."""
    value, size, number = np.zeros(1), np.zeros(1), np.zeros(1, np.int64)
    linear, sizes = c[None].copy(), np.abs(c)[None].copy()
    for i in range(c.size):
        more = linear[:, 0] + 0.5 * Q[i, i]
        value = np.concatenate([value, value + more])
        size = np.concatenate([size, size + sizes[:, 0] + 0.5 * Q[i, i]])
        number = np.concatenate([number, number + 1])
        linear = np.concatenate([linear[:, 1:], linear[:, 1:] + Q[i, i + 1 :]])
        sizes = np.concatenate([sizes[:, 1:], sizes[:, 1:] + np.abs(Q[i, i + 1 :])])
    return value, number, 2 * _EPS * max(c.size, 1) * size


def _joint(A: FloatArray, v: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
    """½ v_Pᵀ(A_PP)⁻¹v_P of all P, their sizes, and bounds on the rounding errors; adds one weight at a time."""
    scale = 1.0 / np.sqrt(np.diag(A))
    A, v = A * scale[:, None] * scale, v * scale
    value, number = np.zeros(1), np.zeros(1, np.int64)
    inverse, mean = A[None].copy(), v[None].copy()
    for _ in range(v.size):
        pivot = inverse[:, 0, 0]
        column = inverse[:, 1:, 0]
        value = np.concatenate([value, value + 0.5 * mean[:, 0] ** 2 / pivot])
        number = np.concatenate([number, number + 1])
        after = inverse[:, 1:, 1:] - column[:, :, None] * column[:, None, :] / pivot[:, None, None]
        moved = mean[:, 1:] - column * (mean[:, 0] / pivot)[:, None]
        inverse, mean = np.concatenate([inverse[:, 1:, 1:], after]), np.concatenate([mean[:, 1:], moved])
    # An error ε of A, relative to its unit diagonal, moves the value by ε times itself and the condition of A.
    smallest = float(np.linalg.eigvalsh(A)[0]) if v.size else 1.0
    if not smallest > 0:
        raise SolutionError("the Hessian is singular to working precision: the joint problem cannot be checked")
    return value, number, 4 * _EPS * max(v.size, 1) / smallest * value


def join(tables: list[FloatArray], budget: int) -> float:
    """Least sum of one entry per table whose positions sum to `budget`: min-plus convolutions."""
    best = np.zeros(1)
    # Every entry is lowered by its share of what K sums may round.
    tables = [F - np.where(np.isfinite(F), 2 * _EPS * len(tables) * np.abs(F), 0.0) for F in tables]
    tables = sorted(tables, key=lambda table: table.size)
    room = sum(table.size - 1 for table in tables)
    for table in tables:
        room -= table.size - 1
        new = np.full(min(best.size + table.size - 1, budget + 1), np.inf)
        for j, value in enumerate(table[: new.size]):
            part = best[: new.size - j]
            with np.errstate(invalid="ignore"):  # −∞ + ∞: infeasible combinations need no bound
                np.fmin(new[j : j + part.size], part + value, out=new[j : j + part.size])
        new[: max(budget - room, 0)] = np.inf  # what the tables to come cannot fill up
        best = new
    return float(best[budget]) if best.size > budget else np.inf
