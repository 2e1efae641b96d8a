"""CBS-U on a card: batched factorisations of blocks, the gradients' side of factors, conjugate gradients of rows.

Room: the core; `update` uses it where a card was chosen. All sums are in float64, but for the conjugate gradients,
whose residuals are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cbs_opt.curvature.base import Curvature, SharedRows
from cbs_opt.curvature.gradient_factor import GradientFactor
from cbs_opt.curvature.row_updates import CORRECTIONS, INNER, INNER_TOLERANCE, TOLERANCE, long_rows
from cbs_opt.device import Card, in_batches
from cbs_opt.interrupt import checkpoint
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_SMALLEST_PIVOT = 1e-7  # as on the CPU: below it a block is singular to working precision
_BATCHED = 1024  # weights of a block up to which blocks of a gradient factor are formed, many at a time
_PIECE_BYTES = 1 << 27  # of gradients in float64 that are used at a time
_SHARE = 6.0  # matrices of the size of a batch that are alive at a time

Blocks = Callable[[int], FloatArray]


def best_weights(
    curvature: Curvature, w: FloatArray, pruned: BoolArray, linear: FloatArray | None, card: Card
) -> FloatArray:
    """The weights after the best update of all blocks, float64 (n,): `Curvature.best_weights` on a card.

    What is singular to working precision there is left to the CPU, block by block.

    Notes
    -----
    Dense blocks and small blocks of gradient factors: O(b³/3) each, blocks of equal size in one batch. Larger
    blocks of a factor: O(m³/3 + m² q) for q kept weights. Rows that share a Hessian: a factorisation each, or,
    where they are long, products with all rows.
    """
    moves = np.zeros(curvature.n)
    left: list[int] = []
    shared, factor = curvature.shared_rows(), curvature.as_factor()
    if shared is not None:
        starts = {int(first): k for k, first in enumerate(curvature.offsets[:-1])}
        for rows in shared:
            failed = _update_shared(rows, w, pruned, linear, moves, card)
            left += [starts[int(rows.index[r, 0])] for r in failed]
    else:
        sizes = curvature.block_sizes
        for b in np.unique(sizes).tolist():
            blocks = np.flatnonzero(sizes == b)
            if factor is not None and b > _BATCHED:
                left += [
                    k for k in blocks.tolist() if not _by_gradients(factor, k, w, pruned, linear, moves, card)
                ]
            else:
                left += _batched(curvature, blocks, b, w, pruned, linear, moves, card)
    out = w + moves
    for k in left:
        checkpoint()
        part = curvature.block_slice(k)
        out[part] = w[part] + curvature.best_update(
            k, w[part], pruned[part], None if linear is None else linear[part]
        )
    out[pruned] = 0.0
    return out


def _tensor(array: np.ndarray, card: Card) -> torch.Tensor:
    return torch.tensor(array, device=card.device)


def _solve_masked(H: torch.Tensor, inside: torch.Tensor, rhs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X with H_II x_I = rhs_I and zeros elsewhere, (B, b), and whether each system is regular, bool (B,).

    Rows and columns outside of I, bool (B, b), are replaced by the identity, so that all systems have one size.
    """
    diagonal = H.diagonal(dim1=1, dim2=2)
    scale = torch.where(inside & (diagonal > 0), diagonal, 1.0).rsqrt()
    system = H * scale[:, :, None] * scale[:, None, :]
    system = torch.where(inside[:, :, None] & inside[:, None, :], system, 0.0)
    system.diagonal(dim1=1, dim2=2).masked_fill_(~inside, 1.0)
    L, info = torch.linalg.cholesky_ex(system)
    good = (info == 0) & (L.diagonal(dim1=1, dim2=2).amin(1) > _SMALLEST_PIVOT)
    L = torch.where(good[:, None, None], L, torch.eye(L.shape[1], dtype=L.dtype, device=L.device))
    right = torch.where(inside, rhs * scale, 0.0)[:, :, None]
    x = torch.cholesky_solve(right, L)[:, :, 0] * scale
    return torch.where(inside, x, 0.0), good & torch.isfinite(x).all(1)


