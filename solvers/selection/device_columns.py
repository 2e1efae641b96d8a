"""Q of a presolved problem on a card: products with many points, and the matrices of cores.

Room: selection; `device_relaxation` and `device_search` use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cbs_opt.device import Card
from cbs_opt.interrupt import checkpoint
from cbs_opt.solvers.problem.columns import Columns, DenseBlock, FactorBlock
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.incumbent import Incumbent
from cbs_opt.typing import FloatArray, IntArray

_DENSE_ROWS = 4096  # of Q made at a time
_DOUBLE_SHARE = 0.3  # of the free memory up to which rows of gradients are kept in float64


@dataclass(frozen=True)
class _Bundle:
    """Blocks of equal size and kind.

    Attributes
    ----------
    blocks : list of int
    at : int64 (K·b,) or slice
        Their variables.
    matrices : (K, b, m) or (K, b, b)
    factored : bool
    """

    blocks: list[int]
    at: torch.Tensor | slice
    matrices: torch.Tensor
    factored: bool


def columns_bytes(columns: Columns) -> float:
    """Memory of Q in float64, as it is stored."""
    return 8.0 * sum(
        float(block.rows.size) if isinstance(block, FactorBlock) else float(block.Q.size)
        for block in columns.blocks
        if isinstance(block, FactorBlock | DenseBlock)
    )


class DeviceColumns:
    """The blocks of `Columns` on a card.

    Parameters
    ----------
    columns : Columns
    card : Card

    Attributes
    ----------
    diagonal, ridge : float64 (r,)
        Q_ii, and the part of it that lies beside the products: of factors, and of uncoupled variables.
    """

    def __init__(self, columns: Columns, card: Card) -> None:
        self.columns, self.device = columns, card.device
        self.diagonal = self.tensor(columns.diagonal)
        ridge = np.zeros(columns.n)
        kinds: dict[tuple[bool, int, int], list[int]] = {}
        for k, block in enumerate(columns.blocks):
            part = slice(int(columns.starts[k]), int(columns.starts[k + 1]))
            if isinstance(block, FactorBlock):
                ridge[part] = block.ridge
                kinds.setdefault((True, *block.rows.shape), []).append(k)
            elif isinstance(block, DenseBlock):
                kinds.setdefault((False, *block.Q.shape), []).append(k)
            else:
                ridge[part] = block.diagonal()
        self.ridge = self.tensor(ridge)
        double = columns_bytes(columns) <= _DOUBLE_SHARE * card.free_bytes()
        dtype = torch.float64 if double else torch.float32
        self.place: dict[int, tuple[int, int]] = {}
        self.bundles: list[_Bundle] = []
        for (factored, size, depth), blocks in kinds.items():
            matrices = torch.empty(len(blocks), size, depth, dtype=dtype, device=self.device)
            for position, k in enumerate(blocks):
                checkpoint()
                block = columns.blocks[k]
                source = block.rows if isinstance(block, FactorBlock) else block.submatrix(np.arange(size))
                matrices[position] = self.tensor(source)
                self.place[k] = len(self.bundles), position
            starts = columns.starts[blocks]
            where = (starts[:, None] + np.arange(size)).ravel()
            whole = where.size == where[-1] - where[0] + 1
            at = slice(int(where[0]), int(where[-1]) + 1) if whole else self.tensor(where)
            self.bundles.append(_Bundle(blocks, at, matrices, factored))

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """A copy on the card."""
        return torch.tensor(array, device=self.device)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Qx of many points, float64 (R, r), in products of matrices; or of one, (r,)."""
        if x.ndim == 1:
            return self.product(x[None])[0]
        out = self.ridge * x
        for bundle in self.bundles:
            K, b = bundle.matrices.shape[:2]
            mine = x[:, bundle.at].view(x.shape[0], K, b).transpose(0, 1).to(bundle.matrices.dtype)
            if bundle.factored:
                mine = torch.bmm(torch.bmm(mine, bundle.matrices), bundle.matrices.transpose(1, 2))
            else:
                mine = torch.bmm(mine, bundle.matrices)
            out[:, bundle.at] += mine.transpose(0, 1).reshape(x.shape[0], -1).to(torch.float64)
        return out

    def core_matrices(self, cores: list[tuple[int, IntArray]], padded: int) -> torch.Tensor:
        """Q of cores, float64 (B, P, P), zero beyond each core; a core is a block and variables of it, local."""
        out = torch.zeros(len(cores), padded, padded, dtype=torch.float64, device=self.device)
        for b, (k, local) in enumerate(cores):
            number, position = self.place[k]
            bundle, n = self.bundles[number], int(local.size)
            at = self.tensor(local)
            rows = bundle.matrices[position][at].to(torch.float64)
            if bundle.factored:
                out[b, :n, :n] = rows @ rows.T
                start = int(self.columns.starts[k])
                out[b, :n, :n].diagonal().add_(self.ridge[start + at])
            else:
                out[b, :n, :n] = rows[:, at]
        return out

    def dense(self, k: int, padded: int) -> torch.Tensor:
        """Q of block k, float32 (padded, padded), zero beyond it; sums in float64 where the rows are."""
        number, position = self.place[k]
        bundle = self.bundles[number]
        rows = bundle.matrices[position]
        n = int(rows.shape[0])
        out = torch.zeros(padded, padded, dtype=torch.float32, device=self.device)
        for first in range(0, n, _DENSE_ROWS):
            checkpoint()
            part = rows[first : first + _DENSE_ROWS]
            out[first : first + _DENSE_ROWS, :n] = part @ rows.T if bundle.factored else part
        start = int(self.columns.starts[k])
        out.diagonal()[:n].add_(self.ridge[start : start + n].to(torch.float32))
        return out


class DeviceIncumbent(Incumbent):
    """An incumbent whose gradients come from the card; the same to the rounding of the products."""

    def __init__(self, problem: SelectionProblem, y: FloatArray, there: DeviceColumns) -> None:
        self.there = there
        super().__init__(problem, y)

    def copy(self) -> DeviceIncumbent:
        """An independent copy, gradient included."""
        other = object.__new__(DeviceIncumbent)
        other.__dict__.update(self.__dict__)
        other.y, other.g = self.y.copy(), self.g.copy()
        return other

    def loss(self) -> float:
        """The loss in units of the instance, from the product on the card."""
        return self.problem.from_units(self.f)

    def refresh(self) -> None:
        """Compute gradient and objective from scratch."""
        self.g = self.there.product(self.there.tensor(self.y)).cpu().numpy().copy()
        self.f = float(0.5 * self.y @ self.g + self.problem.linear @ self.y)

    def move(self, index: IntArray, values: FloatArray) -> None:
        """Set y[index] = values and update gradient and objective."""
        self.y[index] = values
        self.refresh()
