"""Exports are read back by readers of their own, and solved to the value of the instance."""

from __future__ import annotations

import itertools

import highspy
import numpy as np
import pytest

from cbs_opt import InstanceError, UsageError, selection_loss, solve, write_instance
from cbs_opt.files.quadratic_text import read_qubo, read_ubqp
from cbs_opt.solvers.mip.text_formats import export_instance

KINDS = {
    "plain": {"kind": "gradients", "n": 9},
    "blocks": {"kind": "hessian", "blocks": 3, "n": 9},
    "groups": {"kind": "inverse_hessian", "blocks": 2, "groups": "layers", "n": 9},
    "linear": {"kind": "gradients", "linear": True, "n": 8},
    "fixed": {"kind": "hessian", "fixed": True, "n": 8},
    "everything": {
        "kind": "inverse_hessian",
        "blocks": 3,
        "groups": "layers",
        "linear": True,
        "fixed": True,
        "n": 10,
    },
}


def binary_points(n):
    return np.array(list(itertools.product((0.0, 1.0), repeat=n)))


def read_qplib(path):
    """Quadratic form, linear part, constant, rows and their two sides."""
    fields = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    fields = iter([field for field in fields if field])

    def number():
        return float(next(fields)[0])

    next(fields)
    kind, sense = next(fields)[0], next(fields)[0]
    assert (kind[1:], sense) == ("BL", "minimize")
    n, m = int(number()), int(number())
    Q, c, rows = np.zeros((n, n)), None, np.zeros((m, n))
    for _ in range(int(number())):
        i, j, value = next(fields)
        assert int(i) >= int(j)
        Q[int(i) - 1, int(j) - 1] = Q[int(j) - 1, int(i) - 1] = float(value)

    def vector(size):
        out = np.full(size, number())
        for _ in range(int(number())):
            i, value = next(fields)
            out[int(i) - 1] = float(value)
        return out

    c, constant = vector(n), number()
    for _ in range(int(number())):
        r, i, value = next(fields)
        rows[int(r) - 1, int(i) - 1] = float(value)
    infinity = number()
    assert infinity >= 1e20
    left, right = vector(m), vector(m)
    vector(n), vector(m), vector(n)
    assert (number(), number()) == (0, 0)
    assert next(fields, None) is None
    return Q, c, constant, rows, left, right


def qubo_by_hand(path):
    """Upper triangular matrix of the form yᵀUy, and the constraints in the comments."""
    U, constraints = None, []
    for line in path.read_text().splitlines():
        kind, *fields = line.split()
        if kind == "c":
            if fields[0] == "cardinality":
                constraints.append((None, int(fields[1])))
            elif fields[0] == "group":
                constraints.append(([int(i) for i in fields[5:]], int(fields[3])))
            elif fields[0] == "fixed":
                constraints.append(([int(fields[1])], int(fields[2])))
        elif kind == "p":
            assert fields[:2] == ["qubo", "0"]
            n, couplers = int(fields[2]), int(fields[4])
            U = np.zeros((n, n))
        else:
            i, (j, value) = int(kind), fields
            assert U[i, int(j)] == 0
            U[i, int(j)] = float(value)
    assert np.count_nonzero(np.triu(U, 1)) == couplers
    assert not np.tril(U, -1).any()
    return U, constraints


CROSSED = {"kind": "hessian", "groups": "tiles", "n": 12}


@pytest.mark.parametrize("kind", [*KINDS, "tiles"])
def test_qplib(kind, problem, tmp_path):
    given = problem(2, **(KINDS | {"tiles": CROSSED})[kind])
    export_instance(tmp_path / "out.qplib", given.instance)
    Q, c, constant, rows, left, right = read_qplib(tmp_path / "out.qplib")
    points = binary_points(given.instance.n)
    sums = points @ rows.T
    points = points[((sums >= left) & (sums <= right)).all(axis=1)]
    assert len(points) == len(list(given.selections()))
    values = 0.5 * np.einsum("ri,ij,rj->r", points, Q, points) + points @ c + constant
    assert values.min() == pytest.approx(given.optimum("selection"), rel=1e-9)
    for y, value in zip(points, values, strict=True):
        assert value == pytest.approx(given.selection_loss(y > 0.5), rel=1e-9, abs=1e-9 * given.scale())


