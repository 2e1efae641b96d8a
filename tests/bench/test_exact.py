"""The table of exact solvers: right cells, left-out solvers in a sentence, contradictions told."""

from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import read_instance, solve, write_instance
from cbs_opt.bench import exact, exact_blocks
from cbs_opt.bench.reports.analysis import analyse
from cbs_opt.bench.reports.proofs import proofs
from cbs_opt.bench.runs.runner import make_plan
from cbs_opt.bench.runs.store import Row, Store, StoredInstance
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
    for name, n, sparsity, objective, value, bound, own, highs, root in rows:
        instance = read_instance(files / f"{name}.npz")
        if name != "grouped":
            instance = instance.with_budget(round(float(sparsity) * instance.n))
            assert instance.budget.total == instance.with_sparsity(0.5).budget.total
        assert int(n) == instance.n
        optimum = solve(instance, "brute", objective=objective).objective
        assert float(value) == pytest.approx(optimum, rel=2e-6)
        assert float(bound) == pytest.approx(optimum, rel=2e-6)
        assert "gap" not in own + highs
        assert "node" in own
        assert 0 <= float(root.removesuffix(" %")) <= 100
    assert "no_such_solver is left out: " in text
    assert text.count("| exact | 3 of 3 |") == text.count("| highs | 3 of 3 |") == 2
    assert "wrong" not in text


def test_the_rows_are_kept_and_the_report_has_the_same_table(files, tmp_path, capsys, run):
    store, out = tmp_path / "rows.sqlite", tmp_path / "report.md"
    arguments = ["--solvers", "exact", "brute", "--sparsities", ".5", "-q", "--store", str(store)]
    assert exact.main([str(files), *arguments]) == 0
    text = capsys.readouterr().out
    done = run("bench", "report", store, "--proofs", out, "-q")
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert cells(out.read_text()) == cells(text) != []
    assert exact.main([str(files), *arguments]) == 0  # nothing is solved again
    assert capsys.readouterr().out == text


@pytest.fixture
def stored(tmp_path):
    """`stored(rows)`: the view of a store with a row for each (solver, n, seconds, own seconds, more)."""

    def view(rows):
        with Store(tmp_path / "rows.sqlite", "w") as store:
            for solver, n, solve_s, own_s, more in rows:
                given = {"status": "optimal", "objective": 2.0, "bound": 2.0} | more
                sha256 = f"{n:04d}" * 16
                store.add_instance(StoredInstance(sha256, f"of {n}", n, 1, "hessian", {}))
                key = (sha256, solver, "{}", "selection", n // 2, 0, 60.0)
                store.add(Row(*key, solver, 0.5, "ok", build_s=0.1, solve_s=solve_s, own_s=own_s, **given))
            analysis = analyse(store)
        return proofs(analysis)

    return view


def test_medians_count_only_problems_that_all_took(stored):
    rows = [("exact", n, n / 100, None, {}) for n in (10, 20, 30)] + [("exact", 200, 9.0, None, {})]
    text = stored([*rows, *(("gurobi", n, n / 10, n / 20, {}) for n in (10, 20))])
    assert "the 2 problems" in text
    assert "| exact | 2 of 2 | 0.1500 s | 0.1500 s | 0.3 s |" in text
    assert "| gurobi | 2 of 2 | 1.5000 s | 0.7500 s | 3.0 s |" in text


def test_a_cell_has_seconds_nodes_and_what_is_not_proven(stored):
    text = stored(
        [
            ("exact", 12, 0.25, None, {"nodes": 1}),
            ("scip", 12, 12.34, 5.5, {"nodes": 4321, "status": "time_limit", "bound": 1.5, "objective": 3.0}),
            ("highs", 12, 1.0, None, {"status": "converged", "bound": None}),
            ("liar", 12, 1.0, None, {"bound": 2.5, "objective": 2.5}),
        ]
    )
    (line,) = [line for line in text.splitlines() if line.startswith("| of 12 ")]
    assert line.strip("| ").split(" | ")[4:] == [
        "2.000000e+00",
        "2.000000e+00",
        "0.250 s, 1 node",
        "12.3 s (5.500), 4,321 nodes, **gap 50 %**, bound 1.500e+0, value 3.000e+0",
        "1.000 s, **no bound**",
        "**wrong**",
    ]
    assert "exact has a selection of 2" in text


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
    asked = exact.configuration([], ["exact"], [0.5], ["selection"], 1.0)
    sizes = {instance.sha256: instance.n for instance in make_plan(asked).instances}
    taken = {sizes[task.instance_sha256] for task in make_plan(asked).tasks}
    assert taken == {n for n in sizes.values() if n <= exact.LIBRARY_UP_TO}


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
