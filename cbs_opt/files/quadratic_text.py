"""Quadratic forms over binary variables, and as text: `.ubqp` (OR-Library, Biq Mac) and `.qubo` (qbsolv).

Both formats hold an objective only. The cardinality, cardinalities of groups and fixed variables are in
comments, which `read_ubqp` and `read_qubo` read and other programs ignore. Their syntax: `docs/format.md`.
`qplib_text` reads QPLIB's format into the same form, `text_instance` makes instances of all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cbs_opt.budget import Budget
from cbs_opt.curvature import HessianBlocks
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.instance import Instance
from cbs_opt.scalars import is_finite
from cbs_opt.typing import FloatArray, IntArray

STATED = "stated_objective"
"""Key of the metadata: how the objective that a file or a model states follows from the loss."""

Term = tuple[int, int, float]
"""Row, column and coefficient of a product, row < column, counted from 0."""


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """minimise Σ a_i y_i + Σ s_i y_i² + Σ b_ij y_i y_j over binary y, each pair i < j once.

    Attributes
    ----------
    linear : float64 (n,)
        a.
    squares : float64 (n,)
        s; what a format writes on the diagonal.
    row, column : int64 (k,)
        The pairs, row < column.
    value : float64 (k,)
        b.
    cardinality : int or None
        Number of y_i that are 1; None if the file does not state it.
    groups : tuple of (int64 array, int)
        Members of a group, and the number of them that are 1.
    fixed : int8 (n,)
        1 if y_i = 1, −1 if y_i = 0, else 0; as in an instance.
    name : str
    constant : float
        The objective that the file states is this plus the form, or with `maximise` this minus the form.
    maximise : bool
    """

    linear: FloatArray
    squares: FloatArray
    row: IntArray
    column: IntArray
    value: FloatArray
    cardinality: int | None
    groups: tuple[tuple[IntArray, int], ...]
    fixed: npt.NDArray[np.int8]
    name: str = ""
    constant: float = 0.0
    maximise: bool = False

    @property
    def n(self) -> int:
        """Number of variables."""
        return int(self.linear.size)

    def objective(self, y: FloatArray) -> float:
        """Value of the form at a binary y, (n,)."""
        return float((self.linear + self.squares) @ y + self.value @ (y[self.row] * y[self.column]))

    def to_instance(self, cardinality: int | None = None) -> Instance:
        """An instance whose selection loss is this form, for the cardinality given or stated in the file.

        All weights are 1, H holds 2 s_i and the b_ij, and the linear term −a_i. H may be indefinite: solvers take
        the `convex_form` then. `stated_value` gives the objective that the file states.

        Raises
        ------
        UsageError
            Without a cardinality, or where it contradicts the groups.

        Notes
        -----
        O(n³) time, for a check of H, and O(n²) memory.
        """
        budget = self._budget() if cardinality is None else self._budget_of(cardinality)
        H = np.zeros((self.n, self.n))
        H[self.row, self.column] = self.value
        H += H.T
        H[np.diag_indices(self.n)] = 2.0 * self.squares
        stated = {"sense": "maximize" if self.maximise else "minimize", "constant": self.constant}
        return Instance(
            np.ones(self.n),
            HessianBlocks.from_blocks([H]),
            budget,
            linear=-self.linear if self.linear.any() else None,  # a step by −1 gains −linear
            fixed=self.fixed if self.fixed.any() else None,
            metadata={"network": self.name or "quadratic form", STATED: stated},
        )

    def _budget_of(self, total: int) -> Budget:
        """The budget of the file for another total; groups that hold all variables change in proportion."""
        grouped = sum(members.size for members, _ in self.groups)
        if not self.groups:
            return Budget(total)
        if grouped == self.n or self.cardinality is not None:
            return self._budget().with_total(total)
        return replace(self, cardinality=total)._budget()

    def _budget(self) -> Budget:
        """The budget stated in the file; variables without a group form one more group."""
        counts = [count for _, count in self.groups]
        grouped = sum(members.size for members, _ in self.groups)
        total = self.cardinality
        if total is None and counts and grouped == self.n:
            total = sum(counts)
        if total is None or (grouped == self.n and counts and total != sum(counts)):
            what = "no cardinality" if total is None else f"the cardinality {total} and groups of {sum(counts)}"
            ways = "`--budget`, in Python `budget`, the number of ones, or `--keep` or `--sparsity`"
            raise UsageError(f"it states {what}: give {ways}")
        if not counts:
            return Budget(total)
        label = np.full(self.n, len(counts), dtype=np.int64)
        for g, (members, _) in enumerate(self.groups):
            label[members] = g
        if grouped < self.n:
            counts.append(total - sum(counts))
        return Budget(total, label, np.array(counts))


def stated_value(metadata: Mapping[str, Any], loss: float | None) -> float | None:
    """The objective that a file or a model states, for a loss or a bound; None where it is the loss itself.

    Parameters
    ----------
    metadata : mapping
        Of the instance.
    loss : float or None
        None if unknown.
    """
    stated = metadata.get(STATED)
    if loss is None or not isinstance(stated, Mapping):
        return None
    constant, maximise = stated.get("constant", 0.0), stated.get("sense") == "maximize"
    if not is_finite(constant) or (constant == 0 and not maximise):
        return None
    return float(constant - loss if maximise else constant + loss)


def write_ubqp(path: Path | str, n: int, diagonal: FloatArray, terms: Iterable[Term], comments: list[str]) -> None:
    """Write the sparse format of OR-Library and Biq Mac: n and number of entries, then `i j q_ij`, i ≤ j, from 1.

    The objective is yᵀqy for the symmetric q, to be minimised, so that q_ii = a_i and q_ij = b_ij / 2.

    Parameters
    ----------
    path : path
    n : int
    diagonal : float64 (n,)
        a.
    terms : iterable of Term
        Iterated twice; b ≠ 0.
    comments : list of str
        Lines without the leading `#`; variables in them count from 1.
    """
    entries = int(np.count_nonzero(diagonal)) + sum(1 for _ in terms)
    with atomic_write(path) as file:
        file.write("".join(f"# {line}\n" for line in comments).encode(errors="backslashreplace"))
        file.write(f"{n} {entries}\n".encode())
        for i in np.flatnonzero(diagonal).tolist():
            file.write(f"{i + 1} {i + 1} {float(diagonal[i])!r}\n".encode())
        for i, j, value in terms:
            file.write(f"{i + 1} {j + 1} {0.5 * value!r}\n".encode())


def write_qubo(path: Path | str, n: int, diagonal: FloatArray, terms: Iterable[Term], comments: list[str]) -> None:
    """Write the format of qbsolv: `p qubo 0 n n couplers`, then `i i a_i`, then `i j b_ij`, i < j, from 0.

    Parameters are those of `write_ubqp`; variables in the comments count from 0, and the leading letter is `c`.
    """
    with atomic_write(path) as file:
        file.write("".join(f"c {line}\n" for line in comments).encode(errors="backslashreplace"))
        file.write(f"p qubo 0 {n} {n} {sum(1 for _ in terms)}\n".encode())
        for i, value in enumerate(diagonal.tolist()):
            file.write(f"{i} {i} {value!r}\n".encode())
        for i, j, value in terms:
            file.write(f"{i} {j} {value!r}\n".encode())


def read_ubqp(path: Path | str) -> QuadraticForm:
    """Read the sparse format of OR-Library and Biq Mac as a problem to minimise; see `write_ubqp`.

    An entry denotes both q_ij and q_ji, in either order of i and j. OR-Library maximises and stores several
    problems in one file, after their number: change the signs, and split the file.

    Raises
    ------
    InstanceError
        For a file that cannot be read, or a line that is wrong; it names the line and what was expected.
    """
    reader = _Reader(Path(path), first=1)
    header: list[int] | None = None
    for fields in reader.lines("#"):
        if header is None:
            header = reader.integers(fields, 2, "the number of variables and the number of entries")
            reader.start(header[0])
        else:
            reader.entry(fields, 2.0, ordered=False)
    if header is None:
        raise InstanceError(f"{path}: no line with the number of variables and the number of entries")
    reader.count("entries", header[1], reader.nodes + reader.couplers)
    return reader.form()


def read_qubo(path: Path | str) -> QuadraticForm:
    """Read the format of qbsolv; see `write_qubo`.

    Raises
    ------
    InstanceError
        For a file that cannot be read, or a line that is wrong; it names the line and what was expected.
    """
    reader = _Reader(Path(path), first=0)
    header: list[int] | None = None
    for fields in reader.lines("c"):
        if header is None:
            if fields[:2] != ["p", "qubo"] or fields[2:3] not in (["0"], ["unconstrained"]):
                raise reader.error(f"expected `p qubo 0 n nodes couplers`, got `{' '.join(fields)}`")
            header = reader.integers(fields[3:], 3, "three numbers after `p qubo 0`")
            reader.start(header[0])
        else:
            reader.entry(fields, 1.0, ordered=True)
    if header is None:
        raise InstanceError(f"{path}: no line `p qubo 0 n nodes couplers`")
    reader.count("nodes", header[1], reader.nodes)
    reader.count("couplers", header[2], reader.couplers)
    return reader.form()


LARGEST = 20_000
"""Most variables of a file: beyond, the dense matrix takes more than 3 GB."""


def check_size(path: Path, line: int, n: int) -> None:
    """Refuse a number of variables that no instance can have."""
    if not 1 <= n <= LARGEST:
        raise InstanceError(f"{path}, line {line}: the number of variables must be in [1, {LARGEST}], got {n}")


class _Reader:
    """The lines of a file and what has been read; `first` is the index of the first variable."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first, self.number = path, first, 0
        self.n = self.nodes = self.couplers = 0
        self.entries: dict[tuple[int, int], float] = {}
        self.comments: list[tuple[int, list[str]]] = []

    def error(self, text: str) -> InstanceError:
        return InstanceError(f"{self.path}, line {self.number}: {text}")

    def lines(self, comment: str) -> Iterator[list[str]]:
        """Fields of the lines that are not comments; those of comments are kept separately."""
        try:
            with self.path.open(encoding="utf-8") as file:
                for self.number, line in enumerate(file, start=1):
                    fields = line.split()
                    if not fields:
                        continue
                    if comment == "#" and fields[0].startswith("#"):
                        self.comments.append((self.number, line.strip().lstrip("#").split()))
                    elif fields[0] == comment:
                        self.comments.append((self.number, fields[1:]))
                    else:
                        yield fields
        except OSError as error:
            raise InstanceError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InstanceError(f"{self.path}: is not a text file") from error

    def integers(self, fields: list[str], count: int, what: str) -> list[int]:
        try:
            numbers = [int(field) for field in fields]
        except ValueError:
            numbers = []
        if len(numbers) != count or any(number < 0 for number in numbers):
            raise self.error(f"expected {what}, got `{' '.join(fields)}`")
        return numbers

    def start(self, n: int) -> None:
        check_size(self.path, self.number, n)
        self.n = n

    def entry(self, fields: list[str], factor: float, ordered: bool) -> None:
        """Take `i j value`, a value off the diagonal times `factor`."""
        last = self.first + self.n - 1
        try:
            i, j, value = int(fields[0]), int(fields[1]), float(fields[2])
            right = len(fields) == 3 and math.isfinite(value)
        except (ValueError, IndexError):
            right = False
        if not right:
            raise self.error(f"expected two indices and a finite number, got `{' '.join(fields)}`")
        if not (self.first <= i <= last and self.first <= j <= last):
            raise self.error(f"indices must be in [{self.first}, {last}], got {i} and {j}")
        if ordered and i > j:
            raise self.error(f"the first index must not be the larger one, got {i} and {j}")
        pair = min(i, j) - self.first, max(i, j) - self.first
        if pair in self.entries:
            raise self.error(f"the pair {i} {j} is given twice")
        self.entries[pair] = value if i == j else factor * value
        self.nodes += i == j
        self.couplers += i != j

    def count(self, what: str, announced: int, found: int) -> None:
        if announced != found:
            raise InstanceError(f"{self.path}: announces {announced} {what} and holds {found}")

    def _index(self, text: str) -> int:
        index = int(text) - self.first
        if not 0 <= index < self.n:
            raise ValueError
        return index

    def _once(self, what: str, before: int | None, now: int) -> int:
        """A number that comments must not contradict."""
        if before is not None and before != now:
            raise self.error(f"{what} has another value here than in a comment above")
        return now

    def form(self) -> QuadraticForm:
        """All that was read."""
        squares, fixed = np.zeros(self.n), np.zeros(self.n, dtype=np.int8)
        for (i, j), value in self.entries.items():
            if i == j:
                squares[i] = value
        products = sorted((pair, value) for pair, value in self.entries.items() if pair[0] != pair[1])
        cardinality: int | None = None
        groups: list[tuple[IntArray, int]] = []
        taken: list[int] = []
        for number, fields in self.comments:
            self.number = number
            try:
                if fields[:1] == ["cardinality"]:
                    cardinality = self._once("cardinality", cardinality, int(fields[1]))
                elif fields[:1] == ["group"] and fields[2] == "cardinality" and fields[4] == "members":
                    members = [self._index(field) for field in fields[5:]]
                    taken += members
                    groups.append((np.array(members, dtype=np.int64), int(fields[3])))
                elif fields[:1] == ["fixed"]:
                    i, sign = self._index(fields[1]), {0: -1, 1: 1}[int(fields[2])]
                    fixed[i] = self._once(f"variable {fields[1]}", int(fixed[i]) or None, sign)
            except (ValueError, IndexError, KeyError):
                raise self.error(
                    f"the comment `{' '.join(fields)[:80]}` is no constraint in this format"
                ) from None
        if len(set(taken)) < len(taken):
            raise InstanceError(f"{self.path}: a variable is in two groups")
        pairs = np.array([pair for pair, _ in products], dtype=np.int64).reshape(-1, 2)
        values = np.array([value for _, value in products], dtype=np.float64)
        return QuadraticForm(
            np.zeros(self.n), squares, pairs[:, 0], pairs[:, 1], values, cardinality, tuple(groups), fixed,
            name=self.path.stem,
        )  # fmt: skip
