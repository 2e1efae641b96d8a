"""Tabu search on one large dense block in Triton: a row of Q is added and the next candidate found in one pass.

The programs of a start share the work by tiles of variables. `cost` holds what flipping each variable alone costs,
½ Q_kk + (1 − 2 y_k) h_k, so that a pass reads and writes one number for each variable besides the row of Q.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wait(seed, count, tenure):
    """Steps that a variable waits, tenure … 2 tenure − 1; `count` numbers the draws of a start."""
    z = seed + (count + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return tenure + (z % tenure.to(tl.uint64)).to(tl.int32)


@triton.jit
def _best_tile(value, index, start, tiles, TILES: tl.constexpr):
    """The least value of all tiles of a start, and its index."""
    at = tl.arange(0, TILES)
    v = tl.load(value + start * tiles + at, mask=at < tiles, other=float("inf"))
    least, tile = tl.min(v, 0, return_indices=True)
    return least, tl.load(index + start * tiles + tile)


@triton.jit
def first_candidates(cost, state, drop_value, drop_index, n, tiles, TILE: tl.constexpr):
    """The cheapest drop of every tile; program (start, tile)."""
    start = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    c = tl.load(cost + start * n + at, mask=at < n, other=float("inf"))
    s = tl.load(state + start * n + at, mask=at < n, other=2)
    least, k = tl.min(tl.where(s == 1, c, float("inf")), 0, return_indices=True)
    tl.store(drop_value + start * tiles + tile, least)
    tl.store(drop_index + start * tiles + tile, (tile * TILE + k).to(tl.int32))


@triton.jit
def drop_step(
    q, cost, state, drop_value, drop_index, add_value, add_index, dropped, gain, clock, next_clock, n, tiles,
    TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Drop the cheapest variable: subtract its row, and find the cheapest addition of every tile.

    state (S, n) int8: bit 0 is y, bit 1 is set for a tabu variable.
    """
    start = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < n
    here = start * n + at
    c = tl.load(cost + here, mask=inside, other=float("inf"))
    s = tl.load(state + here, mask=inside, other=2)
    least, i = _best_tile(drop_value, drop_index, start, tiles, TILES)
    if least < float("inf"):
        row = tl.load(q + i.to(tl.int64) * n + at, mask=inside, other=0.0)
        c = tl.where((s & 1) == 1, c + row, c - row)
        # i itself is flipped by the addition that follows; its cost is not looked at before that.
        tl.store(cost + here, c, mask=inside & (at != i))
    value, k = tl.min(tl.where((s == 0) & (at != i), c, float("inf")), 0, return_indices=True)
    tl.store(add_value + start * tiles + tile, value)
    tl.store(add_index + start * tiles + tile, (tile * TILE + k).to(tl.int32))
    if tile == 0:
        tl.store(dropped + start, i)
        tl.store(gain + start, least)
        tl.store(next_clock + start, tl.load(clock + start) + 1)


@triton.jit
def add_step(
    q, cost, state, drop_value, drop_index, add_value, add_index, dropped, gain, clock, next_clock,
    tabu_index, tabu_release, seed, tenure, f, f_best, best_clock, moves, began, n, tiles,
    SLOTS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the cheapest variable: add its row, free what has waited long enough, find the cheapest drops.

    tabu_index, tabu_release (S, SLOTS): what is tabu, written in a circle; moves (steps, S, 2): the two variables
    of every step since the clock `began`, −1 where there was none.
    """
    start = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    first = tile * TILE
    at = first + tl.arange(0, TILE)
    inside = at < n
    here = start * n + at
    now = tl.load(next_clock + start)
    i = tl.load(dropped + start)
    given = tl.load(gain + start)
    done = given < float("inf")
    price, j = _best_tile(add_value, add_index, start, tiles, TILES)
    none = price == float("inf")
    j = tl.where(none, i, j)
    price = tl.where(none, -given, price).to(cost.dtype.element_ty)
    slots = tl.arange(0, SLOTS)
    old = tl.load(tabu_index + start * SLOTS + slots)
    free = (tl.load(tabu_release + start * SLOTS + slots) == now) & (old >= first) & (old < first + TILE)
    freed = tl.load(state + start * n + old, mask=free, other=0)
    tl.debug_barrier()  # a value is read by all before one writes it
    tl.store(state + start * n + old, (freed & 1).to(tl.int8), mask=free)
    tl.debug_barrier()  # the tile below reads what was just written
    s = tl.load(state + here, mask=inside, other=2)
    c = tl.load(cost + here, mask=inside, other=float("inf"))
    if done:
        row = tl.load(q + j.to(tl.int64) * n + at, mask=inside, other=0.0)
        cross = tl.load(q + i.to(tl.int64) * n + j)
        c = tl.where((s & 1) == 1, c - row, c + row)
        # Flipped alone: ½Q + (1 − 2y) h. After the drop of i its h fell by Q_ii, so that flipping it back costs
        # −given; the addition of j changes that by Q_ij. Flipping j back costs −price by the same rule.
        changed_i = tl.where(i == j, given, -given + cross).to(c.dtype)
        c = tl.where(at == i, changed_i, c)
        c = tl.where((at == j) & (i != j), -price, c)
        s = tl.where(at == i, 2, s)
        s = tl.where(at == j, 3, s)
        tl.store(cost + here, c, mask=inside)
        tl.store(state + here, s.to(tl.int8), mask=inside & ((at == i) | (at == j)))
    value, k = tl.min(tl.where(s == 1, c, float("inf")), 0, return_indices=True)
    tl.store(drop_value + start * tiles + tile, value)
    tl.store(drop_index + start * tiles + tile, (first + k).to(tl.int32))
    if tile == 0:
        tl.store(clock + start, now)
        step = (now - 1 - tl.load(began)).to(tl.int64)
        at_move = moves + (step * tl.num_programs(0) + start) * 2
        if done:
            tl.store(at_move, i)
            tl.store(at_move + 1, j)
            seed_ = tl.load(seed + start).to(tl.uint64, bitcast=True)
            wait = tl.load(tenure + start)
            slot = tabu_index + start * SLOTS + (2 * now) % SLOTS
            release = tabu_release + start * SLOTS + (2 * now) % SLOTS
            tl.store(slot, i)
            tl.store(release, now + _wait(seed_, 2 * now, wait))
            if i != j:
                tl.store(slot + 1, j)
                tl.store(release + 1, now + _wait(seed_, 2 * now + 1, wait))
            total = tl.load(f + start) + given.to(tl.float64) + price.to(tl.float64)
            tl.store(f + start, total)
            least = tl.load(f_best + start)
            if total < least - 1e-12 * tl.abs(least):
                tl.store(f_best + start, total)
                tl.store(best_clock + start, now)
        else:
            tl.store(at_move, -1)
            tl.store(at_move + 1, -1)
