"""The contract of a form of the curvature: every route to H gives the same matrix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.budget import Budget
from cbs_opt.curvature.base import Curvature
from cbs_opt.curvature.hessian_blocks import HessianBlocks
from cbs_opt.errors import CbsError, InstanceError, UnboundedError, UsageError
from cbs_opt.files import read_instance, write_instance
from cbs_opt.instance import Instance
from cbs_opt.losses import evaluate
from cbs_opt.solve import solve
from cbs_opt.stop import Stop
from cbs_opt.testing.contract import Check, require, require_close, run_all
from cbs_opt.typing import BoolArray, FloatArray, IntArray

LARGEST = 400
"""Blocks of more weights than this are too large to be checked as dense matrices."""

_SOLVERS = ("magnitude", "obd", "search", "joint")


def check_curvature(curvature: Curvature, *, seed: int = 0) -> list[str]:
    """Check that all methods of a curvature agree with the dense matrices of `block`.

    Parameters
    ----------
    curvature : Curvature
        Small, with blocks of up to 400 weights; check one with several blocks and one with a single block.
    seed : int
        Of the random test vectors.

    Returns
    -------
    list of str
        The names of the checks.

    Raises
    ------
    ContractError
        With a line for each check that failed.
    """
    return run_all(f"curvature {type(curvature).__name__}", curvature_checks(curvature, seed=seed))


def curvature_checks(curvature: Curvature, *, seed: int = 0) -> list[Check]:
    """The checks of `check_curvature`, one by one, for a test runner."""
    contract = _Contract(curvature, seed)
    return [
        Check("declaration", contract.declares_itself),
        Check("dense blocks", contract.blocks_are_symmetric_and_semidefinite),
        Check("diagonal", contract.diagonal),
        Check("columns and submatrices", contract.columns_and_submatrices),
        Check("products", contract.products),
        Check("inverse", contract.inverse),
        Check("conditional inverse", contract.conditional_inverse),
        Check("best update", contract.best_update),
        Check("structure", contract.structure),
        Check("diagonal split", contract.diagonal_split),
        Check("damping", contract.damping),
        Check("file", contract.file),
        Check("arguments and state", contract.leaves_arguments_alone),
        Check("losses", contract.losses),
        Check("solvers", contract.solvers),
    ]


class _Contract:
    """The checks of one curvature."""

    def __init__(self, curvature: Curvature, seed: int) -> None:
        self.curvature = curvature
        self._seed = seed

    def rng(self) -> np.random.Generator:
        """The same vectors for every run of a check."""
        return np.random.default_rng(self._seed)

    def dense(self) -> Iterator[tuple[int, FloatArray]]:
        """The blocks, as copies."""
        for k in range(self.curvature.number_of_blocks):
            require(
                int(self.curvature.block_sizes[k]) <= LARGEST,
                f"block {k} has more than {LARGEST} weights: check a smaller curvature",
            )
            yield k, np.array(self.curvature.block(k))

    def _singular(self, H: FloatArray) -> bool:
        values = np.linalg.eigvalsh(H)
        return bool(values[0] <= 1e-12 * max(values[-1], 0.0))

    def declares_itself(self) -> None:
        """Kind, sizes and offsets."""
        c = self.curvature
        require(isinstance(c, Curvature), "the class must be a subclass of cbs_opt.Curvature")
        require(isinstance(c.kind, str) and bool(c.kind), "`kind` must be a name")
        sizes, offsets = np.asarray(c.block_sizes), np.asarray(c.offsets)
        require(
            sizes.dtype == np.int64 and sizes.ndim == 1 and sizes.size > 0 and bool((sizes >= 1).all()),
            "`block_sizes` must be int64 of shape (K,), each at least 1",
        )
        expected = np.concatenate([[0], np.cumsum(sizes)])
        require(np.array_equal(offsets, expected), "`offsets` must be the cumulated block sizes from 0 on")
        require(c.n == int(sizes.sum()), "`n` must be the sum of `block_sizes`")
        require("\n" not in repr(c) and len(repr(c)) < 500, "repr must be one short line")
        names = [name for name, _ in c.facts()]
        require(names[:2] == ["curvature", "blocks"], "`facts` must begin with curvature and blocks")

    def blocks_are_symmetric_and_semidefinite(self) -> None:
        """The reference matrices for all other checks."""
        for k, H in self.dense():
            b = int(self.curvature.block_sizes[k])
            require(H.shape == (b, b), f"block {k} must have shape {(b, b)}, got {H.shape}")
            require(H.dtype == np.float64, f"block {k} must be float64, got {H.dtype}")
            require(bool(np.isfinite(H).all()), f"block {k} has NaN or infinite entries")
            require_close(H, H.T, f"block {k}, against its transpose", rel=1e-9)
            values = np.linalg.eigvalsh(H)
            require(
                bool(values[0] >= -1e-7 * max(values[-1], 0.0)),
                f"block {k} must be positive semidefinite, its least eigenvalue is {values[0]:.3g}",
            )

    def diagonal(self) -> None:
        """H_ii."""
        expected = np.concatenate([H.diagonal() for _, H in self.dense()])
        require_close(self.curvature.diagonal(), expected, "`diagonal`", rel=1e-8)

    def columns_and_submatrices(self) -> None:
        """Columns and submatrices by index, in any order, also empty."""
        for k, H in self.dense():
            b = H.shape[0]
            order = self.rng().permutation(b)
            rows = order[: b // 2 + 1]
            for index in (order, order[: (b + 1) // 2], order[:0]):
                require_close(self.curvature.columns(k, index), H[:, index], f"`columns` of block {k}", rel=1e-8)
                found = self.curvature.submatrix(k, rows, index)
                require_close(found, H[np.ix_(rows, index)], f"`submatrix` of block {k}", rel=1e-8)

    def products(self) -> None:
        """H x for a vector, for several, and over all blocks; xᵀHx."""
        c = self.curvature
        x = self.rng().standard_normal((c.n, 3))
        expected = np.empty_like(x)
        for k, H in self.dense():
            part = c.block_slice(k)
            expected[part] = H @ x[part]
            scale = float(np.abs(H).max(initial=0.0) * np.abs(x[part]).sum())
            require_close(c.block_matmul(k, x[part]), expected[part], f"`block_matmul` {k}", rel=1e-9, scale=scale)
            found = c.block_matmul(k, x[part, 0])
            require_close(found, expected[part, 0], f"`block_matmul` {k} of a vector", rel=1e-9, scale=scale)
            value = float(x[part, 0] @ expected[part, 0])
            quadratic = c.block_quadratic(k, x[part, 0])
            require(quadratic >= 0, f"`block_quadratic` of block {k} must not be negative")
            require_close(quadratic, value, f"`block_quadratic` of block {k}", rel=1e-8)
        total = float(x[:, 0] @ expected[:, 0])
        require_close(c.quadratic(x[:, 0]), total, "`quadratic`", rel=1e-8)
        require_close(c.matmul(x), expected, "`matmul`", rel=1e-8)
        require_close(c.matmul(x[:, 1]), expected[:, 1], "`matmul` of a vector", rel=1e-8)

    def inverse(self) -> None:
        """H⁻¹ and its diagonal; `InstanceError` where H is singular."""
        c = self.curvature
        diagonals = []
        for k, H in self.dense():
            if self._singular(H):
                _require_refusal(lambda k=k: c.inverse_block(k), InstanceError, f"`inverse_block` {k}", "singular")  # type: ignore[misc]
                _require_refusal(c.inverse_diagonal, InstanceError, "`inverse_diagonal`", "singular")
                return
            inverse = c.inverse_block(k)
            identity = np.eye(H.shape[0])
            condition = float(np.linalg.cond(H))
            require_close(H @ inverse, identity, f"H times `inverse_block` {k}", rel=1e-11 * condition + 1e-9)
            diagonals.append(np.diagonal(inverse))
        expected = np.concatenate(diagonals)
        require_close(c.inverse_diagonal() / expected, np.ones(expected.size), "`inverse_diagonal`", rel=1e-6)

    def conditional_inverse(self) -> None:
        """[H_KK⁻¹]_ii on some weights K; `InstanceError` where H is singular on them."""
        for k, H in self.dense():
            kept = np.sort(self.rng().permutation(H.shape[0])[: (H.shape[0] + 1) // 2])
            part = H[np.ix_(kept, kept)]

            def ask(k: int = k, kept: Any = kept) -> FloatArray:
                return self.curvature.conditional_inverse_diagonal(k, kept)

            if self._singular(part):
                _require_refusal(ask, InstanceError, f"`conditional_inverse_diagonal` of block {k}", "singular")
                continue
            expected = np.diagonal(np.linalg.inv(part))
            found = ask() / expected
            require_close(found, np.ones(expected.size), f"`conditional_inverse_diagonal` {k}", rel=1e-6)

    def best_update(self) -> None:
        """δ = −w on the pruned weights, and a stationary point on the kept ones, with and without `linear`."""
        rng = self.rng()
        for k, H in self.dense():
            b = H.shape[0]
            w: FloatArray = rng.standard_normal((b,))
            g: FloatArray = rng.standard_normal((b,))
            order = rng.permutation(b)
            for count in {0, 1, b // 2, b - 1, b}:
                pruned = np.zeros(b, dtype=bool)
                pruned[order[:count]] = True
                for linear in (None, g):
                    try:
                        delta = self.curvature.best_update(k, w, pruned, linear)
                    except UnboundedError:
                        kept = np.flatnonzero(~pruned)
                        singular = self._singular(H[np.ix_(kept, kept)])
                        require(linear is not None and singular, f"`best_update` of block {k} has a minimum")
                        continue
                    require_close(delta[pruned], -w[pruned], f"δ of block {k} on the pruned weights", rel=1e-12)
                    gradient = H @ delta + (0.0 if linear is None else linear)
                    scale = float(np.abs(H).max(initial=0.0) * np.abs(delta).sum() + np.abs(g).max())
                    zero = np.zeros(b - count)
                    what = f"the gradient of block {k} on the kept weights at δ"
                    require_close(gradient[~pruned], zero, what, rel=1e-6, scale=scale)

    def structure(self) -> None:
        """Coupled weights, connected components, empty columns, and how indefinite a block may be."""
        c = self.curvature
        margin = c.indefiniteness()
        require(margin.shape == (c.n,), f"`indefiniteness` must have shape ({c.n},), got {margin.shape}")
        for k, H in self.dense():
            b = H.shape[0]
            off_diagonal = (H != 0) & ~np.eye(b, dtype=bool)
            missed = off_diagonal.any(axis=0) & ~c.coupled(k)
            require(not missed.any(), f"`coupled` misses weights of block {k} that have a second-order term")
            index = np.sort(self.rng().permutation(b)[: (b + 1) // 2])
            label = c.connected_components(k, index)
            joined = off_diagonal[np.ix_(index, index)] & (label[:, None] != label)
            require(not joined.any(), f"`connected_components` of block {k} separates weights that are coupled")
            flat = np.flatnonzero(H.diagonal() == 0)
            if flat.size:
                empty = ~(H[:, flat] != 0).any(axis=0)
                claimed = c.empty_columns(k, flat)
                require(np.array_equal(claimed, empty), f"`empty_columns` of block {k} is wrong")
            least = float(np.linalg.eigvalsh(H)[0])
            rounding = 1e-12 * b * float(np.abs(H).max(initial=0.0))
            allowed = float(margin[c.block_slice(k)].min()) + rounding
            require(least >= -allowed, f"`indefiniteness` of block {k} is smaller than its eigenvalue {least:.3g}")

    def diagonal_split(self) -> None:
        """A positive diagonal D with H − D semidefinite."""
        c = self.curvature
        below = c.diagonal_split()
        if below is None:
            return
        require(bool((below > 0).all()), "`diagonal_split` must be positive, or None")
        for k, H in self.dense():
            values = np.linalg.eigvalsh(H - np.diag(below[c.block_slice(k)]))
            require(
                bool(values[0] >= -1e-9 * float(np.abs(H).max(initial=0.0))),
                f"H minus `diagonal_split` must be semidefinite, block {k} has the eigenvalue {values[0]:.3g}",
            )

    def file(self) -> None:
        """An instance file returns the same matrices, or writing it is refused with a sentence."""
        ours, _ = self._instances()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "instance.npz"
            try:
                write_instance(path, ours)
            except InstanceError as refusal:
                require("cannot be written" in str(refusal), f"a refusal must say so, got: {refusal}")
                require(not path.exists(), "nothing must be written where writing is refused")
                return
            again = read_instance(path).curvature
            require(np.array_equal(again.offsets, self.curvature.offsets), "a file must keep `block_sizes`")
            for k, H in self.dense():
                require_close(again.block(k), H, f"block {k} from a file", rel=1e-6)
            require(type(again) is type(self.curvature), f"a file gives {type(again).__name__} back")

    def damping(self) -> None:
        """Another damping gives another curvature of the same sizes, or is refused with a sentence."""
        c = self.curvature
        before = [H for _, H in self.dense()]
        try:
            more, most = c.with_damping(1.0), c.with_damping(2.0)
        except UsageError as refusal:
            require("\n" not in str(refusal) and "damping" in str(refusal), "a refusal must be a sentence")
            return
        for k, H in self.dense():
            require_close(H, before[k], f"block {k}, after `with_damping`", rel=0.0)
            difference = most.block(k) - more.block(k)
            values = np.linalg.eigvalsh((difference + difference.T) / 2)
            require(bool(values[0] >= 0 and values[-1] > 0), f"more damping must add to H, block {k}")
        _require_refusal(lambda: c.with_damping(-1.0), UsageError, "a negative damping", "damping")

    def leaves_arguments_alone(self) -> None:
        """No method changes its arguments, and repeated calls return the same values."""
        c, rng = self.curvature, self.rng()
        first = [H for _, H in self.dense()]
        for k, H in enumerate(first):
            b = H.shape[0]
            x: FloatArray = rng.standard_normal((b,))
            index: IntArray = np.arange(b)
            pruned: BoolArray = rng.random((b,)) < 0.5
            for flags in (x.flags, index.flags, pruned.flags):
                flags.writeable = False
            c.block_matmul(k, x)
            c.columns(k, index)
            c.submatrix(k, index, index)
            c.best_update(k, x, pruned, None)
            require_close(c.block(k), H, f"block {k}, asked for again", rel=0.0)

    def _instances(self) -> tuple[Instance, Instance]:
        """A problem with this curvature, and the same with dense blocks."""
        c = self.curvature
        weights = self.rng().standard_normal(c.n)
        blocks = [(H + H.T) / 2 for _, H in self.dense()]
        budget = Budget(c.n // 2)
        return Instance(weights, c, budget), Instance(weights, HessianBlocks.from_blocks(blocks), budget)

    def losses(self) -> None:
        """Both losses, as with dense blocks."""
        ours, dense = self._instances()
        for seed in range(3):
            pruned = ours.budget.cheapest(np.random.default_rng(seed).random(ours.n))
            found, expected = evaluate(ours, pruned), evaluate(dense, pruned)
            require_close(found.selection_loss, expected.selection_loss, "the selection loss", rel=1e-7)
            require(found.joint_loss is not None, "the joint loss must have a minimum")
            if found.joint_loss is not None and expected.joint_loss is not None:
                scale = abs(expected.selection_loss)
                require_close(found.joint_loss, expected.joint_loss, "the joint loss", rel=1e-6, scale=scale)

    def solvers(self) -> None:
        """The solvers of the package find as good a selection as with dense blocks."""
        ours, dense = self._instances()
        for name in _SOLVERS:
            results = []
            for instance in (ours, dense):
                try:
                    results.append(solve(instance, name, seed=0, stop=Stop(max_iterations=200, time_limit=20)))
                except CbsError as refusal:
                    require("\n" not in str(refusal), f"solver '{name}' must answer in one sentence")
            if len(results) < 2:
                continue
            found, expected = results
            require(ours.admits(found.pruned), f"the selection of '{name}' must meet the budget")
            if name in ("magnitude", "obd"):
                scale = abs(expected.objective)
                require_close(found.objective, expected.objective, f"the loss of '{name}'", rel=1e-6, scale=scale)
            if found.bound is not None:
                require(
                    found.bound <= expected.objective + 1e-6 * abs(expected.objective),
                    f"the bound of '{name}', {found.bound:.9g}, exceeds the loss {expected.objective:.9g}",
                )


def _require_refusal(ask: Callable[[], Any], error: type[CbsError], what: str, word: str) -> None:
    try:
        ask()
    except error as refusal:
        require(
            "\n" not in str(refusal) and word in str(refusal),
            f"{what} must be refused in a sentence with '{word}'",
        )
    else:
        require(False, f"{what} must raise {error.__name__}")
