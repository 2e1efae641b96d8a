"""Points whose groups have given sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from cbs_opt.solvers.kernels.compilation import entry


@entry
def shift_to_counts(x: Any, group: Any, count: Any, out: Any) -> None:
    """Shift x, float64 (n,), by one number per group within [0, 1] so that group sums are `count`; into `out`.

    By bisection; a group whose sum is right keeps its x.
    """
    groups, n = len(count), len(x)
    total = np.zeros(groups)
    for k in range(n):
        total[group[k]] += x[k]
    low, high, middle = np.full(groups, -1.0), np.full(groups, 1.0), np.empty(groups)
    off = np.abs(total - count) > 1e-9
    for _ in range(60):
        for g in range(groups):
            middle[g] = 0.5 * (low[g] + high[g])
            total[g] = 0.0
        for k in range(n):
            total[group[k]] += min(max(x[k] + middle[group[k]], 0.0), 1.0)
        for g in range(groups):
            if total[g] < count[g]:
                low[g] = middle[g]
            else:
                high[g] = middle[g]
    for k in range(n):
        g = group[k]
        out[k] = min(max(x[k] + high[g], 0.0), 1.0) if off[g] else x[k]
