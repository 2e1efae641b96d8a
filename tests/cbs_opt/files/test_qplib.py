"""QPLIB's text, and instances from text files: what is read, what is refused, and that the values are right."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

import cbs_opt
from cbs_opt import InstanceError, UsageError
from cbs_opt.cli.info import main as info
from cbs_opt.cli.solve import main as solve
from cbs_opt.files.qplib_text import read_qplib

GOLDEN = {
    "densest-subgraph.qplib": ("maximize", 2.5, 19.5),
    "groups-and-fixed.qplib": ("minimize", -1.0, None),
}


ALL_THREE = ("1 1 2.0", "1 2 2.0", "1 3 2.0")
FOUR = ("4.0", "0")


def text(
    kind="QBL",
    sense="minimize",
    n="3",
    m="1",
    quadratic=("2 1 -4.0", "3 3 2.0"),
    linear=("0.0", "1", "1 1.5"),
    constant="0.25",
    terms=ALL_THREE,
    left=FOUR,
    right=FOUR,
):
    lines = ["SMALL # the name", f"{kind}", sense, f"{n} # variables", f"{m} # constraints", str(len(quadratic))]
    lines += [*quadratic, *linear, constant, str(len(terms)), *terms, "1e+30 # infinity", *left, *right]
    return "\n".join([*lines, "0.0", "0", "0.0", "0", "0.0", "0", "0", "0"]) + "\n"


@pytest.fixture
def write(tmp_path):
    def put(content, name="in.qplib"):
        path = tmp_path / name
        path.write_text(content)
        return path

    return put


def test_values(write):
    """½ · 2 x₃² − 4 x₁x₂ + 1.5 x₁ + 0.25, two of three."""
    instance = cbs_opt.read_instance(write(text()))
    assert instance.budget.total == 2 and instance.metadata["network"] == "SMALL"
    for chosen in itertools.product((0, 1), repeat=3):
        x = np.array(chosen)
        expected = x[2] - 4 * x[0] * x[1] + 1.5 * x[0]
        assert cbs_opt.selection_loss(instance, x > 0) == pytest.approx(expected, abs=1e-12)


def test_sense_and_constant_are_reported_as_stated(write, capsys):
    path = write(text(sense="maximize"))
    assert solve([str(path), "--solver", "brute", "--json", "-", "-q"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["objective"] == pytest.approx(-2.5)  # −(1 + 1.5): x₁ and x₃
    assert content["stated"] == {"sense": "maximize", "objective": 2.75, "bound": 2.75}
    assert solve([str(path), "--solver", "brute", "-q"]) == 0
    assert "as stated" in capsys.readouterr().out


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files(name, repository):
    """Files that were written once, by hand; they stay readable for ever."""
    sense, constant, best = GOLDEN[name]
    instance = cbs_opt.read_instance(repository / "tests" / "data" / name)
    assert instance.metadata["stated_objective"] == {"sense": sense, "constant": constant}
    result = cbs_opt.solve(instance, "brute")
    if best is None:  # two groups: 1 of x₁ … x₃, 2 of x₄ … x₆; x₇ is 0 and x₈ is 1
        assert instance.budget.per_group.tolist() == [1, 2, 1]
        assert instance.fixed.tolist() == [0, 0, 0, 0, 0, 0, -1, 1]
        assert result.objective == pytest.approx(-9.0)
    else:
        assert constant - result.objective == best


def test_what_the_exporter_writes_is_read_back(problem, tmp_path):
    for number, arguments in enumerate(
        ({}, {"groups": "layers"}, {"groups": "rows", "fixed": True}, {"linear": True, "blocks": 2, "fixed": True},
         {"kind": "hessian", "indefinite": True})
    ):  # fmt: skip
        case = problem(number, n=9, **arguments)
        from cbs_opt.solvers.mip.text_formats import export_instance

        path = tmp_path / f"{number}.qplib"
        export_instance(path, case.instance)
        back = cbs_opt.read_instance(path)
        assert back.curvature.is_convex == case.instance.curvature.is_convex
        for chosen in itertools.product((False, True), repeat=9):
            pruned = np.array(chosen)
            assert back.admits(pruned) == case.instance.admits(pruned)
            loss = case.selection_loss(pruned)
            assert cbs_opt.selection_loss(back, pruned) == pytest.approx(loss, abs=1e-12 * case.scale())


BROKEN = {
    "empty": ("", "ends after line 0, where the name of the problem must follow"),
    "type": (text(kind="XYZ"), r"line 2: expected the type of the problem.*got `XYZ`"),
    "continuous": (text(kind="QCL"), r"line 2: only problems whose variables are all binary.*QCL"),
    "quadratic constraints": (text(kind="QBQ"), "line 2: only linear constraints can be solved.*QBQ"),
    "sense": (text(sense="min"), "line 3: expected minimize or maximize, got `min`"),
    "no number": (text(n="three"), "line 4: expected the number of variables, a whole number, got `three`"),
    "too many": (text(n="999999999"), r"line 4: the number of variables must be in \[1, 20000\], got 999999999"),
    "huge": (text(n="9" * 400), r"line 4: the number of variables must be in"),
    "no variables": (text(n="0"), "line 4: the number of variables must be"),
    "index": (text(quadratic=("4 1 1.0",)), "line 7: expected a variable from 1 to 3, got `4`"),
    "short line": (text(quadratic=("2 1",)), "line 7: expected a quadratic term: two variables and a coeff"),
    "not finite": (text(quadratic=("2 1 nan",)), "line 7: expected the coefficient of a quadratic term, a finite"),
    "twice": (text(quadratic=("2 1 1.0", "1 2 1.0")), "line 8: the pair 1 2 is given twice"),
    "linear twice": (text(linear=("0.0", "2", "1 1.0", "1 2.0")), "line 12: variable 1 is given twice"),
    "row": (text(terms=("2 1 1.0",)), "line 14: expected a constraint from 1 to 1, got `2`"),
    "truncated": (
        "\n".join(text().splitlines()[:12]),
        "ends after line 12, where the number of linear terms in all",
    ),
    "inequality": (text(left=("-1e30", "0")), r"constraint 1 .*Σ x = p.*an inequality, from -1e\+30 to 4"),
    "coefficients": (text(terms=("1 1 2.0", "1 2 1.0")), "constraint 1 .*coefficients differ, 1 to 2"),
    "fraction": (text(left=("3.0", "0"), right=("3.0", "0")), "constraint 1 .*no 1.5 of its 3 variables"),
    "negative": (text(left=("-2.0", "0"), right=("-2.0", "0")), "constraint 1 .*no -1 of its 3"),
    "no terms": (text(terms=()), "constraint 1 .*it has no variables"),
    "binary": ("\x00\x01\n\x02\n", "line 2: expected the type"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_one_sentence(what, write):
    content, words = BROKEN[what]
    path = write(content)
    with pytest.raises(InstanceError, match=words) as refusal:
        read_qplib(path)
    assert str(refusal.value).startswith(str(path)) and "\n" not in str(refusal.value)


def test_two_constraints_that_contradict(write):
    both = text(m="2", terms=(*(f"1 {i} 1" for i in (1, 2, 3)), *(f"2 {i} 1" for i in (1, 2, 3))),
                left=("2", "1", "2 1"), right=("2", "1", "2 1"))  # fmt: skip
    with pytest.raises(InstanceError, match="constraint 2 contradicts the cardinality 2"):
        read_qplib(write(both))
    shared = text(m="2", terms=("1 1 1", "1 2 1", "2 2 1", "2 3 1"), left=("1", "0"), right=("1", "0"))
    with pytest.raises(InstanceError, match="constraint 2 shares variables with another"):
        read_qplib(write(shared))
    fixed = text(m="2", terms=("1 1 1", "2 1 1"), left=("0", "1", "2 1"), right=("0", "1", "2 1"))
    with pytest.raises(InstanceError, match="constraint 2 contradicts another one"):
        read_qplib(write(fixed))


def test_without_a_cardinality_one_is_asked_for(write, capsys):
    lines = text(kind="QBN").splitlines()
    del lines[4]
    path = write("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=r"in\.qplib: it states no cardinality: give `--budget`"):
        cbs_opt.read_instance(path)
    assert cbs_opt.read_instance(path, 2).budget.total == 2
    assert cbs_opt.read_instance(path, lambda n: n - 1).budget.total == 2
    with pytest.raises(UsageError, match=r"in\.qplib: the budget does not fit.*\[0, 3\], got 4"):
        cbs_opt.read_instance(path, 4)
    assert solve([str(path), "-q"]) == 2
    assert "give `--budget`" in capsys.readouterr().err
    assert solve([str(path), "-q", "--keep", "1", "--solver", "brute", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == pytest.approx(-2.5)  # x₁ and x₂
    assert info([str(path)]) == 2
    capsys.readouterr()
    assert info([str(path), "--budget", "2"]) == 0
    shown = capsys.readouterr().out
    assert "indefinite  1 block" in shown and "2 to prune of 3" in shown


def test_a_partly_grouped_file_needs_the_total(write):
    path = write(text(terms=("1 1 1", "1 2 1"), left=("1", "0"), right=("1", "0")))
    with pytest.raises(UsageError, match="no cardinality"):
        cbs_opt.read_instance(path)
    assert cbs_opt.read_instance(path, 2).budget.per_group.tolist() == [1, 1]


@pytest.mark.parametrize("ending", ["qplib", "ubqp", "qubo"])
def test_solutions_and_certificates_of_text_files(ending, problem, tmp_path, capsys):
    case = problem(3, n=10, kind="hessian", indefinite=True)
    cbs_opt.write_instance(tmp_path / "i.npz", case.instance)
    path = tmp_path / f"i.{ending}"
    assert info([str(tmp_path / "i.npz"), "--export", str(path)]) == 0
    proof, answer = tmp_path / "proof.npz", tmp_path / "s.npz"
    arguments = [str(path), "--solver", "exact", "--set", f"certificate={proof}", "--solution", str(answer), "-q"]
    assert solve([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["objective"] == pytest.approx(case.optimum("selection")) and content["status"] == "optimal"
    for file in (proof, answer):
        assert solve([str(path), "--check", str(file), "-q"]) == 0
    assert solve([str(path), "--warm-start", str(answer), "--solver", "ls", "-q", "--json", "-"]) == 0
    with path.open("a") as file:
        file.write("\n")
    assert solve([str(path), "--check", str(answer), "-q"]) == 3  # of another file


@pytest.mark.parametrize(
    ("comments", "words"),
    [
        ("# cardinality 2\n# cardinality 1\n", "line 2: cardinality has another value here"),
        ("# cardinality 2\n# fixed 3 1\n# fixed 3 0\n", "line 3: variable 3 has another value here"),
    ],
)
def test_comments_that_contradict_each_other(tmp_path, comments, words):
    path = tmp_path / "in.ubqp"
    path.write_text(comments + "3 2\n1 1 5\n2 3 1\n")
    with pytest.raises(InstanceError, match=words):
        cbs_opt.read_instance(path)
