"""Relaxation of a node of the selection tree.

min f + gᵀ(y − x) + ½ (y − x)ᵀQ(y − x) over 0 ≤ y ≤ u with the sum over every group fixed. Vectors run over the m
columns of a compressed level. u is 1 for a free variable and 0 for a fixed one, whose x is 0 and whose value is
part of g and f. Group a is the range gp[a] … gp[a+1]. Q is positive semidefinite where all group sums are zero.
Where stop[0] is set meanwhile, no further step is taken.
"""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import axpy, cholesky_until, inner, inner_fast, invert_factor, solve


@inner
def pair_step(g, x, u, Q, dg, gp, G):
    """Second-order pair step in the group of largest violation; the gain in f, 0 when optimal to rounding."""
    i = np.int64(-1)
    h = np.int64(0)
    gi = 0.0
    gap = 0.0
    for a in range(G):
        lo = np.inf
        hi = -np.inf
        at = np.int64(-1)
        for k in range(gp[a], gp[a + 1]):
            gk = g[k]
            if gk < lo and x[k] < u[k]:
                lo = gk
                at = k
            if gk > hi and x[k] > 0.0:
                hi = gk
        if at >= 0 and hi - lo > gap:
            gap = hi - lo
            i = at
            h = a
            gi = lo
    if i < 0:
        return 0.0
    Qi = Q[i]
    qii = dg[i]
    best = 0.0
    j = np.int64(-1)
    for k in range(gp[h], gp[h + 1]):
        d = g[k] - gi
        if d > 0.0 and x[k] > 0.0:
            kap = max(qii + dg[k] - 2.0 * Qi[k], 1e-200)
            v = d * d / kap
            if v > best:
                best = v
                j = k
    if j < 0:
        return 0.0
    return pair_move(g, x, u, Q, dg, gp[G], i, j, np.inf)


@inner
def pair_move(g, x, u, Q, dg, m, i, j, forced):
    """Move weight from j to i: the best step, or (forced < inf) that much, up to the box. Returns the gain."""
    kap = dg[i] + dg[j] - 2.0 * Q[i, j]
    d = g[j] - g[i]
    ti = u[i] - x[i]
    tj = x[j]
    t = min(ti, tj)
    inner = forced if forced < np.inf else (d / kap if kap > 0.0 and d < t * kap else np.inf)
    if inner < t:
        t = inner
        x[i] += t
        x[j] -= t
    else:
        x[i] = u[i] if ti <= tj else x[i] + t
        x[j] = 0.0 if tj <= ti else x[j] - t
    Qi = Q[i]
    Qj = Q[j]
    for k in range(m):
        g[k] += t * (Qi[k] - Qj[k])
    return t * d - 0.5 * t * t * kap


@inner_fast
def dual(g, x, u, gp, G, th):
    """Σ min over y of (g − θ)(y − x): added to f it is a valid bound for any θ. Sets θ per group.

    θ = the x(1−x)-weighted mean of the gradient, or the middle of the gap where nothing is fractional.
    """
    total = 0.0
    for a in range(G):
        s = 0.0
        t = 0.0
        lo = np.inf
        hi = -np.inf
        for k in range(gp[a], gp[a + 1]):
            w = x[k] * (u[k] - x[k])
            s += w
            t += w * g[k]
            if x[k] < u[k]:
                lo = min(lo, g[k])
            if x[k] > 0.0:
                hi = max(hi, g[k])
        if s > 1e-9:
            z = t / s
        elif lo == np.inf:
            z = 0.0 if hi == -np.inf else hi
        else:
            z = lo if hi == -np.inf else 0.5 * (lo + hi)
        th[a] = z
        s = 0.0
        for k in range(gp[a], gp[a + 1]):
            d = g[k] - z
            s += min(d * (u[k] - x[k]), -d * x[k])
        total += s
    return total


@inner
def factor(Q, dg, x, u, gp, G, S, ref, A, sc, stop):
    """Cholesky factor of Q on the fractional variables with every Σ fixed.

    In each group the fractional variable of smallest diagonal is eliminated. S[:h] are the others, S[h:k] the
    eliminated ones, ref[a] the eliminated partner of S[a] as a position in S. Returns h, k, or zeros when told
    to stop.
    """
    h = np.int64(0)
    e = np.int64(0)
    for a in range(G):
        o = -1
        for i in range(gp[a], gp[a + 1]):
            if 0.0 < x[i] < u[i] and (o < 0 or dg[i] < dg[o]):
                o = i
        if o < 0:
            continue
        for i in range(gp[a], gp[a + 1]):
            if i != o and 0.0 < x[i] < u[i]:
                S[h] = i
                ref[h] = e
                h += 1
        ref[ref.size - 1 - e] = o
        e += 1
    for a in range(e):
        S[h + a] = ref[ref.size - 1 - a]
    for a in range(h):
        i = S[a]
        ref[a] += h
        o = S[ref[a]]
        sc[a] = 1.0 / np.sqrt(max(dg[i] + dg[o] - 2.0 * Q[i, o], 1e-200))
    for a in range(h):
        Qi = Q[S[a]]
        Qo = Q[S[ref[a]]]
        s = sc[a]
        for b in range(a):
            j = S[b]
            o = S[ref[b]]
            A[a, b] = ((Qi[j] - Qo[j]) - (Qi[o] - Qo[o])) * s * sc[b]
        A[a, a] = 1.0 + 1e-13
    if not cholesky_until(A, h, stop):
        return np.int64(0), np.int64(0)
    return h, h + e


