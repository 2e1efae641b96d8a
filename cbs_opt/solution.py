"""A selection as stored in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cbs_opt.typing import BoolArray, FloatArray


class HasSolution(Protocol):
    """What can be written as a solution, such as a `Result`."""

    def to_solution(self) -> Solution:
        """The selection with its weights and the JSON of the run."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A selection as stored in a file.

    Attributes
    ----------
    pruned : bool (n,)
    instance_sha256 : str
        Hash of the instance file that it belongs to; empty for an instance without a file.
    weights : float64 (n,) or None
    result : mapping
        The JSON of the run that found it; may be empty.
    """

    pruned: BoolArray
    instance_sha256: str = ""
    weights: FloatArray | None = None
    result: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        updated = "" if self.weights is None else ", weights updated"
        solver = self.result.get("solver")
        origin = f" of {solver}" if isinstance(solver, str) else ""
        return f"<Solution{origin}: {int(self.pruned.sum())} of {self.pruned.size} weights pruned{updated}>"
