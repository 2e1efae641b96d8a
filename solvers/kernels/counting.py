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


CANCELLATION = 1e-8
"""The same, over the share of all that the loss is: kept sets give it as a difference."""


@inner_fast
def eliminate(M, b, floor, first, m, pivot, N, e):
    """N, e: upper triangle of M, and b, from `first` on without column `pivot`; whether all pivots are safe."""
    row = M[pivot]
    scale = 1.0 / row[pivot]
    gain = b[pivot] * scale
    safe = True
    for i in range(first, m):
        f = row[i] * scale
        Mi = M[i]
        Ni = N[i]
        for j in range(i, m):
            Ni[j] = Mi[j] - f * row[j]
        e[i] = b[i] - gain * row[i]
        safe = safe and Ni[i] > floor[i]
    return safe


@inner_fast
def best_second(row, other, f, h, b, i, first, last, limit, sign):
    """Largest excess over a limit of what the second member of the pairs {i, j} adds to b_Tᵀ H_TT⁻¹ b_T.

    Row i of H is row − f·other. With q = b_i / H_ii the excess is (b_j − q H_ij)² − limit (H_jj − H_ij² / H_ii),
    times a positive number.
    """
    q = b[i] / h[i]
    linear = -2.0 * q * sign
    square = (q * q + limit / h[i]) * sign
    best = -np.inf
    for j in range(first, last):
        x = row[j] - f * other[j]
        best = max(best, x * (x * square + linear * b[j]) + sign * (b[j] * b[j] - limit * h[j]))
    return best


@inner_fast
def seconds_are_safe(row, other, f, h, floor, i, first, last):
    """Whether the second pivots of the pairs {i, j} are above their floor."""
    least = np.inf
    for j in range(first, last):
        x = row[j] - f * other[j]
        least = min(least, h[i] * h[j] - x * x - floor[j] * h[i])
    return least >= 0.0


@inner_fast
def search_pairs(M, pivot, b, h, base, need, prices, start, m, record, sign, floor, checked, pair):
    """The best pair of columns from `start` on beyond the record, after column `pivot` (−1: none) is eliminated.

    b, h: what is left of the linear term and the diagonal. Returns pairs looked at, whether the record was broken,
    and whether all pivots were safe.
    """
    seen = 0
    found = False
    other = M[max(pivot, 0)]
    scale = 0.0 if pivot < 0 else 1.0 / other[pivot]
    for k in range(start, m - 1):
        rest = need - prices[k]
        if prices[k + 1] <= rest:
            break
        last = last_allowed(prices, k + 1, m, rest)
        own = base + 0.5 * b[k] * b[k] / h[k]
        f = other[k] * scale
        row = M[k]
        if checked and not seconds_are_safe(row, other, f, h, floor, k, k + 1, last):
            return seen, found, False
        seen += last - k - 1
        if best_second(row, other, f, h, b, k, k + 1, last, 2.0 * (record[0] - own), sign) > 0.0:
            for j in range(k + 1, last):
                x = row[j] - f * other[j]
                cross = b[j] * h[k] - x * b[k]
                value = own + 0.5 * cross * cross / (h[k] * (h[k] * h[j] - x * x))
                if sign * (value - record[0]) > 0.0:
                    record[0] = value
                    found = True
                    pair[0] = k
                    pair[1] = j
    return seen, found, True


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
def best_set(
    H, b, prices, need, r, m, record, sign, cap, floor, checked, room, vectors, h, sums, chosen, best, at
):  # fmt: skip
    """The set T of r of m columns with the largest (sign = 1) or least (−1) ½ b_Tᵀ H_TT⁻¹ b_T beyond `record`.

    Parameters
    ----------
    H, b : float64 (m, m), (m,)
        Only the upper triangle is read.
    prices : float64 (m,), falling
        Sets whose prices sum to `need` or less cannot beat the record.
    r : int
    record : float64 (1,)
        Value to beat; updated with `best`.
    cap : int
        Sets to look at before giving up.
    floor, checked : float64 (m,), bool
        Smallest safe pivots, and whether those of the last members are compared with them.
    room, vectors : float64 (max(r − 3, 0), m, m), (max(r − 3, 0), m)
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
    e = np.empty(m)
    gains = np.zeros(r + 1)
    spent = np.zeros(r + 1)
    depth = 0
    at[0] = -1
    while depth >= 0:
        M = H if depth == 0 else room[depth - 1]
        c = b if depth == 0 else vectors[depth - 1]
        left = r - depth
        i = at[depth] + 1
        if left <= 3:
            base = gains[depth]
            rest = need - spent[depth]
            if left == 1:
                last = last_allowed(prices, i, m, rest)
                for j in range(i, last):
                    value = base + 0.5 * c[j] * c[j] / M[j, j]
                    if sign * (value - record[0]) > 0.0:
                        record[0] = value
                        found = True
                        best[depth] = j
                        for t in range(depth):
                            best[t] = chosen[t]
                seen += last - i
            elif left == 2:
                for j in range(i, m):
                    h[j] = M[j, j]
                count, broken, safe = search_pairs(
                    M, -1, c, h, base, rest, prices, i, m, record, sign, floor, checked, best[depth:]
                )
                seen += count
                found = found or broken
                outcome = DONE if safe else UNSAFE
                for t in range(depth if broken else 0):
                    best[t] = chosen[t]
            else:
                for p in range(i, m - 2):
                    if sums[p + 3] - sums[p] <= rest:
                        break
                    own = base + 0.5 * c[p] * c[p] / M[p, p]
                    if sign < 0.0 and own >= record[0]:
                        continue
                    scale = 1.0 / M[p, p]
                    safe = True
                    for j in range(p + 1, m):
                        e[j] = c[j] - c[p] * scale * M[p, j]
                        h[j] = M[j, j] - M[p, j] * M[p, j] * scale
                        safe = safe and h[j] > floor[j]
                    if safe:
                        count, broken, safe = search_pairs(
                            M, p, e, h, own, rest - prices[p], prices, p + 1, m, record, sign, floor, checked,
                            best[depth + 1 :],
                        )  # fmt: skip
                        seen += count + m - p
                        found = found or broken
                        if broken:
                            best[depth] = p
                            for t in range(depth):
                                best[t] = chosen[t]
                    if not safe:
                        outcome = UNSAFE
                        break
                    if seen > cap:
                        break
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
def count_node(M, c, diagonal, d, u, y, kept, m, R, const, thr, cap, least, work, vectors, order, chosen, sel):
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
    least : float
        No pivot of kept weights is smaller, relative to `diagonal`; 0 where that is not known.
    work : float64 (w,)
        For one matrix of all columns and max(r − 2, 1) of the free ones.
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
    matrices = max(r - 2, 1)
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
    safe = max(SAFE_PIVOT, CANCELLATION * const / thr) if thr > 0.0 else SAFE_PIVOT
    checked = not keeps or least <= safe
    N = work[: m * m].reshape(m, m)
    for a in range(m):
        row = M[order[a]]
        for b in range(m):
            N[a, b] = row[order[b]]
        h[a] = -c[order[a]]
        sums[a] = safe * diagonal[order[a]]
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
            S[i, j] = N[k + min(i, j), k + max(i, j)]
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
            S, b, price, need, r, f, record, sign, cap, floor, checked, levels, V, np.empty(f), np.empty(f + 1),
            chosen[0], chosen[1], chosen[2],
        )  # fmt: skip
    if found:
        for i in range(m):
            sel[i] = 1 if kept[i] or not keeps else 0
        for t in range(r):
            sel[order[k + chosen[1, t]]] = 1 if keeps else 0
    return outcome == DONE, found
