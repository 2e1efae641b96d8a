"""Search over the pruned set of one row with fixed weights, in numba; the twin of `kernels` for selection."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.layers.kernels import NEVER, entry, inner_fast


@entry
def quadratic(S, w, Q):
    """Q = diag(w) S diag(w), (K, K), out."""
    for i in range(w.size):
        row, out, factor = S[i], Q[i], w[i]
        for j in range(w.size):
            out[j] = factor * row[j] * w[j]


@entry
def greedy_row(Q, y, h, allowed, group, quota, order, costs):
    """Prune weights one by one, each time the one that adds least to the doubled loss yᵀQy; returns how many.

    Q (K, K) = diag(w) S diag(w); y uint8 (K,) and h = Qy float64 (K,), in place; allowed : uint8 (K,);
    group, quota : int64 (K,), (G,), quota in place; order, costs : int64, float64 (steps,), out. O(K) per step.
    """
    K = y.size
    for step in range(order.size):
        best, j = NEVER, -1
        for k in range(K):
            if y[k] == 0 and allowed[k] and quota[group[k]] > 0:
                value = 2.0 * h[k] + Q[k, k]
                if value < best:
                    best, j = value, k
        if j < 0:
            return step
        y[j] = 1
        quota[group[j]] -= 1
        row = Q[j]
        for k in range(K):
            h[k] += row[k]
        order[step], costs[step] = j, best
    return order.size


@inner_fast
def _best_exchange(Q, peak, pruned, p, first, leave, enter, least, highest, grouped, group):
    """The pair (i back, j out) with the least enter[j] − leave[i] − 2 Q_ij below `highest`.

    A row i is not read where enter[j] ≥ least and Q_ij ≤ peak[i] exclude a better pair. Row `first`, if it is not
    negative, is read before the others.
    """
    best, back, out = highest, -1, -1
    K = enter.size
    for a in range(-1 if first >= 0 else 0, p):
        i = pruned[a] if a >= 0 else first
        if leave[i] <= -0.5 * NEVER or least - leave[i] - 2.0 * peak[i] >= best:
            continue
        row, base, excess = Q[i], -leave[i], -1.0
        limit = best - base
        if grouped:
            g = group[i]
            for k in range(K):
                excess = max(excess, limit - enter[k] + 2.0 * row[k] if group[k] == g else -1.0)
        else:
            for k in range(K):
                excess = max(excess, limit - enter[k] + 2.0 * row[k])
        if excess > 0.0:
            for k in range(K):
                change = base + enter[k] - 2.0 * row[k]
                if change < best and (not grouped or group[k] == group[i]):
                    best, back, out = change, i, k
    return back, out, best


@inner_fast
def _descend(Q, y, h, locked, grouped, group, loss, stop):
    """Exchanges that improve, in place on y and h, until there are none; the new loss.

    Each pruned weight in turn goes back for the best of the kept ones as soon as that improves. A turn over all
    weights without an exchange costs O(p K).
    """
    K = y.size
    enter = np.empty(K)
    for k in range(K):
        enter[k] = NEVER if y[k] or locked[k] else 2.0 * h[k] + Q[k, k]
    i, idle = -1, 0
    while idle < K and not stop[0]:
        i = (i + 1) % K
        idle += 1
        if y[i] == 0 or locked[i]:
            continue
        row = Q[i]
        least = -1e-10 * abs(loss)
        limit = least + 2.0 * h[i] - Q[i, i]
        excess = -1.0
        if grouped:
            for k in range(K):
                excess = max(excess, limit - enter[k] + 2.0 * row[k] if group[k] == group[i] else -1.0)
        else:
            for k in range(K):
                excess = max(excess, limit - enter[k] + 2.0 * row[k])
        if excess <= 0.0:
            continue
        out = -1
        for k in range(K):
            change = Q[i, i] - 2.0 * h[i] + enter[k] - 2.0 * row[k]
            if change < least and (not grouped or group[k] == group[i]):
                least, out = change, k
        if out < 0:
            continue
        loss += least
        y[i], y[out] = 0, 1
        other = Q[out]
        for k in range(K):
            h[k] += other[k] - row[k]
            enter[k] = NEVER if y[k] or locked[k] else 2.0 * h[k] + Q[k, k]
        idle = 0
    return loss


@entry
def search_selection_row(
    Q, y, h, locked, group, grouped, loss, price, lowest, values, masks, release, clock, steps, tenure, seed, stop
):  # fmt: skip
    """Up to `steps` moves of a tabu search on yᵀQy − price · Σy; (loss, clock). See `kernels.search_row`."""
    K = y.size
    leave, enter, peak = np.empty(K), np.empty(K), np.empty(K)
    for i in range(K):
        peak[i] = 0.0
        for j in range(K):
            if j != i and Q[i, j] > peak[i]:
                peak[i] = Q[i, j]
    if tenure == 0:
        loss = _descend(Q, y, h, locked, grouped, group, loss, stop)
    pruned = np.empty(K, np.int64)
    random = np.uint64(seed) * np.uint64(2862933555777941757) + np.uint64(3037000493)
    highest = lowest + values.size - 1
    for step in range(steps + 1):
        p = 0
        back1, gain1, out1, cost1 = -1, -NEVER, -1, NEVER
        for k in range(K):
            free = locked[k] == 0 and release[k] <= clock
            leave[k], enter[k] = -NEVER, NEVER
            if y[k]:
                pruned[p] = k
                p += 1
                if free:
                    leave[k] = 2.0 * h[k] - Q[k, k]
                    if leave[k] > gain1:
                        gain1, back1 = leave[k], k
            elif free:
                enter[k] = 2.0 * h[k] + Q[k, k]
                if enter[k] < cost1:
                    cost1, out1 = enter[k], k
        place = p - lowest
        if 0 <= place < values.size and loss < values[place] * (1.0 - 1e-10):
            values[place] = loss
            for k in range(K):
                masks[place, k] = y[k]
        if step == steps or stop[0]:
            break
        # A descent needs no pair that does not improve.
        limit = -1e-10 * abs(loss) if tenure == 0 else NEVER
        back, out, change = _best_exchange(Q, peak, pruned, p, back1, leave, enter, cost1, limit, grouped, group)
        if back < 0 or change >= 0.5 * NEVER:
            back, out, change = -1, -1, NEVER
        if not grouped:
            if out1 >= 0 and p < highest and cost1 - price < change:
                back, out, change = -1, out1, cost1 - price
            if back1 >= 0 and p > lowest and price - gain1 < change:
                back, out, change = back1, -1, price - gain1
        if tenure == 0 and ((back < 0 and out < 0) or change >= -1e-10 * abs(loss)):
            break
        if back < 0 and out < 0:
            clock += 1  # everything waits
            continue
        clock += 1
        random ^= random << np.uint64(13)
        random ^= random >> np.uint64(7)
        random ^= random << np.uint64(17)
        wait = tenure + (int(random >> np.uint64(33)) % (tenure + 1)) if tenure > 0 else 0
        if out >= 0:
            loss += 2.0 * h[out] + Q[out, out]
            y[out] = 1
            release[out] = clock + wait
            row = Q[out]
            for k in range(K):
                h[k] += row[k]
        if back >= 0:
            loss -= 2.0 * h[back] - Q[back, back]
            y[back] = 0
            release[back] = clock + wait
            row = Q[back]
            for k in range(K):
                h[k] -= row[k]
    return loss, clock
