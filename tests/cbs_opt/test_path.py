"""One instance under many budgets, in Python and on the command line."""

import csv
import json

import numpy as np
import pytest

import cbs_opt
from cbs_opt.cli.arguments import parse_solve
from cbs_opt.cli.solve import main
from cbs_opt.path import extended


def test_a_start_extends_what_is_pruned(problem):
    base = problem(0, n=12, blocks=2, budget=4, linear=True, fixed=True)
    pruned = cbs_opt.solve(base.instance, "obd").pruned
    more = base.instance.with_budget(5)
    start = extended(more, pruned)
    assert more.admits(start) and (start >= pruned).all()
    prices = {}
    for i in np.flatnonzero(~pruned & (more.fixed != -1)):
        candidate = pruned.copy()
        candidate[i] = True
        prices[i] = base.selection_loss(candidate)
    assert start[min(prices, key=prices.get)]


def test_results_along_a_path(problem):
    base = problem(1, n=10, blocks=1, budget=5)
    results = cbs_opt.solve_path(base.instance, [0.6, 0.2, 0.4, 0.4], "exact")
    assert [int(result.pruned.sum()) for result in results] == [2, 4, 6]
    for result, budget in zip(results, (2, 4, 6), strict=True):
        small = problem(1, n=10, blocks=1, budget=budget)
        assert result.objective == pytest.approx(small.optimum("selection"))
    seen = []
    stopped = cbs_opt.solve_path(
        base.instance, [0.2, 0.4], "obd", on_result=lambda s, r: seen.append(s), should_stop=lambda: True
    )
    assert len(stopped) == 1 and seen == [0.2]
    with pytest.raises(cbs_opt.UsageError, match="at least one sparsity"):
        cbs_opt.solve_path(base.instance, [])


def test_table_picture_and_files(instance_file, tmp_path, capsys):
    out = tmp_path / "s.npz"
    options = ["--table", tmp_path / "t.csv", "--picture", tmp_path / "p.svg", "--json", tmp_path / "r.json"]
    arguments = [
        "--sparsity",
        ".25",
        "50%",
        "0.75",
        instance_file,
        "--solver",
        "exact",
        "--solution",
        out,
        *options,
    ]
    assert main([*map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("written  ") and "t.csv" in lines[-1]
    assert len(lines) == 5 and lines[0].split()[:3] == ["sparsity", "pruned", "objective"]
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    content = json.loads((tmp_path / "r.json").read_text())
    assert [row["pruned"] for row in rows] == ["3", "6", "9"]
    for row, entry, sparsity in zip(rows, content["path"], (0.25, 0.5, 0.75), strict=True):
        assert entry["sparsity"] == sparsity and entry["objective"] == pytest.approx(float(row["objective"]))
        solution = cbs_opt.read_solution(tmp_path / f"s-{sparsity:g}.npz")
        assert int(solution.pruned.sum()) == int(row["pruned"])
    objectives = [float(row["objective"]) for row in rows]
    assert objectives == sorted(objectives)
    assert (tmp_path / "p.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_one_sparsity_stays_one_solve(instance_file, capsys):
    for words in (["--sparsity", "0.5", str(instance_file)], [str(instance_file), "--sparsity", "50%"]):
        assert parse_solve(words).sparsity == [0.5] and str(parse_solve(words).instance) == str(instance_file)
    assert main([str(instance_file), "--sparsity", "0.5", "--table", "t.csv"]) == 2
    assert "several budgets" in capsys.readouterr().err
    assert main([str(instance_file), "--sparsity"]) == 2
    assert main([str(instance_file), "--sparsity", "0.5", "2"]) == 2
    assert "must be a number between 0 and 1, got '2'" in capsys.readouterr().err
