"""Exchanges that keep two partitions, in numba: four weights of a tile, at two rows and two columns.

In rows r1, r2 and columns c1, c2 with (r1, c1), (r2, c2) kept and (r1, c2), (r2, c1) pruned all four change sides.
Each row makes a swap, and as rows do not interact, the change of the loss is the sum of those of the two swaps.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.layers.kernels import NEVER, catch_up, entry, inner, swap


@inner
def _note_places(pruned, kept, p, q, place):
    """The slot of each weight of a row among the pruned or among the kept ones."""
    for r in range(p):
        place[pruned[r]] = r
    for s in range(q):
        place[kept[s]] = s


@inner
def _best_exchange(prices, rows, width):
    """The best exchange of a tile from the prices of the swaps of its rows: (row, row, column, column, change).

    prices : float64 (a, b, b), the change of a row where it prunes column i and keeps column j.
    """
    best, b1, b2, bi, bj = NEVER, -1, -1, -1, -1
    for first in range(rows):
        for i in range(width):
            for j in range(width):
                price = prices[first, i, j]
                if price >= NEVER:
                    continue
                for second in range(first + 1, rows):
                    change = price + prices[second, j, i]
                    if change < best:
                        best, b1, b2, bi, bj = change, first, second, i, j
    return b1, b2, bi, bj, best


@entry
def search_band(
    U, A, T, VA, VT, signs, sizes, x, t, d, a, pruned, kept, work, mask, place, release, prices,
    tile_rows, cells, losses, scale, best_mask, clock, steps, tenure, seed, stop,
):  # fmt: skip
    """Up to `steps` exchanges in the rows of a band: rows that have tiles in common, directly or through others.

    The exchange that changes the loss least is made. A weight that moved stays where it is for `tenure` to 2
    `tenure` exchanges; with `tenure` = 0 the search stops at the first local optimum.

    Parameters
    ----------
    U … kept
        The states of the rows, see `kernels`, with an axis for the rows in front.
    work : float64 (4, K + 1)
    mask : uint8 (R, K), in place
        1 where pruned.
    place : int64 (R, K)
    release : int64 (R, K), in place
        The exchange from which on a weight may move again; very large for locked weights.
    prices : float64 (a, b, b)
    tile_rows : int64 (N, a)
        Rows of each tile within the band, −1 beyond its last one.
    cells : int64 (N, a, b)
        Columns of its weights, −1 beyond the last one.
    losses, scale : float64 (R,), the former in place
        Doubled losses without the scale of the row.
    best_mask : uint8 (R, K), out
        The best mask.
    clock, steps, tenure, seed : int
    stop : uint8 (1,)
        Set by another thread to end the search.

    Returns
    -------
    best, exchanges, clock : float, int, int
        The doubled loss of the best mask, with the scales; exchanges made; the number of the next one.
    """
    f, left, g, right = work[0], work[1], work[2], work[3]
    R = losses.size
    for r in range(R):
        _note_places(pruned[r], kept[r], sizes[r, 0], sizes[r, 1], place[r])
    total = 0.0
    for r in range(R):
        total += scale[r] * losses[r]
    best = total
    best_mask[:] = mask
    random = np.uint64(seed) * np.uint64(2862933555777941757) + np.uint64(3037000493)
    made = 0
    N, rows, width = cells.shape
    for _ in range(steps):
        if stop[0]:
            break
        change, at, n1, n2, m1, m2 = NEVER, -1, -1, -1, -1, -1
        for tile in range(N):
            for i in range(rows):
                r = tile_rows[tile, i]
                for j in range(width):
                    for k in range(width):
                        prices[i, j, k] = NEVER
                if r < 0:
                    continue
                for j in range(width):
                    out = cells[tile, i, j]
                    if out < 0 or mask[r, out] != 0 or release[r, out] > clock:
                        continue
                    s = place[r, out]
                    ts = max(t[r, s], 1e-300)
                    y = x[r, s] / ts
                    cost = x[r, s] * y
                    for k in range(width):
                        back = cells[tile, i, k]
                        if back < 0 or mask[r, back] == 0 or release[r, back] > clock:
                            continue
                        q = place[r, back]
                        u = U[r, q, s]
                        top = d[r, q] + u * y
                        prices[i, j, k] = scale[r] * (cost - top * top / (a[r, q] + u * u / ts))
            first, second, j, k, value = _best_exchange(prices, rows, width)
            if first >= 0 and value < change:
                change, at, n1, n2, m1, m2 = value, tile, first, second, j, k
        if at < 0:
            if tenure == 0:
                break
            clock += 1  # everything waits
            continue
        if tenure == 0 and change >= -1e-10 * abs(total):
            break
        clock += 1
        made += 1
        random ^= random << np.uint64(13)
        random ^= random >> np.uint64(7)
        random ^= random << np.uint64(17)
        wait = tenure + (int(random >> np.uint64(33)) % (tenure + 1)) if tenure > 0 else 0
        for turn in range(2):
            i = n1 if turn == 0 else n2
            r = tile_rows[at, i]
            out = cells[at, i, m1 if turn == 0 else m2]
            back = cells[at, i, m2 if turn == 0 else m1]
            q, s = place[r, back], place[r, out]
            total -= scale[r] * losses[r]
            losses[r] = swap(
                q, s, U[r], A[r], T[r], VA[r], VT[r], signs[r], sizes[r], x[r], t[r], d[r], a[r],
                pruned[r], kept[r], f, left, g, right, losses[r],
            )  # fmt: skip
            catch_up(U[r], sizes[r, 0], sizes[r, 1], f, left, g, right)
            total += scale[r] * losses[r]
            place[r, out], place[r, back] = q, s
            mask[r, out], mask[r, back] = 1, 0
            release[r, out], release[r, back] = clock + wait, clock + wait
        if total < best * (1.0 - 1e-10):
            best = total
            best_mask[:] = mask
    return best, made, clock


@entry
def best_exchanges(cost, gain, index, change, weights):
    """The best exchange of every tile by separate prices of its weights.

    Parameters
    ----------
    cost, gain : float32 (n,)
        What each kept weight costs, infinite for others; what each pruned one gains, −infinite for others.
    index : int64 (T, a, b)
        The weights of the tiles.
    change : float64 (T,), out
        0 where no exchange gains.
    weights : int64 (T, 4), out
        The two weights that are pruned, then the two that return.
    """
    T, rows, width = index.shape
    for tile in range(T):
        best = 0.0
        weights[tile, :] = -1
        for first in range(rows):
            for j in range(width):
                out = index[tile, first, j]
                if cost[out] == np.inf:
                    continue
                for k in range(width):
                    back = index[tile, first, k]
                    if gain[back] == -np.inf:
                        continue
                    price = np.float64(cost[out]) - gain[back]
                    for second in range(first + 1, rows):
                        other, again = index[tile, second, k], index[tile, second, j]
                        value = price + cost[other] - gain[again]
                        if value < best:
                            best = value
                            weights[tile, 0], weights[tile, 1] = out, other
                            weights[tile, 2], weights[tile, 3] = back, again
        change[tile] = best
