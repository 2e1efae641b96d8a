"""The family of small instances: repeatable, as shipped, and what its members say they are."""

import json

import numpy as np
import pytest

import cbs_opt

pytest.importorskip("sklearn")

from cbs_opt.instances import family


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    assert family.main(["-o", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", family.family())
def test_the_shipped_files_come_from_the_script(name, made):
    shipped, fresh = cbs_opt.library(name), cbs_opt.read_instance(made / f"{name}.npz")
    np.testing.assert_allclose(shipped.weights, fresh.weights, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(shipped.curvature.diagonal(), fresh.curvature.diagonal(), rtol=1e-4, atol=1e-9)
    assert {**shipped.metadata, "writer": None} == {**fresh.metadata, "writer": None}  # of any version
    assert shipped.budget.total == fresh.budget.total


def test_members_hold_what_they_say(made):
    members = family.family()
    row = cbs_opt.read_instance(made / "mlp-output-rows-2of4.npz")
    assert row.budget.number_of_groups == 50
    assert set(row.budget.per_group.tolist()) == {2}
    assert members["mlp-output-60-linear"].linear
    assert cbs_opt.read_instance(made / "mlp-output-60-linear.npz").linear is not None
    # Small blocks hold the weights of the largest curvature, so that larger ones contain them.
    small, large = (
        set(cbs_opt.read_instance(made / f"mlp-hidden-{n}.npz").metadata["positions"]) for n in (30, 100)
    )
    assert small < large


def test_best_known_values_stay_with_their_files_only(made):
    path = made / "index.json"
    content = json.loads(path.read_text())
    line = {"objective": "joint", "budget": 10, "value": 1.0, "bound": None, "proven": False, "solver": "test"}
    for item in content["instances"]:
        item["best_known"] = [line]
    content["instances"][0]["sha256"] = "another file's"
    path.write_text(json.dumps(content))
    family.write_index(made)
    known = [item["best_known"] for item in json.loads(path.read_text())["instances"]]
    assert known[0] == []
    assert known[1:] == [[line]] * (len(known) - 1)
