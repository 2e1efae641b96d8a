"""Exports are read back by readers of their own, and solved to the value of the instance."""

from __future__ import annotations

import itertools

import highspy
import numpy as np
import pytest

from cbs_opt import UsageError, write_instance
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


def read_ubqp(path):
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


@pytest.mark.parametrize("kind", KINDS)
def test_qplib(kind, problem, tmp_path):
    given = problem(2, **KINDS[kind])
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


@pytest.mark.parametrize("kind", KINDS)
def test_ubqp(kind, problem, tmp_path):
    given = problem(2, **KINDS[kind])
    export_instance(tmp_path / "out.ubqp", given.instance)
    U, constraints = read_ubqp(tmp_path / "out.ubqp")
    points = binary_points(given.instance.n)
    for members, count in constraints:
        points = points[points[:, slice(None) if members is None else members].sum(axis=1) == count]
    assert len(points) == len(list(given.selections()))
    values = np.einsum("ri,ij,rj->r", points, U, points)
    assert values.min() == pytest.approx(given.optimum("selection"), rel=1e-9)


@pytest.mark.parametrize("ending", ["lp", "mps"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_program(kind, ending, problem, tmp_path):
    given = problem(2, **KINDS[kind])
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
    with pytest.raises(UsageError, match=r"\.lp, \.mps, \.qplib, \.ubqp"):
        export_instance(tmp_path / "out.txt", problem(1).instance)
    assert not list(tmp_path.iterdir())


def test_command_line(problem, tmp_path, run):
    given = problem(2, n=6)
    write_instance(tmp_path / "in.npz", given.instance)
    for ending in ("lp", "mps", "qplib", "ubqp"):
        done = run("info", tmp_path / "in.npz", "--export", tmp_path / f"out.{ending}")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"out.{ending}").stat().st_size > 100
    done = run("info", tmp_path / "in.npz", "--export", tmp_path / "out.txt")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = run("info", tmp_path / "in.npz", "--export", tmp_path / "absent" / "out.lp")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