@pytest.mark.parametrize("ending", ["ubqp", "qubo"])
def test_comments_have_no_place_for_cross_groups(ending, problem, tmp_path):
    with pytest.raises(UsageError, match="its comments have no place for cross groups"):
        export_instance(tmp_path / f"out.{ending}", problem(0, **CROSSED).instance)
    assert not list(tmp_path.iterdir())


def ubqp_by_hand(path):
    """Upper triangular matrix of the form yᵀUy, and the constraints in the comments, counted from 0."""
    lines = path.read_text().splitlines()
    comments = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    constraints = []
    for fields in (line.split()[1:] for line in comments):
        if fields[0] == "cardinality":
            constraints.append((None, int(fields[1])))
        elif fields[0] == "group":
            constraints.append(([int(i) - 1 for i in fields[5:]], int(fields[3])))
        elif fields[0] == "fixed":
            constraints.append(([int(fields[1]) - 1], int(fields[2])))
    n, m = map(int, lines[len(comments)].split())
    entries = lines[len(comments) + 1 :]
    assert len(entries) == m
    q = np.zeros((n, n))
    for i, j, value in map(str.split, entries):
        assert 1 <= int(i) <= int(j) <= n
        assert q[int(i) - 1, int(j) - 1] == 0
        assert float(value) != 0
        q[int(i) - 1, int(j) - 1] = q[int(j) - 1, int(i) - 1] = float(value)
    return q, constraints


FORMS = {".ubqp": (ubqp_by_hand, read_ubqp), ".qubo": (qubo_by_hand, read_qubo)}


@pytest.mark.parametrize("ending", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_quadratic_forms(kind, ending, problem, tmp_path):
    given = problem(2, **KINDS[kind])
    path = tmp_path / f"out{ending}"
    export_instance(path, given.instance)
    by_hand, read = FORMS[ending]
    matrix, constraints = by_hand(path)
    points = binary_points(given.instance.n)
    for members, count in constraints:
        points = points[points[:, slice(None) if members is None else members].sum(axis=1) == count]
    assert len(points) == len(list(given.selections()))
    values = np.einsum("ri,ij,rj->r", points, matrix, points)
    form = read(path)
    back = form.to_instance()
    for y, value in zip(points, values, strict=True):
        loss = given.selection_loss(y > 0.5)
        close = pytest.approx(loss, rel=1e-9, abs=1e-12 * given.scale())
        assert (value, form.objective(y), selection_loss(back, y > 0.5)) == (close, close, close)
    for pruned in binary_points(given.instance.n) > 0.5:
        assert back.admits(pruned) == given.instance.admits(pruned)
    optimum = solve(back, "brute", objective="selection").objective
    assert optimum == pytest.approx(given.optimum("selection"), rel=1e-9)


@pytest.mark.parametrize("ending", FORMS)
def test_forms_of_others(ending, tmp_path):
    """Indefinite, without comments, pairs in any order, blank lines; a cardinality is asked for."""
    path = tmp_path / f"in{ending}"
    text = {
        ".ubqp": "\n3 4\n1 1 -2\n3 1 5\n\n2 3 -4\n3 3 1e0\n",
        ".qubo": "c\nc a comment\np qubo unconstrained 3 2 2\n0 0 -2\n2 2 1\n0 2 10\nc more\n1 2 -8\n",
    }[ending]
    path.write_text(text)
    form = FORMS[ending][1](path)
    assert form.n == 3
    assert form.cardinality is None
    with pytest.raises(UsageError, match="cardinality"):
        form.to_instance()
    for y in binary_points(3):
        value = -2 * y[0] + y[2] + 10 * y[0] * y[2] - 8 * y[1] * y[2]
        assert form.objective(y) == value
        instance = form.to_instance(int(y.sum()))
        assert selection_loss(instance, y > 0.5) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("ending", "text", "words"),
    [
        (".ubqp", "", "no line"),
        (".ubqp", "10\n50 3\n", "line 1: expected the number of variables"),
        (".ubqp", "2 2\n1 1 3\n", "announces 2 entries and holds 1"),
        (".ubqp", "2 1\n1 1 x\n", "line 2: expected two indices and a finite number"),
        (".ubqp", "2 1\n1 1 nan\n", "finite"),
        (".ubqp", "2 1\n0 1 3\n", r"indices must be in \[1, 2\], got 0 and 1"),
        (".ubqp", "2 2\n1 2 3\n2 1 3\n", "line 3: the pair 2 1 is given twice"),
        (".ubqp", "# cardinality x\n2 0\n", "line 1: the comment `cardinality x`"),
        (".ubqp", "# fixed 3 1\n2 0\n", "the comment `fixed 3 1`"),
        (".ubqp", "# group 0 cardinality 1 members 1 2\n# group 1 cardinality 0 members 2\n2 0\n", "two groups"),
        (".qubo", "2 1\n1 1 3\n", "line 1: expected `p qubo 0 n nodes couplers`, got `2 1`"),
        (".qubo", "p qubo 0 2 1\n", "three numbers"),
        (".qubo", "p qubo 0 2 1 0\n", "announces 1 nodes and holds 0"),
        (".qubo", "p qubo 0 2 0 1\n1 0 3\n", "first index must not be the larger"),
        (".qubo", "p qubo 0 2 0 1\n0 2 3\n", r"\[0, 1\]"),
        (".qubo", "c nothing\n", "no line"),
    ],
)
def test_broken_forms_are_refused_in_a_sentence(ending, text, words, tmp_path):
    path = tmp_path / f"in{ending}"
    path.write_text(text)
    with pytest.raises(InstanceError, match=words) as refusal:
        FORMS[ending][1](path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "in.ubqp").write_bytes(b"\xff\xfe\x00")
    for read, name in ((read_ubqp, "in.ubqp"), (read_qubo, "absent.qubo")):
        with pytest.raises(InstanceError, match=name):
            read(tmp_path / name)


