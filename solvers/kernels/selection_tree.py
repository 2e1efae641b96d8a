"""Depth-first tree of the selection problem: explicit stack, compressed levels, resumable after any node."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.box_relaxation import pair_move, relax, response, responses
from cbs_opt.solvers.kernels.dense_numba import axpy, entry, inner, kth_largest
from cbs_opt.solvers.kernels.stack_layout import BRANCH, FOUND, LEVEL, NODES, PENDING, QLEVEL, ROOT, VALUE

_EPS = 2.3e-16


@entry
def selection_value(Q, c, y, n):
    """½ yᵀQy + cᵀy at a binary y, int8 (n,)."""
    f = 0.0
    for i in range(n):
        if y[i]:
            s = 0.0
            Qi = Q[i]
            for j in range(n):
                if y[j]:
                    s += Qi[j]
            f += 0.5 * s + c[i]
    return f


@inner
def charge(N, idx, b, x, g, u, m):
    """Column b has become 1: every free column pays its product with it. Returns the change of f."""
    df = 0.0
    Nb = N[idx[b]]
    for k in range(m):
        if u[k] > 0.0:
            t = Nb[idx[k]]
            g[k] += t
            df += t * x[k]
    return df


@inner
def refresh(x, u, v, g, Q, c, f, m, N, idx, has_products):
    """Gradient g and value f of x + v from the level's own data: what updates have lost comes back."""
    for k in range(m):
        g[k] = c[k]
    for a in range(m):
        t = x[a] + v[a]
        if t != 0.0:
            axpy(g, t, Q[a], m)
    for a in range(m):
        t = x[a] + v[a]
        if t != 0.0:
            f += 0.5 * t * (g[a] + c[a])
    if has_products:
        for a in range(m):
            if v[a] == 1:
                f += charge(N, idx, a, x, g, u, m)
                for b in range(a):
                    if v[b] == 1:
                        f += N[idx[a], idx[b]]
    return f


@inner
def fix(x, u, v, g, Q, dg, lo, hi, m, b, val):
    """Fix b to val; its group lo … hi keeps its sum by forced pair moves. Returns the change of f."""
    df = 0.0
    for _ in range(m + 1):
        left = (1.0 - x[b]) if val == 1 else x[b]
        if left <= 0.0:
            break
        best = np.inf
        j = np.int64(-1)
        Qb = Q[b]
        for k in range(lo, hi):
            room = (x[k] if val == 1 else 1.0 - x[k]) if (u[k] > 0.0 and k != b) else 0.0
            if room > 0.0:
                t = min(room, left)
                d = g[b] - g[k] if val == 1 else g[k] - g[b]
                cost = d + 0.5 * t * (dg[b] + dg[k] - 2.0 * Qb[k])
                if cost < best:
                    best = cost
                    j = k
        if j < 0:
            break
        df -= pair_move(g, x, u, Q, dg, m, b if val == 1 else j, j if val == 1 else b, left)
    x[b] = 0.0
    u[b] = 0.0
    v[b] = val
    return df


@inner
def round_up(x, u, v, gp, G, R, base, idx, n, Q0, c0, key, y):
    """Round x: the R largest of each group. The value in the original data, the point in y."""
    for i in range(n):
        y[i] = base[i]
    for a in range(G):
        count = np.int64(0)
        for k in range(gp[a], gp[a + 1]):
            y[idx[k]] = v[k]
            if u[k] > 0.0:
                key[count] = x[k]
                count += 1
        if R[a] <= 0:
            continue
        cut = kth_largest(key, count, R[a])
        left = R[a]
        for k in range(gp[a], gp[a + 1]):
            if u[k] > 0.0 and x[k] > cut:
                y[idx[k]] = 1
                left -= 1
        for k in range(gp[a], gp[a + 1]):
            if left > 0 and u[k] > 0.0 and x[k] == cut:
                y[idx[k]] = 1
                left -= 1
    return selection_value(Q0, c0, y, n)


@inner
def child(px, pg, pu, pv, dx, dq, f, b, val, m, x, g, u, v):
    """Move b towards val with the others following, as far as the box lets them. Returns f there."""
    t = val - px[b]
    al = 1.0
    for a in range(m):
        s = t * dx[a]
        if s > 0.0 and al * s > pu[a] - px[a]:
            al = (pu[a] - px[a]) / s
        elif s < 0.0 and al * s < -px[a]:
            al = -px[a] / s
    al = max(al, 0.0) * t
    s = 0.0
    for a in range(m):
        g[a] = pg[a] + al * dq[a]
        x[a] = min(max(px[a] + al * dx[a], 0.0), pu[a])
        s += al * dx[a] * (pg[a] + g[a])
        u[a] = pu[a]
        v[a] = pv[a]
    return f + 0.5 * s


