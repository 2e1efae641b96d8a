"""The problem: trained weights, the curvature of the loss around them, and a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.budget import Budget, number_of
from cbs_opt.curvature.base import Curvature
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.scalars import is_finite, is_integer
from cbs_opt.typing import FloatArray
from cbs_opt.view import html, text

if TYPE_CHECKING:
    from networkx import Graph


@dataclass(frozen=True, eq=False)
class Instance:
    """A pruning problem; its data are checked on construction.

    Parameters
    ----------
    weights : float (n,)
        Trained weights w̄; kept as float64.
    curvature : Curvature
        Block-diagonal H.
    budget : Budget or int
        How many weights to prune.
    linear : float (n,), optional
        Mean gradient g at w̄: both losses then gain gᵀδ and may be negative.
    fixed : int8 (n,), optional
        1 must be pruned, −1 must be kept, 0 undecided.
    metadata : mapping, optional
        Describes the origin: network, tensors, data, samples. JSON types only.
    path : Path, optional
        The file it was read from.
    sha256 : str, optional
        Hash of that file: solutions carry it.

    Raises
    ------
    InstanceError
        When the parts are inconsistent; the message names the field.

    Examples
    --------
    >>> import numpy as np
    >>> from cbs_opt import HessianBlocks, Instance
    >>> Instance(np.array([1.0, 2.0]), HessianBlocks.from_blocks([np.eye(2)]), 1).n
    2
    """

    weights: FloatArray
    curvature: Curvature
    budget: Budget
    linear: FloatArray | None = None
    fixed: NDArray[np.int8] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, Curvature):
            raise InstanceError(
                "`curvature` must be a Curvature, such as HessianBlocks.from_blocks([H]), got "
                f"{type(self.curvature).__name__}"
            )
        if not isinstance(self.metadata, Mapping):
            raise InstanceError(f"`metadata` must be a mapping, got {type(self.metadata).__name__}")
        if not isinstance(self.budget, Budget):
            object.__setattr__(self, "budget", Budget(self.budget))  # type: ignore[unreachable]
        n = self.curvature.n
        object.__setattr__(self, "weights", _vector("weights", self.weights, n))
        if self.linear is not None:
            object.__setattr__(self, "linear", _vector("linear", self.linear, n))
        if self.fixed is not None:
            fixed = np.asarray(self.fixed)
            if fixed.shape != (n,) or not np.issubdtype(fixed.dtype, np.signedinteger):
                raise InstanceError(f"`fixed` must be int8 of shape ({n},), got {fixed.dtype} {fixed.shape}")
            if np.abs(fixed.astype(np.int64)).max() > 1:
                raise InstanceError("`fixed` must hold only 1 (prune), -1 (keep) and 0 (free)")
            fixed = fixed.astype(np.int8)
            fixed.flags.writeable = False
            object.__setattr__(self, "fixed", fixed)
        self.budget.check_fits(n, self.fixed)

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.weights.size

    def with_budget(self, total: int) -> Instance:
        """The same problem with another budget; groups change in proportion, see `Budget.with_total`.

        Raises
        ------
        UsageError
            When it does not fit, or the instance has an N:M pattern, which another budget would break.
        """
        if total == self.budget.total:
            return self
        if self.budget.groups is not None and "nm" in self.metadata:
            raise UsageError(
                f"the instance has the pattern {self.metadata['nm']}, which prunes {self.budget.total} weights: "
                "another `--budget`, `--keep` or `--sparsity` would break it"
            )
        try:
            return replace(self, budget=self.budget.with_total(total))
        except InstanceError as error:
            raise UsageError(str(error)) from None

    def with_sparsity(self, sparsity: float) -> Instance:
        """The same problem with p = ⌈sparsity · n⌉ weights to prune."""
        if not is_finite(sparsity) or not 0 <= sparsity <= 1:
            raise UsageError(f"`sparsity` must be a number between 0 and 1, got {sparsity!r}")
        return self.with_budget(number_of(sparsity, self.n))

    def with_kept(self, keep: int) -> Instance:
        """The same problem with `keep` weights that stay: n − keep to prune, as in best-subset selection.

        Raises
        ------
        UsageError
            When it is no whole number from 0 to n, or as `with_budget`.
        """
        if not is_integer(keep) or not 0 <= keep <= self.n:
            raise UsageError(
                f"`keep` must be a whole number from 0 to {self.n}, the number of weights, got {keep!r}"
            )
        return self.with_budget(self.n - int(keep))

    def with_damping(self, damping: float) -> Instance:
        """The same problem with another λ; raises `UsageError` unless the curvature is a gradient factor."""
        curvature = self.curvature.with_damping(damping)
        # A stated objective, such as that of a regression, is one of the former damping.
        keep = damping == self.curvature.damping
        metadata = {key: value for key, value in self.metadata.items() if keep or key != "stated_objective"}
        return replace(self, curvature=curvature, metadata=metadata)

    def admits(self, pruned: NDArray[np.bool_]) -> bool:
        """Whether `pruned`, bool (n,), meets the budget and `fixed`."""
        if pruned.shape != (self.n,) or not self.budget.is_met_by(pruned):
            return False
        return self.fixed is None or not ((self.fixed == 1) & ~pruned | (self.fixed == -1) & pruned).any()

    def identity(self) -> dict[str, Any]:
        """The identification of an instance in results and solutions; JSON types only."""
        return {
            "path": None if self.path is None else str(self.path),
            "sha256": self.sha256,
            "n": self.n,
            "blocks": self.curvature.number_of_blocks,
            "budget": self.budget.total,
        }

    def interaction_graph(self, threshold: float = 0.0, **options: Any) -> Graph:
        """The strongly coupled pairs of weights, as a networkx graph.

        For the options and the contents of the graph see `cbs_opt.interactions.interaction_graph`.
        """
        from cbs_opt.interactions import interaction_graph

        return interaction_graph(self, threshold, **options)

    def facts(self) -> text.Facts:
        """Names and values of the main properties, as text."""
        rows = [("weights", f"{self.n:,}"), *self.curvature.facts(), *self.budget.facts(self.n)]
        if self.linear is not None:
            rows.append(("linear", "first-order term"))
        if self.fixed is not None:
            must, stay = int((self.fixed == 1).sum()), int((self.fixed == -1).sum())
            rows.append(("fixed", f"{must:,} must be pruned, {stay:,} must stay"))
        for name, value in (("network", self.metadata.get("network")), ("file", self.path)):
            if value is not None:
                rows.append((name, str(value)))
        return rows

    def __repr__(self) -> str:
        return f"<Instance: {self.describe()}>"

    def _repr_html_(self) -> str:
        return html.facts("Instance", self.facts())

    def describe(self) -> str:
        """One line: size, form of the Hessian, budget."""
        curvature = self.curvature
        form = curvature.describe()
        blocks = "1 block" if curvature.number_of_blocks == 1 else f"{curvature.number_of_blocks} blocks"
        extras = "".join(
            [
                "" if self.budget.groups is None else f", {self.budget.number_of_groups} groups",
                "" if (crossed := self.budget.cross_group_budgets) is None else f", {crossed.size} cross groups",
                "" if self.linear is None else ", linear term",
                "" if self.fixed is None else f", {int(np.count_nonzero(self.fixed))} fixed",
            ]
        )
        return (
            f"{self.n} weights in {blocks} ({form}), {self.budget.total} to prune "
            f"({self.budget.total / self.n:.1%}){extras}"
        )


def _vector(name: str, values: FloatArray, n: int) -> FloatArray:
    array = np.asarray(values)
    if array.dtype.newbyteorder("=") not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise InstanceError(f"`{name}` must be float32 or float64, got {array.dtype}")
    if array.shape != (n,):
        raise InstanceError(f"`{name}` must have shape ({n},), the sum of `block_sizes`, got {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise InstanceError(f"`{name}` has NaN or infinite entries")
    array.flags.writeable = False
    return array