def _batched(
    curvature: Curvature,
    blocks: IntArray,
    b: int,
    w: FloatArray,
    pruned: BoolArray,
    linear: FloatArray | None,
    moves: FloatArray,
    card: Card,
) -> list[int]:
    """Blocks of b weights, from H or H⁻¹, whichever is stored; returns those that are singular."""
    inverse = "inverse_hessian" in curvature.members
    matrix: Blocks = curvature.inverse_block if inverse else curvature.block
    singular: list[int] = []
    if inverse and linear is not None:
        return [int(k) for k in blocks]

    def solve(first: int, last: int) -> None:
        checkpoint()
        part = blocks[first:last]
        at = curvature.offsets[part][:, None] + np.arange(b)
        H = torch.stack([_tensor(matrix(int(k)), card) for k in part])
        P = _tensor(pruned[at], card)
        removed = torch.where(P, _tensor(w[at], card), 0.0)
        if inverse:  # δ = −H⁻¹_{:,P} ([H⁻¹]_PP)⁻¹ w_P
            price, good = _solve_masked(H, P, removed)
            move = -torch.bmm(H, price[:, :, None])[:, :, 0]
        else:
            right = torch.bmm(H, removed[:, :, None])[:, :, 0]
            if linear is not None:
                right -= _tensor(linear[at], card)
            move, good = _solve_masked(H, ~P, right)
        move = torch.where(P, -removed, move)
        moves[at] = move.cpu().numpy()
        singular.extend(part[~good.cpu().numpy()].tolist())

    size = max(1, int(card.free_bytes() / (8.0 * _SHARE * b * b)))
    in_batches(blocks.size, min(size, 4096), solve, lambda: False)
    return singular


