"""Searches on dense blocks in Triton: one program for each block and start, its state in registers.

Both do what the kernels of the same name in `cbs_opt.solvers.kernels.selection_numba` do on a core of one block
and one group; in float64 they give the same points. A block of b weights is padded to P, a power of two; the rows
of Q are read from memory, where the starts of one block share them in the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(state):
    """One step of the splitmix64 generator, in uint64."""
    state = state + 0x9E3779B97F4A7C15
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return state, z ^ (z >> 31)


@triton.jit(do_not_specialize=["clock", "steps", "stall"])
def tabu_swaps(
    q,
    half,
    y,
    h,
    release,
    best,
    f,
    f_best,
    idle,
    rng,
    tenure,
    active,
    clock,
    steps,
    stall,
    starts,
    P: tl.constexpr,
):
    """Drop/add tabu search of all lanes; a lane is a block and a start.

    q (B, P, P), half (B, P): the halved diagonal; y, best int8, h, release int32 (B, S, P); f, f_best, idle int32,
    rng int64, tenure int32 (B, S); `active` (B, S) is 0 for lanes that stay as they are. Changed in place.
    """
    lane = tl.program_id(0).to(tl.int64)
    block = lane // starts
    if tl.load(active + lane) != 0:
        at = tl.arange(0, P)
        q += block * P * P
        cost = tl.load(half + block * P + at)
        h_ = tl.load(h + lane * P + at)
        y_ = tl.load(y + lane * P + at).to(tl.int32)
        best_ = tl.load(best + lane * P + at).to(tl.int32)
        release_ = tl.load(release + lane * P + at)
        f_ = tl.load(f + lane)
        f_best_ = tl.load(f_best + lane)
        idle_ = tl.load(idle + lane)
        rng_ = tl.load(rng + lane).to(tl.uint64, bitcast=True)
        tenure_ = tl.load(tenure + lane)
        inf = float("inf")
        now = clock + 0
        last = clock + steps
        while (now < last) & (idle_ < stall):
            allowed = release_ <= now
            now += 1
            idle_ += 1
            gain, i = tl.min(tl.where(allowed & (y_ == 1), cost - h_, inf), 0, return_indices=True)
            if gain < inf:
                h_ -= tl.load(q + i * P + at)
                y_ = tl.where(at == i, 0, y_)
                price, j = tl.min(
                    tl.where(allowed & (y_ == 0) & (at != i), cost + h_, inf), 0, return_indices=True
                )
                none = price == inf
                j = tl.where(none, i, j)
                price = tl.where(none, -gain, price)
                h_ += tl.load(q + j * P + at)
                y_ = tl.where(at == j, 1, y_)
                f_ += gain + price
                rng_, z = _mix(rng_)
                wait = now + tenure_ + (z % tenure_.to(tl.uint64)).to(tl.int32)
                release_ = tl.where(at == i, wait, release_)
                if j != i:
                    rng_, z = _mix(rng_)
                    wait = now + tenure_ + (z % tenure_.to(tl.uint64)).to(tl.int32)
                    release_ = tl.where(at == j, wait, release_)
                if f_ < f_best_ - 1e-12 * tl.abs(f_best_):
                    f_best_ = f_
                    best_ = y_
                    idle_ = idle_ * 0
        tl.store(h + lane * P + at, h_)
        tl.store(y + lane * P + at, y_.to(tl.int8))
        tl.store(best + lane * P + at, best_.to(tl.int8))
        tl.store(release + lane * P + at, release_)
        tl.store(f + lane, f_)
        tl.store(f_best + lane, f_best_)
        tl.store(idle + lane, idle_)
        tl.store(rng + lane, rng_.to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=["steps"])
def pair_descent(q, curvature, shift, x, h, sizes, tolerance, done, steps, starts, P: tl.constexpr):
    """Second-order pairwise descent of the (possibly concave) box QP of all lanes.

    q (B, P, P); curvature = diag(Q) − shift, shift, x, h (B, S, P); sizes int32 (B,); tolerance (B, S); x and h
    change in place, `done` int32 (B, S) receives the steps taken, fewer than `steps` where no pair violates
    optimality.
    """
    lane = tl.program_id(0).to(tl.int64)
    block = lane // starts
    at = tl.arange(0, P)
    inside = at < tl.load(sizes + block)
    q += block * P * P
    curvature_ = tl.load(curvature + lane * P + at)
    shift_ = tl.load(shift + lane * P + at)
    x_ = tl.load(x + lane * P + at)
    h_ = tl.load(h + lane * P + at)
    least = tl.load(tolerance + lane)
    inf = float("inf")
    taken = 0
    going = 1
    while (taken < steps) & (going == 1):
        low, i = tl.min(tl.where(inside & (x_ < 1.0), h_, inf), 0, return_indices=True)
        here = at == i
        nothing = h_ * 0.0
        row = tl.load(q + i * P + at)
        room = 1.0 - tl.sum(tl.where(here, x_, nothing), 0)
        bend = tl.sum(tl.where(here, curvature_, nothing), 0)
        slope = h_ - low
        a = bend + curvature_ - 2.0 * row
        move = tl.minimum(x_, room)
        move = tl.where(a * move > slope, slope / tl.where(a == 0.0, 1.0, a), move)
        value = move * (slope - 0.5 * a * move)
        value = tl.where(inside & (slope > least) & (x_ > 0.0), value, nothing)
        gain, j = tl.max(value, 0, return_indices=True)
        if (gain > 0.0) & (low < inf):
            there = at == j
            step = tl.sum(tl.where(there, move, nothing), 0)
            other = tl.load(q + j * P + at)
            x_ = tl.where(here, tl.where(step == room, 1.0, x_ + step), x_)
            x_ = tl.where(there, tl.where(step == x_, 0.0, x_ - step), x_)
            h_ = tl.where(here, h_ - step * shift_, h_)
            h_ = tl.where(there, h_ + step * shift_, h_)
            h_ += step * (row - other)
            taken += 1
        else:
            going = 0
    tl.store(x + lane * P + at, x_)
    tl.store(h + lane * P + at, h_)
    tl.store(done + lane, taken)
