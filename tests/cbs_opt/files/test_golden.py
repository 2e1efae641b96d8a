"""Files of all format versions, written once: every release reads them to the same values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cbs_opt import Budget, evaluate, read_instance, read_solution, solve, write_instance
from cbs_opt.files import instance_file

FOLDER = Path(__file__).resolve().parents[2] / "data" / "v1"
WEIGHTS = [1.0, -0.5, 0.25, 2.0]
GRADIENTS = [[1.0, 0.5, 0.0, -2.0], [0.25, 0.0, 4.0, 1.0], [0.0, -1.0, 0.5, 0.0]]
METADATA = {
    "network": "golden",
    "tensors": [{"name": "fc.weight", "shape": [2, 2], "offset": 0}],
    "note": "ä ½",
}
SHA256 = "126c999184d844bce4b360d9b5ced87396cbfd900109545b533a7678a12d0f58"


def test_hessian():
    instance = read_instance(FOLDER / "hessian.npz")
    assert instance.sha256 == SHA256
    assert instance.weights.tolist() == WEIGHTS
    assert instance.curvature.kind == "hessian"
    assert instance.curvature.block_sizes.tolist() == [2, 2]
    assert instance.curvature.flat.dtype == np.float64
    assert instance.curvature.flat.tolist() == [2.0, 0.5, 0.5, 1.0, 4.0, -1.0, -1.0, 0.5]
    assert instance.budget.total == 2
    assert (instance.budget.groups, instance.linear, instance.fixed) == (None, None, None)
    assert dict(instance.metadata) == METADATA
    result = solve(instance, "brute")
    assert (result.objective, result.pruned.tolist()) == (0.25, [False, True, True, False])


def test_inverse_hessian_with_everything():
    instance = read_instance(FOLDER / "inverse-hessian.npz")
    assert instance.weights.tolist() == WEIGHTS
    assert instance.curvature.kind == "inverse_hessian"
    assert instance.curvature.flat.dtype == np.float32
    assert instance.curvature.inverse_block(1).tolist() == [[4.0, -1.0], [-1.0, 0.5]]
    assert instance.curvature.block(1) == pytest.approx(np.array([[0.5, 1.0], [1.0, 4.0]]))
    assert instance.budget.total == 2
    assert instance.budget.groups.tolist() == [0, 0, 1, 1]
    assert instance.budget.group_budgets.tolist() == [1, 1]
    assert instance.linear.tolist() == [0.5, 0.0, -0.25, 0.125]
    assert instance.fixed.tolist() == [1, 0, 0, -1]
    assert dict(instance.metadata) == METADATA
    # ½ (1² · 4/7) − 0.5 in the first block, ½ (¼² · ½) + 0.25 · 0.25 in the second
    assert solve(instance, "magnitude").selection_loss == pytest.approx(2 / 7 - 0.5 + 1 / 64 + 1 / 16)


def test_gradients():
    instance = read_instance(FOLDER / "gradients.npz")
    assert instance.curvature.kind == "gradients"
    assert instance.curvature.gradients.dtype == np.float32
    assert instance.curvature.gradients.tolist() == GRADIENTS
    assert instance.curvature.damping == 0.125
    assert instance.curvature.block_sizes.tolist() == [3, 1]
    assert instance.budget.total == 3
    assert dict(instance.metadata) == {}
    G = np.array(GRADIENTS)
    delta = np.array(WEIGHTS) * [1, 1, 1, 0]
    expected = ((G @ delta) ** 2).sum() / 6 + 0.125 / 2 * (delta**2).sum()
    assert solve(instance, "magnitude").selection_loss == pytest.approx(expected, rel=1e-12)


def test_compressed_by_numpy_with_other_number_types():
    instance = read_instance(FOLDER / "numpy-compressed.npz")
    assert instance.weights.tolist() == WEIGHTS
    assert instance.curvature.gradients.tolist() == GRADIENTS
    assert instance.curvature.damping == 0.5
    assert instance.budget.groups.tolist() == [0, 0, 0, 0]
    assert instance.budget.group_budgets.tolist() == [1]


def test_solution():
    instance = read_instance(FOLDER / "hessian.npz")
    solution = read_solution(FOLDER / "solution.npz", instance)
    assert solution.pruned.tolist() == [False, True, True, False]
    assert solution.weights.tolist() == [0.875, 0.0, 0.0, 1.5]
    assert solution.instance_sha256 == SHA256
    assert solution.result["joint_loss"] == 0.171875
    assert solution.result["history"] == [[0.0, 1, 0.25, None]]
    assert evaluate(instance, solution.pruned).joint_loss == pytest.approx(0.171875, rel=1e-12)


def test_golden_files_are_small():
    files = list(FOLDER.glob("*.npz"))
    assert len(files) >= 5
    assert all(path.stat().st_size < 20_000 for path in files)


def test_version_2_blocks_share_what_is_stored():
    instance = read_instance(FOLDER.with_name("v2") / "hessian.npz")
    curvature = instance.curvature
    assert instance.sha256 == "a3eced54b094712ff87e335edf9fde97e3e4c4ddacfca3c440af67e374139b10"
    assert instance.weights.tolist() == [1.0, -0.5, 0.25, 2.0, 3.0, -1.0, 0.5]
    assert curvature.block_sizes.tolist() == [2, 2, 1, 2]
    assert (curvature.shared.tolist(), curvature.block_scale.tolist()) == ([0, 0, 1, 0], [1.0, 2.0, 1.0, 0.25])
    assert curvature.stored.flat.tolist() == [2.0, 0.5, 0.5, 1.0, 4.0]
    assert [curvature.block(k).tolist() for k in (1, 2)] == [[[4.0, 1.0], [1.0, 2.0]], [[4.0]]]
    assert instance.metadata["network"] == "golden" and instance.metadata["note"] == "ä ½"
    result = solve(instance, "brute")
    # ½ (½² · 1 + ¼² · 4 + ½² · ¼)
    assert (result.objective, np.flatnonzero(result.pruned).tolist()) == (0.28125, [1, 2, 6])


def test_version_2_inverse_blocks():
    instance = read_instance(FOLDER.with_name("v2") / "inverse-hessian.npz")
    curvature = instance.curvature
    assert (curvature.kind, curvature.stored.flat.dtype) == ("inverse_hessian", np.float32)
    assert curvature.stored.flat.tolist() == [4.0, -1.0, -1.0, 0.5]
    assert (curvature.shared.tolist(), curvature.block_scale.tolist()) == ([0, 0], [1.0, 1.0])
    assert curvature.block(1) == pytest.approx(np.array([[0.5, 1.0], [1.0, 4.0]]))


def test_version_2_groups_by_their_sizes(monkeypatch, tmp_path):
    folder = FOLDER.with_name("v2")
    instance = read_instance(folder / "pattern.npz")
    assert instance.sha256 == "f79d6e1ecab3f94a28ddd85d8259a776681f3ae3e843af470c33675d33f9c96a"
    assert instance.budget.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert instance.budget.group_budgets.tolist() == [1, 1, 1, 1]
    assert instance.budget.cell == (1, 2)
    assert np.flatnonzero(solve(instance, "brute").pruned).tolist() == [1, 2, 5, 7]
    other = read_instance(folder / "group-sizes.npz")
    assert other.budget.groups.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert (other.budget.group_budgets.tolist(), other.budget.cell) == ([1, 3], None)
    monkeypatch.setattr(instance_file, "_MANY_WEIGHTS", 8)
    for name, again in (("pattern.npz", instance), ("group-sizes.npz", other)):
        write_instance(tmp_path / name, again)
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    monkeypatch.setattr(instance_file, "_MANY_WEIGHTS", 9)
    write_instance(tmp_path / "whole.npz", other)  # few weights are written as ever
    with np.load(tmp_path / "whole.npz") as file:
        assert file["groups"].tolist() == other.budget.groups.tolist() and "group_sizes" not in file


def test_version_3_cross_groups(monkeypatch, tmp_path):
    path = FOLDER.with_name("v3") / "tiles.npz"
    instance = read_instance(path)
    assert instance.sha256 == "c55317184a010e5999b73b89c0f49116f5fa3918bb8b1b29574f608a950c84ee"
    budget = instance.budget
    assert budget.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert budget.cross_groups.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert budget.group_budgets.tolist() == [1, 1, 1, 1, 0, 0]
    assert budget.cross_group_budgets.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert np.flatnonzero(solve(instance, "brute", objective="joint").pruned).tolist() == [0, 2, 5, 7]
    write_instance(tmp_path / "again.npz", instance)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    monkeypatch.setattr(instance_file, "_MANY_WEIGHTS", 12)  # many weights are written in fewer bytes
    write_instance(tmp_path / "many.npz", instance)
    with np.load(tmp_path / "many.npz") as file:
        assert file["cross_groups"].dtype == np.int32 and file["group_sizes"].tolist() == [2]
        assert int(file["version"]) == 3
    again = read_instance(tmp_path / "many.npz").budget
    assert again.cross_groups.tolist() == budget.cross_groups.tolist()
    assert again.cross_groups.dtype == np.int64 and again.groups.tolist() == budget.groups.tolist()
    plain = replace(instance, budget=Budget(4, budget.groups, budget.group_budgets))
    write_instance(tmp_path / "plain.npz", plain)  # without cross groups as ever
    with np.load(tmp_path / "plain.npz") as file:
        assert int(file["version"]) == 2
