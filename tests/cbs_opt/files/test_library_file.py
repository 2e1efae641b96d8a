"""The instances that ship: found by name, listed with their origin, and with values that hold."""

import json
from dataclasses import replace

import pytest

import cbs_opt
from cbs_opt import Budget
from cbs_opt.cli import info, solve
from cbs_opt.files import library_file
from cbs_opt.files.instance_file import file_sha256

ENTRIES = cbs_opt.library_entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_index_tells_what_the_files_hold(entry):
    assert entry.sha256 == file_sha256(entry.path)
    instance = cbs_opt.library(entry.name)
    blocks = instance.curvature.number_of_blocks
    assert (entry.n, entry.blocks, entry.budget) == (instance.n, blocks, instance.budget.total)
    assert entry.curvature == instance.curvature.kind
    assert {"network", "data", "samples", "damping", "seed"} <= {*instance.metadata}
    for objective in ("selection", "joint"):
        best = entry.best(objective)
        assert best is not None
        assert best.bound is None or best.bound <= best.value
        assert not best.proven or best.value - best.bound <= 2e-6 * abs(best.value)
        assert library_file.best_known(instance, objective) == best


def test_every_file_is_in_the_index():
    assert {path.stem for path in ENTRIES[0].path.parent.glob("*.npz")} == set(cbs_opt.library_names())


def test_the_family_is_what_was_promised():
    single = {entry.n for entry in ENTRIES if entry.blocks == 1 and entry.name.startswith(("mlp-", "conv-"))}
    assert {12, 200} <= single
    assert len({entry.origin for entry in ENTRIES}) >= 4
    assert any(entry.groups for entry in ENTRIES)
    assert sum(entry.best("selection").proven for entry in ENTRIES) >= 20


@pytest.mark.parametrize("name", ["mlp-hidden-12", "mlp-output-12", "conv-18", "mlp-output-20"])
@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_enumeration_confirms_the_small_values(name, objective):
    entry = cbs_opt.library_entry(name)
    for best in entry.best_known:
        if best.objective == objective:
            instance = cbs_opt.library(name).with_budget(best.budget)
            assert best.proven
            assert cbs_opt.solve(instance, "brute", objective=objective).objective == pytest.approx(
                best.value, rel=1e-6
            )


def test_an_unknown_name_is_one_sentence(capsys):
    with pytest.raises(
        cbs_opt.InstanceError, match=r"library:nothing: no instance of the library; it has .*conv-72"
    ):
        cbs_opt.library("nothing")
    assert solve.main(["library:nothing"]) == 3
    assert capsys.readouterr().err.startswith("cbs-solve: library:nothing: ")


def test_solving_by_name_tells_the_best_known(capsys):
    assert solve.main(["library:mlp-output-12", "--solver", "exact", "-q"]) == 0
    assert "(proven optimal; this is +0.0000 %)" in capsys.readouterr().out
    assert solve.main(["library:mlp-output-12", "--solver", "random", "-q", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["best_known"]["value"] < content["objective"]
    assert solve.main(["library:mlp-output-12", "--solver", "random", "-q", "--budget", "3"]) == 0
    assert "best known" not in capsys.readouterr().out


def test_another_damping_is_another_problem():
    instance = cbs_opt.library("digits-mlp-gradients")
    assert library_file.best_known(instance, "selection") is not None
    assert library_file.best_known(instance.with_damping(0.1), "selection") is None


def test_the_list_of_the_library(capsys):
    assert info.main(["library:"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cbs_opt.library_names())
    assert info.main(["library:", "--json", "-"]) == 0
    assert [item["name"] for item in json.loads(capsys.readouterr().out)["instances"]] == cbs_opt.library_names()
    assert info.main(["library:conv-18"]) == 0


def test_an_index_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text('{"format": "cbs-library", "version": 2, "instances": []}')
    monkeypatch.setattr(library_file, "_folder", lambda: tmp_path)
    library_file.library_entries.cache_clear()
    try:
        with pytest.raises(cbs_opt.InstanceError, match="version 1"):
            cbs_opt.library_names()
    finally:
        library_file.library_entries.cache_clear()


def test_a_problem_without_its_groups_is_another_problem():
    grouped = cbs_opt.library("mlp-output-rows-2of4")
    ungrouped = replace(grouped, budget=Budget(grouped.budget.total))
    assert library_file.best_known(grouped, "selection") is not None
    assert library_file.best_known(ungrouped, "selection") is None
