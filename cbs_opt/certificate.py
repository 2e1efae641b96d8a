"""Checks a certificate: that no feasible selection of an instance is cheaper than the bound that it states.

The check is independent of every solver. It traverses the trees and recomputes each bound from the instance in
float64, with plain NumPy and a margin for rounding. The file only determines which bounds are computed.

The rules of soundness
----------------------
The file is assumed to be written by an adversary. Whatever it contains, the reported bound must not exceed the
loss of any feasible selection. For each rule, ``tests/cbs_opt/certificate`` has forgeries that would pass without
it.

1. *Nothing claimed is used.* Objective and bound are recomputed; claims are only compared with them. The reported
   bound is the recomputed one, and "optimal" is decided by it.
2. *Same problem.* Hash (where both sides have one), budget, damping, groups and `fixed` are those of the
   instance given. The open weights are derived from `fixed` and the budgets, never read.
3. *Pieces are independent.* A piece is a connected component. Every open weight belongs to exactly one piece. No
   entry of the Hessian couples two pieces; in the joint problem a piece consists of whole blocks. With several
   groups of open weights there is one piece.
4. *The leaves cover everything.* Both children of a branching are in the tree, and every node belongs to it.
   A leaf bounds all selections that agree with the decisions above it. That a node has no feasible selection is
   established by counting, never by a statement of the file.
5. *A decision by bound accounts for what it excludes.* The selections with the opposite decision are bounded like
   a leaf, by a point or (joint, kept weights only) by the loss of the pruned weights. A weight is decided once.
   Where the budgets alone decide weights, the loss of these weights is part of the bound.
6. *No bound, no proof.* A leaf or decision without a point or value above it has the bound −∞. So has every
   overflow, NaN included.
7. *Points are arbitrary, the inequality is recomputed.* Any finite point gives a valid bound if R is semidefinite.
   This is verified by a Cholesky factorisation with a margin; a deficit is subtracted from the bound (selection)
   or removed from the diagonal (joint).
8. *A diagonal that is valid on exact sums only* is used at points that have these sums, within the box, with
   the rounding of the sums in the margin, and only for the numbers it was computed for: it does not bound other
   entries of the joined table.
   The same goes for multipliers of products, which are positive, of two open weights each: of a product of
   pruning two weights only y_i y_j ≥ 0 is used, and y_i y_j = y_j once i is pruned.
9. *Tables.* An entry is the best of its own trees, of the root point of any tree of its piece that rule 8
   allows, and of the cheap bound; no entry is omitted or taken from another number. The checker joins the
   tables itself.
10. *Rounding counts against the claim.* Each bound is lowered by the worst case of its sums (`_doubt`), each
    table entry by its own. Not covered is the rounding of data that instance and evaluator share: Q =
    diag(w) H diag(w), the curvature of a gradient factor, the Schur complement of the kept weights, and the
    loss of decided weights.
11. *Nothing is left over.* All streams are read to their ends, so that a file has only one interpretation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbs_opt.arguments import as_instance
from cbs_opt.certificate_bounds import JointPart, Part, SelectionPart, States
from cbs_opt.certificate_tables import join, small_table
from cbs_opt.certificate_tree import Streams, TreeCheck, floor_of, root_table
from cbs_opt.convex_form import convex_form
from cbs_opt.errors import SolutionError, UsageError
from cbs_opt.files.certificate_file import Certificate, read_certificate
from cbs_opt.instance import Instance
from cbs_opt.losses import joint_loss, selection_loss
from cbs_opt.monitor import OPTIMAL_GAP
from cbs_opt.result import relative_gap
from cbs_opt.solver import indefinite_sentence
from cbs_opt.typing import FloatArray, IntArray

SMALL = 18
"""Pieces of up to this many weights need no tree: all their selections are enumerated."""

MAX_WEIGHTS = 4000
"""Largest block that can be checked."""

_AGREE = 1e-7  # relative, between the claimed objective and the one found
_BOUND_AGREES = 1e-9  # relative, between the claimed bound and the one found


@dataclass(frozen=True)
class Verified:
    """What a certificate proves.

    Attributes
    ----------
    objective, bound : float
        Both recomputed.
    gap : float
    optimal : bool
        Whether they agree to `OPTIMAL_GAP`.
    pieces, trees, nodes, leaves : int
    """

    objective: float
    bound: float
    gap: float
    optimal: bool
    pieces: int
    trees: int
    nodes: int
    leaves: int


def verify(
    instance: Instance | Path | str,
    certificate: Certificate | Path | str,
    progress: Callable[[int], None] = lambda nodes: None,
) -> Verified:
    """Check a certificate against its instance.

    Parameters
    ----------
    instance : Instance, Path or str
        With the budget and the damping of the run; a path is that of an instance file.
    certificate : Certificate, Path or str
    progress : callable, optional
        Called from time to time with the number of nodes checked.

    Raises
    ------
    SolutionError
        One sentence, if anything does not agree.
    UsageError
        For arguments of other types.

    Notes
    -----
    O(nodes · m²) for pieces of m weights, and O(m³) per diagonal.
    """
    instance = as_instance(instance)
    if isinstance(certificate, str | Path):
        certificate = read_certificate(certificate)
    if not isinstance(certificate, Certificate):
        raise UsageError(
            f"`certificate` must be a Certificate or the path of its file, got {type(certificate).__name__}; "
            "`cbs_opt.verify` checks a solution"
        )
    objective = check_incumbent(instance, certificate)
    if certificate.objective_kind == "joint" and not instance.curvature.is_convex:
        raise SolutionError(indefinite_sentence(instance))
    proof = Proof(convex_form(instance), certificate, progress)
    bound = proof.bound()
    if instance.linear is None and instance.curvature.is_convex:
        bound = max(bound, 0.0)  # the Hessian is semidefinite, and the evaluator never gives less
    margin = _BOUND_AGREES * max(abs(certificate.bound), abs(bound)) if np.isfinite(bound) else 0.0
    if not bound >= certificate.bound - margin:
        raise SolutionError(f"its leaves prove a bound of {bound:.9g}, the file states {certificate.bound:.9g}")
    if certificate.bound > objective + _AGREE * abs(objective):
        raise SolutionError(
            f"the bound {certificate.bound:.9g} lies above the loss {objective:.9g} of its selection"
        )
    bound = min(bound, objective)
    gap = relative_gap(objective, bound)
    assert gap is not None
    return Verified(
        objective, bound, gap, gap <= OPTIMAL_GAP, len(proof.parts), certificate.tree_nodes.size,
        certificate.branch.size, proof.leaves,
    )  # fmt: skip


def check_incumbent(instance: Instance, certificate: Certificate) -> float:
    """Check that instance and certificate belong together, and the incumbent; its loss."""
    ours, theirs = instance.sha256, certificate.instance_sha256
    if certificate.pruned.size != instance.n:
        raise SolutionError(
            f"`pruned` must have shape ({instance.n},) for this instance, got {certificate.pruned.shape}"
        )
    if ours and theirs and ours != theirs:
        raise SolutionError(
            f"`instance_sha256` is {theirs[:12]}…, the instance has {ours[:12]}…: the certificate belongs to "
            "another instance"
        )
    if certificate.budget != instance.budget.total:
        raise SolutionError(
            f"it was made for a budget of {certificate.budget}, the instance as given has "
            f"{instance.budget.total}: `--budget {certificate.budget}` gives that problem"
        )
    damping = damping_of(instance)
    if damping != certificate.damping:
        raise SolutionError(
            f"it was made for a damping of {_text(certificate.damping)}, the instance as given has "
            f"{_text(damping)}"
            + ("" if certificate.damping is None else f": `--damping {certificate.damping!r}` gives that problem")
        )
    if not instance.admits(certificate.pruned):
        raise SolutionError(
            f"the selection, {int(certificate.pruned.sum())} weights, does not meet the budget of "
            f"{instance.budget.total}, the groups or `fixed` of the instance"
        )
    loss = joint_loss if certificate.objective_kind == "joint" else selection_loss
    objective = loss(instance, certificate.pruned)
    if not abs(objective - certificate.objective) <= _AGREE * abs(objective) + 1e-300:
        raise SolutionError(
            f"the selection has the loss {objective:.9g}, the file states {certificate.objective:.9g}"
        )
    return objective


def damping_of(instance: Instance) -> float | None:
    """The damping of a gradient factor; None if it is part of the blocks."""
    damping = getattr(instance.curvature, "damping", None)
    return None if damping is None else float(damping)


def _text(damping: float | None) -> str:
    return "none of its own" if damping is None else f"{damping:g}"


class Proof:
    """The bound of a certificate, from its trees.

    Attributes
    ----------
    parts : list of Part
    leaves : int
    """

    def __init__(self, instance: Instance, certificate: Certificate, progress: Callable[[int], None]) -> None:
        self.instance, self.certificate, self._progress = instance, certificate, progress
        self.leaves = 0
        self.state, self.left = forced_state(instance)
        pieces = np.asarray(certificate.pieces, np.int64)
        if not np.array_equal(pieces >= 0, self.state < 0):
            raise SolutionError("`pieces` does not name the weights that `fixed` and the budgets leave open")
        count = int(pieces.max(initial=-1)) + 1
        if np.unique(pieces[pieces >= 0]).size != count:
            raise SolutionError("`pieces` skips a number")
        group = instance.budget.group_of(instance.n)
        used, group = np.unique(group[self.state < 0], return_inverse=True)
        self._single = used.size <= 1
        if count > 1 and not self._single:
            raise SolutionError("`pieces` must have one piece, because the groups couple all weights")
        self.left = self.left[used] if used.size else np.zeros(1, np.int64)
        self._group = np.zeros(instance.n, np.int64)
        self._group[self.state < 0] = group
        build = selection_parts if certificate.objective_kind == "selection" else joint_parts
        self.parts, self.constant = build(instance, self.state, pieces, count, self._group, self.left)

    def bound(self) -> float:
        """The least that any selection can cost."""
        certificate, streams = self.certificate, Streams(self.certificate)
        several = len(self.parts) > 1
        tables: list[FloatArray] = [np.full(int((p.state < 0).sum()) + 1, -np.inf) for p in self.parts]
        whole = -np.inf
        with_tree = set()
        for piece, count, nodes in zip(
            certificate.tree_piece.tolist(),
            certificate.tree_count.tolist(),
            certificate.tree_nodes.tolist(),
            strict=True,
        ):
            if not 0 <= piece < len(self.parts):
                raise SolutionError(f"`tree_piece` must be in [0, {len(self.parts) - 1}], got {piece}")
            part, table = self.parts[piece], tables[piece]
            if (count >= 0) != several or count >= table.size:
                raise SolutionError(f"`tree_count` {count} does not fit piece {piece}")
            check = TreeCheck(part, np.array([count]) if several else self.left, streams, self._progress)
            found = check.run(int(nodes))
            self.leaves += check.leaves
            with_tree.add(piece)
            if not several:
                whole = max(whole, found)
                continue
            table = np.maximum(table, root_table(check.root, part))
            table[count] = max(table[count], found)
            tables[piece] = table
        if not streams.finished():
            raise SolutionError("the arrays hold more than the trees use")
        if not self.parts:
            return self.constant
        if not several:
            return self.constant + max(whole, floor_of(self.parts[0], self.left))
        for k, part in enumerate(self.parts):
            if k not in with_tree:
                small = small_table(part, SMALL)
                tables[k] = root_table(None, part) if small is None else small
        return self.constant + join(tables, int(self.left.sum()))


def forced_state(instance: Instance) -> tuple[States, IntArray]:
    """State of every weight, −1 if undecided, and the number left to prune in every group."""
    n, group, wanted = instance.n, instance.budget.group_of(instance.n), instance.budget.per_group
    fixed = np.zeros(n, np.int8) if instance.fixed is None else instance.fixed
    state = np.where(fixed == 1, 1, np.where(fixed == -1, 0, -1)).astype(np.int8)
    left = wanted - np.bincount(group[state == 1], minlength=wanted.size)
    free = np.bincount(group[state < 0], minlength=wanted.size)
    state[(state < 0) & (left == 0)[group]] = 0
    state[(state < 0) & ((left == free) & (left > 0))[group]] = 1
    return state, wanted - np.bincount(group[state == 1], minlength=wanted.size)


def _check_size(block: int, size: int) -> None:
    if size > MAX_WEIGHTS:
        raise SolutionError(
            f"block {block} has {size} open weights, blocks of at most {MAX_WEIGHTS} can be checked"
        )


def selection_parts(
    instance: Instance, state: States, pieces: IntArray, count: int, group: IntArray, left: IntArray
) -> tuple[list[Part], float]:
    """The pieces of the selection problem, the loss of the decided weights; checks that pieces are uncoupled."""
    curvature, w = instance.curvature, instance.weights
    one = state == 1
    c = np.zeros(instance.n) if instance.linear is None else -instance.linear * w
    constant = selection_loss(instance, one)
    c = c + w * curvature.matmul(np.where(one, w, 0.0))
    index = [np.flatnonzero(pieces == k) for k in range(count)]
    squares = [np.zeros((at.size, at.size)) for at in index]
    for k in range(curvature.number_of_blocks):
        block = curvature.block_slice(k)
        at = np.flatnonzero(state[block] < 0)
        if not at.size:
            continue
        _check_size(k, at.size)
        weights = w[block][at]
        Q = curvature.submatrix(k, at, at) * weights[:, None] * weights
        Q = 0.5 * (Q + Q.T)
        found = pieces[block][at]
        if (Q[found[:, None] != found] != 0).any():
            raise SolutionError(f"`pieces` splits block {k} where the Hessian has a nonzero entry")
        for piece in np.unique(found):
            mine = np.flatnonzero(found == piece)
            place = np.searchsorted(index[piece], block.start + at[mine])
            squares[piece][np.ix_(place, place)] = Q[np.ix_(mine, mine)]
    for at, Q in zip(index, squares, strict=True):
        # y_i² = y_i: if weight i is uncoupled, ½ Q_ii is a linear cost.
        diagonal = Q.diagonal().copy()
        uncoupled = np.count_nonzero(Q, axis=0) == (diagonal != 0)
        c[at] += np.where(uncoupled, 0.5 * diagonal, 0.0)
        Q[np.diag_indices(at.size)] = np.where(uncoupled, 0.0, diagonal)
    return [SelectionPart(at, Q, c[at], group[at], left) for at, Q in zip(index, squares, strict=True)], constant


def joint_parts(
    instance: Instance, state: States, pieces: IntArray, count: int, group: IntArray, left: IntArray
) -> tuple[list[Part], float]:
    """Pieces of the joint problem, with all weights of their blocks, and the loss of the other blocks."""
    curvature = instance.curvature
    g = np.zeros(instance.n) if instance.linear is None else instance.linear
    blocks_of: list[list[int]] = [[] for _ in range(count)]
    constant = 0.0
    for k in range(curvature.number_of_blocks):
        block = curvature.block_slice(k)
        found = np.unique(pieces[block][pieces[block] >= 0])
        if found.size > 1:
            raise SolutionError(f"`pieces` splits block {k}, which is connected in the joint problem")
        if found.size:
            _check_size(k, block.stop - block.start)
            blocks_of[int(found[0])].append(k)
        elif (state[block] == 1).any() or g[block].any():
            rest = _joint_part(instance, g, state, [k], group, left)
            constant += rest.value(rest.state)
    return [_joint_part(instance, g, state, blocks, group, left) for blocks in blocks_of], constant


def _joint_part(
    instance: Instance, g: FloatArray, state: States, blocks: list[int], group: IntArray, left: IntArray
) -> JointPart:
    curvature = instance.curvature
    at = np.concatenate([np.arange(curvature.offsets[k], curvature.offsets[k + 1]) for k in blocks])
    H = np.zeros((at.size, at.size))
    start = 0
    for k in blocks:
        size = int(curvature.block_sizes[k])
        H[start : start + size, start : start + size] = curvature.block(k)
        start += size
    return JointPart(at, 0.5 * (H + H.T), instance.weights[at], g[at], state[at], group[at], left)
