"""Perspective relaxation of a node of the joint problem.

min ½ uᵀ(M − D)u + cᵀu + ½ Σ d_i u_i²/z_i + const over u and 0 ≤ z ≤ 1, with z = 1 on kept columns, Σ z ≤ R over
the free ones of each group, and D = diag(d) ≼ M, d > 0. u are the weights after the update. Vectors run over the m
columns of a level, from which the pruned ones are gone; group a is the range gp[a] … gp[a+1]; kept[k] is 1 or 0.
y = Mu + c is kept up to date. θ of a group is the common √d|u|/z of its fractional columns, so that θ²/2 is the
price of one more kept weight. Where stop[0] is set meanwhile, no further step is taken.
"""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import axpy, cholesky_until, entry, inner, inner_fast, kth_largest, solve


@inner
def best_theta(u, rd, kept, gp, G, R, th):
    """θ of the best z for u: z_i = min(1, √d_i|u_i|/θ) with Σ z = R; 0 where R columns hold all of u."""
    for a in range(G):
        total = 0.0
        count = 0
        for i in range(gp[a], gp[a + 1]):
            if kept[i] == 0 and u[i] != 0.0:
                total += rd[i] * abs(u[i])
                count += 1
        if count <= R[a] or R[a] <= 0:
            th[a] = 0.0
            continue
        t = total / R[a]
        for _ in range(60):
            total = 0.0
            full = 0
            for i in range(gp[a], gp[a + 1]):
                if kept[i] == 0:
                    v = rd[i] * abs(u[i])
                    if v > t:
                        full += 1
                    else:
                        total += v
            if full >= R[a]:
                break
            new = total / (R[a] - full)
            if not new < t * (1.0 - 1e-14):
                break
            t = new
        th[a] = t


@inner
def sweep(u, y, M, dg, d, rd, kept, gp, G, th):
    """One cycle of coordinate descent at the prices θ."""
    m = gp[G]
    for a in range(G):
        theta = th[a]
        for i in range(gp[a], gp[a + 1]):
            rho = dg[i] * u[i] - y[i]
            t = rho / dg[i]
            if kept[i] == 0:
                size = abs(rho)
                if size <= rd[i] * theta:
                    t = 0.0
                elif rd[i] * abs(t) < theta:
                    t = (size - rd[i] * theta) / max(dg[i] - d[i], 1e-14 * dg[i])
                    t = min(t, theta / rd[i])
                    t = t if rho > 0.0 else -t
            e = t - u[i]
            if e != 0.0:
                u[i] = t
                axpy(y, e, M[i], m)


@inner
def newton(u, y, M, dg, d, rd, kept, q, th, m, S, A, sc, x, h, stop):
    """Solve the pattern's linear system for u and θ of a single group, step up to the first kink.

    Returns θ, whether the step was cut, whether there was one.
    """
    k = np.int64(0)
    full = np.int64(0)
    any_frac = False
    for i in range(m):
        if kept[i] == 0 and u[i] == 0.0:
            continue
        frac = False
        if kept[i] == 0:
            frac = rd[i] * abs(u[i]) < th * (1.0 - 1e-12)
            if not frac:
                full += 1
        S[k] = i
        p = dg[i] - d[i] if frac else dg[i]
        sc[k] = 1.0 / np.sqrt(max(p, 1e-14 * dg[i]))
        h[k] = 0.0
        x[k] = -y[i] * sc[k]
        if frac:
            any_frac = True
            s = 1.0 if u[i] > 0.0 else -1.0
            h[k] = rd[i] * s * sc[k]
            x[k] += (d[i] * u[i] - rd[i] * s * th) * sc[k]
        k += 1
    if k == 0:
        return th, False, False
    for a in range(k):
        Mi = M[S[a]]
        for b in range(a):
            A[a, b] = Mi[S[b]] * sc[a] * sc[b]
        A[a, a] = 1.0 + 1e-13
    if not cholesky_until(A, k, stop):
        return th, False, False
    solve(A, x, k)
    dth = 0.0
    if any_frac:
        # Σ √d|u| over the fractional ones = θ (q − full)
        res = -th * (q - full)
        for a in range(k):
            if h[a] != 0.0:
                res += rd[S[a]] * abs(u[S[a]]) + h[a] * x[a]
        w = A[k]
        for a in range(k):
            w[a] = h[a]
        solve(A, w, k)
        t = float(q - full)
        for a in range(k):
            t += h[a] * w[a]
        if t <= 0.0:
            return th, False, False
        dth = res / t
        for a in range(k):
            x[a] -= dth * w[a]
    al = 1.0
    hit = -1
    for a in range(k):
        x[a] *= sc[a]
        i = S[a]
        if kept[i] == 0 and u[i] * (u[i] + al * x[a]) < 0.0:
            al = -u[i] / x[a]
            hit = a
    for a in range(k):
        i = S[a]
        t = u[i] + al * x[a] if a != hit else 0.0
        axpy(y, t - u[i], M[i], m)
        u[i] = t
    return max(th + al * dth, 0.0), hit >= 0, True