@pytest.mark.parametrize("ending", ["lp", "mps"])
@pytest.mark.parametrize("kind", [*KINDS, "tiles"])
def test_linear_program(kind, ending, problem, tmp_path):
    given = problem(2, **(KINDS | {"tiles": CROSSED})[kind])
    path = tmp_path / f"out.{ending}"
    export_instance(path, given.instance)
    (line,) = [line for line in path.read_text().splitlines() if "loss = " in line]
    scale = float(line.split("loss = ")[1].split("*")[0])
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("mip_rel_gap", 1e-9)
    assert highs.readModel(str(path)) == highspy.HighsStatus.kOk
    highs.run()
    assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    loss = scale * highs.getInfo().objective_function_value
    optimum = given.optimum("selection")
    assert loss == pytest.approx(optimum, rel=1e-6, abs=1e-9 * given.scale())
    names, values = highs.getLp().col_names_, highs.getSolution().col_value
    chosen = {int(name[1:]) for name, v in zip(names, values, strict=True) if name[0] == "y" and v > 0.5}
    (line,) = [line for line in path.read_text().splitlines() if "presolve: " in line]
    chosen |= {int(i) for i in line.split("[")[1].split("]")[0].split(",") if i.strip()}
    pruned = np.isin(np.arange(given.instance.n), list(chosen))
    assert given.instance.admits(pruned)
    assert given.selection_loss(pruned) == pytest.approx(optimum, rel=1e-6, abs=1e-9 * given.scale())


def test_unknown_ending(problem, tmp_path):
    with pytest.raises(UsageError, match=r"\.lp, \.mps, \.qplib, \.ubqp, \.qubo"):
        export_instance(tmp_path / "out.txt", problem(1).instance)
    assert not list(tmp_path.iterdir())


def test_command_line(problem, tmp_path, run):
    given = problem(2, n=6)
    write_instance(tmp_path / "in.npz", given.instance)
    for ending in ("lp", "mps", "qplib", "ubqp", "qubo"):
        done = run("info", tmp_path / "in.npz", "--export", tmp_path / f"out.{ending}")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"out.{ending}").stat().st_size > 100
    done = run("info", tmp_path / "in.npz", "--export", tmp_path / "out.txt")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = run("info", tmp_path / "in.npz", "--export", tmp_path / "absent" / "out.lp")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
