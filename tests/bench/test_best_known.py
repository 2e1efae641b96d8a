"""Best-known values: found, merged, never made worse."""

import json

import pytest

import cbs_opt
from cbs_opt.bench import best_known
from cbs_opt.errors import SolverError


@pytest.fixture
def instance():
    return cbs_opt.library("mlp-output-12")


def test_problems_are_the_budgets(instance):
    assert list(best_known.problems(instance)) == [6, 10, 11]
    assert list(best_known.problems(cbs_opt.library("mlp-output-rows-2of4"))) == [100]


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_values_are_proven_and_merged(instance, objective):
    optimum = cbs_opt.solve(instance, "brute", objective=objective).objective
    worse = {
        "objective": objective,
        "budget": 10,
        "value": 2 * optimum,
        "bound": 0.1 * optimum,
        "proven": False,
        "solver": "random",
    }
    for known in (None, worse):
        found = best_known.improve(known, instance, objective, 5.0)
        assert found["proven"]
        assert found["value"] == pytest.approx(optimum, rel=1e-6)
        assert found["bound"] <= found["value"]
    assert best_known.improve(found, instance, objective, 5.0) is found


def test_a_bound_above_the_value_is_an_error(instance):
    known = {"objective": "selection", "budget": 10, "value": 1e-12, "bound": None, "proven": False, "solver": "x"}
    with pytest.raises(SolverError, match="one of them is wrong"):
        best_known.improve(known, instance, "selection", 5.0)


def test_the_command_writes_the_index(tmp_path, instance):
    entry = cbs_opt.library_entry("mlp-output-12")
    (tmp_path / "mlp-output-12.npz").write_bytes(entry.path.read_bytes())
    items = [{"name": "mlp-output-12", "best_known": []}]
    (tmp_path / "index.json").write_text(json.dumps({"instances": items}))
    assert best_known.main(["--folder", str(tmp_path), "--time-limit", "5"]) == 0
    (item,) = json.loads((tmp_path / "index.json").read_text())["instances"]
    assert len(item["best_known"]) == 6
    assert {(best["objective"], best["budget"]): round(best["value"], 9) for best in item["best_known"]} == {
        (best.objective, best.budget): round(best.value, 9) for best in entry.best_known
    }
