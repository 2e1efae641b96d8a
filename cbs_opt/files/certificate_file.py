"""Reading and writing certificate files, `cbs-certificate` version 2: a checkable branch-and-bound tree.

Version 1 had no products.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.errors import SolutionError, UsageError
from cbs_opt.files.npz import NpzReader, json_text, write_npz
from cbs_opt.files.paths import as_path
from cbs_opt.typing import BoolArray, FloatArray, IntArray, RealArray

FORMAT = "cbs-certificate"
VERSION = 2

NOTHING, POINT, INHERIT, VALUE, COUNT = range(5)
"""What bounds a node: no feasible selection, a point of its own, the last point above it, what its pruned weights
cost, (leaves of the joint problem) all selections that are left, one by one."""
FRAME = 16
"""Added if a node has a new diagonal, which holds for the nodes below it too."""
LEAF, SINGLE = -1, -2
"""In `branch`, if a node has no child or one; else the weight that its two children decide."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """A proof that no feasible selection is cheaper than `bound`.

    Attributes
    ----------
    instance_sha256 : str
        Hash of the instance file; empty for an instance without a file.
    objective_kind : str
        "selection" or "joint".
    budget : int
    damping : float or None
        Damping of the run, if the curvature has one.
    pruned : bool (n,)
        The incumbent.
    objective, bound : float
        Its loss, and the lower bound that the trees prove.
    pieces : int32 (n,)
        Piece (connected component) of each open weight, −1 if `fixed` and the budgets leave no choice.
    tree_piece, tree_count, tree_nodes : int32, int32, int64 (T,)
        For each tree its piece, the number pruned in it (−1: the budgets of the groups), and its number of nodes.
    branch : int32 (N,)
        Weight that a node decides, `LEAF` or `SINGLE`; nodes in preorder, the child that keeps the weight first.
    how : uint8 (N,)
    fixed_counts : int32 (N,)
        Number of weights that each node decides by its bound.
    fixings : int32 (F,)
        These weights, as twice the index plus 1 if pruned.
    diagonals : float64
        One entry per open weight of every `FRAME`.
    product_counts : int32
        Number of pairs of every `FRAME`; all zero in the joint problem.
    products : int32 (2E,)
        These pairs of open weights, one after the other.
    product_prices : float64 (E,)
        The multiplier of each pair, positive.
    codes : uint8
        Bits of the points: whether the entry of an undecided weight is one of `numbers`; selection: else 0 or 1.
    numbers : float32 or float64
    """

    instance_sha256: str
    objective_kind: str
    budget: int
    damping: float | None
    pruned: BoolArray
    objective: float
    bound: float
    pieces: IntArray
    tree_piece: IntArray
    tree_count: IntArray
    tree_nodes: IntArray
    branch: IntArray
    how: NDArray[np.uint8]
    fixed_counts: IntArray
    fixings: IntArray
    diagonals: FloatArray
    product_counts: IntArray
    products: IntArray
    product_prices: FloatArray
    codes: NDArray[np.uint8]
    numbers: RealArray


_ARRAYS: dict[str, type[np.generic]] = {
    "pieces": np.int32,
    "tree_piece": np.int32,
    "tree_count": np.int32,
    "tree_nodes": np.int64,
    "branch": np.int32,
    "how": np.uint8,
    "fixed_counts": np.int32,
    "fixings": np.int32,
    "diagonals": np.float64,
    "product_counts": np.int32,
    "products": np.int32,
    "product_prices": np.float64,
    "codes": np.uint8,
}
_SECOND = ("product_counts", "products", "product_prices")  # of version 2


def is_certificate(path: Path) -> bool:
    """Whether a file has the format of a certificate; raises `SolutionError` if it cannot be read."""
    with NpzReader(path, SolutionError) as npz:
        return "format" in npz.headers and npz.headers["format"].dtype.kind == "U" and npz.text("format") == FORMAT


def read_certificate(path: Path | str) -> Certificate:
    """Read a certificate file; `cbs_opt.certificate.verify` checks what it proves.

    Raises
    ------
    SolutionError
        With one sentence that names the file and the field.
    """
    path = as_path(path)
    with NpzReader(path, SolutionError) as npz:
        npz.check_format(FORMAT, VERSION)
        old = npz.integer("version") == 1
        stored = {key: kind for key, kind in _ARRAYS.items() if not (old and key in _SECOND)}
        npz.check_keys({"format", "version", "instance_sha256", "claim", "pruned", "numbers", *stored}, set())
        claim = npz.json_object("claim")
        kind = claim.get("objective_kind")
        if kind not in ("selection", "joint"):
            raise SolutionError(f"{path}: `objective_kind` must be 'selection' or 'joint', got {str(kind)[:40]!r}")
        budget, damping = claim.get("budget"), claim.get("damping")
        if not isinstance(budget, int) or isinstance(budget, bool):
            raise SolutionError(f"{path}: `budget` must be a whole number, got {str(budget)[:40]!r}")
        values = {}
        for key in ("objective", "bound", *(() if damping is None else ("damping",))):
            value = claim.get(key)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise SolutionError(f"{path}: `{key}` must be a number, got {str(value)[:40]!r}")
            values[key] = float(value)
        (n,) = npz.expect("pruned", "bool", (None,)).shape
        npz.expect("numbers", "float", (None,))
        arrays: dict[str, Any] = {}
        for key, kind_ in stored.items():
            npz.expect(key, "float" if kind_ is np.float64 else "integer", (n,) if key == "pieces" else (None,))
            if npz.headers[key].dtype != kind_:
                raise SolutionError(
                    f"{path}: `{key}` must be {np.dtype(kind_).name}, got {npz.headers[key].dtype}"
                )
            arrays[key] = npz.read(key)
        for first, *others in (("tree_piece", "tree_count", "tree_nodes"), ("branch", "how", "fixed_counts")):
            for key in others:
                if arrays[key].size != arrays[first].size:
                    raise SolutionError(f"{path}: `{key}` must be as long as `{first}`, {arrays[first].size}")
        if old:
            frames = np.count_nonzero(arrays["how"] & FRAME)
            arrays |= {key: np.zeros(frames * (key == "product_counts"), _ARRAYS[key]) for key in _SECOND}
        return Certificate(
            instance_sha256=npz.text("instance_sha256"),
            objective_kind=str(kind),
            budget=budget,
            damping=values.get("damping"),
            pruned=npz.read("pruned"),
            objective=values["objective"],
            bound=values["bound"],
            numbers=npz.read("numbers"),
            **arrays,
        )


def write_certificate(path: Path | str, certificate: Certificate) -> None:
    """Write a certificate file.

    Raises
    ------
    OutputError
        When the file cannot be written; nothing is left behind then.
    UsageError
        For something else than a certificate.
    """
    if not isinstance(certificate, Certificate):
        raise UsageError(
            f"`certificate` must be a Certificate, got {type(certificate).__name__}: "
            "write_certificate(path, certificate)"
        )
    claim = {
        "objective_kind": certificate.objective_kind,
        "budget": certificate.budget,
        "damping": certificate.damping,
        "objective": certificate.objective,
        "bound": certificate.bound,
    }
    arrays: dict[str, NDArray[Any]] = {
        "format": np.array(FORMAT),
        "version": np.array(VERSION, dtype=np.int64),
        "instance_sha256": np.array(certificate.instance_sha256),
        "claim": json_text(claim),
        "pruned": certificate.pruned,
        "numbers": certificate.numbers,
    }
    for key, kind in _ARRAYS.items():
        arrays[key] = np.asarray(getattr(certificate, key), kind)
    write_npz(path, arrays)
