"""Moves and searches on the swap tableau of one row, in numba.

With kept set Q, pruned set P and T = S_QQ⁻¹, the state of a row is U = S_PQ T (p, q), A = S_PP − U S_QP (p, p), T
(q, q), the weights after the update x = T b_Q, the residual gradients d = b_P − S_PQ x, the diagonals t and a of T
and A, and the doubled loss. U is current before and after every move; A and T are read a column at a time and keep
the last moves as a list of vectors, which is multiplied out when it is full.

`sizes` is int64 [p, q, vectors in the list]; `late` says that U still lacks f leftᵀ + g rightᵀ.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.compilation import compiled, entry

_FAST = {"nnan", "nsz", "contract", "reassoc"}

inner = compiled(no_cpython_wrapper=True)
inner_fast = compiled(no_cpython_wrapper=True, fastmath=_FAST)

NEVER = 1e299
"""The price of what is not allowed."""


@inner_fast
def best_swap(U, p, q, late, f, left, g, right, y, it, cost, d, a, free, grouped, row_group, column_group):
    """The swap that changes the doubled loss least: (r, s, change), r = s = −1 where there is none.

    The change by r and s is cost[s] − (d[r] + U[r, s] y[s])² / (a[r] + U[r, s]² it[s]), y = x/t, it = 1/t,
    cost = x²/t. What U lacks is subtracted on the way. A row is read twice only where it holds a better swap than
    the rows before; the test for that needs no division.
    """
    best, best_r, best_s = NEVER, -1, -1
    for r in range(p):
        row = U[r, :q]
        if late:
            fr, gr = f[r], g[r]
            for s in range(q):
                row[s] -= fr * left[s] + gr * right[s]
        if not free[r]:
            continue
        residual, pivot, excess = d[r], a[r], -1.0
        if grouped:
            group = row_group[r]
            for s in range(q):
                u = row[s]
                top = residual + u * y[s]
                value = top * top - (cost[s] - best) * (pivot + u * u * it[s])
                excess = max(excess, value if column_group[s] == group else -1.0)
        else:
            for s in range(q):
                u = row[s]
                top = residual + u * y[s]
                excess = max(excess, top * top - (cost[s] - best) * (pivot + u * u * it[s]))
        if excess > 0.0:
            for s in range(q):
                u = row[s]
                top = residual + u * y[s]
                change = cost[s] - top * top / (pivot + u * u * it[s])
                if change < best and (not grouped or column_group[s] == row_group[r]):
                    best, best_r, best_s = change, r, s
    return best_r, best_s, best


@inner_fast
def catch_up(U, p, q, f, left, g, right):
    """Subtract f leftᵀ + g rightᵀ, which U lacks after a move."""
    for r in range(p):
        row, fr, gr = U[r, :q], f[r], g[r]
        for s in range(q):
            row[s] -= fr * left[s] + gr * right[s]


@inner_fast
def _column(M, V, sign, listed, i, size, out):
    """Column i of M + Σ_h sign_h V_h V_hᵀ."""
    for k in range(size):
        out[k] = M[i, k]
    for h in range(listed):
        factor = sign[h] * V[h, i]
        row = V[h]
        for k in range(size):
            out[k] += factor * row[k]


@inner
def _multiply_out(M, V, sign, listed, size):
    left = np.ascontiguousarray(V[:listed, :size])
    right = left.copy()
    for h in range(listed):
        if sign[h] < 0.0:
            for k in range(size):
                right[h, k] = -right[h, k]
    M[:size, :size] += np.dot(left.T, right)


@inner
def _make_room(A, T, VA, VT, signs, sizes):
    if sizes[2] + 2 > VA.shape[0]:
        _multiply_out(A, VA, signs[0], sizes[2], sizes[0])
        _multiply_out(T, VT, signs[1], sizes[2], sizes[1])
        sizes[2] = 0


@inner_fast
def swap(i, j, U, A, T, VA, VT, signs, sizes, x, t, d, a, pruned, kept, f, left, g, right, loss):
    """Prune kept slot j and keep pruned slot i; U must be current, and lacks f leftᵀ + g rightᵀ afterwards."""
    _make_room(A, T, VA, VT, signs, sizes)
    p, q, listed = sizes[0], sizes[1], sizes[2]
    _column(T, VT, signs[1], listed, j, q, left)
    _column(A, VA, signs[0], listed, i, p, g)
    tj = left[j]
    uij = U[i, j]
    a1 = max(g[i] + uij * uij / tj, 1e-300)
    xj = x[j]
    root_t, root_a = 1.0 / np.sqrt(tj), 1.0 / np.sqrt(a1)
    va, vb, vt, vu = VA[listed], VA[listed + 1], VT[listed], VT[listed + 1]
    ratio = uij / tj
    step = (d[i] + ratio * xj) / a1
    for r in range(p):
        u = U[r, j]
        f[r] = u / tj
        c = g[r] + u * ratio
        g[r] = c / a1
        va[r] = u * root_t
        vb[r] = c * root_a
        d[r] += f[r] * xj - c * step
        a[r] += va[r] * va[r] - vb[r] * vb[r]
    row = U[i]
    shift = xj / tj
    for s in range(q):
        tau = left[s]
        u = row[s] - ratio * tau
        right[s] = u
        vt[s] = tau * root_t
        vu[s] = u * root_a
        x[s] -= tau * shift + u * step
        t[s] += vu[s] * vu[s] - vt[s] * vt[s]
    # The two weights change places.
    for h in range(listed + 2):
        VA[h, i] = 0.0
        VT[h, j] = 0.0
    across = ratio / a1
    for r in range(p):
        A[i, r] = f[r] - ratio * g[r]
        A[r, i] = A[i, r]
        U[r, j] = g[r]
    for s in range(q):
        T[j, s] = -right[s] / a1
        T[s, j] = T[j, s]
        U[i, s] = -left[s] / tj - across * right[s]
    A[i, i] = 1.0 / tj - ratio * across
    T[j, j] = 1.0 / a1
    U[i, j] = across
    x[j], t[j] = step, T[j, j]
    d[i], a[i] = shift - ratio * step, max(A[i, i], 1e-300)
    f[i], g[i], left[j], right[j] = 0.0, 0.0, 0.0, 0.0
    signs[0, listed], signs[0, listed + 1] = 1.0, -1.0
    signs[1, listed], signs[1, listed + 1] = -1.0, 1.0
    sizes[2] = listed + 2
    pruned[i], kept[j] = kept[j], pruned[i]
    return loss + xj * xj / tj - step * step * a1


@inner_fast
def remove(j, U, A, T, VA, VT, signs, sizes, x, t, d, a, pruned, kept, f, left, g, right, loss):
    """Prune kept slot j; the last kept slot takes its place."""
    _make_room(A, T, VA, VT, signs, sizes)
    p, q, listed = sizes[0], sizes[1], sizes[2]
    _column(T, VT, signs[1], listed, j, q, left)
    tj, xj = left[j], x[j]
    root, shift = 1.0 / np.sqrt(tj), xj / tj
    va, vt = VA[listed], VT[listed]
    for r in range(p):
        u = U[r, j]
        f[r], g[r] = u / tj, 0.0
        va[r] = u * root
        d[r] += u * shift
        a[r] += va[r] * va[r]
        A[p, r] = f[r]
        A[r, p] = f[r]
    for s in range(q):
        vt[s] = left[s] * root
        right[s] = 0.0
        x[s] -= left[s] * shift
        t[s] -= vt[s] * vt[s]
    catch_up(U, p, q, f, left, g, right)
    for s in range(q):
        U[p, s] = -left[s] / tj
    A[p, p] = 1.0 / tj
    d[p], a[p], pruned[p] = shift, A[p, p], kept[j]
    for h in range(listed + 1):
        VA[h, p] = 0.0
    signs[0, listed], signs[1, listed] = 1.0, -1.0
    last = q - 1
    if j != last:
        for r in range(p + 1):
            U[r, j] = U[r, last]
        for s in range(q):
            T[j, s] = T[last, s]
        for s in range(q):
            T[s, j] = T[s, last]
        T[j, j] = T[last, last]
        for h in range(listed + 1):
            VT[h, j] = VT[h, last]
        x[j], t[j], kept[j] = x[last], t[last], kept[last]
    sizes[0], sizes[1], sizes[2] = p + 1, last, listed + 1
    return loss + xj * shift


@inner_fast
def add(i, U, A, T, VA, VT, signs, sizes, x, t, d, a, pruned, kept, f, left, g, right, loss):
    """Keep pruned slot i; the last pruned slot takes its place."""
    _make_room(A, T, VA, VT, signs, sizes)
    p, q, listed = sizes[0], sizes[1], sizes[2]
    _column(A, VA, signs[0], listed, i, p, g)
    ai = max(g[i], 1e-300)
    step, root = d[i] / ai, 1.0 / np.sqrt(ai)
    va, vt = VA[listed], VT[listed]
    for s in range(q):
        u = U[i, s]
        left[s], right[s] = u, 0.0
        vt[s] = u * root
        x[s] -= u * step
        t[s] += vt[s] * vt[s]
        T[q, s] = -u / ai
        T[s, q] = T[q, s]
    for r in range(p):
        f[r] = g[r] / ai
        va[r] = g[r] * root
        d[r] -= g[r] * step
        a[r] = max(a[r] - va[r] * va[r], 1e-300)
        g[r] = 0.0
    catch_up(U, p, q, f, left, g, right)
    for r in range(p):
        U[r, q] = f[r]
    T[q, q] = 1.0 / ai
    x[q], t[q], kept[q] = step, T[q, q], pruned[i]
    for h in range(listed + 1):
        VT[h, q] = 0.0
    signs[0, listed], signs[1, listed] = -1.0, 1.0
    last = p - 1
    if i != last:
        for s in range(q + 1):
            U[i, s] = U[last, s]
        for r in range(p):
            A[i, r] = A[last, r]
        for r in range(p):
            A[r, i] = A[r, last]
        A[i, i] = A[last, last]
        for h in range(listed + 1):
            VA[h, i] = VA[h, last]
        d[i], a[i], pruned[i] = d[last], a[last], pruned[last]
    sizes[0], sizes[1], sizes[2] = last, q + 1, listed + 1
    return loss - step * step * ai


@entry
def search_row(
    U, A, T, VA, VT, signs, sizes, x, t, d, a, pruned, kept, work, locked, group, grouped,
    loss, price, lowest, values, masks, release, clock, steps, tenure, patience, seed, stop,
):  # fmt: skip
    """Up to `steps` moves of a tabu search on loss − price · (number pruned); returns (loss, clock).

    The move that changes this least is made: a swap, or (without groups) one removal or one return, as long as the
    number pruned stays within the table. A weight that moved stays where it is for `tenure` to 2 `tenure` moves;
    with `tenure` = 0 the search stops at the first local optimum, and at any rate after `patience` moves without
    an entry of the table having improved. Whatever is better than the table's entry for its number of pruned
    weights is written there.

    Parameters
    ----------
    U … kept : the state of the row, see the module
    work : float64 (10, K + 1)
    locked : uint8 (K,)
        Weights that may not move.
    group : int64 (K,)
    grouped : bool
    loss, price : float
        Doubled loss of the state, and price of a pruned weight.
    lowest : int
        Number pruned of the table's first entry.
    values, masks : float64 (c,), uint8 (c, K), in place
        Least doubled loss for each number pruned, and 1 where pruned.
    release : int64 (K,), in place
        The move from which on a weight may move again.
    clock, steps, tenure, patience, seed : int
    stop : uint8 (1,)
        Set by another thread to end the search.
    """
    f, left, g, right, y, it, cost = work[0], work[1], work[2], work[3], work[4], work[5], work[6]
    K = release.size
    free = np.zeros(K + 1, np.bool_)
    row_group, column_group = np.zeros(K + 1, np.int64), np.zeros(K + 1, np.int64)
    random = np.uint64(seed) * np.uint64(2862933555777941757) + np.uint64(3037000493)
    late, idle = False, 0
    highest = lowest + values.size - 1
    for _ in range(steps):
        if stop[0]:
            break
        p, q = sizes[0], sizes[1]
        entry_of = p - lowest
        idle += 1
        if 0 <= entry_of < values.size and loss < values[entry_of] * (1.0 - 1e-10):
            values[entry_of] = loss
            mask = masks[entry_of]
            mask[:] = 0
            for r in range(p):
                mask[pruned[r]] = 1
            idle = 0
        if idle > patience:
            break
        r1, gain1 = -1, -1.0
        for r in range(p):
            k = pruned[r]
            free[r] = locked[k] == 0 and release[k] <= clock
            if grouped:
                row_group[r] = group[k]
            elif free[r]:
                gain = d[r] * d[r] / a[r]
                if gain > gain1:
                    r1, gain1 = r, gain
        s1, cost1 = -1, NEVER
        for s in range(q):
            k = kept[s]
            ts = max(t[s], 1e-300)
            it[s] = 1.0 / ts
            y[s] = x[s] / ts
            cost[s] = x[s] * y[s]
            if locked[k] != 0 or release[k] > clock:
                cost[s] = NEVER
            elif cost[s] < cost1:
                s1, cost1 = s, cost[s]
            if grouped:
                column_group[s] = group[k]
        i, j, change = best_swap(
            U, p, q, late, f, left, g, right, y, it, cost, d, a, free, grouped, row_group, column_group
        )
        late = False
        move = 0
        if change >= 0.5 * NEVER:
            i, change = -1, NEVER
        if not grouped:
            if s1 >= 0 and p < highest and cost1 - price < change:
                move, change = 1, cost1 - price
            if r1 >= 0 and p > lowest and price - gain1 < change:
                move, change = 2, price - gain1
        if change >= 0.5 * NEVER or (move == 0 and i < 0):
            if tenure == 0:
                break
            clock += 1  # everything waits
            continue
        if tenure == 0 and change >= -1e-10 * abs(loss):
            break
        clock += 1
        random ^= random << np.uint64(13)
        random ^= random >> np.uint64(7)
        random ^= random << np.uint64(17)
        wait = tenure + (int(random >> np.uint64(33)) % (tenure + 1)) if tenure > 0 else 0
        if move == 0:
            release[pruned[i]], release[kept[j]] = clock + wait, clock + wait
            loss = swap(i, j, U, A, T, VA, VT, signs, sizes, x, t, d, a, pruned, kept, f, left, g, right, loss)
            late = True
        elif move == 1:
            release[kept[s1]] = clock + wait
            loss = remove(s1, U, A, T, VA, VT, signs, sizes, x, t, d, a, pruned, kept, f, left, g, right, loss)
        else:
            release[pruned[r1]] = clock + wait
            loss = add(r1, U, A, T, VA, VT, signs, sizes, x, t, d, a, pruned, kept, f, left, g, right, loss)
    if late:
        catch_up(U, sizes[0], sizes[1], f, left, g, right)
    entry_of = sizes[0] - lowest
    if 0 <= entry_of < values.size and loss < values[entry_of] * (1.0 - 1e-10):
        values[entry_of] = loss
        mask = masks[entry_of]
        mask[:] = 0
        for r in range(sizes[0]):
            mask[pruned[r]] = 1
    return loss, clock


@inner_fast
def _conditional_column(T, V, done, j, out):
    b = out.size
    for i in range(b):
        out[i] = T[j, i]
    for k in range(done):
        factor = V[k, j]
        row = V[k]
        for i in range(b):
            out[i] -= factor * row[i]


@inner_fast
def _apply_removal(column, j, x, t):
    root = np.sqrt(max(column[j], 1e-300))
    shift = x[j] / root
    for i in range(column.size):
        column[i] /= root
        x[i] -= column[i] * shift
        t[i] -= column[i] * column[i]


@entry
def eliminate(T, V, x, t, removable, group, quota, order, losses):
    """Remove weights one by one, each time the one that costs least; ExactOBS with a quota for each group.

    After s steps the conditional inverse is T − V[:s]ᵀ V[:s]; the caller multiplies V out. O(s b) per step.

    Parameters
    ----------
    T : float64 (b, b)
        Inverse of S on the weights that are left.
    V : float64 (steps, b), out
    x, t : float64 (b,), in place
        Weights after the best update, and the diagonal of the conditional inverse.
    removable : bool (b,), in place
    group, quota : int64 (b,), (G,), in place
        How many weights of each group may still go.
    order, losses : int64 (steps,), float64 (steps,), out
        The weight removed, and the rise of the doubled loss.

    Returns
    -------
    int
        Steps taken; fewer than asked for when nothing may go any more.
    """
    b = x.size
    for s in range(V.shape[0]):
        best, j = NEVER, -1
        for i in range(b):
            if removable[i] and quota[group[i]] > 0:
                value = x[i] * x[i] / max(t[i], 1e-300)
                if value < best:
                    best, j = value, i
        if j < 0:
            return s
        column = V[s]
        _conditional_column(T, V, s, j, column)
        _apply_removal(column, j, x, t)
        removable[j] = False
        quota[group[j]] -= 1
        x[j], t[j] = 0.0, 1.0
        order[s], losses[s] = j, best
    return V.shape[0]
