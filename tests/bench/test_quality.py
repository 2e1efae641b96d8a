"""The tables of objectives over time: right numbers, missing peers in a sentence, the peers themselves correct."""

import numpy as np
import pytest

from cbs_opt import Budget, Instance, Monitor, Stop, joint_loss, selection_loss, write_instance
from cbs_opt.bench import losses, quality
from cbs_opt.bench.anytime import Anytime, losses_at, run_for, spread, table
from cbs_opt.bench.chita import Chita
from cbs_opt.bench.peers import MissingPeerError, Samplers, run_sampler
from cbs_opt.errors import InstanceError


@pytest.fixture
def instance(problem):
    return problem(1, n=30, kind="gradients", m=12, budget=20, damping=1e-2).instance


def test_what_a_run_has_at_each_time(instance):
    run = run_for(instance, "search", 0.3, objective="selection", seed=0)
    assert run.at(-1.0) is None
    assert run.bound_at(-1.0) is None
    first, last = losses_at(instance, run, [run.seconds[0], 1.0], "selection")
    assert first == selection_loss(instance, run.selections[0])
    assert last == selection_loss(instance, run.selections[-1]) <= first
    assert run.bound_at(1.0) <= last
    assert run.seconds == sorted(run.seconds)


def test_cells():
    assert spread([2e-4, 1e-4, 4e-4]) == "2.000e-4 [1.000e-4, 4.000e-4]"
    assert spread([1.0, 1.0]) == "1.000e0"
    assert spread([1.0, None]) == spread([]) == "–"
    assert table([0.3, 1.0], {"a": ["1", "2"]}).splitlines() == [
        "| | 0.3 s | 1 s |",
        "|---|---|---|",
        "| a | 1 | 2 |",
    ]
    assert Anytime().at(1.0) is None


