"""A curvature of which only the form is known: `cbs-info` shows files of any size without reading them."""

from __future__ import annotations

from typing import NoReturn

from numpy.typing import ArrayLike

from cbs_opt.curvature.base import Curvature
from cbs_opt.errors import InstanceError
from cbs_opt.typing import FloatArray, IntArray
from cbs_opt.view import text


class CurvatureOutline(Curvature):
    """The form and the blocks of a curvature whose values have not been read.

    Parameters
    ----------
    kind : str
        Its name in the file format.
    block_sizes : int (K,)
    stored : int, optional
        Number of stored blocks, if blocks share them.
    details : facts
        Further names and values for display.

    Notes
    -----
    Every method that needs values raises `InstanceError`.
    """

    def __init__(
        self, kind: str, block_sizes: ArrayLike, stored: int | None = None, details: text.Facts | None = None
    ) -> None:
        self._set_blocks(block_sizes)
        self.kind = kind  # type: ignore[misc]  # of the values in the file
        self._stored, self._details = stored, details or []

    @property
    def number_of_stored(self) -> int:
        """Number of blocks that are stored: fewer where blocks share one."""
        return self.number_of_blocks if self._stored is None else self._stored

    def facts(self) -> text.Facts:
        """Names and values for display."""
        return [*super().facts(), *self._details]

    def diagonal(self) -> FloatArray:
        """Not known."""
        self._refuse()

    def inverse_diagonal(self) -> FloatArray:
        """Not known."""
        self._refuse()

    def block(self, k: int) -> FloatArray:
        """Not known."""
        self._refuse()

    def inverse_block(self, k: int) -> FloatArray:
        """Not known."""
        self._refuse()

    def columns(self, k: int, index: IntArray) -> FloatArray:
        """Not known."""
        self._refuse()

    def submatrix(self, k: int, rows: IntArray, columns: IntArray) -> FloatArray:
        """Not known."""
        self._refuse()

    def block_matmul(self, k: int, x: FloatArray) -> FloatArray:
        """Not known."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise InstanceError("only the outline of this instance has been read: read it with `read_instance`")
