"""How many weights to prune: one number, or one number per group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.errors import InstanceError
from cbs_opt.scalars import is_whole
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.view import html, text


def number_of(sparsity: float, n: int) -> int:
    """How many of n weights a sparsity between 0 and 1 prunes: ⌈sparsity · n⌉."""
    # The product of a decimal fraction and n may exceed a whole number by a rounding error.
    return min(n, math.ceil(sparsity * n - 1e-9 * n))


@dataclass(frozen=True, eq=False)
class Budget:
    """Number of weights to prune, over all weights or per group.

    Parameters
    ----------
    total : int
        Weights to prune in all, 0 … n.
    groups : int64 (n,), optional
        Group of each weight, 0 … G-1: layers, rows, or the cells of an N:M pattern.
    group_budgets : int64 (G,), optional
        Weights to prune in each group; they sum to `total`.

    Raises
    ------
    InstanceError
        When the numbers are inconsistent.

    Examples
    --------
    >>> Budget(3).total
    3
    >>> Budget(2, groups=[0, 0, 1, 1], group_budgets=[1, 1]).number_of_groups
    2
    """

    total: int
    groups: IntArray | None = None
    group_budgets: IntArray | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.total):
            raise InstanceError(f"`budget` must be a whole number, got {self.total!r}")
        object.__setattr__(self, "total", int(self.total))
        if self.total < 0:
            raise InstanceError(f"`budget` must not be negative, got {self.total}")
        if (self.groups is None) != (self.group_budgets is None):
            missing = "groups" if self.groups is None else "group_budgets"
            raise InstanceError(f"`groups` and `group_budgets` are required together: `{missing}` is missing")
        if self.groups is None or self.group_budgets is None:
            return
        groups = _whole_numbers("groups", self.groups)
        group_budgets = _whole_numbers("group_budgets", self.group_budgets)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "group_budgets", group_budgets)
        if groups.size and (groups.min() < 0 or groups.max() >= group_budgets.size):
            raise InstanceError(
                f"`groups` must be in [0, {group_budgets.size - 1}] for {group_budgets.size} entries of "
                f"`group_budgets`, got {groups.min()} … {groups.max()}"
            )
        wrong = (group_budgets < 0) | (group_budgets > self.group_sizes(groups.size))
        if wrong.any():
            g = int(np.argmax(wrong))
            raise InstanceError(
                f"`group_budgets[{g}]` must be in [0, {self.group_sizes(groups.size)[g]}], the size of the "
                f"group, got {group_budgets[g]}"
            )
        if int(group_budgets.sum()) != self.total:
            raise InstanceError(
                f"`group_budgets` must sum to `budget` = {self.total}, got {int(group_budgets.sum())}"
            )

    @property
    def number_of_groups(self) -> int:
        """G, 1 when there are no groups."""
        return 1 if self.group_budgets is None else self.group_budgets.size

    @property
    def per_group(self) -> IntArray:
        """int64 (G,): number to prune in each group; `[total]` when there are no groups."""
        return np.array([self.total], dtype=np.int64) if self.group_budgets is None else self.group_budgets

    def facts(self, n: int | None = None) -> text.Facts:
        """Names and values for display; with shares of the `n` weights if n is given."""
        of = f" of {n:,} ({text.share(self.total, n)})" if n else ""
        rows = [("budget", f"{self.total:,} to prune{of}")]
        if self.groups is not None:
            sizes = text.sizes(self.group_sizes(self.groups.size))
            prune = text.sizes(self.per_group)
            rows.append(("groups", f"{self.number_of_groups:,} of {sizes} weights, {prune} to prune in each"))
        return rows

    def __repr__(self) -> str:
        if self.groups is None:
            return f"Budget({self.total})"
        weights = text.count(self.groups.size, "weight")
        return f"<Budget: {self.total} of {weights} in {text.count(self.number_of_groups, 'group')}>"

    def _repr_html_(self) -> str:
        return html.facts("Budget", self.facts(None if self.groups is None else self.groups.size))

    def group_of(self, n: int) -> IntArray:
        """int64 (n,): the group of each weight; zeros when there are no groups."""
        return np.zeros(n, dtype=np.int64) if self.groups is None else self.groups

    def group_sizes(self, n: int) -> IntArray:
        """int64 (G,): the number of weights in each group."""
        return np.bincount(self.group_of(n), minlength=self.number_of_groups).astype(np.int64)

    @cached_property
    def _order_by_group(self) -> IntArray:
        assert self.groups is not None
        return np.argsort(self.groups, kind="stable").astype(np.int64)

    def members(self, n: int) -> Iterator[IntArray]:
        """Yield the indices of each group in increasing order, int64 arrays; O(n log n) once, O(n) then."""
        if self.groups is None:
            yield np.arange(n, dtype=np.int64)
            return
        ends = np.cumsum(self.group_sizes(n))
        for g in range(self.number_of_groups):
            yield self._order_by_group[ends[g - 1] if g else 0 : ends[g]]

    @cached_property
    def in_order(self) -> bool:
        """Whether every group is a run of consecutive weights, and the runs are in the order of the groups."""
        return self.groups is not None and bool((self.groups[1:] >= self.groups[:-1]).all())

    @cached_property
    def cell(self) -> tuple[int, int] | None:
        """Pruned weights and size of a group, where all groups are runs of weights of one size, else None."""
        if self.groups is None or self.group_budgets is None or not self.in_order or not self.groups.size:
            return None
        n, m = int(self.group_budgets[0]), self.groups.size // self.number_of_groups
        same = (self.group_budgets == n).all() and (self.group_sizes(self.groups.size) == m).all()
        return (n, m) if same else None

    def with_total(self, total: int) -> Budget:
        """The same budget for another number of weights in all.

        Parameters
        ----------
        total : int
            0 … n. With fewer weights than now each group prunes the same multiple of its budget, with more it
            keeps the same multiple of what it keeps now: layers with one fraction have one fraction again. Whole
            numbers by largest remainders; between equal ones, as in N:M patterns, a fixed random order decides.

        Raises
        ------
        InstanceError
            When there are groups and they hold fewer weights.
        """
        if self.groups is None or total == self.total:
            return Budget(total, self.groups, self.group_budgets)
        sizes, old = self.group_sizes(self.groups.size), self.per_group
        n = int(sizes.sum())
        if not 0 <= total <= n:
            raise InstanceError(f"`budget` must be in [0, {n}], got {total}")
        if total < self.total:
            wanted = old * (total / self.total)
        else:
            wanted = sizes - (sizes - old) * ((n - total) / (n - self.total))
        counts = np.floor(wanted + 1e-9).astype(np.int64)
        ties = np.random.default_rng(0).permutation(counts.size)
        order = np.lexsort((ties, counts - wanted))
        order = order[counts[order] < sizes[order]]
        counts[order[: total - int(counts.sum())]] += 1
        return Budget(total, self.groups, counts)

    def check_fits(self, n: int, fixed: ArrayLike | None = None) -> None:
        """Raise `InstanceError` unless some selection of the `n` weights meets the budget and `fixed`."""
        if self.groups is not None and self.groups.size != n:
            raise InstanceError(f"`groups` must have shape ({n},), got ({self.groups.size},)")
        if self.total > n:
            raise InstanceError(f"`budget` must be in [0, {n}], got {self.total}")
        if fixed is None:
            return
        fixed = np.asarray(fixed)
        group = self.group_of(n)
        must = np.bincount(group[fixed == 1], minlength=self.number_of_groups)
        may = self.group_sizes(n) - np.bincount(group[fixed == -1], minlength=self.number_of_groups)
        wrong = (must > self.per_group) | (may < self.per_group)
        if wrong.any():
            g = int(np.argmax(wrong))
            where = "" if self.groups is None else f" in group {g}"
            raise InstanceError(
                f"`fixed` contradicts the budget: between {must[g]} and {may[g]} weights can be "
                f"pruned{where}, the budget is {self.per_group[g]}"
            )

    def is_met_by(self, pruned: BoolArray) -> bool:
        """Whether `pruned`, bool (n,), removes the right number of weights in every group."""
        counts = np.bincount(self.group_of(pruned.size)[pruned], minlength=self.number_of_groups)
        return bool(np.array_equal(counts, self.per_group))

    def cheapest(self, scores: FloatArray, fixed: ArrayLike | None = None) -> BoolArray:
        """Prune the lowest `scores` that the budget and `fixed` allow.

        Parameters
        ----------
        scores : float (n,)
            The price of each weight; ties go to the lower index.
        fixed : int8 (n,), optional
            1 must be pruned, −1 must be kept, 0 undecided.

        Returns
        -------
        bool (n,)
            True where pruned. O(n log n) time; O(n) without groups.
        """
        n = scores.size
        if self.groups is None:
            return self._cheapest_of_all(scores, fixed)
        rank = np.zeros(n) if fixed is None else -np.sign(np.asarray(fixed, dtype=np.float64))
        if self.cell is not None:
            count, size = self.cell
            cells = scores.reshape(-1, size)
            if fixed is None:
                order = np.argsort(cells, axis=1, kind="stable")[:, :count]
            else:
                order = np.lexsort((cells, rank.reshape(-1, size)), axis=1)[:, :count]
            chosen = np.zeros((n // size, size), dtype=bool)
            np.put_along_axis(chosen, order, True, axis=1)
            return chosen.ravel()
        group = self.group_of(n)
        order = np.lexsort((scores, rank, group))
        first = np.cumsum(self.group_sizes(n)) - self.group_sizes(n)
        position = np.arange(n) - first[group[order]]
        pruned = np.zeros(n, dtype=bool)
        pruned[order] = position < self.per_group[group[order]]
        return pruned

    def _cheapest_of_all(self, scores: FloatArray, fixed: ArrayLike | None) -> BoolArray:
        """`cheapest` without groups, by selection in place of sorting."""
        pruned = np.zeros(scores.size, dtype=bool)
        free = None
        if fixed is not None:
            pruned = np.asarray(fixed) > 0
            free = np.flatnonzero(np.asarray(fixed) == 0)
        left = scores if free is None else scores[free]
        count = self.total - int(pruned.sum())
        if count <= 0:
            return pruned
        if count >= left.size:
            chosen = np.ones(left.size, dtype=bool)
        else:
            last = np.partition(left, count - 1)[count - 1]
            chosen = left < last
            ties = np.flatnonzero(left == last)
            chosen[ties[: count - int(chosen.sum())]] = True
        pruned[slice(None) if free is None else free] = chosen
        return pruned


def _whole_numbers(name: str, values: ArrayLike) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InstanceError(
            f"`{name}` must be a one-dimensional array of integers, got {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array
