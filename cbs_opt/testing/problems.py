"""Small random problems of every kind, each with the dense matrices from which it was made."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cbs_opt.budget import Budget
from cbs_opt.curvature import Curvature, GradientFactor, HessianBlocks, InverseHessianBlocks, SharedBlocks
from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray, FloatArray

CASES: Mapping[str, Mapping[str, Any]] = {
    "hessian": {"kind": "hessian"},
    "inverse hessian": {"kind": "inverse_hessian"},
    "gradients": {"kind": "gradients"},
    "few gradients": {"kind": "gradients", "m": 3, "n": 10},
    "float32 gradients": {"kind": "gradients", "dtype": np.float32},
    "hessian, blocks": {"kind": "hessian", "blocks": 3, "n": 10},
    "inverse hessian, blocks": {"kind": "inverse_hessian", "blocks": 4, "n": 11},
    "gradients, blocks": {"kind": "gradients", "blocks": 3, "n": 10, "m": 4},
    "layers": {"kind": "hessian", "blocks": 2, "groups": "layers", "n": 10},
    "rows": {"kind": "gradients", "groups": "rows", "n": 10},
    "2:4": {"kind": "inverse_hessian", "groups": "2:4", "n": 12},
    "tiles": {"kind": "hessian", "groups": "tiles", "n": 12},
    "tiles, blocks": {"kind": "inverse_hessian", "groups": "tiles", "n": 16, "blocks": 2},
    "tiles, linear": {"kind": "gradients", "groups": "tiles", "n": 12, "linear": True},
    "fixed, tiles": {"kind": "hessian", "groups": "tiles", "n": 16, "fixed": True},
    "tiles of shared rows": {"kind": "hessian", "shared": (0, 0, 0, 0), "groups": "tiles", "n": 16},
    "tiles of shared rows, everything": {
        "kind": "hessian",
        "shared": (0, 0, 1, 1),
        "n": 16,
        "groups": "tiles",
        "linear": True,
        "fixed": True,
    },
    "shared hessian": {"kind": "hessian", "shared": (0, 0, 0), "n": 9},
    "shared inverse hessians": {"kind": "inverse_hessian", "shared": (1, 0, 1, 0), "n": 12},
    "shared gradients": {"kind": "gradients", "shared": (0, 0), "n": 10, "m": 3},
    "shared, everything": {
        "kind": "hessian",
        "shared": (0, 1, 0),
        "n": 9,
        "groups": "layers",
        "linear": True,
        "fixed": True,
    },
    "linear": {"kind": "gradients", "linear": True},
    "linear, blocks": {"kind": "inverse_hessian", "linear": True, "blocks": 3},
    "fixed": {"kind": "hessian", "fixed": True},
    "fixed, 2:4": {"kind": "gradients", "fixed": True, "groups": "2:4"},
    "everything": {
        "kind": "inverse_hessian",
        "blocks": 3,
        "groups": "layers",
        "linear": True,
        "fixed": True,
        "n": 10,
    },
    "indefinite": {"kind": "hessian", "indefinite": True, "n": 9},
    "indefinite, everything": {
        "kind": "hessian",
        "indefinite": True,
        "blocks": 3,
        "groups": "layers",
        "linear": True,
        "fixed": True,
        "n": 10,
    },
    "nothing to prune": {"kind": "gradients", "budget": 0},
    "nothing to prune, linear": {"kind": "hessian", "budget": 0, "linear": True},
    "everything to prune": {"kind": "inverse_hessian", "budget": 8, "blocks": 2},
    "everything to prune, linear": {"kind": "gradients", "budget": 8, "linear": True},
    "one weight, kept": {"kind": "hessian", "n": 1, "budget": 0},
    "one weight, pruned": {"kind": "inverse_hessian", "n": 1, "budget": 1},
    "blocks of one": {"kind": "gradients", "n": 6, "blocks": 6},
    "zero weights": {"kind": "gradients", "weights": [0, 0, 0, 1, -2, 0.5, 0, 0]},
    "all weights zero": {"kind": "hessian", "weights": [0.0] * 8},
    "zero gradients": {"kind": "gradients", "zero_columns": (1, 2, 6)},
    "ties": {"kind": "hessian", "weights": [1, -1, 1, -1, 1, -1, 1, -1], "zero_columns": range(8)},
    "badly scaled": {"kind": "gradients", "weights": [1e-6, 1e6, -1, 1e3, -1e-3, 1, 1e-6, -2]},
}
"""Arguments of `make_problem`, by the name of the special case."""


@dataclass(frozen=True)
class Problem:
    """An instance with its dense H and g, from which losses are computed by textbook formulae.

    Attributes
    ----------
    instance : Instance
    H : float64 (n, n)
    g : float64 (n,)
        Zero where the instance has no linear term.
    """

    instance: Instance
    H: FloatArray
    g: FloatArray

    @property
    def w(self) -> FloatArray:
        """The weights."""
        return self.instance.weights

    def selection_loss(self, pruned: BoolArray) -> float:
        """gᵀδ + ½ δᵀHδ with δ = −w on the pruned weights."""
        delta = np.where(pruned, -self.w, 0.0)
        return float(self.g @ delta + 0.5 * delta @ self.H @ delta)

    @property
    def convex(self) -> bool:
        """Whether H is positive semidefinite, so that there is a joint loss."""
        return bool(np.linalg.eigvalsh(self.H)[0] >= -1e-12 * np.abs(self.H).max())

    def joint_loss(self, pruned: BoolArray) -> float:
        """Eqs 10-12 with explicit inverses, around the unconstrained minimiser u = −H⁻¹g."""
        inverse = np.linalg.inv(self.H)
        u = -inverse @ self.g
        free = self.g @ u + 0.5 * u @ self.H @ u
        P = np.flatnonzero(pruned)
        residual = self.w[P] + u[P]
        return float(free + 0.5 * residual @ np.linalg.solve(inverse[np.ix_(P, P)], residual))

    def loss(self, objective: str, pruned: BoolArray) -> float:
        """The loss of an objective, "selection" or "joint"."""
        return self.selection_loss(pruned) if objective == "selection" else self.joint_loss(pruned)

    def selections(self) -> Iterator[BoolArray]:
        """Every feasible selection, by itertools, not by the code of the package."""
        n, budget = self.instance.n, self.instance.budget
        groups = [0] * n if budget.groups is None else budget.groups.tolist()
        wanted = [budget.total] if budget.group_budgets is None else budget.group_budgets.tolist()
        crossed = [0] * n if budget.cross_groups is None else budget.cross_groups.tolist()
        wanted_across = [budget.total]
        if budget.cross_group_budgets is not None:
            wanted_across = budget.cross_group_budgets.tolist()
        fixed = [0] * n if self.instance.fixed is None else self.instance.fixed.tolist()
        for chosen in itertools.combinations(range(n), budget.total):
            counts, counts_across = [0] * len(wanted), [0] * len(wanted_across)
            for i in chosen:
                counts[groups[i]] += 1
                counts_across[crossed[i]] += 1
            inside = set(chosen)
            met = counts == wanted and counts_across == wanted_across
            if met and all(f == 0 or (f == 1) == (i in inside) for i, f in enumerate(fixed)):
                pruned = np.zeros(n, dtype=bool)
                pruned[list(chosen)] = True
                yield pruned

    def optimum(self, objective: str) -> float:
        """The least loss of any feasible selection."""
        return min(self.loss(objective, pruned) for pruned in self.selections())

    def scale(self) -> float:
        """A typical size of the losses, for tolerances."""
        return float(0.5 * np.abs(self.w) @ np.abs(self.H) @ np.abs(self.w) + np.abs(self.g) @ np.abs(self.w))


def make_problem(
    seed: int = 0,
    *,
    n: int = 8,
    kind: str = "gradients",
    blocks: int = 1,
    budget: int | None = None,
    groups: str | None = None,
    linear: bool = False,
    fixed: bool = False,
    m: int | None = None,
    damping: float = 1e-3,
    weights: ArrayLike | None = None,
    zero_columns: Any = (),
    dtype: DTypeLike = np.float64,
    shared: Sequence[int] | None = None,
    indefinite: bool = False,
) -> Problem:
    """Make a random problem.

    Parameters
    ----------
    seed : int
    n, blocks : int
        Weights, and consecutive blocks of random sizes.
    kind : {"gradients", "hessian", "inverse_hessian"}
        Form of the curvature.
    budget : int, optional
        Weights to prune, half of them when not given.
    groups : {None, "layers", "rows", "2:4", "tiles"}
        Budgets per group, half of each: three in order, n/2 interleaved, four in a row; or rows of four with cross
        groups, in tiles of two by two.
    linear, fixed : bool
        With a first-order term; with the first weight pruned and the last kept.
    m : int, optional
        Gradients, n + 2 when not given.
    damping : float
    weights : float (n,), optional
        Random ones when not given.
    zero_columns : index
        Weights without any gradient.
    dtype : float32 or float64
        Of the gradients.
    shared : sequence of int, optional
        As many equal blocks; block k is a multiple of stored block shared[k].
    indefinite : bool
        Half of the largest diagonal entry is subtracted from the diagonal of H; for the kind "hessian".
    """
    if shared is not None:
        shared_parts = _shared_blocks(seed, n // len(shared), kind, shared, m, damping)
        return _problem(np.random.default_rng([seed, 2]), *shared_parts, budget, groups, linear, fixed, weights)
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, n), size=blocks - 1, replace=False)).tolist() if blocks > 1 else []
    sizes = np.diff([0, *cuts, n]).astype(np.int64)
    m = n + 2 if m is None else m
    G: NDArray[Any] = rng.standard_normal((m, n)) * rng.uniform(0.2, 2.0, n)
    G[:, list(zero_columns)] = 0.0
    G = G.astype(dtype)
    curvature, H = make_curvature(kind, G, damping, sizes)
    if indefinite:
        H = H - 0.5 * H.diagonal().max() * np.eye(n)
        ends = np.cumsum(sizes).tolist()
        curvature = HessianBlocks.from_blocks([H[a:b, a:b] for a, b in itertools.pairwise([0, *ends])])
    return _problem(rng, curvature, H, budget, groups, linear, fixed, weights)


def make_curvature(
    kind: str, gradients: NDArray[Any], damping: float, sizes: ArrayLike | None = None
) -> tuple[Curvature, FloatArray]:
    """H = λI + GᵀG/m in each block and 0 outside, in one of the three forms, and as a dense matrix.

    Parameters
    ----------
    kind : {"gradients", "hessian", "inverse_hessian"}
    gradients : float (m, n)
    damping : float
        Positive for an inverse, unless G has full rank.
    sizes : int (K,), optional
        Of the blocks; one block when not given.

    Returns
    -------
    curvature : Curvature
    H : float64 (n, n)
    """
    m, n = gradients.shape
    ends = np.cumsum([n] if sizes is None else np.asarray(sizes)).tolist()
    H = np.zeros((n, n))
    parts = []
    for start, stop in itertools.pairwise([0, *ends]):
        G = gradients[:, start:stop].astype(np.float64)
        H[start:stop, start:stop] = G.T @ G / m + damping * np.eye(stop - start)
        parts.append(H[start:stop, start:stop])
    if kind == "gradients":
        return GradientFactor(gradients, damping, np.diff([0, *ends])), H
    if kind == "hessian":
        return HessianBlocks.from_blocks(parts), H
    return InverseHessianBlocks.from_blocks([(A + A.T) / 2 for A in map(np.linalg.inv, parts)]), H


def _problem(
    rng: np.random.Generator,
    curvature: Curvature,
    H: FloatArray,
    budget: int | None,
    groups: str | None,
    linear: bool,
    fixed: bool,
    weights: ArrayLike | None,
) -> Problem:
    n = curvature.n
    w = rng.standard_normal(n) if weights is None else np.asarray(weights, dtype=np.float64)
    g = 0.3 * rng.standard_normal(n) if linear else None
    instance = Instance(
        w,
        curvature,
        _budget(groups, n, n // 2 if budget is None else budget),
        linear=g,
        fixed=_fixed(n) if fixed else None,
    )
    return Problem(instance, H, np.zeros(n) if g is None else g)


def _shared_blocks(
    seed: int, b: int, kind: str, shared: Sequence[int], m: int | None, damping: float
) -> tuple[Curvature, FloatArray]:
    """Blocks H_k = scale_k · S of a few stored S, and the dense H that they represent."""
    sizes = np.full(max(shared) + 1, b)
    factor = make_problem(seed, n=int(sizes.sum()), m=m or b + 2, damping=damping).instance.curvature
    assert isinstance(factor, GradientFactor)
    stored, dense = make_curvature(kind, factor.gradients, damping, sizes)
    parts = [dense[s * b : (s + 1) * b, s * b : (s + 1) * b] for s in range(sizes.size)]
    scale = np.random.default_rng([seed, 1]).uniform(0.25, 4.0, len(shared))
    H = np.zeros((b * len(shared), b * len(shared)))
    for k, s in enumerate(shared):
        H[k * b : (k + 1) * b, k * b : (k + 1) * b] = scale[k] * parts[s]
    return SharedBlocks(stored, shared, scale), H


def _budget(groups: str | None, n: int, total: int) -> Budget:
    if groups is None:
        return Budget(total)
    index = np.arange(n)
    if groups == "tiles":
        row, column = np.divmod(index, 4)
        of, across = 2 * row + column // 2, 4 * (row // 2) + column
        whole = (np.bincount(across) == 2)[across]  # nothing is pruned in the lower half of a tile that ends early
        counts = [np.bincount(group[whole], minlength=int(group.max()) + 1) // 2 for group in (of, across)]
        return Budget(int(counts[0].sum()), of, counts[0], across, counts[1])
    of = {"layers": index * 3 // n, "rows": index % max(n // 2, 1), "2:4": index // 4}[groups]
    sizes = np.bincount(of)
    return Budget(int((sizes // 2).sum()), of, sizes // 2)


def _fixed(n: int) -> NDArray[np.int8]:
    fixed = np.zeros(n, dtype=np.int8)
    fixed[0], fixed[-1] = 1, -1
    return fixed
