"""Enumeration of the few selections that a node of a joint tree leaves.

Both sides are the same problem: with S the Hessian of the open weights after the kept ones have been eliminated
and b = S v, v their minimiser, keeping T lowers the loss by ½ b_Tᵀ S_TT⁻¹ b_T; with A = S⁻¹, pruning T raises it
by ½ v_Tᵀ A_TT⁻¹ v_T. Sets grow in the order of the columns, one rank-one update a member; the last two members are
pairs in closed form. A set survives only if the prices of its members allow it: no loss is below a constant plus
the prices of the pruned weights.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import entry, entry_fast, inner_fast

DONE, TOO_MANY, UNSAFE = range(3)
"""What `best_set` returns: all sets seen, the cap reached, a pivot too small for a claim."""

SETS_BEFORE_PRICES = 20
"""How many times as many sets as a node may look at there may be before prices exclude some."""

SAFE_PIVOT = 1e-7
"""Smallest pivot, relative to the diagonal before any elimination, at which values are trusted to 1e-9."""


@inner_fast
def eliminate(M, b, diagonal, first, m, pivot, N, e):
    """N, e: M and b on first ≤ j < m without column `pivot` < first; whether all pivots are safe."""
    row = M[pivot]
    scale = 1.0 / row[pivot]
    gain = b[pivot] * scale
    safe = True
    for i in range(first, m):
        f = row[i] * scale
        Mi = M[i]
        Ni = N[i]
        for j in range(first, m):
            Ni[j] = Mi[j] - f * row[j]
        e[i] = b[i] - gain * row[i]
        safe = safe and Ni[i] > diagonal[i]
    return safe


@inner_fast
def best_pair(row, h, b, floor, i, first, last, limit, sign):
    """Largest excess of ½ b_Tᵀ H_TT⁻¹ b_T over a limit, in the pairs T = {i, j}, times a positive number.

    Also the least pivot less its floor, times H_ii.
    """
    hi = h[i]
    bi = b[i]
    best = -np.inf
    safe = np.inf
    for j in range(first, last):
        cross = b[j] * hi - row[j] * bi
        det = hi * h[j] - row[j] * row[j]
        best = max(best, sign * (cross * cross - limit * hi * det))
        safe = min(safe, det - floor[j] * hi)
    return best, safe


@inner_fast
def last_allowed(prices, first, m, need):
    """Number of columns, from the front, whose price is above `need`; prices fall."""
    low = first
    high = m
    while low < high:
        middle = (low + high) // 2
        if prices[middle] > need:
            low = middle + 1
        else:
            high = middle
    return low


@entry_fast
def best_set(H, b, prices, need, r, m, record, sign, cap, floor, room, vectors, h, sums, chosen, best, at):
    """The set T of r of m columns with the largest (sign = 1) or least (−1) ½ b_Tᵀ H_TT⁻¹ b_T beyond `record`.

    Parameters
    ----------
    H, b : float64 (m, m), (m,)
    prices : float64 (m,), falling
        Sets whose prices sum to `need` or less cannot beat the record.
    r : int
    record : float64 (1,)
        Value to beat; updated with `best`.
    cap : int
        Sets to look at before giving up.
    floor : float64 (m,)
        Smallest safe pivots.
    room, vectors : float64 (max(r − 2, 0), m, m), (max(r − 2, 0), m)
    h, sums : float64 (m,), (m + 1,)
    chosen, best : int64 (r,)
    at : int64 (r,)

    Returns
    -------
    int, int, bool
        Outcome, sets looked at, and whether the record was broken.
    """
    sums[0] = 0.0
    for i in range(m):
        sums[i + 1] = sums[i] + prices[i]
    seen = 0
    found = False
    outcome = DONE
    gains = np.zeros(r + 1)
    spent = np.zeros(r + 1)
    depth = 0
    at[0] = -1
    while depth >= 0:
        M = H if depth == 0 else room[depth - 1]
        c = b if depth == 0 else vectors[depth - 1]
        left = r - depth
        i = at[depth] + 1
        if left <= 2:
            for j in range(i, m):
                h[j] = M[j, j]
            base = gains[depth]
            if left == 1:
                last = last_allowed(prices, i, m, need - spent[depth])
                for j in range(i, last):
                    value = base + 0.5 * c[j] * c[j] / h[j]
                    if sign * (value - record[0]) > 0.0:
                        record[0] = value
                        found = True
                        for k in range(depth):
                            best[k] = chosen[k]
                        best[depth] = j
                seen += last - i
            else:
                for k in range(i, m - 1):
                    rest = need - spent[depth] - prices[k]
                    if prices[k + 1] <= rest:
                        break
                    last = last_allowed(prices, k + 1, m, rest)
                    own = base + 0.5 * c[k] * c[k] / h[k]
                    excess, safe = best_pair(M[k], h, c, floor, k, k + 1, last, 2.0 * (record[0] - own), sign)
                    if safe < 0.0:
                        outcome = UNSAFE
                    seen += last - k - 1
                    if excess > 0.0:
                        for j in range(k + 1, last):
                            cross = c[j] * h[k] - M[k, j] * c[k]
                            det = h[k] * h[j] - M[k, j] * M[k, j]
                            value = own + 0.5 * cross * cross / (h[k] * det)
                            if sign * (value - record[0]) > 0.0:
                                record[0] = value
                                found = True
                                for t in range(depth):
                                    best[t] = chosen[t]
                                best[depth] = k
                                best[depth + 1] = j
            if outcome == DONE and seen > cap:
                outcome = TOO_MANY
            if outcome != DONE:
                break
            depth -= 1
            continue
        top = sums[min(i + left, m)] - sums[min(i, m)]
        if i + left > m or spent[depth] + top <= need:
            depth -= 1
            continue
        at[depth] = i
        own = gains[depth] + 0.5 * c[i] * c[i] / M[i, i]
        if sign < 0.0 and own >= record[0]:
            continue
        chosen[depth] = i
        gains[depth + 1] = own
        spent[depth + 1] = spent[depth] + prices[i]
        seen += (m - i) * (m - i) // 2
        if not eliminate(M, c, floor, i + 1, m, i, room[depth], vectors[depth]):
            outcome = UNSAFE
            break
        at[depth + 1] = i
        depth += 1
    return outcome, seen, found


@inner_fast
def invert(S, floor, m):
    """Invert a positive definite matrix in place by Gauss–Jordan steps; False where a pivot is too small."""
    for k in range(m):
        p = S[k, k]
        if not p > floor[k]:
            return False
        q = 1.0 / p
        Sk = S[k]
        for i in range(m):
            if i != k:
                Si = S[i]
                f = Si[k] * q
                for j in range(m):
                    Si[j] -= f * Sk[j]
                Si[k] = -f
        for j in range(m):
            Sk[j] *= q
        Sk[k] = q
    return True


@inner_fast
def subsets(m, r):
    """The number of subsets of r of m columns, as a float."""
    r = min(r, m - r)
    count = 1.0
    for i in range(r):
        count *= (m - i) / (i + 1.0)
    return count


@entry
def count_node(M, c, diagonal, d, u, y, kept, m, R, const, thr, cap, work, vectors, order, chosen, sel):
    """Try all selections of a node with R of its free columns kept, where they are few.

    Parameters
    ----------
    M, c, diagonal, d, u, y, kept : of a level of `joint_tree`
        diagonal: float64 (m,), that of M.
    R : int
    const, thr : float
        The loss is ½ uᵀMu + cᵀu + const; only selections below `thr` count.
    cap : int
        About as many sets, at most `SETS_BEFORE_PRICES` times as many before prices, are looked at.
    work : float64 (w,)
        For max(r − 1, 1) + 1 matrices of the free columns, and one of all.
    vectors : float64 (4, n + 2)
    order, chosen : int64 (n + 2,), (3, n + 2)
    sel : int8 (n,)
        The best selection, 1 = kept, where one is found.

    Returns
    -------
    bool, bool
        Whether the node is settled, and whether a selection below `thr` was found.
    """
    f = np.int64(0)
    for i in range(m):
        f += 1 - kept[i]
    keeps = f - R >= R
    r = R if keeps else f - R
    sets = subsets(f, r)
    matrices = max(r - 1, 1)
    if cap <= 0 or sets > SETS_BEFORE_PRICES * cap or m * m + matrices * f * (f + 1) > work.size:
        return False, False
    price, h, sums, rest = vectors[0], vectors[1], vectors[2], vectors[3]
    # Prices at u: no selection that keeps T costs less than `low` minus their sum over T.
    low = const
    total = 0.0
    for i in range(m):
        slope = y[i] - d[i] * u[i]
        low -= 0.5 * u[i] * (slope - c[i])
        rise = 0.5 * slope * slope / d[i]
        if kept[i]:
            low -= rise
        else:
            total += rise
        rest[i] = rise if keeps else -rise
    need = low - thr if keeps else low - thr - total
    # Kept columns first, then the free ones with falling prices.
    k = np.int64(0)
    for i in range(m):
        if kept[i]:
            order[k] = i
            k += 1
    t = k
    for i in range(m):
        if kept[i] == 0:
            a = t
            while a > k and rest[order[a - 1]] < rest[i]:
                order[a] = order[a - 1]
                a -= 1
            order[a] = i
            t += 1
    N = work[: m * m].reshape(m, m)
    for a in range(m):
        row = M[order[a]]
        for b in range(m):
            N[a, b] = row[order[b]]
        h[a] = -c[order[a]]
        sums[a] = SAFE_PIVOT * diagonal[order[a]]
    loss = const
    for a in range(k):
        if N[a, a] < sums[a]:
            return False, False
        loss -= 0.5 * h[a] * h[a] / N[a, a]
        if not eliminate(N, h, sums, a + 1, m, a, N, h):
            return False, False
    start = m * m
    S = work[start : start + f * f].reshape(f, f)
    start += f * f
    V = work[start : start + f * max(matrices - 1, 0)].reshape(max(matrices - 1, 0), f)
    start += V.size
    levels = work[start : start + f * f * max(matrices - 1, 0)].reshape(max(matrices - 1, 0), f, f)
    b = vectors[1]
    floor = vectors[2]
    for i in range(f):
        price[i] = rest[order[k + i]]
    for i in range(f):
        b[i] = h[k + i]
        floor[i] = sums[k + i]
        for j in range(f):
            S[i, j] = N[k + i, k + j]
    record = np.empty(1)
    sign = 1.0
    if keeps:
        record[0] = loss - thr
    else:
        if not invert(S, floor, f):
            return False, False
        for i in range(f):
            rest[i] = 0.0
            for j in range(f):
                rest[i] += S[i, j] * b[j]
        for i in range(f):
            loss -= 0.5 * b[i] * rest[i]
        for i in range(f):
            b[i] = rest[i]
            floor[i] = SAFE_PIVOT * S[i, i]
        record[0] = thr - loss
        sign = -1.0
    if r == 0:
        outcome, found = DONE, sign * record[0] < 0.0
    else:
        outcome, _, found = best_set(
            S, b, price, need, r, f, record, sign, cap, floor, levels, V, np.empty(f), np.empty(f + 1),
            chosen[0], chosen[1], chosen[2],
        )  # fmt: skip
    if found:
        for i in range(m):
            sel[i] = 1 if kept[i] or not keeps else 0
        for t in range(r):
            sel[order[k + chosen[1, t]]] = 1 if keeps else 0
    return outcome == DONE, found