@inner
def newton(g, x, u, Q, dg, gp, G, S, ref, A, sc, d, stop):
    """Newton step on the fractional variables, cut at the box. Returns (gain, whether it was cut)."""
    h, k = factor(Q, dg, x, u, gp, G, S, ref, A, sc, stop)
    if h == 0:
        return 0.0, False
    m = gp[G]
    for a in range(h):
        d[a] = (g[S[ref[a]]] - g[S[a]]) * sc[a]
    solve(A, d, h)
    for a in range(h, k):
        d[a] = 0.0
    slope = 0.0
    for a in range(h):
        d[a] *= sc[a]
        d[ref[a]] -= d[a]
        slope += (g[S[a]] - g[S[ref[a]]]) * d[a]
    if not slope < 0.0:
        return 0.0, False
    alpha = 1.0
    hit = -1
    for a in range(k):
        i = S[a]
        if d[a] > 0.0 and alpha * d[a] > u[i] - x[i]:
            alpha = (u[i] - x[i]) / d[a]
            hit = a
        elif d[a] < 0.0 and alpha * d[a] < -x[i]:
            alpha = -x[i] / d[a]
            hit = a
    for a in range(k):
        i = S[a]
        t = alpha * d[a]
        x[i] = min(max(x[i] + t, 0.0), u[i])
        axpy(g, t, Q[i], m)
    after = 0.0
    for a in range(h):
        after += (g[S[a]] - g[S[ref[a]]]) * d[a]
    if hit >= 0:
        i = S[hit]
        x[i] = u[i] if d[hit] > 0.0 else 0.0
    return -0.5 * alpha * (slope + after), hit >= 0


@inner
def relax(x, u, g, Q, dg, gp, G, f, thr, goal, th, S, ref, A, sc, d, stop):
    """Descend until the node is known to be prunable (bound ≥ thr) or not to be. Returns (f, bound), θ in th."""
    best = -np.inf
    for _ in range(60):
        optimal = False
        for _ in range(4):
            gain = pair_step(g, x, u, Q, dg, gp, G)
            f -= gain
            if gain <= 0.0:
                optimal = True
                break
        for _ in range(3):
            gain, cut = newton(g, x, u, Q, dg, gp, G, S, ref, A, sc, d, stop)
            f -= gain
            if not cut:
                break
        lb = f + dual(g, x, u, gp, G, th)
        best = max(best, lb)
        if best >= thr or optimal or (f < thr and f - lb <= goal * (thr - lb)) or stop[0] != 0:
            break
    return f, best, lb


@inner
def responses(Q, dg, x, u, gp, G, S, ref, A, sc, B, w, stop):
    """w[a]: moving S[a] by t while the other fractional ones follow costs t²/(2 w[a]). The factor stays in A."""
    h, k = factor(Q, dg, x, u, gp, G, S, ref, A, sc, stop)
    invert_factor(A, B, h)
    for a in range(k):
        w[a] = 0.0
    for a in range(h):
        Ba = B[a]
        for t in range(a + 1):
            w[t] += Ba[t] * Ba[t]
        # the eliminated ones: w[o] = sᵀA⁻¹s with s the scales of its partners
        for o in range(h, k):
            s = 0.0
            for t in range(a + 1):
                if ref[t] == o:
                    s += Ba[t] * sc[t]
            w[o] += s * s
    for a in range(h):
        w[a] *= sc[a] * sc[a]
    return h, k


@inner
def response(ref, h, k, A, sc, w, b, d):
    """d: how the fractional variables follow when S[b] moves by one."""
    for a in range(h):
        d[a] = 0.0
        if b >= h and ref[a] == b:
            d[a] = -sc[a]
    if b < h:
        d[b] = sc[b]
    solve(A, d, h)
    for a in range(h, k):
        d[a] = 0.0
    for a in range(h):
        d[a] *= sc[a] / w[b]
        d[ref[a]] -= d[a]
    d[b] = 1.0