@inner
def fix_by_reduced_cost(x, u, v, g, gp, G, th, R, slack, N, idx, has_products, loc):
    """Fix what would cost more than `slack` on its other side. Returns the change of f."""
    ones = 0
    for a in range(G):
        for k in range(gp[a], gp[a + 1]):
            if u[k] > 0.0:
                if x[k] == 0.0 and g[k] - th[a] >= slack:
                    u[k] = 0.0
                    v[k] = 0
                elif x[k] == 1.0 and th[a] - g[k] >= slack:
                    u[k] = 0.0
                    x[k] = 0.0
                    v[k] = 1
                    R[a] -= 1
                    loc[ones] = k
                    ones += 1
    df = 0.0
    if has_products:
        for a in range(ones):
            df += charge(N, idx, loc[a], x, g, u, gp[G])
            for b in range(a):
                df += N[idx[loc[a]], idx[loc[b]]]
    return df


@inner
def count_free(u, gp, G, R):
    """Free variables, those of them in groups that leave a choice, and whether the budgets can be met."""
    total = 0
    choice = 0
    feasible = True
    for a in range(G):
        free = 0
        for k in range(gp[a], gp[a + 1]):
            if u[k] > 0.0:
                free += 1
        total += free
        if R[a] < 0 or R[a] > free:
            feasible = False
        if R[a] > 0 and R[a] < free:
            choice += free
    return total, choice, feasible


@inner
def choose(x, u, g, Q, gp, G, th, slack, dg, S, ref, A, sc, B, w, d, DX, DG, N, idx, has_products, stop):
    """Branching variable: product of the two children's estimated rises, each cut at what would prune it.

    The rise is exact while no other variable meets its bound, but for the products, which are those at x.
    DX: how all follow a unit move of it; DG = Q DX.
    """
    m = gp[G]
    for k in range(m):
        DX[k] = 0.0
        DG[k] = 0.0
    h, k = responses(Q, dg, x, u, gp, G, S, ref, A, sc, B, w, stop)
    best = -1.0
    at = np.int64(-1)
    for a in range(k):
        if w[a] > 0.0:
            xi = x[S[a]]
            rise = 0.5 * (1.0 - xi) * (1.0 - xi) / w[a]
            if has_products:
                Na = N[idx[S[a]]]
                for i in range(m):
                    if u[i] > 0.0:
                        rise += x[i] * Na[idx[i]]
            dn = max(min(0.5 * xi * xi / w[a], slack), 1e-6 * slack)
            up = max(min(rise, slack), 1e-6 * slack)
            if dn * up > best:
                best = dn * up
                at = a
    if at >= 0:
        response(ref, h, k, A, sc, w, at, d)
        for a in range(k):
            DX[S[a]] = d[a]
            axpy(DG, d[a], Q[S[a]], m)
        return S[at]
    best = np.inf
    for a in range(G):
        for k in range(gp[a], gp[a + 1]):
            if u[k] > 0.0 and (abs(g[k] - th[a]) < best or at < 0):
                best = abs(g[k] - th[a])
                at = k
    return at


@inner
def compress(b, q, G, x, g, u, v, DX, DG, pool, off, gps, idx, dgs, cs, fs, base, c, loc, N, has_products):
    """Level q + 1 with the free columns of a frame only; the frame's vectors move along. Returns b's new place."""
    p = q + 1
    m = gps[q, G]
    first = off[q]
    off[p] = first + m * m
    for i in range(base.shape[1]):
        base[p, i] = base[q, i]
    for a in range(m):
        c[a] = cs[q, a]
    f = fs[q]
    for a in range(m):
        if v[a] == 1:
            for k in range(m):
                c[k] += pool[first + a * m + k]
            if has_products:
                Na = N[idx[q, a]]
                for k in range(m):
                    c[k] += Na[idx[q, k]]
    for a in range(m):
        if v[a] == 1:
            f += 0.5 * (c[a] + cs[q, a])
    fs[p] = f
    w = 0
    at = -1
    gps[p, 0] = 0
    for a in range(G):
        for k in range(gps[q, a], gps[q, a + 1]):
            if u[k] > 0.0:
                loc[w] = k
                if k == b:
                    at = w
                w += 1
            else:
                base[p, idx[q, k]] = v[k]
        gps[p, a + 1] = w
    second = off[p]
    for a in range(w):
        k = loc[a]
        for t in range(w):
            pool[second + a * w + t] = pool[first + k * m + loc[t]]
        dgs[p, a] = dgs[q, k]
        idx[p, a] = idx[q, k]
        cs[p, a] = c[k]
        x[a] = x[k]
        g[a] = g[k]
        u[a] = 1.0
        v[a] = 0
        DX[a] = DX[k]
        DG[a] = DG[k]
    return at