def test_the_command_prints_and_writes_the_table(tmp_path, capsys, instance):
    path, out = tmp_path / "instance.npz", tmp_path / "out.md"
    write_instance(path, instance)
    arguments = ["--times", "0.1", "0.2", "--seeds", "0", "1", "--solvers", "search", "magnitude"]
    assert quality.main([str(path), "--sparsities", ".5", *arguments, "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.read_text() == text
    assert "15 to prune" in text
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        "search",
        "search, bound",
        "magnitude",
    ]


def test_an_unknown_solver_is_told(tmp_path, capsys, instance):
    path = tmp_path / "instance.npz"
    write_instance(path, instance)
    assert quality.main([str(path), "--solvers", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


def test_peers_refuse_groups(problem):
    grouped = problem(1, n=12, groups="rows").instance
    rows, notes = quality.quality(grouped, ["dwave-tabu", "dwave-annealing"], [0.1], [0])
    assert not rows
    assert len(notes) == 1


@pytest.mark.parametrize("name", ["tabu", "annealing"])
def test_samplers_meet_the_budget(name, instance):
    pytest.importorskip("dwave.samplers")
    run = run_sampler(Samplers(instance), name, [0.05], 0)
    assert all(instance.admits(pruned) for pruned in run.selections)
    best = run_for(instance, "search", 0.2, objective="selection", seed=0)
    magnitude = instance.budget.cheapest(np.abs(instance.weights))
    assert selection_loss(instance, best.selections[-1]) <= selection_loss(instance, run.selections[-1]) * (
        1 + 1e-9
    )
    if name == "tabu":
        assert selection_loss(instance, run.selections[-1]) <= selection_loss(instance, magnitude)


def test_the_model_of_the_samplers_is_the_objective(instance):
    pytest.importorskip("dwave.samplers")
    samplers = Samplers(instance)
    rng = np.random.default_rng(0)
    pairs = [instance.budget.cheapest(rng.random(instance.n)) for _ in range(2)]
    energies = [samplers.model.energy(dict(enumerate(y.astype(int).tolist()))) for y in pairs]
    one, other = (selection_loss(instance, y) for y in pairs)
    assert energies[0] / energies[1] == pytest.approx(one / other, rel=1e-6)
    repaired = samplers.repair(np.zeros(instance.n, dtype=bool))
    assert instance.admits(repaired)
    assert instance.admits(samplers.repair(np.ones(instance.n, dtype=bool)))


def test_too_large_for_a_dense_qubo(problem, monkeypatch):
    monkeypatch.setattr("cbs_opt.bench.peers.MOST_WEIGHTS", 5)
    with pytest.raises(MissingPeerError, match="dense QUBO"):
        Samplers(problem(1).instance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [0, 6, 10, 12])
def test_chita_is_feasible_and_near_the_optimum(problem, seed, budget):
    made = problem(seed, n=12, m=20, budget=budget, damping=1e-2)
    monitor = Monitor(Stop(max_iterations=6))
    Chita(made.instance).run(monitor)
    assert made.instance.admits(monitor.pruned)
    assert monitor.objective == pytest.approx(made.joint_loss(monitor.pruned), rel=1e-6, abs=1e-12)
    assert made.optimum("joint") * (1 - 1e-9) - 1e-12 <= monitor.objective <= 3 * made.optimum("joint") + 1e-12


def test_chita_steps_never_rise(problem):
    method = Chita(problem(4, n=40, m=30, budget=30, damping=1e-2).instance)
    beta = method._threshold(method.w, 10)
    for _ in range(20):
        residual = method.residual(beta)
        stepped, after, fell = method._step(beta, residual, 10, np.arange(40))
        assert np.count_nonzero(stepped) <= 10
        assert method.value(stepped, after) <= method.value(beta, residual)
        np.testing.assert_allclose(after, method.residual(stepped), atol=1e-10)
        if not fell:
            break
        beta = stepped


def test_chita_refuses_other_instances(problem):
    with pytest.raises(InstanceError, match="one block"):
        Chita(problem(1, kind="hessian").instance)
    base = problem(1, n=8).instance
    with pytest.raises(InstanceError, match="one budget"):
        Chita(Instance(base.weights, base.curvature, Budget(2, np.arange(8) % 2, [1, 1])))


def test_the_joint_losses_over_time(tmp_path, capsys, instance):
    path = tmp_path / "instance.npz"
    write_instance(path, instance)
    arguments = [
        "--objective",
        "joint",
        "--cases",
        "1e-2:.5",
        "--times",
        "0.3",
        "--seeds",
        "0",
        "--clock",
        "processor",
    ]
    assert quality.main([str(path), *arguments]) == 0
    text = capsys.readouterr().out
    for name in ("magnitude, then update", "search, then update", "chita", "backward", "joint"):
        assert f"| {name} |" in text
    assert "search, then update, bound" not in text  # it bounds the other loss
    assert "15 to prune" in text


def test_a_peer_of_the_other_loss_is_refused(tmp_path, capsys, instance):
    path = tmp_path / "instance.npz"
    write_instance(path, instance)
    assert quality.main([str(path), "--objective", "joint", "--solvers", "dwave-tabu"]) == 2
    assert "'dwave-tabu' of the joint loss" in capsys.readouterr().err


def test_chita_is_left_out_in_a_sentence(problem):
    rows, notes = quality.quality(problem(1, kind="hessian").instance, ["chita"], [0.1], [0], objective="joint")
    assert not rows
    assert notes == ["chita takes a gradient factor of one block"]


def test_losses_over_sparsity(tmp_path, capsys, instance):
    points = losses.losses_over_sparsity(instance, [0.5, 0.8], 0.2)
    for way in points.values():
        for point in way:
            assert point.joint_loss <= point.selection_loss * (1 + 1e-9)
    there = instance.with_sparsity(0.5)
    assert points["joint"][0].joint_loss <= joint_loss(there, there.budget.cheapest(np.abs(there.weights)))
    path, picture = tmp_path / "instance.npz", tmp_path / "picture.png"
    write_instance(path, instance)
    assert losses.main([str(path), "--sparsities", ".5", ".8", "--seconds", "0.1", "-o", str(picture)]) == 0
    assert picture.stat().st_size < 150_000
    assert len(capsys.readouterr().out.splitlines()) == 6
