"""How many weights to prune: one number, one number per group, or also one per group of a second partition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.errors import InstanceError
from cbs_opt.scalars import is_whole
from cbs_opt.tiles import Tiles, cheapest_in_tiles, check_fixed, find_tiles
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
    cross_groups : int64 (n,), optional
        Group of each weight in a second partition, 0 … G'-1, as for transposable N:M patterns. Both partitions
        together form tiles: matrices of weights whose rows are groups and whose columns are cross groups.
    cross_group_budgets : int64 (G',), optional
        Weights to prune in each cross group; they sum to `total`, too.

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
    >>> crossed = Budget(2, [0, 0, 1, 1], [1, 1], cross_groups=[0, 1, 0, 1], cross_group_budgets=[1, 1])
    >>> crossed.cheapest(np.array([1.0, 2.0, 1.0, 9.0])).tolist()
    [False, True, True, False]
    """

    total: int
    groups: IntArray | None = None
    group_budgets: IntArray | None = None
    cross_groups: IntArray | None = None
    cross_group_budgets: IntArray | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.total):
            raise InstanceError(f"`budget` must be a whole number, got {self.total!r}")
        object.__setattr__(self, "total", int(self.total))
        if self.total < 0:
            raise InstanceError(f"`budget` must not be negative, got {self.total}")
        self._check_partition("groups", "group_budgets")
        self._check_partition("cross_groups", "cross_group_budgets")
        if self.cross_groups is None:
            return
        if self.groups is None:
            raise InstanceError("`cross_groups` is allowed only with `groups`, which it crosses")
        if self.groups.shape != self.cross_groups.shape:
            raise InstanceError(
                f"`cross_groups` must have shape ({self.groups.size},), that of `groups`, got "
                f"({self.cross_groups.size},)"
            )
        _ = self.tiles  # checks them

    def _check_partition(self, name: str, name_of_budgets: str) -> None:
        """Check and convert a partition and its budgets, which are the fields of these names."""
        given, given_budgets = getattr(self, name), getattr(self, name_of_budgets)
        if (given is None) != (given_budgets is None):
            missing = name if given is None else name_of_budgets
            raise InstanceError(f"`{name}` and `{name_of_budgets}` are required together: `{missing}` is missing")
        if given is None:
            return
        groups, budgets = _whole_numbers(name, given), _whole_numbers(name_of_budgets, given_budgets)
        object.__setattr__(self, name, groups)
        object.__setattr__(self, name_of_budgets, budgets)
        if groups.size and (groups.min() < 0 or groups.max() >= budgets.size):
            raise InstanceError(
                f"`{name}` must be in [0, {budgets.size - 1}] for {budgets.size} entries of "
                f"`{name_of_budgets}`, got {groups.min()} … {groups.max()}"
            )
        sizes = np.bincount(groups, minlength=budgets.size)
        wrong = (budgets < 0) | (budgets > sizes)
        if wrong.any():
            g = int(np.argmax(wrong))
            raise InstanceError(
                f"`{name_of_budgets}[{g}]` must be in [0, {sizes[g]}], the size of the group, got {budgets[g]}"
            )
        if int(budgets.sum()) != self.total:
            raise InstanceError(
                f"`{name_of_budgets}` must sum to `budget` = {self.total}, got {int(budgets.sum())}"
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
        if self.cross_groups is not None and self.cross_group_budgets is not None:
            sizes = text.sizes(np.bincount(self.cross_groups, minlength=self.cross_group_budgets.size))
            prune = text.sizes(self.cross_group_budgets)
            number = f"{self.cross_group_budgets.size:,}"
            rows.append(("cross groups", f"{number} of {sizes} weights, {prune} to prune in each"))
        return rows

    def __repr__(self) -> str:
        if self.groups is None:
            return f"Budget({self.total})"
        weights = text.count(self.groups.size, "weight")
        crossed = ""
        if self.cross_group_budgets is not None:
            crossed = f" and {text.count(self.cross_group_budgets.size, 'cross group')}"
        return f"<Budget: {self.total} of {weights} in {text.count(self.number_of_groups, 'group')}{crossed}>"

    def _repr_html_(self) -> str:
        return html.facts("Budget", self.facts(None if self.groups is None else self.groups.size))

    def group_of(self, n: int) -> IntArray:
        """int64 (n,): the group of each weight; zeros when there are no groups."""
        return np.zeros(n, dtype=np.int64) if self.groups is None else self.groups

    def group_sizes(self, n: int) -> IntArray:
        """int64 (G,): the number of weights in each group."""
        return np.bincount(self.group_of(n), minlength=self.number_of_groups).astype(np.int64)

    @cached_property
    def tiles(self) -> tuple[Tiles, ...]:
        """The tiles that groups and cross groups form, by shape; none without cross groups. O(n) once."""
        if self.groups is None or self.group_budgets is None:
            return ()
        if self.cross_groups is None or self.cross_group_budgets is None:
            return ()
        return find_tiles(self.groups, self.group_budgets, self.cross_groups, self.cross_group_budgets)

    def partitions(self, n: int) -> Iterator[tuple[IntArray, IntArray]]:
        """Yield the group of each weight, int64 (n,), and the budgets, of each partition: one, or two."""
        yield self.group_of(n), self.per_group
        if self.cross_groups is not None and self.cross_group_budgets is not None:
            yield self.cross_groups, self.cross_group_budgets

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
            When there are groups and they hold fewer weights, or there are cross groups.
        """
        if total == self.total:
            return self
        if self.groups is None:
            return Budget(total)
        if self.cross_groups is not None:
            raise InstanceError(
                f"the groups and cross groups of the budget fix its total, {self.total}: it cannot become {total}"
            )
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
        for name, (group, budgets) in zip(("group", "cross group"), self.partitions(n), strict=False):
            must = np.bincount(group[fixed == 1], minlength=budgets.size)
            may = np.bincount(group[fixed != -1], minlength=budgets.size)
            wrong = (must > budgets) | (may < budgets)
            if wrong.any():
                g = int(np.argmax(wrong))
                where = "" if self.groups is None else f" in {name} {g}"
                raise InstanceError(
                    f"`fixed` contradicts the budget: between {must[g]} and {may[g]} weights can be "
                    f"pruned{where}, the budget is {budgets[g]}"
                )
        check_fixed(self.tiles, fixed)

    def is_met_by(self, pruned: BoolArray) -> bool:
        """Whether `pruned`, bool (n,), removes the right number of weights in every group and cross group."""
        return all(
            np.array_equal(np.bincount(group[pruned], minlength=budgets.size), budgets)
            for group, budgets in self.partitions(pruned.size)
        )

    def of_part(self, index: IntArray | slice, pruned: BoolArray) -> Budget:
        """The budget of some of the weights, with the numbers that a selection prunes in each group.

        Parameters
        ----------
        index : slice or int64 (k,)
            The weights.
        pruned : bool (k,)
            Their part of a selection.

        Raises
        ------
        InstanceError
            Where the weights cut a tile of groups and cross groups.
        """
        if self.groups is None:
            return Budget(int(pruned.sum()))
        fields = []
        for group, _ in self.partitions(self.groups.size):
            names, own = np.unique(group[index], return_inverse=True)
            fields += [own, np.bincount(own[pruned], minlength=names.size)]
        return Budget(int(pruned.sum()), *fields)

    def cheapest(self, scores: FloatArray, fixed: ArrayLike | None = None) -> BoolArray:
        """Prune the lowest `scores` that the budget and `fixed` allow.

        Parameters
        ----------
        scores : float (n,)
            The price of each weight; ties go to the lower index, with cross groups to either.
        fixed : int8 (n,), optional
            1 must be pruned, −1 must be kept, 0 undecided.

        Returns
        -------
        bool (n,)
            True where pruned. O(n log n) time; O(n) without groups; with cross groups see `cheapest_in_tiles`.
        """
        n = scores.size
        if self.cross_groups is not None:
            return cheapest_in_tiles(self.tiles, scores, fixed)
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