@inner
def reopen(st, meta, F, L, pend, f):
    """Undo that the work on a node of frame L has begun; a root keeps its point, whose value is f."""
    st[NODES] -= 1
    meta[L, PENDING] = pend
    if pend == ROOT:
        F[L] = f
    else:
        meta[L, VALUE] = 1 - meta[L, VALUE]


@entry
def run(
    budget, tol, atol, shared, Q0, c0, st, meta, F, LB, X, G_, U, V, R,
    pool, off, gps, idx, dgs, cs, fs, base, DX, DG, ybest, best, S, ref, A, B, sc, d, w, th, y, loc,
    N, has_products, stop,
):  # fmt: skip
    """Work on up to `budget` nodes; returns whether frames are left: those with PENDING are open, bounded by LB.

    Nodes are dropped when no selection in them is better than the incumbent by more than tol·|incumbent| + atol.
    A node at which stop[0] is set meanwhile stays open as it was.
    """
    n = Q0.shape[0]
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
        if budget <= 0:
            return True
        budget -= 1
        st[NODES] += 1
        q = meta[L, QLEVEL]
        gp = gps[q]
        m = gp[G]
        Q = pool[off[q] : off[q] + m * m].reshape(m, m)
        dg = dgs[q]
        C = L if pend == ROOT else L + 1
        x, g, u, v = X[C], G_[C], U[C], V[C]
        if pend == ROOT:
            meta[L, PENDING] = 0
            f = F[C]
        else:
            meta[L, PENDING] = pend - 1
            val = meta[L, VALUE]
            meta[L, VALUE] = 1 - val
            b = meta[L, BRANCH]
            f = child(X[L], G_[L], U[L], V[L], DX[L], DG[L], F[L], b, val, m, x, g, u, v)
            a = 0
            while gp[a + 1] <= b:
                a += 1
            f += fix(x, u, v, g, Q, dg, gp[a], gp[a + 1], m, b, val)
            if has_products and val == 1:
                f += charge(N, idx[q], b, x, g, u, m)
            for k in range(G):
                R[C, k] = R[L, k]
            R[C, a] -= val
        total, choice, feasible = count_free(u, gp, G, R[C])
        if not feasible:
            continue
        lb = LB[L]
        slack = 0.0
        offer = pend == ROOT or st[NODES] % 32 == 0
        if choice > 0:
            gm = 0.0
            dm = 0.0
            for k in range(m):
                if u[k] > 0.0:
                    gm = max(gm, abs(g[k]))
                    dm = max(dm, dg[k])
            last = lb
            for attempt in range(2):
                f, lb, last = relax(x, u, g, Q, dg, gp, G, f, thr, 0.02, th, S, ref, A, sc, d, stop)
                # what the updates of g may have lost, against what the decision needs
                lost = 300.0 * _EPS * (gm + dm) * (m + 1)
                if attempt == 1 or (lost <= 1e-3 * (tol * abs(thr) + atol) and lb == lb):
                    break
                f = refresh(x, u, v, g, Q, cs[q], fs[q], m, N, idx[q], has_products)
            if lb >= thr:
                continue
            if stop[0] != 0:
                reopen(st, meta, F, L, pend, f)
                return True
            if not lb >= LB[L]:
                lb = LB[L]
            slack = thr - last
            integral = True
            for a in range(m):
                if x[a] != 0.0 and x[a] != 1.0:
                    integral = False
                    break
            offer = offer or integral
            f += fix_by_reduced_cost(x, u, v, g, gp, G, th, R[C], slack, N, idx[q], has_products, loc)
            total, choice, feasible = count_free(u, gp, G, R[C])
            if not feasible:
                continue
        if offer or choice == 0:
            fr = round_up(x, u, v, gp, G, R[C], base[q], idx[q], n, Q0, c0, d, y)
            if fr < best[0] and fr < shared[0]:
                best[0] = fr
                st[FOUND] += 1
                for i in range(n):
                    ybest[i] = y[i]
                thr = fr - tol * abs(fr) - atol
            if choice == 0 or lb >= thr:
                continue
        b = choose(
            x, u, g, Q, gp, G, th, slack, dg, S, ref, A, sc, B, w, d, DX[C], DG[C], N, idx[q], has_products, stop
        )
        F[C] = f
        LB[C] = lb
        meta[C, VALUE] = 1 if x[b] >= 0.5 else 0
        meta[C, PENDING] = 2
        meta[C, QLEVEL] = q
        if total <= 0.85 * m - 2:
            b = compress(
                b, q, G, x, g, u, v, DX[C], DG[C], pool, off, gps, idx, dgs, cs, fs, base, d, loc, N, has_products
            )  # fmt: skip
            meta[C, QLEVEL] = q + 1
        meta[C, BRANCH] = b
        st[LEVEL] = C
    return False
