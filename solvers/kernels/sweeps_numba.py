"""Coordinate descent over whole blocks, in numba; twins in `sweeps_numpy`.

Each variable in turn is set to the minimiser of the objective with everything else fixed, as in LIBLINEAR's dual
coordinate descent (Hsieh et al. 2008). The budget enters by one price for each group: what a pruned weight earns.
`price` moves with the sum of the block during a sweep, by `stiffness` for each unit: the quadratic term of
a sharing ADMM. `t` is the weight of the concave term t/2 Σ Q_ii x_i (1 − x_i). `active` lists the variables to
visit; those at a bound whose slope exceeds √Q_ii · `margin` on the right side are dropped from it in place
(shrinking): a slope changes by at most √Q_ii times the length of the change of the residual.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cbs_opt.solvers.kernels.compilation import entry, inner, inner_fast


@inner
def _best_value(x: Any, h: Any, bend: Any) -> Any:
    """Minimiser in [0, 1] of h (z − x) + bend/2 (z − x)²; x itself where nothing gains."""
    if bend > 0.0:
        return min(max(x - h / bend, 0.0), 1.0)
    down = -h * x + 0.5 * bend * x * x
    up = h * (1.0 - x) + 0.5 * bend * (1.0 - x) * (1.0 - x)
    if min(down, up) >= 0.0:
        return x
    return 0.0 if down < up else 1.0


@inner_fast
def _dot(row: Any, r: Any) -> Any:
    v = 0.0
    for s in range(len(r)):
        v += row[s] * r[s]
    return v


@inner_fast
def _axpy(a: Any, row: Any, r: Any) -> None:
    for s in range(len(r)):
        r[s] += a * row[s]


@entry
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
        h = _dot(rows[i], r) + ridge[i] * z + linear[i] - price[j] + t * d * (0.5 - z)
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
            _axpy(new - z, rows[i], r)
    return kept, gain


@entry
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
            _axpy(new - z, q[i], g)
    return kept, gain


@entry
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


@entry
def scaled_transpose(gradients: Any, index: Any, factor: Any, rows: Any) -> None:
    """rows[i] = factor[i] * gradients[:, index[i]], in tiles that fit the cache."""
    m = gradients.shape[0]
    n = len(index)
    for first in range(0, n, 64):
        last = min(first + 64, n)
        for s in range(m):
            row = gradients[s]
            for i in range(first, last):
                rows[i, s] = row[index[i]] * factor[i]


@entry
def project(gradients: Any, start: Any, v: Any, out: Any) -> None:
    """Out = gradients[:, start : start + len(v)] @ v, in float64."""
    for s in range(gradients.shape[0]):
        out[s] = _dot(gradients[s, start : start + len(v)], v)


@entry
def back_project(gradients: Any, start: Any, r: Any, out: Any) -> None:
    """Out = rᵀ gradients[:, start : start + len(out)], in float64."""
    out[:] = 0.0
    for s in range(gradients.shape[0]):
        _axpy(r[s], gradients[s, start : start + len(out)], out)
