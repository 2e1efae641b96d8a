"""What a Python user meets first: arguments, results, how objects look, verification."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest

import cbs_opt
from cbs_opt import (
    Budget,
    CbsError,
    GradientFactor,
    HessianBlocks,
    Instance,
    InstanceError,
    Result,
    Solution,
    SolutionError,
    Status,
    Stop,
    UsageError,
    read_solution,
    solve,
    verify,
    write_solution,
)

mpl.use("agg")


@pytest.fixture(scope="module")
def instance():
    return cbs_opt.library("mlp-output-12")


@pytest.fixture(scope="module")
def result(instance):
    return solve(instance, "brute", seed=4, update=True)


# Arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stop": 3}, "`stop` must be a Stop, such as Stop(time_limit=10), got 3 (int)"),
        ({"solver": 3}, "`solver` must be the name of a solver"),
        ({"solver": int}, "`solver` must be the name of a solver"),
        ({"seed": "x"}, "`seed` must be a whole number, got 'x' (str)"),
        ({"seed": 1.0}, "`seed` must be a whole number, got 1.0 (float)"),
        ({"seed": True}, "`seed` must be a whole number"),
        ({"seed": None}, "`seed` must be a whole number"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        (
            {"seed": 2**70},
            "`seed` must be a whole number of at most 9223372036854775807, got 1180591620717411303424",
        ),
        ({"objective": 3}, "`objective` must be 'selection' or 'joint', got 3 (int)"),
        ({"objective": "loss"}, "`objective` must be 'selection' or 'joint', got 'loss' (str)"),
        ({"parameters": 3}, "`parameters` must be a mapping"),
        ({"update": 1}, "`update` must be True or False, got 1 (int)"),
        ({"device": None}, "`device` must be 'auto', 'cpu' or 'cuda'"),
        ({"threads": 1.5}, "`threads` must be a whole number, got 1.5 (float)"),
        ({"threads": 0}, "`threads` must be at least 1, got 0"),
        ({"batch_size": "2"}, "`batch_size` must be a whole number"),
        ({"callback": 3}, "`callback` must be a callable"),
        ({"warm_start": np.zeros(3, bool)}, "`warm_start` must be bool of shape (12,), got bool of shape (3,)"),
        ({"warm_start": np.zeros(12)}, "`warm_start` must be bool of shape (12,), got float64 of shape (12,)"),
        ({"warm_start": "a"}, "`warm_start` must be bool of shape (12,), got 'a' (str)"),
        ({"warm_start": np.zeros(12, bool)}, "the warm start does not meet the budget"),
    ],
    ids=str,
)
def test_wrong_arguments_in_one_sentence(instance, options, text):
    with pytest.raises(UsageError) as refusal:
        solve(instance, **{"solver": "magnitude"} | options)
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: solve(3),
        lambda: solve(None),
        lambda: solve("missing.npz"),
        lambda: solve("library:missing"),
        lambda: solve(cbs_opt.library("mlp-output-12"), seed=10**400),
        lambda: solve(cbs_opt.library("mlp-output-12"), "ls", parameters={"starts": 10**400}),
        lambda: Stop(time_limit="3"),
        lambda: Stop(time_limit=10**400),
        lambda: Stop(max_iterations=10**400),
        lambda: Stop(no_improvement=2**63),
        lambda: Budget(10**400),
        lambda: Stop(gap=[1]),
        lambda: Stop(target="low"),
        lambda: Stop(should_stop=3),
        lambda: Budget("x"),
        lambda: Budget(np.nan),
        lambda: Budget(None),
        lambda: Budget(1.5),
        lambda: Instance(np.ones(2), np.eye(2), 1),
        lambda: Instance(np.ones(2), HessianBlocks.from_blocks([np.eye(2)]), 1, metadata=3),
        lambda: cbs_opt.read_instance(3),
        lambda: read_solution(None),
        lambda: cbs_opt.library("mlp-output-12").with_sparsity("x"),
        lambda: cbs_opt.library("mlp-output-12").with_budget("x"),
        lambda: HessianBlocks.from_blocks(3),
        lambda: HessianBlocks.from_blocks([[[1, 2], [3]]]),
        lambda: HessianBlocks.from_blocks([[["a"]]]),
        lambda: GradientFactor(np.ones((2, 2)), "x"),
        lambda: write_solution("unused.npz", 3),
        lambda: verify(cbs_opt.library("mlp-output-12"), 3),
    ],
)
def test_wrong_types_elsewhere_in_one_sentence(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CbsError) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_numpy_numbers_are_numbers(instance):
    found = solve(
        instance, "magnitude", seed=np.int64(2), stop=Stop(time_limit=np.float32(5), max_iterations=np.int32(9))
    )
    assert found.seed == 2
    json.dumps(found.to_dict(), allow_nan=False)
    assert instance.with_sparsity(np.float32(0.5)).budget.total == 6
    assert Budget(np.int16(3)).total == 3


def test_instance_by_name_and_by_path(instance):
    for given in ("library:mlp-output-12", str(instance.path), instance.path):
        assert solve(given, "obd").objective == solve(instance, "obd").objective


def test_solver_by_class_and_start_from_a_result(instance, result):
    assert solve(instance, cbs_opt.get_solver("obd")).solver == "obd"
    for start in (result, Solution(result.pruned), result.pruned):
        again = solve(instance, "ls", warm_start=start)
        assert again.objective == pytest.approx(result.objective)
    with pytest.raises(UsageError, match="has no name"):
        solve(instance, type("Nameless", (cbs_opt.Solver,), {"run": lambda *_: Status.CONVERGED}))


def test_missing_module_keeps_the_incumbent(instance):
    def run(self, instance, context):
        context.monitor.report(1.0, instance.budget.cheapest(np.abs(instance.weights)))
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    late = type("Late", (cbs_opt.Solver,), {"name": "late", "summary": "fails late", "run": run})
    assert solve(instance, late).status is Status.ERROR

    def fail(self, instance, context):
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing.inside")

    early = type("Early", (cbs_opt.Solver,), {"name": "early", "summary": "fails early", "run": fail})
    with pytest.raises(cbs_opt.SolverError, match="solver 'early' needs the package 'nothing', which is not"):
        solve(instance, early)


def test_parameters_that_are_no_dataclass_are_told(instance):
    class Lost(cbs_opt.Parameters):
        width: int = cbs_opt.option(3, "is no field without the decorator")

    solver = type("Odd", (cbs_opt.get_solver("obd"),), {"name": "odd", "parameters_type": Lost})
    with pytest.raises(cbs_opt.SolverError, match=r"Lost must be a @dataclass\(frozen=True\): 'width'"):
        solve(instance, solver)


# Results ---------------------------------------------------------------------------------------------------


def test_summary_and_dictionary(instance, result):
    rows = dict(line.split("  ", 1) for line in result.summary().splitlines())
    values = {name.strip(): value.strip() for name, value in rows.items()}
    assert values["status"] == "optimal"
    assert values["pruned"] == "10 of 12 weights, weights updated"
    assert float(values["selection loss"]) == pytest.approx(result.selection_loss, rel=1e-6)
    assert values["gap"] == "0.00 %"
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["schema"] == 1
    assert content["instance"] == {
        "path": str(instance.path),
        "sha256": instance.sha256,
        "n": 12,
        "blocks": 1,
        "budget": 10,
    }
    assert (content["status"], content["pruned_count"], content["seed"]) == ("optimal", 10, 4)
    assert content["objective"] == result.objective
    assert content["runtime"] == result.runtime
    assert len(content["history"]) == len(result.history)


def test_dictionary_has_no_nan(result):
    odd = replace(
        result, extras={"a": float("nan"), "b": np.float64(np.inf), "c": np.arange(2), "d": (np.int8(1),)}
    )
    assert odd.to_dict()["extras"] == {"a": None, "b": None, "c": [0, 1], "d": [1]}


def test_saved_result_is_a_solution_of_its_instance(instance, result, tmp_path):
    for save in (lambda path: result.save(path), lambda path: write_solution(path, result)):
        save(tmp_path / "s.npz")
        solution = read_solution(tmp_path / "s.npz", instance)
        assert np.array_equal(solution.pruned, result.pruned)
        assert np.array_equal(solution.weights, result.weights)
        assert solution.instance_sha256 == instance.sha256
        assert solution.result == result.to_dict()
    result.save(str(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == result.to_dict()
    with pytest.raises(UsageError, match=r"\.npz .* or \.json, not as '\.txt'"):
        result.save(tmp_path / "r.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "s.npz"]


def test_plot_draws_incumbent_and_bound(result):
    axes = result.plot()
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["incumbent"].get_ydata()[-1] == result.objective
    assert lines["lower bound"].get_ydata()[-1] == result.bound
    assert "seconds" in axes.get_xlabel()
    assert "selection loss" in axes.get_ylabel()
    assert replace(result, bound=None, history=()).plot(axes=axes) is axes
    mpl.pyplot.close(axes.figure)
    unbound = replace(result, bound=None, history=()).plot()
    assert [line.get_label() for line in unbound.get_lines()] == ["incumbent"]
    mpl.pyplot.close(unbound.figure)


# How objects look ------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def html_text(thing):
    page = Tags()
    page.feed(thing._repr_html_())
    assert page.open == []
    return page.text


def test_short_forms(instance, result, problem):
    assert repr(instance) == "<Instance: 12 weights in 1 block (hessian), 10 to prune (83.3%)>"
    assert repr(Budget(3)) == "Budget(3)"
    grouped = problem(0, n=12, groups="2:4", kind="inverse_hessian", blocks=3)
    assert repr(grouped.instance.budget) == "<Budget: 6 of 12 weights in 3 groups>"
    assert repr(grouped.instance.curvature) == "<InverseHessianBlocks: 12 weights in 3 blocks>"
    gradients = problem(0, n=5, m=7, damping=0.25).instance.curvature
    assert repr(gradients) == "<GradientFactor: 5 weights in 1 block, gradients 7, damping 0.25>"
    assert "brute: optimal" in repr(result)
    assert "gap 0.00 %" in repr(result)
    assert "no bound" in repr(replace(result, bound=None))
    assert repr(result.to_solution()) == "<Solution of brute: 10 of 12 weights pruned, weights updated>"
    for thing in (instance, result, grouped.instance.budget, gradients):
        assert "array" not in repr(thing)
        assert len(repr(thing)) < 120


def test_tables_of_notebooks(result, problem, with_instance):
    given = with_instance(
        problem(1, n=12, groups="2:4", kind="gradients", m=9, linear=True, fixed=True),
        metadata={"network": "a < b & c"},
    ).instance
    text = html_text(given)
    assert {"12", "6 to prune of 12 (50.0 %)", "3 of 4 weights, 2 to prune in each", "0.001", "9"} <= {*text}
    assert "a < b & c" in text
    assert "1 must be pruned, 1 must stay" in text
    assert "optimal" in html_text(result)
    assert "3 of 4 weights, 2 to prune in each" in html_text(given.budget)
    assert "GradientFactor" in html_text(given.curvature)
    assert "yes" in html_text(verify("library:mlp-output-12", result))


def test_completion_shows_only_what_is_ours():
    assert dir(cbs_opt) == sorted(cbs_opt.__all__)
    assert [name for name in dir(cbs_opt) if not hasattr(cbs_opt, name)] == []
    assert not {"logging", "Path", "np"} & {*dir(cbs_opt)}


# Verification ----------------------------------------------------------------------------------------------


def test_true_claims_are_valid(instance, result, tmp_path):
    result.save(tmp_path / "s.npz")
    for given in (result, result.to_solution(), tmp_path / "s.npz", result.pruned):
        found = verify(instance, given)
        assert found.valid, found.problems
        assert found.selection_loss == result.selection_loss
        assert found.joint_loss == result.joint_loss
    assert verify(instance, result).weights_loss == pytest.approx(result.joint_loss)
    other = solve(instance.with_budget(4), "obd")
    assert verify(instance, other).valid


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"objective": 1.0}, "`objective` is"),
        ({"selection_loss": 1.0}, "`selection_loss` is"),
        ({"joint_loss": 1.0}, "`joint_loss` is"),
        ({"bound": 1.0}, "lies above"),
        ({"weights": np.ones(12)}, "`weights` is not zero"),
        ({"pruned": np.arange(12) < 3}, "does not meet the budget"),
    ],
)
def test_false_claims_are_named(instance, result, change, text):
    found = verify(instance, replace(result, **change))
    assert not found.valid
    assert any(text in problem for problem in found.problems)
    assert found.feasible == ("pruned" not in change)


def test_solution_of_another_instance(result, tmp_path):
    result.save(tmp_path / "s.npz")
    with pytest.raises(SolutionError, match="must have shape"):
        verify("library:mlp-output-20", tmp_path / "s.npz")
    with pytest.raises(InstanceError, match="`pruned` must be bool"):
        verify("library:mlp-output-20", result)
    assert isinstance(result, Result)


def test_certificates_and_arguments_in_the_wrong_place(instance, result, tmp_path):
    path = tmp_path / "proof.npz"
    solve(instance, "exact", parameters={"certificate": str(path)})
    for given in (path, str(path), cbs_opt.read_certificate(path)):
        assert cbs_opt.verify_certificate(instance, given).optimal
    with pytest.raises(UsageError, match=r"`cbs_opt\.verify_certificate` checks what it proves"):
        verify(instance, cbs_opt.read_certificate(path))
    with pytest.raises(UsageError, match="must be a Certificate or the path of its file, got Result"):
        cbs_opt.verify_certificate(instance, result)
    with pytest.raises(UsageError, match=r"must be an Instance, got str: write_instance\(path, instance\)"):
        cbs_opt.write_instance(instance, "x.npz")
    with pytest.raises(UsageError, match=r"got str: write_solution\(path, solution\)"):
        write_solution(result, "x.npz")