@inner_fast
def dual(u, y, c, d, kept, gp, G, R, th, const):
    """Valid lower bound from any u and θ."""
    f = const
    for a in range(G):
        lam = 0.5 * th[a] * th[a]
        f -= lam * R[a]
        for i in range(gp[a], gp[a + 1]):
            b = y[i] - d[i] * u[i]
            f -= 0.5 * u[i] * (b - c[i])
            r = 0.5 * b * b / d[i]
            f -= r if kept[i] == 1 else max(r - lam, 0.0)
    return f


@inner
def best_prices(u, y, d, kept, gp, G, R, th, key):
    """The θ that are best for the dual bound at u: from the R-th largest b²/d of each group's free columns."""
    for a in range(G):
        k = np.int64(0)
        for i in range(gp[a], gp[a + 1]):
            if kept[i] == 0:
                b = y[i] - d[i] * u[i]
                key[k] = b * b / d[i]
                k += 1
        th[a] = 0.0
        if R[a] > 0 and k > R[a]:
            th[a] = np.sqrt(kth_largest(key, k, R[a]))


@entry
def relax(u, y, M, c, dg, d, rd, kept, gp, G, R, th, const, thr, S, A, sc, x, h, key, price, trial, stop):
    """Improve u until the bound passes thr or settles; u stays where the descent only makes the bound worse.

    Returns the best bound and the last one, whose θ are in `price`. th: θ of the descent, a start for the next.
    """
    m = gp[G]
    best_prices(u, y, d, kept, gp, G, R, price, key)
    first = dual(u, y, c, d, kept, gp, G, R, price, const)
    if first >= thr:
        return first, first
    first_u = u[:m].copy()
    first_y = y[:m].copy()
    best = first
    last = -np.inf
    lb = -np.inf
    for it in range(25 if G == 1 else 60):
        best_theta(u, rd, kept, gp, G, R, trial)
        for a in range(G):
            if trial[a] > 0.0:
                th[a] = trial[a]
        for _ in range(2):
            sweep(u, y, M, dg, d, rd, kept, gp, G, th)
        best_theta(u, rd, kept, gp, G, R, th)
        if G == 1:
            for _ in range(4):
                th[0], cut, ok = newton(u, y, M, dg, d, rd, kept, R[0], th[0], m, S, A, sc, x, h, stop)
                if not ok or not cut:
                    break
        best_prices(u, y, d, kept, gp, G, R, price, key)
        lb = dual(u, y, c, d, kept, gp, G, R, price, const)
        best = max(best, lb)
        if lb >= thr or (it > 0 and lb - last <= 0.01 * (thr - lb)) or stop[0] != 0:
            break
        last = lb
    if lb < first:
        for i in range(m):
            u[i] = first_u[i]
            y[i] = first_y[i]
        best_prices(u, y, d, kept, gp, G, R, price, key)
        lb = first
    return best, lb
