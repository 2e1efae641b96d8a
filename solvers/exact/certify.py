"""Certificates of the exact solver, from which another program can check its bound."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt import certificate as checking
from cbs_opt.certificate import Proof, damping_of, verify
from cbs_opt.certificate_bounds import Part
from cbs_opt.certificate_tables import small_table
from cbs_opt.certificate_tree import root_table
from cbs_opt.files.certificate_file import Certificate, write_certificate
from cbs_opt.instance import Instance
from cbs_opt.interrupt import Interrupted, interruptible
from cbs_opt.monitor import OPTIMAL_GAP, Monitor
from cbs_opt.solvers.kernels.stop_flag import NEVER, stop_flag
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.trees.block_search import BlockSearch, multiplier
from cbs_opt.solvers.trees.joint_worker import JointWorker, prepare_joint
from cbs_opt.solvers.trees.prove import Provable
from cbs_opt.solvers.trees.recorded_nodes import flatten
from cbs_opt.solvers.trees.recorder import JointRecorder, Recorder, SelectionRecorder
from cbs_opt.solvers.trees.selection_worker import TOLERANCE, SelectionWorker, prepare_selection
from cbs_opt.solvers.trees.tables import JointTable, SelectionTable
from cbs_opt.typing import FloatArray, Int8Array, IntArray

logger = logging.getLogger("cbs_opt")

MOST_NODES = 300_000
"""Largest number of nodes of a certificate; further nodes keep the bounds that they have."""

_EMPTY: dict[str, Any] = {
    "tree_piece": np.zeros(0, np.int32),
    "tree_count": np.zeros(0, np.int32),
    "tree_nodes": np.zeros(0, np.int64),
    "branch": np.zeros(0, np.int32),
    "how": np.zeros(0, np.uint8),
    "fixed_counts": np.zeros(0, np.int32),
    "fixings": np.zeros(0, np.int32),
    "diagonals": np.zeros(0),
    "product_counts": np.zeros(0, np.int32),
    "products": np.zeros(0, np.int32),
    "product_prices": np.zeros(0),
    "codes": np.zeros(0, np.uint8),
    "numbers": np.zeros(0, np.float32),
}


@dataclass
class _Tree:
    piece: int
    count: int
    streams: dict[str, list[Any]]


class Certifier:
    """Builds the certificate of a run that has ended.

    Parameters
    ----------
    instance : Instance
    problem : SelectionProblem or JointProblem
    monitor : Monitor
        With the incumbent and the bound to certify.
    search : BlockSearch, optional
        The tables, if there are several components.
    """

    def __init__(
        self,
        instance: Instance,
        problem: Provable,
        monitor: Monitor,
        search: BlockSearch | None,
    ) -> None:
        assert monitor.objective is not None and monitor.pruned is not None
        self.instance, self.problem, self.monitor, self.search = instance, problem, monitor, search
        self.kind = "selection" if isinstance(problem, SelectionProblem) else "joint"
        self.objective = monitor.objective
        # For an optimum the tolerance of its tree suffices; otherwise the bound of the run is certified.
        self.target = self.objective - TOLERANCE * abs(self.objective)
        if not monitor.closed:
            self.target = -np.inf if monitor.bound is None else min(monitor.bound, self.target)
        self.pieces = self._pieces()
        self.bare = Certificate(
            instance.sha256 or "", self.kind, instance.budget.total, damping_of(instance), monitor.pruned,
            self.objective, -np.inf, self.pieces, **_EMPTY,
        )  # fmt: skip
        self.proof = Proof(instance, self.bare, lambda nodes: None)
        self.nodes, self.cut = 0, False
        self._trees: list[_Tree] = []
        self._most, self._heard = MOST_NODES, 0
        interrupted = monitor.stop.should_stop
        self._should_stop: Callable[[], bool] = interrupted or (lambda: False)
        self._stop: Int8Array = NEVER

    def build(self) -> Certificate:
        """Record the trees and check them; the bound is what the check finds. An interrupt ends the recording."""
        if np.isfinite(self.target) and self.problem.n and not self._should_stop():
            asked = self._should_stop
            with suppress(Interrupted), interruptible(asked), stop_flag(asked) as self._stop:
                self._record(self.search)
        found = self._assembled(np.float32)
        wanted = self.objective - OPTIMAL_GAP * abs(self.objective)
        if found.bound < min(self.target, wanted) - 1e-9 * abs(self.target) and self._trees:
            found = self._assembled(np.float64)
        return found

    def _record(self, search: BlockSearch | None) -> None:
        if search is None:
            self._dense()
            return
        if self.monitor.closed and not search.built:  # by a heuristic
            search.run(lambda: False, self._should_stop)
        if search.built:
            self._blocks(search)

    def _pieces(self) -> IntArray:
        problem = self.problem
        pieces = np.full(self.instance.n, -1, np.int64)
        if self.search is None:
            pieces[problem.index] = 0
        else:
            sizes = [table.n for table in self.search.tables]
            pieces[problem.index] = np.repeat(np.arange(len(sizes)), sizes)
        return pieces

    def _note(self, recorder: Recorder, piece: int, count: int) -> None:
        most = max(1, self._most - self.nodes)
        root = recorder.run(most, self._heartbeat(recorder))
        self.nodes += recorder.nodes
        self.cut |= recorder.cut
        if not root.is_blank:
            self._trees.append(_Tree(piece, count, flatten(root, recorder.part)))

    def _heartbeat(self, recorder: Recorder) -> Callable[[], bool]:
        def ask() -> bool:
            total = self.nodes + recorder.nodes
            if total >= self._heard + 20_000:
                self._heard = total
                logger.info(f"certificate: {total} nodes recorded")
            return self._should_stop()

        return ask

    def _dense(self) -> None:
        problem, pruned = self.problem, self.monitor.pruned
        assert pruned is not None
        start: Int8Array = pruned[problem.index].astype(np.int8)
        inner = (self.target - problem.offset) / problem.scale
        if problem.nonnegative and self.target <= 0:
            return
        part, left = self.proof.parts[0], self.proof.left
        if isinstance(problem, SelectionProblem):
            recorder = _selection(
                part, left, inner, problem.scale, problem.index, problem.matrix, problem.linear, problem.group,
                problem.budget, start, self._stop,
            )  # fmt: skip
        else:
            A, H, w = problem.matrices()
            recorder = _joint(
                part, left, inner, problem.index, A, H, w, problem.group, problem.keep, start, self._stop
            )
        self._note(recorder, 0, -1)

    def _blocks(self, search: BlockSearch) -> None:
        """A tree for every number of weights of a component on which the joined bound depends."""
        problem = self.problem
        lower = [table.lower for table in search.tables]
        mu, lagrange = multiplier(lower, search.budget)
        # Above this an entry is irrelevant: any sum with it is above the bound.
        slack = max(search.bound - lagrange, 0.0) + 1e-9 * abs(search.bound)
        starts = np.concatenate([[0], np.cumsum([table.n for table in search.tables])])
        path = np.zeros(len(lower), np.int64) if search.path is None else search.path
        for k, table in enumerate(search.tables):
            part, F = self.proof.parts[k], lower[k]
            numbers = np.arange(F.size)
            if small_table(part, checking.SMALL) is not None:
                continue
            assert isinstance(table, SelectionTable | JointTable)
            reduced = F - mu * numbers
            wanted = np.minimum(F, reduced.min() + slack + mu * numbers)
            index = problem.index[starts[k] : starts[k + 1]]
            base = part.value(part.state) if self.kind == "joint" else 0.0
            known = root_table(None, part)
            for j in np.argsort(np.abs(numbers - path[k]), kind="stable").tolist():
                if self._should_stop():
                    return
                need = base + problem.scale * wanted[j]
                if j != path[k] and known[j] >= need - 1e-12 * abs(need):
                    continue
                start = table.picks.get(j)
                if start is None:
                    continue
                left = np.array([j])
                recorder: Recorder
                if isinstance(table, SelectionTable):
                    group = np.zeros(table.n, np.int64)
                    recorder = _selection(
                        part, left, wanted[j], problem.scale, index, table.Q, table.c, group, left, start,
                        self._stop,
                    )  # fmt: skip
                else:
                    group = np.zeros(table.n, np.int64)
                    recorder = _joint(
                        part,
                        left,
                        wanted[j],
                        index,
                        table.A,
                        table.H,
                        table.w,
                        group,
                        table.n - left,
                        start,
                        self._stop,
                    )
                self._note(recorder, k, j)
                known = np.maximum(known, root_table(recorder.root_point, part))
                known[j] = max(known[j], need)

    def _assembled(self, precision: type[np.floating[Any]]) -> Certificate:
        """The certificate, with the bound of its own check, less a margin for rounding on other machines."""
        whole = ("branch", "how", "fixed_counts", "fixings", "product_counts")
        joined: dict[str, Any] = {key: [] for key in whole}
        arrays: dict[str, list[Any]] = {
            key: [] for key in ("diagonals", "products", "product_prices", "codes", "numbers")
        }
        for tree in self._trees:
            for key, value in tree.streams.items():
                (joined if key in joined else arrays)[key].extend(value)
        made: dict[str, Any] = {key: np.array(value, _EMPTY[key].dtype) for key, value in joined.items()}
        for key in ("diagonals", "products", "product_prices"):
            made[key] = np.concatenate([_EMPTY[key], *arrays[key]])
        made["codes"] = np.packbits(np.concatenate([np.zeros(0, bool), *arrays["codes"]]))
        made["numbers"] = np.concatenate([np.zeros(0), *arrays["numbers"]]).astype(precision)
        certificate = replace(
            self.bare,
            tree_piece=np.array([tree.piece for tree in self._trees], np.int32),
            tree_count=np.array([tree.count for tree in self._trees], np.int32),
            tree_nodes=np.array([len(tree.streams["branch"]) for tree in self._trees], np.int64),
            **made,
        )
        found = verify(self.instance, certificate).bound
        bound = found - 1e-10 * abs(found) if np.isfinite(found) else -1e300
        if self.problem.nonnegative:
            bound = max(bound, 0.0)
        return replace(certificate, bound=bound)


def _selection(
    part: Part,
    left: IntArray,
    target: float,
    scale: float,
    index: IntArray,
    Q: FloatArray,
    c: FloatArray,
    group: IntArray,
    budget: IntArray,
    start: Int8Array,
    stop: Int8Array,
) -> Recorder:
    """Prepare a tree of the selection problem that is closed at `target`, in units of Q."""
    search = prepare_selection(Q, c, group, budget, [start], 0.0, roundings=0, should_stop=lambda: True)
    threshold = target / search.scale
    worker = SelectionWorker(search.problem, 0.0, 0.0, np.array([threshold]), stop)
    place = np.searchsorted(part.index, index[search.problem.order])
    ones = np.ones(place.size)
    return SelectionRecorder(part, left, worker, target * scale, place, ones, ones * search.scale * scale)


def _joint(
    part: Part,
    left: IntArray,
    target: float,
    index: IntArray,
    A: FloatArray,
    H: FloatArray,
    w: FloatArray,
    group: IntArray,
    keep: IntArray,
    start: Int8Array,
    stop: Int8Array,
) -> Recorder:
    """Prepare a tree of the joint problem that is closed at `target`, above what the part's state costs."""
    search = prepare_joint(A, H, w, group, keep, [start])
    worker = JointWorker(search.problem, 0.0, 0.0, np.array([target / search.scale]), stop)
    place = np.searchsorted(part.index, index[search.order])
    s = 1 / np.sqrt(np.diag(A)[search.order])
    return JointRecorder(
        part, left, worker, target + part.value(part.state), place, np.sqrt(search.scale) / s, s**2
    )


