"""Instances as text for other solvers: LP, MPS, QPLIB, UBQP and QUBO; see `docs/format.md`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from cbs_opt.errors import OutputError, SolverError, UsageError
from cbs_opt.files import quadratic_text
from cbs_opt.files.atomic import atomic_write
from cbs_opt.instance import Instance
from cbs_opt.optional import missing
from cbs_opt.selection import SelectionObjective
from cbs_opt.solvers.problem.decided import open_sums
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.typing import FloatArray

LARGEST = 5000
"""Most weights of a text export: beyond, the n²/2 terms fill gigabytes."""


def export_instance(path: Path | str, instance: Instance) -> None:
    """Write the selection problem of an instance in the format given by the extension of `path`.

    Raises
    ------
    UsageError
        For another extension than .lp, .mps, .qplib, .ubqp or .qubo, or an instance that is too large.
    OutputError
        When the file cannot be written.
    """
    path = Path(path)
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UsageError(f"{path}: an export ends in {', '.join(WRITERS)}, not in '{path.suffix}'")
    if instance.n > LARGEST:
        raise UsageError(f"an export takes at most {LARGEST} weights, the instance has {instance.n}")
    writer(path, instance)


def write_lp(path: Path | str, instance: Instance) -> None:
    """Write the linearised MILP, exact at binary points, in LP format; needs highspy."""
    _write_linear(path, instance, ".lp")


def write_mps(path: Path | str, instance: Instance) -> None:
    """Write the linearised MILP, exact at binary points, in free MPS format; needs highspy."""
    _write_linear(path, instance, ".mps")


def _write_linear(path: Path | str, instance: Instance, suffix: str) -> None:
    try:
        import highspy

        from cbs_opt.solvers.mip.highs import highs_lp
        from cbs_opt.solvers.mip.selection_model import check_open_weights, rlt_model
    except ModuleNotFoundError as error:
        raise SolverError(f"the export to {suffix} {missing(error)}") from error
    try:
        problem = SelectionProblem(instance)
        check_open_weights(problem.n)
    except SolverError as error:
        raise UsageError(str(error)) from None
    model = rlt_model(problem)
    lp = highs_lp(model)
    lp.model_name_ = "cbs_selection"
    # The loss is scale · objective; the scale, a power of two, stays out of coefficients that may be 1e-12.
    lp.offset_ = problem.offset / problem.scale
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.passModel(lp)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / f"model{suffix}"
        if highs.writeModel(str(text)) == highspy.HighsStatus.kError:
            raise OutputError(f"{path}: HiGHS could not write the model")
        comment = "\\" if suffix == ".lp" else "*"
        kept = np.flatnonzero(problem.base).tolist()
        with atomic_write(path) as file, text.open("rb") as source:
            for line in (
                *_description(instance),
                f"loss = {problem.scale!r} * objective",
                f"column y<i> is weight i, column z<i>_<j> the product of two; pruned by presolve: {kept}",
            ):
                file.write(f"{comment} {line}\n".encode(errors="backslashreplace"))
            shutil.copyfileobj(source, file)


def write_qplib(path: Path | str, instance: Instance) -> None:
    """Write the binary quadratic problem in the text format of QPLIB, variables 1 … n in the order of the weights.

    minimise ½ xᵀQx + cᵀx over binary x, one equation per group and one per fixed weight.
    """
    problem = SelectionObjective(instance)
    rows = _equations(instance)
    with atomic_write(path) as file:

        def put(*lines: str) -> None:
            file.write("".join(line + "\n" for line in lines).encode(errors="backslashreplace"))

        put(
            "CBS_SELECTION # problem name",
            "CBL # convex quadratic objective, binary variables, linear constraints"
            if instance.curvature.is_convex
            else "QBL # quadratic objective, binary variables, linear constraints",
            "minimize # objective sense",
            f"{instance.n} # number of variables",
            f"{len(rows)} # number of constraints",
            f"{sum(1 for _ in _quadratic(problem))} # number of quadratic terms in the objective, lower triangle",
        )
        for i, j, value in _quadratic(problem):
            put(f"{i + 1} {j + 1} {value!r}")
        linear = np.flatnonzero(problem.c)
        put(
            "0.0 # default value for linear coefficients in objective",
            f"{linear.size} # number of non-default ones",
        )
        put(*(f"{i + 1} {float(problem.c[i])!r}" for i in linear.tolist()))
        put("0.0 # objective constant")
        put(f"{sum(len(members) for members, _ in rows)} # number of linear terms in all constraints")
        for r, (members, _) in enumerate(rows):
            put(*(f"{r + 1} {i + 1} 1.0" for i in members))
        put("1.0e+30 # value for infinity")
        for side in ("left", "right"):
            put(f"0.0 # default {side}-hand-side value", f"{len(rows)} # number of non-default ones")
            put(*(f"{r + 1} {float(p)!r}" for r, (_, p) in enumerate(rows)))
        for what in ("variable value", "dual of a constraint", "dual of a variable's bounds"):
            put(f"0.0 # default initial {what}", "0 # number of non-default ones")
        put("0 # number of non-default variable names", "0 # number of non-default constraint names")


def write_ubqp(path: Path | str, instance: Instance) -> None:
    """Write the quadratic form in the sparse format of OR-Library and Biq Mac, with the budgets in comments."""
    _write_form(quadratic_text.write_ubqp, path, instance, first=1)


def write_qubo(path: Path | str, instance: Instance) -> None:
    """Write the quadratic form in the format of qbsolv, with the budgets in comments."""
    _write_form(quadratic_text.write_qubo, path, instance, first=0)


def _write_form(
    write: Callable[[Path | str, int, FloatArray, Iterable[quadratic_text.Term], list[str]], None],
    path: Path | str,
    instance: Instance,
    first: int,
) -> None:
    """Write Σ a_i y_i + Σ b_ij y_i y_j, which is the loss; variables count from `first` in the comments.

    The formats have no constraints: a reader must enforce `cardinality`, `group` and `fixed`, for example by a
    penalty.
    """
    if instance.budget.cross_groups is not None:
        raise UsageError(
            f"{path}: its comments have no place for cross groups, as of transposable N:M patterns: export to "
            ".qplib, .lp or .mps"
        )
    problem = SelectionObjective(instance)
    lines = [*_description(instance), f"cardinality {instance.budget.total}"]
    if instance.budget.groups is not None:
        members = instance.budget.members(instance.n)
        for g, (group, p) in enumerate(zip(members, instance.budget.per_group.tolist(), strict=True)):
            lines.append(f"group {g} cardinality {p} members {' '.join(map(str, (group + first).tolist()))}")
    if instance.fixed is not None:
        for value, which in ((1, 1), (0, -1)):
            lines += [f"fixed {i + first} {value}" for i in np.flatnonzero(instance.fixed == which).tolist()]
    write(path, instance.n, 0.5 * problem.diagonal + problem.c, _Products(problem), lines)


class _Products:
    """The products of two weights with their coefficients; can be iterated repeatedly."""

    def __init__(self, problem: SelectionObjective) -> None:
        self.problem = problem

    def __iter__(self) -> Iterator[quadratic_text.Term]:
        return ((j, i, value) for i, j, value in _quadratic(self.problem) if i != j)


def _quadratic(problem: SelectionObjective) -> Iterator[tuple[int, int, float]]:
    """Nonzeros of the lower triangle of Q: row, column, value."""
    for k in range(problem.curvature.number_of_blocks):
        first = problem.curvature.block_slice(k).start
        Q: FloatArray = problem.block(k)
        for i in range(Q.shape[0]):
            for j in np.flatnonzero(Q[i, : i + 1]).tolist():
                yield first + i, first + j, float(Q[i, j])


def _equations(instance: Instance) -> list[tuple[list[int], int]]:
    """Members and right side of each equation Σ y = p: groups, cross groups, then fixed weights."""
    nothing = np.zeros(instance.n, dtype=bool)
    rows = [(m.tolist(), p) for m, p in open_sums(instance, np.arange(instance.n), nothing)]
    if instance.fixed is not None:
        rows += [([i], int(instance.fixed[i] == 1)) for i in np.flatnonzero(instance.fixed).tolist()]
    return rows


def _description(instance: Instance) -> list[str]:
    lines = [f"Combinatorial Brain Surgeon, selection problem: {instance.describe()}"]
    return [*lines, f"instance sha256 {instance.sha256}"] if instance.sha256 else lines


WRITERS: dict[str, Callable[[Path | str, Instance], None]] = {
    ".lp": write_lp,
    ".mps": write_mps,
    ".qplib": write_qplib,
    ".ubqp": write_ubqp,
    ".qubo": write_qubo,
}
"""The writer for each extension."""
