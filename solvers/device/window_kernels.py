"""Algorithm 1 in Triton: the windows and acceptances of one step, one program for each start."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def partner_costs(
    q, row_start, block_first, block_size, diagonal, s, P, cost, n, members, size, p, CHUNK: tl.constexpr
):
    """β_j − γ_{π1,j} = s_j + A_jj − 2 A_ij of all members j, i the first of P; program (start, chunk)."""
    start = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = at < size
    i = tl.load(P + start * p)
    j = tl.load(members + at, mask=inside, other=0)
    first = tl.load(block_first + i)
    same = inside & (tl.load(block_first + j, mask=inside, other=-1) == first)
    entry = tl.load(q + tl.load(row_start + i) + (j - first), mask=same, other=0.0)
    value = tl.load(s + start * n + j, mask=inside, other=0.0) + tl.load(diagonal + j, mask=inside, other=0.0)
    tl.store(cost + start * size + at, value - 2.0 * entry, mask=inside)


@triton.jit(do_not_specialize=["most"])
def window_swaps(
    q,
    row_start,
    block_first,
    block_size,
    diagonal,
    s,
    x,
    P,
    C,
    available,
    epsilon,
    swaps,
    progress,
    n,
    p,
    c,
    rho,
    tau,
    most,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """At most `most` weights of P of a step of Algorithm 1 in one group; s (doubled gradient), x change in place.

    q holds the rows of Q of all blocks, row i from row_start[i] on, its block from the weight block_first[i] on.
    P (p,) is π, C (c,) is θ, available (c,) is 1 where no swap took a position of θ yet; progress (2,) is the next
    position in π and the number of failures so far; each for every start. A step whose position is p, or whose
    failures are more than τ, is over.
    """
    start = tl.program_id(0).to(tl.int64)
    s += start * n
    x += start * n
    P += start * p
    C += start * c
    available += start * c
    least = tl.load(epsilon + start)
    lanes = tl.arange(0, WIDTH)
    offsets = tl.arange(0, CHUNK)
    taken = 0
    k = tl.load(progress + 2 * start)
    failures = tl.load(progress + 2 * start + 1)
    end = tl.minimum(p, k + most)
    while (k < end) & (failures <= tau):
        i = tl.load(P + k)
        first_i = tl.load(block_first + i)
        row_i = tl.load(row_start + i)
        # The first pair is tried alone; if it does not gain, the search has converged.
        low = tl.where(k == 0, 0, tl.maximum(k - rho, 1))
        high = tl.where(k == 0, 1, tl.minimum(k + rho, c))
        at = low + lanes
        open_ = at < high
        open_ = open_ & (tl.load(available + at, mask=open_, other=0) != 0)
        j = tl.load(C + at, mask=open_, other=0)
        same = open_ & (tl.load(block_first + j, mask=open_, other=-1) == first_i)
        entry = tl.load(q + row_i + (j - first_i), mask=same, other=0.0)
        alpha = tl.load(s + i) - tl.load(diagonal + i)
        beta = tl.load(s + j, mask=open_, other=0.0) + tl.load(diagonal + j, mask=open_, other=0.0)
        gain = alpha - beta + 2.0 * entry
        found = tl.min(tl.where(open_ & (gain >= least), lanes, WIDTH), 0)
        if found < WIDTH:
            partner = tl.load(C + low + found)
            first_j = tl.load(block_first + partner)
            row_j = tl.load(row_start + partner)
            tl.debug_barrier()  # nobody still reads what is written next
            tl.store(available + low + found, 0)
            tl.store(x + i, 0)
            tl.store(x + partner, 1)
            size_i = tl.load(block_size + i).to(tl.int32)
            for from_ in range(0, size_i, CHUNK):
                here = from_ + offsets < size_i
                old = tl.load(s + first_i + from_ + offsets, mask=here, other=0.0)
                row = tl.load(q + row_i + from_ + offsets, mask=here, other=0.0)
                new = old - 2.0 * row
                if first_j == first_i:
                    other = tl.load(q + row_j + from_ + offsets, mask=here, other=0.0)
                    new = new + 2.0 * other
                tl.store(s + first_i + from_ + offsets, new, mask=here)
            if first_j != first_i:
                size_j = tl.load(block_size + partner).to(tl.int32)
                for from_ in range(0, size_j, CHUNK):
                    here = from_ + offsets < size_j
                    old = tl.load(s + first_j + from_ + offsets, mask=here, other=0.0)
                    row = tl.load(q + row_j + from_ + offsets, mask=here, other=0.0)
                    tl.store(s + first_j + from_ + offsets, old + 2.0 * row, mask=here)
            tl.debug_barrier()  # the next windows read s and `available`
            taken += 1
        else:
            failures += tl.where(k == 0, tau + 1, 1)
        k += 1
    tl.store(progress + 2 * start, k)
    tl.store(progress + 2 * start + 1, failures)
    tl.store(swaps + start, tl.load(swaps + start) + taken)