def certify(
    path: Path,
    instance: Instance,
    problem: Provable,
    monitor: Monitor,
    search: BlockSearch | None,
) -> dict[str, Any]:
    """Write the certificate of a run; returns what it proves, for `Result.extras`.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    certifier = Certifier(instance, problem, monitor, search)
    with interruptible(None):  # a time limit ended the search, not what is written about it
        certificate = certifier.build()
    write_certificate(path, certificate)
    optimal = certifier.objective - certificate.bound <= OPTIMAL_GAP * abs(certifier.objective)
    if monitor.closed and not optimal:
        reason = f"more than {MOST_NODES} nodes" if certifier.cut else "rounding"
        logger.warning(
            f"certificate: proves only the bound {certificate.bound:.9g} of the optimum {certifier.objective:.9g} "
            f"({reason})"
        )
    elif not monitor.closed and monitor.bound is not None and certificate.bound < monitor.bound * (1 - 1e-6):
        logger.warning(f"certificate: proves the bound {certificate.bound:.9g}, the run found {monitor.bound:.9g}")
    size = path.stat().st_size
    logger.info(
        f"certificate: {certificate.branch.size} nodes, {size / 1e6:.2f} MB, bound {certificate.bound:.9g}"
    )
    return {"bound": certificate.bound, "nodes": int(certificate.branch.size), "bytes": size, "optimal": optimal}
