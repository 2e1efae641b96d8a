"""The selection objective of an instance on a card: values and gradients of many selections at once, and Q."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cbs_opt.device import Card, Work
from cbs_opt.interrupt import checkpoint
from cbs_opt.selection import SelectionObjective
from cbs_opt.typing import FloatArray

_PIECE_BYTES = 1 << 26  # of the curvature brought to the card at a time


@dataclass(frozen=True)
class Bundle:
    """Blocks of equal size.

    Attributes
    ----------
    blocks : list of int
    columns : int64 (K·b,)
        The weights of the blocks, one block after the other; a slice where they are consecutive.
    matrices : float64 (K, b, m) or (K, b, b)
        Rows w_i g_i / √m of a gradient factor, or Q.
    """

    blocks: list[int]
    columns: torch.Tensor | slice
    matrices: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Number and size of the blocks."""
        return int(self.matrices.shape[0]), int(self.matrices.shape[1])

    def of(self, X: torch.Tensor) -> torch.Tensor:
        """The part of X, (R, n), that belongs to the blocks: (K, R, b)."""
        K, b = self.shape
        return X[:, self.columns].view(X.shape[0], K, b).transpose(0, 1)


class DeviceObjective:
    """½ xᵀQx + cᵀx on a card, in float64.

    Parameters
    ----------
    problem : SelectionObjective
    card : Card

    Notes
    -----
    Memory: 8 m n bytes for a gradient factor, 8 Σ b_k² for dense blocks, and 8 n for each of the selections.
    """

    def __init__(self, problem: SelectionObjective, card: Card) -> None:
        self.problem, self.device = problem, card.device
        curvature, factor = problem.curvature, problem.curvature.as_factor()
        self.factored = factor is not None
        self.n = curvature.n
        self.c = self.tensor(problem.c)
        w = self.tensor(problem.w)
        self.ridge = torch.zeros_like(w) if factor is None else factor.damping * w * w
        sizes = curvature.block_sizes
        self.bundles: list[Bundle] = []
        for b in np.unique(sizes).tolist():
            blocks = np.flatnonzero(sizes == b).tolist()
            depth = int(b) if factor is None else factor.m
            matrices = torch.empty(len(blocks), b, depth, dtype=torch.float64, device=self.device)
            for k, block in enumerate(blocks):
                part = curvature.block_slice(block)
                if factor is None:
                    checkpoint()
                    matrices[k] = self.tensor(curvature.block(block)) * w[part, None] * w[part]
                    continue
                width = max(1, _PIECE_BYTES // (8 * factor.m))
                for first in range(part.start, part.stop, width):  # in their own type, which may be smaller
                    checkpoint()
                    columns = slice(first, min(first + width, part.stop))
                    piece = self.tensor(factor.gradients[:, columns]).to(torch.float64)
                    rows = piece.T * (w[columns, None] / np.sqrt(factor.m))
                    matrices[k, columns.start - part.start : columns.stop - part.start] = rows
            where = np.concatenate([np.arange(s.start, s.stop) for s in map(curvature.block_slice, blocks)])
            whole = where.size == where[-1] - where[0] + 1
            columns_ = slice(int(where[0]), int(where[-1]) + 1) if whole else self.tensor(where)
            self.bundles.append(Bundle(blocks, columns_, matrices))

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """A copy on the card, of the type of the array."""
        return torch.tensor(array, device=self.device)

    def values(self, X: torch.Tensor) -> torch.Tensor:
        """Objectives, float64 (R,), of selections, bool (R, n)."""
        x = X.to(torch.float64)
        out = x @ (self.c + 0.5 * self.ridge)
        for bundle in self.bundles:
            mine = bundle.of(x)
            moved = torch.bmm(mine, bundle.matrices)
            out += 0.5 * ((moved if self.factored else mine) * moved).sum((0, 2))
        return out

    def products(self, X: torch.Tensor) -> torch.Tensor:
        """Qx, float64 (R, n), for x of any values, float64 (R, n)."""
        out = self.ridge * X
        for bundle in self.bundles:
            moved = torch.bmm(bundle.of(X), bundle.matrices)
            if self.factored:
                moved = torch.bmm(moved, bundle.matrices.transpose(1, 2))
            out[:, bundle.columns] += moved.transpose(0, 1).reshape(X.shape[0], -1)
        return out

    def matrix_bytes(self) -> int:
        """Memory of Q of all blocks."""
        return int(8 * sum(bundle.shape[0] * bundle.shape[1] ** 2 for bundle in self.bundles))

    def matrices(self, should_stop: Callable[[], bool] = lambda: False) -> list[torch.Tensor]:
        """Q of all blocks in their order, float64 (b, b) each; formed for a gradient factor, O(m b²)."""
        out: list[torch.Tensor] = [self.c] * sum(bundle.shape[0] for bundle in self.bundles)
        for bundle in self.bundles:
            for k, block in enumerate(bundle.blocks):
                if should_stop():
                    return out
                Q = bundle.matrices[k]
                if self.factored:
                    Q = Q @ Q.T
                    part = self.problem.curvature.block_slice(block)
                    Q.diagonal().add_(self.ridge[part])
                out[block] = Q
        return out


def evaluation_work(problem: SelectionObjective, selections: int) -> Work:
    """What the evaluation of many selections costs."""
    curvature, factor = problem.curvature, problem.curvature.as_factor()
    entries = float(factor.gradients.size) if factor is not None else float((curvature.block_sizes**2.0).sum())
    n = float(curvature.n)
    return Work(
        what=f"the losses of {selections} selections of {curvature.n} weights",
        flops64=2.0 * entries * selections,
        moved=8.0 * (entries + 20.0 * n * min(selections, 256)),
        upload=8.0 * entries,
        launches=20.0 + 4.0 * np.unique(curvature.block_sizes).size,
        memory=8.0 * (entries + 12.0 * n * min(selections, 256)) + (1 << 28),
        cpu_seconds=2.0 * entries * selections / 4e10 + selections * n * 2.5e-7,
    )


def host(tensor: torch.Tensor) -> FloatArray:
    """A copy in the memory of the computer."""
    return np.array(tensor.detach().cpu().numpy())
