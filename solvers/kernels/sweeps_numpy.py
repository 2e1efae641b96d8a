"""The kernels of `sweeps_numba` in plain NumPy: the reference of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np


def _best_value(x: Any, h: Any, bend: Any) -> Any:
    """Minimiser in [0, 1] of h (z − x) + bend/2 (z − x)²; x itself where nothing gains."""
    if bend > 0.0:
        return min(max(x - h / bend, 0.0), 1.0)
    down = -h * x + 0.5 * bend * x * x
    up = h * (1.0 - x) + 0.5 * bend * (1.0 - x) * (1.0 - x)
    if min(down, up) >= 0.0:
        return x
    return 0.0 if down < up else 1.0


def sweep_factor(
    rows: Any,
    ridge: Any,
    r: Any,
    diagonal: Any,
    linear: Any,
    group: Any,
    price: Any,
    stiffness: Any,
    t: Any,
    x: Any,
    active: Any,
    count: Any,
    margin: Any,
) -> Any:
    """One sweep for Q = rows rowsᵀ + diag(ridge), with r = rowsᵀ x kept up to date: O(m) per variable.

    Returns how many variables stay active, and by how much the objective went down.
    """
    gain = 0.0
    kept = 0
    for k in range(count):
        i = active[k]
        z = x[i]
        d = diagonal[i]
        j = group[i]
        h = rows[i].astype(np.float64) @ r + ridge[i] * z + linear[i] - price[j] + t * d * (0.5 - z)
        root = np.sqrt(d)
        if (z == 0.0 and h > root * margin) or (z == 1.0 and h < -root * margin):
            continue
        active[kept] = i
        kept += 1
        bend = d * (1.0 - t) + stiffness[j]
        new = _best_value(z, h, bend)
        if new != z:
            gain -= (new - z) * (h + 0.5 * bend * (new - z))
            x[i] = new
            price[j] -= stiffness[j] * (new - z)
            r += (new - z) * rows[i].astype(np.float64)
    return kept, gain


def sweep_dense(
    q: Any,
    g: Any,
    diagonal: Any,
    linear: Any,
    group: Any,
    price: Any,
    stiffness: Any,
    t: Any,
    x: Any,
    active: Any,
    count: Any,
    margin: Any,
) -> Any:
    """One sweep for a dense Q, with g = Qx kept up to date: O(b) per variable that moves, O(1) otherwise.

    Returns how many variables stay active, and by how much the objective went down.
    """
    gain = 0.0
    kept = 0
    for k in range(count):
        i = active[k]
        z = x[i]
        d = diagonal[i]
        j = group[i]
        h = g[i] + linear[i] - price[j] + t * d * (0.5 - z)
        root = np.sqrt(d)
        if (z == 0.0 and h > root * margin) or (z == 1.0 and h < -root * margin):
            continue
        active[kept] = i
        kept += 1
        bend = d * (1.0 - t) + stiffness[j]
        new = _best_value(z, h, bend)
        if new != z:
            gain -= (new - z) * (h + 0.5 * bend * (new - z))
            x[i] = new
            price[j] -= stiffness[j] * (new - z)
            g += (new - z) * q[i]
    return kept, gain


def sweep_diagonal(
    diagonal: Any,
    linear: Any,
    group: Any,
    price: Any,
    stiffness: Any,
    t: Any,
    x: Any,
    active: Any,
    count: Any,
    margin: Any,
) -> Any:
    """One sweep for a diagonal Q: O(1) per variable.

    Returns how many variables stay active, and by how much the objective went down.
    """
    gain = 0.0
    kept = 0
    for k in range(count):
        i = active[k]
        z = x[i]
        d = diagonal[i]
        j = group[i]
        h = d * z + linear[i] - price[j] + t * d * (0.5 - z)
        root = np.sqrt(d)
        if (z == 0.0 and h > root * margin) or (z == 1.0 and h < -root * margin):
            continue
        active[kept] = i
        kept += 1
        bend = d * (1.0 - t) + stiffness[j]
        new = _best_value(z, h, bend)
        if new != z:
            gain -= (new - z) * (h + 0.5 * bend * (new - z))
            x[i] = new
            price[j] -= stiffness[j] * (new - z)
    return kept, gain


def scaled_transpose(gradients: Any, index: Any, factor: Any, rows: Any) -> None:
    """rows[i] = factor[i] * gradients[:, index[i]]."""
    rows[:] = gradients[:, index].T * factor[:, None]


def project(gradients: Any, start: Any, v: Any, out: Any) -> None:
    """Out = gradients[:, start : start + len(v)] @ v, in float64."""
    out[:] = gradients[:, start : start + len(v)].astype(np.float64) @ v


def back_project(gradients: Any, start: Any, r: Any, out: Any) -> None:
    """Out = rᵀ gradients[:, start : start + len(out)], in float64."""
    out[:] = r @ gradients[:, start : start + len(out)].astype(np.float64)