def _by_gradients(
    factor: GradientFactor,
    k: int,
    w: FloatArray,
    pruned: BoolArray,
    linear: FloatArray | None,
    moves: FloatArray,
    card: Card,
) -> bool:
    """One large block: δ_K = G_Kᵀ (G_K G_Kᵀ + mλI)⁻¹ G_P w_P; False where the CPU has to do it."""
    part = factor.block_slice(k)
    kept = ~pruned[part]
    if linear is not None or int(kept.sum()) <= factor.m:
        return False
    pieces = []
    width = max(1, _PIECE_BYTES // (8 * factor.m))
    for first in range(0, part.stop - part.start, width):  # in their own type, which may be smaller
        columns = slice(first, min(first + width, part.stop - part.start))
        raw = factor.gradients[:, part.start + columns.start : part.start + columns.stop]
        pieces.append((columns, _tensor(raw, card).to(torch.float64)))
    removed = _tensor(np.where(kept, 0.0, w[part]), card)
    inside = _tensor(kept, card)
    M = torch.zeros(factor.m, factor.m, dtype=torch.float64, device=card.device)
    right = torch.zeros(factor.m, dtype=torch.float64, device=card.device)
    for columns, G in pieces:
        checkpoint()
        G_K = G[:, inside[columns]]
        M += G_K @ G_K.T
        right += G @ removed[columns]
    M.diagonal().add_(factor.m * factor.damping)
    everything = torch.ones(1, factor.m, dtype=torch.bool, device=card.device)
    coefficients, good = _solve_masked(M[None], everything, right[None])
    if not bool(good.all()):
        return False
    move = torch.cat([G.T @ coefficients[0] for _, G in pieces])
    moves[part] = torch.where(inside, move, -removed).cpu().numpy()
    return True


def _update_shared(
    rows: SharedRows,
    w: FloatArray,
    pruned: BoolArray,
    linear: FloatArray | None,
    moves: FloatArray,
    card: Card,
) -> IntArray:
    """Rows that share a Hessian; returns those where it is singular to working precision."""
    S = _tensor(rows.hessian, card)
    W, P = w[rows.index], pruned[rows.index]
    K = W.shape[1]
    g = None if linear is None else linear[rows.index] / rows.scale[:, None]
    long = long_rows(P)
    failed: list[IntArray] = []

    def right(part: IntArray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = _tensor(P[part], card)
        removed = torch.where(mask, _tensor(W[part], card), 0.0)
        side = removed @ S
        return mask, removed, side if g is None else side - _tensor(g[part], card)

    def keep(
        part: IntArray, mask: torch.Tensor, removed: torch.Tensor, x: torch.Tensor, good: torch.Tensor
    ) -> None:
        moves[rows.index[part]] = torch.where(mask, -removed, x).cpu().numpy()
        failed.append(part[~good.cpu().numpy()])

    def factorise(first: int, last: int) -> None:
        checkpoint()
        part = short[first:last]
        mask, removed, side = right(part)
        x, good = _solve_masked(S.expand(part.size, K, K), ~mask, side)
        keep(part, mask, removed, x, good)

    def descend(first: int, last: int) -> None:
        checkpoint()
        part = many[first:last]
        mask, removed, side = right(part)
        x, good = solve_rows(S, side, mask)
        keep(part, mask, removed, x, good)

    short, many = np.flatnonzero(~long), np.flatnonzero(long)
    room = card.free_bytes()
    in_batches(short.size, max(1, int(room / (8.0 * _SHARE * K * K))), factorise, lambda: False)
    in_batches(many.size, max(1, int(room / (200.0 * K))), descend, lambda: False)
    return np.sort(np.concatenate(failed)) if failed else np.zeros(0, np.int64)


def solve_rows(S: torch.Tensor, right: torch.Tensor, pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X with S_QQ x_Q = right_Q on the kept weights Q of each row, float64, and whether it got there, bool (R,).

    `row_updates.update_rows` on a card: conjugate gradients in float32, residuals in float64.
    """
    scale = S.diagonal().clamp_min(1e-300).rsqrt()
    unit = (S * scale[:, None] * scale).to(torch.float32)
    kept = (~pruned).to(torch.float32)
    x = torch.zeros_like(right)
    goal: torch.Tensor | None = None
    energy = torch.zeros(right.shape[0], dtype=torch.float64, device=right.device)
    for _ in range(CORRECTIONS):
        checkpoint()
        residual = torch.where(pruned, 0.0, (right - x @ S) * scale)
        energy = (residual * residual).sum(1)
        goal = TOLERANCE * energy if goal is None else goal
        if bool((energy <= goal).all()):
            break
        size = energy.clamp_min(1e-300).sqrt()[:, None]
        single = conjugate_gradients(unit, (residual / size).to(torch.float32), kept, INNER, INNER_TOLERANCE)
        x += single.to(torch.float64) * size * scale
    assert goal is not None
    return x, (energy <= goal) & torch.isfinite(x).all(1)


def conjugate_gradients(
    S: torch.Tensor, right: torch.Tensor, kept: torch.Tensor, iterations: int, tolerance: float
) -> torch.Tensor:
    """X with S_QQ x_Q ≈ right_Q for each row, zero elsewhere; S has a unit diagonal, `kept` is 1 on Q.

    `row_updates.solve_on_support` on a card, in the type of S; one product with all rows in each iteration.
    """
    tiny = torch.finfo(S.dtype).tiny
    x = torch.zeros_like(right)
    residual = right * kept
    direction = residual.clone()
    energy = (residual * residual).sum(1)
    goal = (tolerance * energy).clamp_min(tiny)
    for step in range(iterations):
        active = energy > goal
        if step % 10 == 9 and not bool(active.any()):
            break
        image = direction @ S
        bend = (direction * image).sum(1)
        going = active & (bend > 0)
        length = torch.where(going, energy / torch.where(going, bend, 1.0), 0.0)[:, None]
        x += length * direction
        residual -= length * image * kept
        new = (residual * residual).sum(1)
        direction = residual + torch.where(active, new / energy.clamp_min(tiny), 0.0)[:, None] * direction
        energy = torch.where(active, new, energy)
    return x
