"""Depth-first tree of the joint problem over its perspective relaxation; resumable after any node."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.counting import count_node
from cbs_opt.solvers.kernels.dense_numba import cholesky, entry, inner, invert_factor, kth_largest, solve
from cbs_opt.solvers.kernels.perspective_relaxation import best_theta, relax
from cbs_opt.solvers.kernels.stack_layout import (
    BRANCH,
    COUNTED,
    FOUND,
    LEVEL,
    NODES,
    PENDING,
    POINT,
    QLEVEL,
    ROOT,
    VALUE,
)

DONE, MORE, CROWDED = range(3)
"""What `run` returns: nothing left, the nodes are used up, no room for another level."""


@entry
def kept_value(M, c, v, kept, m, A, x, sc, S, e):
    """½ (u − v)ᵀM(u − v) at the best u with support `kept`, int8 (m,), c = −Mv."""
    k = np.int64(0)
    for i in range(m):
        e[i] = -v[i]
        if kept[i]:
            S[k] = i
            k += 1
    for a in range(k):
        sc[a] = 1.0 / np.sqrt(M[S[a], S[a]])
        x[a] = -c[S[a]] * sc[a]
        for b in range(a):
            A[a, b] = M[S[a], S[b]] * sc[a] * sc[b]
        A[a, a] = 1.0
    cholesky(A, k)
    solve(A, x, k)
    for a in range(k):
        e[S[a]] += x[a] * sc[a]
    f = 0.0
    for i in range(m):
        s = 0.0
        Mi = M[i]
        for j in range(m):
            s += Mi[j] * e[j]
        f += 0.5 * e[i] * s
    return f


@inner
def round_value(u, d, kept, gp, G, R, idx, M0, c0, v0, n, sel, key, A, x, sc, S, e):
    """Keep the R free columns of each group with the largest d u²; the value, the set in sel."""
    for i in range(n):
        sel[i] = 0
    for a in range(G):
        count = np.int64(0)
        for i in range(gp[a], gp[a + 1]):
            if kept[i] == 1:
                sel[idx[i]] = 1
            else:
                key[count] = d[i] * u[i] * u[i]
                count += 1
        left = R[a]
        if left <= 0:
            continue
        cut = kth_largest(key, count, left)
        for i in range(gp[a], gp[a + 1]):
            if kept[i] == 0 and d[i] * u[i] * u[i] > cut:
                sel[idx[i]] = 1
                left -= 1
        for i in range(gp[a], gp[a + 1]):
            if left > 0 and kept[i] == 0 and d[i] * u[i] * u[i] == cut:
                sel[idx[i]] = 1
                left -= 1
    return kept_value(M0, c0, v0, sel, n, A, x, sc, S, e)


@inner
def estimate(k, u, M, dg, d, S, A, B, sc, x, h, key, slack):
    """Branching column among the fractional ones of k columns: product of the estimated rises.

    From the Hessian of the bound in the fractional z, diag(d u²/z³) − P K⁻¹ P with P = d u / z²; h holds z.
    """
    for a in range(k):
        Mi = M[S[a]]
        for b in range(a):
            A[a, b] = Mi[S[b]] * sc[a] * sc[b]
        A[a, a] = 1.0 + 1e-13
    cholesky(A, k)
    invert_factor(A, B, k)
    f = np.int64(0)
    for a in range(k):
        if h[a] < 1.0 - 1e-9:
            i = S[a]
            x[f] = d[i] * u[i] / (h[a] * h[a]) * sc[a]
            key[f] = a
            f += 1
    for a in range(f):
        ka = int(key[a])
        ia = S[ka]
        for b in range(a + 1):
            kb = int(key[b])
            s = 0.0
            for t in range(max(ka, kb), k):
                s += B[t, ka] * B[t, kb]
            A[a, b] = -x[a] * x[b] * s
        A[a, a] += d[ia] * u[ia] * u[ia] / (h[ka] * h[ka] * h[ka])
    # The last one follows from Σ z.
    e = f - 1
    corner = A[e, e]
    for a in range(e):
        for b in range(a + 1):
            A[a, b] += corner - A[e, a] - A[e, b]
    for a in range(e):
        sc[a] = 1.0 / np.sqrt(max(A[a, a], 1e-200))
    for a in range(e):
        for b in range(a):
            A[a, b] *= sc[a] * sc[b]
        A[a, a] = 1.0 + 1e-10
    cholesky(A, e)
    invert_factor(A, B, e)
    x[e] = 0.0
    for a in range(e):
        s = 0.0
        t = 0.0
        for j in range(a + 1):
            t += B[a, j] * sc[j]
        x[e] += t * t
        for j in range(a, e):
            s += B[j, a] * B[j, a]
        x[a] = s * sc[a] * sc[a]
    best = -1.0
    at = -1
    for a in range(f):
        z = h[int(key[a])]
        v = max(x[a], 1e-300)
        dn = max(min(0.5 * z * z / v, slack), 1e-6 * slack)
        up = max(min(0.5 * (1.0 - z) * (1.0 - z) / v, slack), 1e-6 * slack)
        if dn * up > best:
            best = dn * up
            at = S[int(key[a])]
    return at


@inner
def choose(u, y, M, dg, d, rd, kept, gp, G, R, price, slack, S, A, B, sc, x, h, key, trial):
    """Free column to branch on."""
    best_theta(u, rd, kept, gp, G, R, trial)
    k = np.int64(0)
    fractional = 0
    best = 0.0
    at = -1
    for a in range(G):
        for i in range(gp[a], gp[a + 1]):
            if kept[i] == 0 and u[i] == 0.0:
                continue
            z = 1.0
            if kept[i] == 0 and trial[a] > 0.0:
                z = min(1.0, rd[i] * abs(u[i]) / trial[a])
                if z < 1.0 - 1e-9:
                    fractional += 1
                    score = d[i] * u[i] * u[i] * min(z, 1.0 - z)
                    if score > best:
                        best = score
                        at = i
            S[k] = i
            h[k] = z
            sc[k] = 1.0 / np.sqrt(max(dg[i] - d[i] + d[i] / z, 1e-200))
            k += 1
    if G == 1 and fractional >= 2:
        at = estimate(k, u, M, dg, d, S, A, B, sc, x, h, key, slack)
    if at >= 0:
        return at
    best = np.inf
    for a in range(G):
        for i in range(gp[a], gp[a + 1]):
            if kept[i] == 0:
                b = y[i] - d[i] * u[i]
                r = abs(b * b / d[i] - price[a] * price[a])
                if r < best or at < 0:
                    best = r
                    at = i
    return at


@inner
def settle(kept, gone, gp, G, R):
    """Decide whole groups without a choice; columns to drop and free ones, −1 where the budgets cannot be met."""
    drop = 0
    free = 0
    for a in range(G):
        count = 0
        for i in range(gp[a], gp[a + 1]):
            if kept[i] == 0 and gone[i] == 0:
                count += 1
        if R[a] < 0 or R[a] > count:
            return 0, -1
        if R[a] == count:
            for i in range(gp[a], gp[a + 1]):
                if gone[i] == 0:
                    kept[i] = 1
            R[a] = 0
        elif R[a] > 0:
            free += count
        for i in range(gp[a], gp[a + 1]):
            if R[a] == 0 and kept[i] == 0:
                gone[i] = 1
            if gone[i] == 1:
                drop += 1
    return drop, free


@inner
def compress(q, G, u, y, kept, gone, pool, off, gps, idx, dgs, ds, cs, loc):
    """Level q + 1 without the pruned columns, whose u goes to zero first."""
    p = q + 1
    m = gps[q, G]
    first = off[q]
    for i in range(m):
        if gone[i] == 1 and u[i] != 0.0:
            e = -u[i]
            for k in range(m):
                y[k] += e * pool[first + i * m + k]
            u[i] = 0.0
    off[p] = first + m * m
    w = 0
    gps[p, 0] = 0
    for a in range(G):
        for i in range(gps[q, a], gps[q, a + 1]):
            if gone[i] == 0:
                loc[w] = i
                w += 1
        gps[p, a + 1] = w
    second = off[p]
    for a in range(w):
        i = loc[a]
        for t in range(w):
            pool[second + a * w + t] = pool[first + i * m + loc[t]]
        dgs[p, a] = dgs[q, i]
        ds[p, a] = ds[q, i]
        cs[p, a] = cs[q, i]
        idx[p, a] = idx[q, i]
        u[a] = u[i]
        y[a] = y[i]
        kept[a] = kept[i]


@inner
def reduced_costs(u, y, d, kept, gone, gp, G, R, price, slack):
    """Decide what would cost more than `slack` on its other side."""
    for a in range(G):
        lam = 0.5 * price[a] * price[a]
        for i in range(gp[a], gp[a + 1]):
            if kept[i] == 0:
                e = y[i] - d[i] * u[i]
                e = 0.5 * e * e / d[i] - lam
                if e >= slack:
                    kept[i] = 1
                    R[a] -= 1
                elif -e >= slack:
                    gone[i] = 1


@entry
def run(
    budget, tol, atol, shared, M0, c0, v0, const, extra, st, meta, TH, LB, U, Y, K, R,
    pool, off, gps, idx, dgs, ds, cs, sbest, best, S, A, B, sc, x, h, key, e, rd, point, gone,
    sel, price, trial, loc, cap, least, work, vectors, chosen, stop,
):  # fmt: skip
    """As `selection_tree.run`. Nodes of one group that leave few selections are enumerated, up to `cap` of a node.

    `extra` is what the columns outside have cost, const = extra + ½ vᵀMv.

    sbest: 1 = kept. The relaxed point of the last node stays in `point`, over the columns of level st[POINT].
    """
    n = v0.size
    G = R.shape[1]
    while st[LEVEL] >= 0:
        L = st[LEVEL]
        pend = meta[L, PENDING]
        inc = min(best[0], shared[0])
        thr = inc - tol * abs(inc) - atol
        if pend == 0 or LB[L] >= thr:
            meta[L, PENDING] = 0
            st[LEVEL] = L - 1
            continue
        q = meta[L, QLEVEL]
        m = gps[q, G]
        if pend != ROOT and off[q] + 3 * m * m > pool.size:
            return CROWDED
        if budget <= 0:
            return MORE
        budget -= 1
        st[NODES] += 1
        C = L if pend == ROOT else L + 1
        u, y, kept = U[C], Y[C], K[C]
        for i in range(m):
            gone[i] = 0
        if pend == ROOT:
            meta[L, PENDING] = 0
        else:
            meta[L, PENDING] = pend - 1
            val = meta[L, VALUE]
            meta[L, VALUE] = 1 - val
            b = meta[L, BRANCH]
            for i in range(m):
                u[i] = U[L, i]
                y[i] = Y[L, i]
                kept[i] = K[L, i]
            for a in range(G):
                R[C, a] = R[L, a]
                TH[C, a] = TH[L, a]
            if val == 0:
                gone[b] = 1
            else:
                kept[b] = 1
                a = 0
                while gps[q, a + 1] <= b:
                    a += 1
                R[C, a] -= 1
        free = 0
        st[POINT] = -1
        lb = LB[L]
        last = lb
        alive = True
        for phase in range(3):
            # 0: what branching decides, 1: the relaxation and its reduced costs, 2: only the level's views
            gp = gps[q]
            m = gp[G]
            M = pool[off[q] : off[q] + m * m].reshape(m, m)
            dg, d, c = dgs[q], ds[q], cs[q]
            if phase == 2 or (phase == 1 and free == 0):
                break
            if phase == 1:
                for i in range(m):
                    gone[i] = 0
                    rd[i] = np.sqrt(d[i])
                lb, last = relax(
                    u,
                    y,
                    M,
                    c,
                    dg,
                    d,
                    rd,
                    kept,
                    gp,
                    G,
                    R[C],
                    TH[C],
                    const,
                    thr,
                    S,
                    A,
                    sc,
                    x,
                    h,
                    key,
                    price,
                    trial,
                    stop,
                )
                st[POINT] = q
                for i in range(m):
                    point[i] = u[i]
                if lb >= thr:
                    alive = False
                    break
                if stop[0] != 0:  # the node stays open as it was
                    st[NODES] -= 1
                    meta[L, PENDING] = pend
                    if pend == ROOT:
                        meta[L, QLEVEL] = q
                    else:
                        meta[L, VALUE] = 1 - meta[L, VALUE]
                    return MORE
                if not lb >= LB[L]:
                    lb = LB[L]
                reduced_costs(u, y, d, kept, gone, gp, G, R[C], price, thr - last)
            drop, free = settle(kept, gone, gp, G, R[C])
            if free < 0:
                alive = False
                break
            if drop > 0:
                compress(q, G, u, y, kept, gone, pool, off, gps, idx, dgs, ds, cs, loc)
                q += 1
        if not alive:
            continue
        if G == 1 and free > 0 and cap > 0:
            settled, broken = count_node(
                M, c, dg, d, u, y, kept, m, R[C, 0], const, thr, cap, least, work, vectors, loc, chosen, gone
            )
            if broken:
                for i in range(n):
                    sel[i] = 0
                for i in range(m):
                    sel[idx[q, i]] = gone[i]
                fr = extra + kept_value(M0, c0, v0, sel, n, A, x, sc, S, e)
                if fr < best[0] and fr < shared[0]:
                    best[0] = fr
                    st[FOUND] += 1
                    for i in range(n):
                        sbest[i] = sel[i]
            if settled:
                st[COUNTED] += 1
                continue
        if free == 0 or pend == ROOT or st[NODES] % 16 == 0:
            fr = extra + round_value(u, d, kept, gp, G, R[C], idx[q], M0, c0, v0, n, sel, key, A, x, sc, S, e)
            if fr < best[0] and fr < shared[0]:
                best[0] = fr
                st[FOUND] += 1
                for i in range(n):
                    sbest[i] = sel[i]
                thr = fr - tol * abs(fr) - atol
            if free == 0 or lb >= thr:
                continue
        for i in range(m):
            rd[i] = np.sqrt(d[i])
        b = choose(u, y, M, dg, d, rd, kept, gp, G, R[C], price, thr - last, S, A, B, sc, x, h, key, trial)
        LB[C] = lb
        a = 0
        while gp[a + 1] <= b:
            a += 1
        t = y[b] - d[b] * u[b]
        meta[C, VALUE] = 1 if t * t / d[b] >= price[a] * price[a] else 0
        meta[C, PENDING] = 2
        meta[C, QLEVEL] = q
        meta[C, BRANCH] = b
        st[LEVEL] = C
    return DONE
