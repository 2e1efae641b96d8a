"""QPLIB's text format, read as a quadratic form with cardinalities; `docs/format.md` says what is taken.

Room: core, files; `text_instance` uses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbs_opt.errors import InstanceError
from cbs_opt.files.quadratic_text import QuadraticForm, check_size
from cbs_opt.typing import FloatArray, IntArray

_INTEGRAL = 1e-9  # relative; a right side this close to a whole number is one


def read_qplib(path: Path | str) -> QuadraticForm:
    """Read a problem of QPLIB: binary variables, a quadratic objective, and equations that count variables.

    An equation Σ x_i = p over all variables is the cardinality, disjoint ones over some are groups, x_i = 0 or 1
    fixes a variable. A problem to maximise is read as the negated one to minimise. Starting points and names are
    skipped.

    Raises
    ------
    InstanceError
        For a file that cannot be read, a line that is wrong, or a problem of another kind; it names the line or
        the constraint, what was expected and what was found.

    References
    ----------
    Furini et al., "QPLIB: a library of quadratic programming instances", Math. Prog. Comp. 11, 2019, section 5.
    """
    lines = _Lines(Path(path))
    (name,) = lines.fields(1, "the name of the problem")
    (kind,) = lines.fields(1, "the type of the problem, three letters such as QBL")
    _check_type(lines, kind)
    (sense,) = lines.fields(1, "minimize or maximize")
    if sense.lower() not in ("minimize", "maximize"):
        raise lines.error("minimize or maximize", sense)
    n = lines.count("the number of variables")
    check_size(lines.path, lines.number, n)
    m = lines.count("the number of constraints") if kind[2] == "L" else 0
    squares, pairs = _quadratic(lines, n) if kind[0] != "L" else (np.zeros(n), {})
    linear = lines.vector(n, "linear coefficients of the objective")
    constant = lines.value("the constant of the objective")
    rows = _rows(lines, n, m) if kind[2] == "L" else []
    sign = -1.0 if sense.lower() == "maximize" else 1.0
    cardinality, groups, fixed = _budgets(lines.path, rows, n)
    index = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return QuadraticForm(
        linear=sign * linear + 0.0,  # no negative zeros
        squares=sign * squares + 0.0,
        row=index[:, 0],
        column=index[:, 1],
        value=sign * np.array([pairs[i, j] for i, j in index.tolist()], dtype=np.float64),
        cardinality=cardinality,
        groups=groups,
        fixed=fixed,
        name=name,
        constant=constant,
        maximise=sign < 0,
    )


@dataclass
class _Row:
    """A constraint: its variables with their coefficients, and its sides."""

    number: int
    terms: dict[int, float]
    left: float
    right: float


class _Lines:
    """The lines of a file that hold values; what follows the values that a line must hold is a comment."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InstanceError(f"{path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InstanceError(f"{path}: is not a text file") from error
        self._lines: Iterator[tuple[int, str]] = iter(enumerate(text.splitlines(), start=1))

    def error(self, expected: str, got: str) -> InstanceError:
        return InstanceError(f"{self.path}, line {self.number}: expected {expected}, got `{got[:60]}`")

    def fields(self, count: int, expected: str) -> list[str]:
        """The first `count` fields of the next line that is not empty or a comment."""
        for number, line in self._lines:
            self.number, fields = number, line.split()
            if not fields or fields[0][0] in "#!%":
                continue
            if len(fields) < count:
                raise self.error(expected, line.strip())
            return fields[:count]
        raise InstanceError(f"{self.path}: ends after line {self.number}, where {expected} must follow")

    def value(self, expected: str) -> float:
        (field,) = self.fields(1, expected)
        return self.number_of(field, expected)

    def number_of(self, field: str, expected: str) -> float:
        try:
            value = float(field)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.error(f"{expected}, a finite number", field)
        return value

    def count(self, expected: str) -> int:
        (field,) = self.fields(1, expected)
        if not (field.isascii() and field.isdigit()):
            raise self.error(f"{expected}, a whole number", field)
        return int(field[:18])

    def index(self, field: str, last: int, what: str) -> int:
        if not (field.isascii() and field.isdigit() and 1 <= int(field[:18]) <= last):
            raise self.error(f"a {what} from 1 to {last}", field)
        return int(field) - 1

    def vector(self, size: int, what: str, kind: str = "variable") -> FloatArray:
        """A default value, the number of others, and these."""
        out = np.full(size, self.value(f"the default of the {what}"))
        seen: set[int] = set()
        for _ in range(self.count(f"the number of other {what}")):
            at, field = self.fields(2, f"a {kind} and its value, of the {what}")
            i = self.index(at, size, kind)
            if i in seen:
                raise InstanceError(f"{self.path}, line {self.number}: {kind} {at} is given twice in the {what}")
            seen.add(i)
            out[i] = self.number_of(field, f"a value of the {what}")
        return out


def _check_type(lines: _Lines, kind: str) -> None:
    if len(kind) != 3 or kind[0] not in "LDCQ" or kind[1] not in "CBMIG" or kind[2] not in "NBLDCQ":
        raise lines.error("the type of the problem, three letters such as QBL", kind)
    if kind[1] != "B":
        raise InstanceError(
            f"{lines.path}, line {lines.number}: only problems whose variables are all binary can be solved "
            f"(type ?B?), this one is {kind}"
        )
    if kind[2] in "DCQ":
        raise InstanceError(
            f"{lines.path}, line {lines.number}: only linear constraints can be solved (type ?BL), not {kind}"
        )


def _quadratic(lines: _Lines, n: int) -> tuple[FloatArray, dict[tuple[int, int], float]]:
    """½ xᵀQx by its lower triangle: the squares ½ Q_ii, and Q_ij of the pairs i < j."""
    squares, pairs, seen = np.zeros(n), {}, set()
    for _ in range(lines.count("the number of quadratic terms in the objective")):
        first, second, field = lines.fields(3, "a quadratic term: two variables and a coefficient")
        i, j = lines.index(first, n, "variable"), lines.index(second, n, "variable")
        value = lines.number_of(field, "the coefficient of a quadratic term")
        pair = min(i, j), max(i, j)
        if pair in seen:
            raise InstanceError(f"{lines.path}, line {lines.number}: the pair {first} {second} is given twice")
        seen.add(pair)
        if i == j:
            squares[i] = 0.5 * value
        elif value:
            pairs[pair] = value
    return squares, pairs


def _rows(lines: _Lines, n: int, m: int) -> list[_Row]:
    rows: dict[int, dict[int, float]] = {}
    for _ in range(lines.count("the number of linear terms in all constraints")):
        first, second, field = lines.fields(3, "a linear term: a constraint, a variable and a coefficient")
        r, i = lines.index(first, m, "constraint"), lines.index(second, n, "variable")
        terms = rows.setdefault(r, {})
        if i in terms:
            raise InstanceError(
                f"{lines.path}, line {lines.number}: variable {second} is twice in constraint {first}"
            )
        terms[i] = lines.number_of(field, "the coefficient of a linear term")
    lines.value("the value that stands for infinity")
    left = lines.vector(m, "left sides of the constraints", "constraint")
    right = lines.vector(m, "right sides of the constraints", "constraint")
    return [
        _Row(r + 1, {i: a for i, a in rows.get(r, {}).items() if a}, float(left[r]), float(right[r]))
        for r in range(m)
    ]


def _budgets(
    path: Path, rows: list[_Row], n: int
) -> tuple[int | None, tuple[tuple[IntArray, int], ...], np.ndarray[tuple[int], np.dtype[np.int8]]]:
    """Cardinality, groups and fixed variables of the constraints; raises `InstanceError` for other constraints."""
    fixed = np.zeros(n, dtype=np.int8)
    cardinality: int | None = None
    groups: list[tuple[IntArray, int]] = []
    taken = np.zeros(n, dtype=bool)
    for row in rows:
        members, number = _counting(path, row)
        if members.size == 1 and n > 1:
            value = 1 if number else -1
            if fixed[members[0]] == -value:
                raise InstanceError(f"{path}: constraint {row.number} contradicts another one on its variable")
            fixed[members[0]] = value
        elif members.size == n:
            if cardinality not in (None, number):
                raise InstanceError(f"{path}: constraint {row.number} contradicts the cardinality {cardinality}")
            cardinality = number
        else:
            if taken[members].any():
                raise InstanceError(f"{path}: constraint {row.number} shares variables with another equation")
            taken[members] = True
            groups.append((members, number))
    alone = np.flatnonzero(~taken & (fixed != 0))
    if groups and alone.size and taken.sum() + alone.size == n:
        groups.append((alone, int((fixed[alone] == 1).sum())))
    return cardinality, tuple(groups), fixed


def _counting(path: Path, row: _Row) -> tuple[IntArray, int]:
    """Variables and right side of Σ x_i = p, from an equation with equal coefficients."""
    coefficients = set(row.terms.values())
    wrong = None
    if row.left != row.right:
        wrong = f"it is an inequality, from {row.left:g} to {row.right:g}"
    elif not coefficients:
        wrong = "it has no variables"
    elif len(coefficients) > 1:
        wrong = f"its coefficients differ, {min(coefficients):g} to {max(coefficients):g}"
    else:
        number = row.right / coefficients.pop()
        if abs(number - round(number)) > _INTEGRAL * max(1.0, abs(number)) or not 0 <= round(number) <= len(
            row.terms
        ):
            wrong = f"no {number:g} of its {len(row.terms)} variables can be 1"
    if wrong is not None:
        raise InstanceError(
            f"{path}: constraint {row.number} is no equation that counts variables, Σ x = p, the only kind that "
            f"can be solved: {wrong}"
        )
    return np.array(sorted(row.terms), dtype=np.int64), round(number)
