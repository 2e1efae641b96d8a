"""All swaps of a pruned and a kept weight, after the windows of Algorithm 1; for `cbs`."""

from __future__ import annotations

import numpy as np

from cbs_opt.monitor import Monitor
from cbs_opt.solvers.paper.ls import LocalSearch
from cbs_opt.typing import BoolArray, FloatArray, IntArray

GAIN = 1e-9
"""Smallest improvement that counts, relative to the objective."""

_ROWS = 64  # whose columns of Q are made in one product
_LONGER = 1 + 1e-9  # for rounding in the bounds of products


def improve_by_all_pairs(search: LocalSearch, start: BoolArray, monitor: Monitor) -> int:
    """Make swaps until none of all pairs within a group gains, reporting to the monitor; returns their number.

    Parameters
    ----------
    search : LocalSearch
        Whose columns of Q and groups are used.
    start : bool (n,)
    monitor : Monitor
        When it says stop, a swap that gains may be left.

    Notes
    -----
    The swap of i and j gains s_i − A_ii − s_j − A_jj + 2A_ij (see `LocalSearch`), where |A_ij| ≤ √(A_ii A_jj):
    only pairs that this bound does not exclude need A_ij. O(m n) for each column of a gradient factor.
    """
    problem, x, swaps = search.problem, start.copy(), 0
    doubled = 2.0 * problem.value(x)
    while not monitor.should_stop():
        s = 2.0 * problem.gradient(x.astype(np.float64))
        least = GAIN * max(abs(doubled), 1e-300)
        made = sum(_improve_group(search, x, s, members, least, monitor) for members in search.groups)
        if not made:
            break
        swaps += made
        doubled = 2.0 * problem.value(x)
        monitor.report(doubled / 2.0, x)
    return swaps


def _improve_group(
    search: LocalSearch, x: BoolArray, s: FloatArray, members: IntArray, least: float, monitor: Monitor
) -> int:
    """One pass over the pairs of a group, applied to x and s; returns the swaps made."""
    A_ii, columns, made = search.problem.diagonal, search.columns, 0
    root = _LONGER * np.sqrt(np.maximum(A_ii, 0.0))
    inside, outside = members[x[members]], members[~x[members]]
    if not inside.size or not outside.size:
        return 0
    cost = (s[outside] + A_ii[outside]).min()
    hope = s[inside] - A_ii[inside] - cost + 2.0 * root[inside] * root[outside].max()
    rows = inside[hope > least]
    rows = rows[np.argsort(A_ii[rows] - s[rows], kind="stable")]
    for first in range(0, rows.size, _ROWS):
        if monitor.should_stop():
            break
        chunk = rows[first : first + _ROWS]
        columns.fetch(chunk)
        for i in chunk:
            J = members[~x[members]]
            plain = (s[i] - A_ii[i]) - (s[J] + A_ii[J])
            J = J[plain + 2.0 * root[i] * root[J] > least]
            if not x[i] or not J.size:
                continue
            gains = (s[i] - A_ii[i]) - (s[J] + A_ii[J]) + 2.0 * columns.entries(i, J)
            best = int(np.argmax(gains))
            if gains[best] > least:
                j = J[best]
                x[i], x[j] = False, True
                columns.add(s, i, -2.0)
                columns.add(s, j, 2.0)
                made += 1
    return made
