"""The table of exact solvers: right cells, left-out solvers in a sentence, contradictions told, an interrupt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cbs_opt import read_instance, solve, write_instance
from cbs_opt.bench import exact, exact_blocks
from cbs_opt.errors import InstanceError, UsageError


@pytest.fixture
def files(problem, tmp_path):
    folder = tmp_path / "instances"
    folder.mkdir()
    write_instance(folder / "large.npz", problem(1, n=11, kind="hessian").instance)
    write_instance(folder / "small.npz", problem(2, n=9, kind="inverse_hessian").instance)
    write_instance(folder / "grouped.npz", problem(3, n=10, groups="2:4").instance)
    return folder


def cells(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] in ("large", "small", "grouped")]


def test_command_prints_and_writes_what_solvers_prove(files, tmp_path, capsys):
    out = tmp_path / "table.md"
    arguments = ["--solvers", "exact", "highs", "no_such_solver", "--sparsities", ".5", "-q", "--root"]
    assert exact.main([str(files), *arguments, "--objective", "selection", "joint", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.read_text() == text
    rows = cells(text)
    assert [row[0] for row in rows] == ["small", "grouped", "large"] * 2
    assert [row[3] for row in rows] == ["selection"] * 3 + ["joint"] * 3
    for name, n, sparsity, objective, value, bound, own, highs, missing, root in rows:
        instance = read_instance(files / f"{name}.npz")
        if name != "grouped":
            instance = instance.with_sparsity(float(sparsity))
        assert int(n) == instance.n
        optimum = solve(instance, "brute", objective=objective).objective
        assert float(value) == pytest.approx(optimum, rel=2e-6)
        assert float(bound) == pytest.approx(optimum, rel=2e-6)
        assert "gap" not in own + highs
        assert "node" in own
        assert missing == "–"
        assert 0 <= float(root.removesuffix(" %")) <= 100
    assert "no_such_solver is left out: " in text
    assert "| exact | 3 of 3 |" in text
    assert "| highs | 3 of 3 |" in text
    assert "wrong" not in text


def test_bound_above_a_value_is_told(problem):
    instance = problem(1).instance
    row = exact.Row(exact.Problem("some", instance, 0.5, "selection"))
    row.results = {name: solve(instance, "brute") for name in ("good", "bad")}
    assert exact.contradictions(row) == []
    row.results["bad"] = replace(row.results["bad"], objective=2 * row.value, bound=1.5 * row.value)
    (sentence,) = exact.contradictions(row)
    assert sentence.startswith("**bad is wrong** on some, 0.5, selection")


def test_medians_count_only_rows_that_all_took(problem):
    instance = problem(1).instance
    one = solve(instance, "exact")
    rows = []
    for seconds in (1.0, 2.0, 30.0):
        row = exact.Row(exact.Problem("some", instance, 0.5, "selection"))
        told = replace(one, solve_seconds=seconds, extras={"solver_seconds": seconds / 2})
        row.results = {"exact": replace(one, solve_seconds=seconds / 10), "gurobi": told, "gone": None}
        rows.append(row)
    rows[2].results["gurobi"] = None
    text = exact.medians(rows, ["exact", "gurobi", "gone"])
    assert "the 2 rows" in text
    assert "| exact | 2 of 2 | 0.1500 s |" in text
    assert "| gurobi | 2 of 2 | 1.5000 s | 0.7500 s | 3.0 s |" in text
    assert "gone" not in text


def test_interrupt_keeps_the_rows_so_far(files):
    problems = exact.problems_of([str(files)], [0.5], ["selection"])
    made = []
    rows = exact.compare(problems, ["exact"], 10.0, lambda: len(made) >= 2, [])
    for row in rows:
        made.append(row)
    assert len(made) == 2 < len(problems)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--time-limit", "0"], "positive"), (["--sparsities", "1.5"], "got 1.5"), (["empty"], "no .npz file")],
)
def test_bad_arguments_are_one_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert exact.main(arguments) in (UsageError.exit_code, InstanceError.exit_code)
    assert sentence in capsys.readouterr().err


def test_default_instances_are_those_of_the_library():
    sources = exact.default_sources(20)
    assert sources
    assert all(problem.instance.n <= 20 for problem in exact.problems_of(sources, [0.5], ["selection"]))


def test_small_blocks_come_from_their_seed(tmp_path):
    first, second = (exact_blocks.small_blocks(4, 8, seed=1) for _ in range(2))
    assert np.array_equal(first.weights, second.weights)
    assert first.curvature.number_of_blocks == 4
    assert not np.array_equal(first.weights, exact_blocks.small_blocks(4, 8, seed=2).weights)
    assert solve(first, "exact").gap <= 1e-6


def test_blocks_of_a_network(tmp_path, monkeypatch, capsys):
    """The Hessian is that of finite differences of the gradients' squares: λI + GᵀG/m of the chosen weights."""
    rng = np.random.default_rng(0)
    shapes = {"fc1.weight": (40, 784), "fc2.weight": (20, 40), "fc3.weight": (10, 20)}
    layers = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "net.npz", **layers)
    x = rng.integers(0, 256, (30, 28, 28)).astype(np.uint8)
    y = rng.integers(0, 10, 30)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y)
    monkeypatch.setattr(exact_blocks, "SAMPLES", 30)
    monkeypatch.setattr(exact_blocks, "LAYERS", {"fc2.weight": (10,), "fc3.weight": (200,)})
    made = dict(exact_blocks.network_blocks(tmp_path / "net.npz", tmp_path / "data.npz"))
    assert sorted(made) == ["mlpnet-fc2-10", "mlpnet-fc3-200"]
    hidden = (x.reshape(30, -1) / 255.0 - exact_blocks.MEAN) / exact_blocks.DEVIATION
    for name in ("fc1.weight", "fc2.weight"):
        hidden = np.maximum(hidden @ layers[name].astype(np.float64).T, 0)
    logits = hidden @ layers["fc3.weight"].astype(np.float64).T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    G = ((p - np.eye(10)[y])[:, :, None] * hidden[:, None, :]).reshape(30, -1)
    expected = G.T @ G / 30 + 1e-5 * np.eye(200)
    assert np.allclose(made["mlpnet-fc3-200"].curvature.block(0), expected, rtol=1e-6, atol=1e-9)
    assert np.array_equal(made["mlpnet-fc3-200"].weights, layers["fc3.weight"].ravel().astype(np.float64))
    np.savez(tmp_path / "broken.npz", x_train=x)
    arguments = ["-o", str(tmp_path), "--network", str(tmp_path / "net.npz"), "--images"]
    assert exact_blocks.main([*arguments, str(tmp_path / "broken.npz")]) == InstanceError.exit_code
    assert "no array 'y_train'" in capsys.readouterr().err
