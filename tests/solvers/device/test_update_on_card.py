"""CBS-U on a card against the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance, joint_loss, solve
from cbs_opt.curvature import SharedBlocks, device_update
from cbs_opt.curvature.device_update import best_weights
from cbs_opt.losses import predicted_loss
from cbs_opt.update import best_update

pytestmark = pytest.mark.gpu


def agrees(instance, pruned, card, tolerance=1e-9):
    found = best_weights(instance.curvature, instance.weights, pruned, instance.linear, card)
    here = best_update(instance, pruned)
    assert not found[pruned].any()
    assert found == pytest.approx(here, rel=tolerance, abs=tolerance * np.abs(here).max())
    value = predicted_loss(instance, found - instance.weights)
    assert value == pytest.approx(joint_loss(instance, pruned), rel=1e-10)


@pytest.mark.parametrize("kind", ["hessian", "inverse_hessian", "gradients"])
@pytest.mark.parametrize("options", [{"blocks": 1}, {"blocks": 4}, {"blocks": 3, "linear": True}])
def test_update_on_a_card(problem, card, kind, options):
    instance = problem(3, n=30, m=9, damping=0.01, kind=kind, **options).instance
    rng = np.random.default_rng(0)
    for rate in (0.2, 0.8):
        agrees(instance, rng.random(30) < rate, card)


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_large_blocks_of_a_factor_go_by_the_gradients(problem, card, monkeypatch, rate):
    monkeypatch.setattr(device_update, "_BATCHED", 4)
    instance = problem(3, n=40, m=6, damping=0.01, kind="gradients", blocks=2).instance
    agrees(instance, np.random.default_rng(1).random(40) < rate, card)


@pytest.fixture
def rows():
    rng = np.random.default_rng(2)
    G = rng.normal(size=(40, 16))
    curvature = SharedBlocks(
        HessianBlocks.from_blocks([G.T @ G / 40]), np.zeros(12, np.int64), rng.random(12) + 0.5
    )
    return Instance(rng.normal(size=192), curvature, Budget(96))


@pytest.mark.parametrize("long", [False, True])
def test_rows_that_share_a_hessian(rows, card, monkeypatch, long):
    monkeypatch.setattr(device_update, "long_rows", lambda P: np.full(P.shape[0], long))
    agrees(rows, np.random.default_rng(0).random(192) < 0.6, card, 1e-7)


def test_a_singular_block_is_left_to_the_cpu(problem, card):
    instance = problem(3, n=20, m=4, damping=0.0, kind="gradients").instance
    pruned = np.random.default_rng(0).random(20) < 0.3
    found = best_weights(instance.curvature, instance.weights, pruned, None, card)
    assert predicted_loss(instance, found - instance.weights) == pytest.approx(
        joint_loss(instance, pruned), abs=1e-12
    )


def test_solve_updates_on_the_card(rows, card, caplog):
    caplog.set_level("INFO")
    there, here = (solve(rows, "rmp", device=device, update=True, seed=1) for device in ("cuda", "cpu"))
    assert "the update of 192 weights: on a card" in caplog.text
    assert there.joint_loss == pytest.approx(joint_loss(rows, there.pruned), rel=1e-9)
    assert here.joint_loss < here.selection_loss and not there.weights[there.pruned].any()
