"""Instances whose blocks do not fit into memory together: solved one block at a time, under the one budget."""

import numpy as np
import pytest

from cbs_opt import (
    Budget,
    HessianBlocks,
    Instance,
    InverseHessianBlocks,
    Stop,
    memory,
    solve,
    write_instance,
)
from cbs_opt.blockwise import block_instance
from cbs_opt.cli.solve import main
from cbs_opt.losses import joint_loss, selection_loss

SOLVERS = [
    (name, objective)
    for name, objectives in {
        "search": ["selection"],
        "relax": ["selection"],
        "exact": ["selection", "joint"],
        "joint": ["joint"],
        "backward": ["joint"],
    }.items()
    for objective in objectives
]


@pytest.fixture
def little(monkeypatch):
    """Memory for one block of about 12 weights, not for three."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 2800.0)


def three_blocks(seed, kind="hessian"):
    """36 weights in three blocks of 12, whose losses are of different sizes; 16 to prune."""
    rng = np.random.default_rng(seed)
    blocks = []
    for scale in (1.0, 5.0, 0.2):
        A = scale * rng.standard_normal((20, 12))
        blocks.append(A.T @ A / 20 + 0.01 * np.eye(12))
    if kind == "inverse_hessian":
        inverses = [np.linalg.inv(H) for H in blocks]
        curvature = InverseHessianBlocks.from_blocks([(A + A.T) / 2 for A in inverses])
    else:
        curvature = HessianBlocks.from_blocks(blocks)
    return Instance(rng.standard_normal(36), curvature, 16)


@pytest.mark.parametrize("kind", ["hessian", "inverse_hessian"])
@pytest.mark.parametrize(("solver", "objective"), SOLVERS)
def test_no_worse_than_magnitude_and_near_the_whole(little, monkeypatch, solver, objective, kind):
    instance = three_blocks(3, kind)
    found = solve(instance, solver, objective=objective, stop=Stop(max_iterations=2000))
    assert found.extras["blocks_in_turn"] == 3
    assert instance.admits(found.pruned)
    loss = joint_loss if objective == "joint" else selection_loss
    assert found.objective == pytest.approx(loss(instance, found.pruned), rel=1e-12)
    magnitude = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
    assert found.objective <= loss(instance, magnitude) * (1 + 1e-12)
    assert found.bound is None
    monkeypatch.undo()
    whole = solve(instance, "exact", objective=objective)
    assert found.objective >= whole.objective * (1 - 1e-9)
    if solver != "relax":
        assert found.objective <= 1.25 * whole.objective


def test_groups_within_blocks_give_the_same_optimum_and_bound(little, monkeypatch):
    plain = three_blocks(5)
    groups = np.repeat(np.arange(6), 6)
    instance = Instance(plain.weights, plain.curvature, Budget(16, groups, [3, 3, 2, 3, 3, 2]))
    found = solve(instance, "exact", objective="joint")
    assert found.status == "optimal"
    assert found.extras["passes"] == 1
    monkeypatch.undo()
    whole = solve(instance, "exact", objective="joint")
    assert found.objective == pytest.approx(whole.objective, rel=1e-9)
    assert found.bound == pytest.approx(whole.bound, rel=1e-5)


def test_groups_across_blocks_have_no_bound(little):
    plain = three_blocks(5)
    instance = Instance(plain.weights, plain.curvature, Budget(16, np.arange(36) % 2, [8, 8]))
    found = solve(instance, "search", stop=Stop(max_iterations=300))
    assert instance.admits(found.pruned)
    assert found.bound is None


def test_linear_terms_fixed_weights_and_indefinite_blocks(little):
    plain = three_blocks(7)
    blocks = [plain.curvature.block(k).copy() for k in range(3)]
    blocks[1] -= 1.5 * np.linalg.eigvalsh(blocks[1])[0] * np.eye(len(blocks[1]))
    rng = np.random.default_rng(0)
    fixed = np.zeros(36, np.int8)
    fixed[[0, 13]], fixed[[5, 30]] = 1, -1
    instance = Instance(
        plain.weights, HessianBlocks.from_blocks(blocks), 15, linear=0.1 * rng.standard_normal(36), fixed=fixed
    )
    assert not instance.curvature.is_convex
    found = solve(instance, "search", stop=Stop(max_iterations=300))
    assert instance.admits(found.pruned)
    assert found.objective == pytest.approx(selection_loss(instance, found.pruned), rel=1e-9)
    magnitude = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
    assert found.objective <= selection_loss(instance, magnitude) + 1e-12


def test_blocks_that_are_too_large_alone_keep_what_they_had(monkeypatch, caplog):
    rng = np.random.default_rng(1)
    A = rng.standard_normal((40, 30))
    others = three_blocks(3).curvature
    blocks = [others.block(0), A.T @ A / 40 + 0.01 * np.eye(30), others.block(2)]
    mixed = Instance(rng.standard_normal(54), HessianBlocks.from_blocks(blocks), 25)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2800.0)
    found = solve(mixed, "search", stop=Stop(max_iterations=200))
    assert "of 3 blocks 1 do not fit into memory even alone (block 1 first)" in caplog.text
    assert mixed.admits(found.pruned)
    monkeypatch.setattr(memory, "available_bytes", lambda: 100.0)
    kept = solve(mixed, "search", stop=Stop(max_iterations=200))
    assert found.objective < kept.objective <= selection_loss(mixed, mixed.budget.cheapest(np.abs(mixed.weights)))


@pytest.mark.parametrize("stop", [Stop(time_limit=0.0), Stop(max_iterations=1), Stop(should_stop=lambda: True)])
def test_limits_keep_a_feasible_selection(little, stop):
    instance = three_blocks(3)
    found = solve(instance, "joint", stop=stop)
    assert instance.admits(found.pruned)
    assert found.objective == pytest.approx(joint_loss(instance, found.pruned), rel=1e-9)


def test_a_warm_start_is_never_lost(little):
    instance = three_blocks(3)
    best = solve(instance, "exact", objective="selection", stop=Stop(max_iterations=50))
    again = solve(instance, "search", warm_start=best.pruned, stop=Stop(max_iterations=20))
    assert again.objective <= best.objective * (1 + 1e-12)


def test_the_same_seed_gives_the_same_history(little):
    instance = three_blocks(3)
    first, second = (solve(instance, "joint", stop=Stop(max_iterations=200), seed=4) for _ in range(2))
    assert [row[1:] for row in first.history] == [row[1:] for row in second.history]


def test_blocks_alone_keep_their_form(problem):
    for kind in ("hessian", "inverse_hessian", "gradients"):
        instance = problem(1, kind=kind, n=12, blocks=2).instance
        alone = block_instance(instance, 1, np.arange(6) < 2)
        assert alone.curvature.kind == instance.curvature.kind
        np.testing.assert_allclose(alone.curvature.block(0), instance.curvature.block(1))
        assert alone.budget.total == 2


def test_the_limit_of_the_command_line(tmp_path, capsys):
    write_instance(tmp_path / "i.npz", three_blocks(3))
    assert main([str(tmp_path / "i.npz"), "--solver", "obd", "--memory", "1e-6", "--json", "-"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "i.npz"), "--solver", "relax", "--memory", "1e-6", "--json", "-"]) == 0
    assert "3 blocks are solved one at a time with 'relax'" in capsys.readouterr().err


def test_a_stated_limit_counts():
    with memory.memory_limit(1e6):
        assert memory.available_bytes() < 1e6
    assert memory.available_bytes() > 1e6
