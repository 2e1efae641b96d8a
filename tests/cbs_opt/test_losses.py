"""Properties of the losses and of the update, each against a formula of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    InstanceError,
    InverseHessianBlocks,
    best_update,
    evaluate,
    joint_loss,
    selection_loss,
    solve,
)
from cbs_opt.curvature.inverse_hessian_blocks import weight_update
from cbs_opt.errors import UnboundedError
from cbs_opt.losses import predicted_loss

SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(["hessian", "inverse_hessian", "gradients"])


def draw_mask(seed, n):
    rng = np.random.default_rng(seed)
    return rng.random(n) < rng.random()


@given(SEEDS, KINDS, st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_losses_are_the_dense_formulae(problem, seed, kind, n, blocks, linear):
    case = problem(seed, n=n, kind=kind, blocks=min(blocks, n), linear=linear, damping=0.05)
    pruned = draw_mask(seed, n)
    rounding = 1e-9 * case.scale()
    assert selection_loss(case.instance, pruned) == pytest.approx(case.selection_loss(pruned), abs=rounding)
    assert joint_loss(case.instance, pruned) == pytest.approx(case.joint_loss(pruned), rel=1e-7, abs=rounding)


@given(SEEDS, st.integers(2, 8), st.integers(1, 3), st.booleans())
def test_three_forms_of_one_hessian_agree(problem, seed, n, blocks, linear):
    cases = [
        problem(seed, n=n, kind=kind, blocks=min(blocks, n), linear=linear, damping=0.05)
        for kind in ("hessian", "inverse_hessian", "gradients")
    ]
    pruned = draw_mask(seed, n)
    losses = [evaluate(case.instance, pruned) for case in cases]
    for other in losses[1:]:
        assert other.selection_loss == pytest.approx(losses[0].selection_loss, rel=1e-8, abs=1e-12)
        assert other.joint_loss == pytest.approx(losses[0].joint_loss, rel=1e-7, abs=1e-10)
        assert other.weights == pytest.approx(losses[0].weights, rel=1e-5, abs=1e-7)


@given(SEEDS, KINDS, st.integers(2, 9), st.booleans())
def test_update_is_optimal(problem, seed, kind, n, linear):
    case = problem(seed, n=n, kind=kind, linear=linear, damping=0.05, blocks=min(2, n))
    pruned = draw_mask(seed, n)
    updated = best_update(case.instance, pruned)
    assert (updated[pruned] == 0).all()
    delta = updated - case.w
    gradient = case.g + case.H @ delta
    assert gradient[~pruned] == pytest.approx(0, abs=1e-8 * (1 + np.abs(case.H).max() * np.abs(case.w).max()))
    value = predicted_loss(case.instance, delta)
    assert value == pytest.approx(case.g @ delta + 0.5 * delta @ case.H @ delta)
    rng = np.random.default_rng(seed)
    for step in (1e-3, 0.1):
        moved = delta + step * np.where(pruned, 0, rng.standard_normal(n))
        assert predicted_loss(case.instance, moved) >= value - 1e-9 * case.scale()


@given(SEEDS, KINDS, st.integers(1, 9), st.booleans())
def test_joint_is_at_most_selection(problem, seed, kind, n, linear):
    case = problem(seed, n=n, kind=kind, linear=linear, damping=1e-6)
    losses = evaluate(case.instance, draw_mask(seed, n))
    assert losses.joint_loss <= losses.selection_loss
    if not linear:
        assert losses.joint_loss >= 0


@given(SEEDS, KINDS, st.floats(1e-3, 1e3))
def test_weights_times_c_scale_the_losses_by_c_squared(problem, with_instance, seed, kind, c):
    case = problem(seed, n=7, kind=kind, damping=0.05)
    scaled = with_instance(case, weights=c * case.w)
    pruned = draw_mask(seed, 7)
    before, after = evaluate(case.instance, pruned), evaluate(scaled.instance, pruned)
    assert after.selection_loss == pytest.approx(c**2 * before.selection_loss, rel=1e-9)
    assert after.joint_loss == pytest.approx(c**2 * before.joint_loss, rel=1e-7)
    assert after.weights == pytest.approx(c * before.weights, rel=1e-6, abs=1e-9 * c)


@given(SEEDS, st.sampled_from(["hessian", "inverse_hessian", "gradients"]))
def test_order_inside_a_block_does_not_matter(seed, kind):
    rng = np.random.default_rng(seed)
    G, w, g = rng.standard_normal((9, 7)), rng.standard_normal(7), rng.standard_normal(7)
    pruned = draw_mask(seed, 7)
    order = np.concatenate([rng.permutation(3), 3 + rng.permutation(4)])

    def losses(index):
        parts = [G[:, index[:3]], G[:, index[3:]]]
        blocks = [A.T @ A / 9 + 0.05 * np.eye(A.shape[1]) for A in parts]
        curvature = {
            "hessian": lambda: HessianBlocks.from_blocks(blocks),
            "inverse_hessian": lambda: InverseHessianBlocks.from_blocks([np.linalg.inv(A) for A in blocks]),
            "gradients": lambda: GradientFactor(G[:, index], 0.05, [3, 4]),
        }[kind]()
        instance = Instance(w[index], curvature, Budget(int(pruned.sum())), linear=g[index])
        return evaluate(instance, pruned[index])

    first, second = losses(np.arange(7)), losses(order)
    assert second.selection_loss == pytest.approx(first.selection_loss, rel=1e-9, abs=1e-12)
    assert second.joint_loss == pytest.approx(first.joint_loss, rel=1e-7, abs=1e-10)
    assert second.weights == pytest.approx(first.weights[order], rel=1e-6, abs=1e-9)


@given(SEEDS, st.booleans(), st.integers(0, 9))
def test_obd_is_optimal_for_a_diagonal_hessian(seed, linear, budget):
    rng = np.random.default_rng(seed)
    diagonal, w = rng.random(9), rng.standard_normal(9)
    curvature = HessianBlocks(diagonal, np.ones(9, dtype=int))
    g = rng.standard_normal(9) if linear else None
    instance = Instance(w, curvature, budget, linear=g)
    prices = np.sort(0.5 * diagonal * w**2 - (g * w if linear else 0))
    result = solve(instance, "obd")
    assert result.objective == pytest.approx(prices[:budget].sum(), rel=1e-9, abs=1e-12)
    assert result.objective == pytest.approx(solve(instance, "brute").objective, rel=1e-9, abs=1e-12)


@given(SEEDS, st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_batched_update_equals_the_single_one(seed, b, batch, linear):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((batch, b, b + 2))
    h_inv = A @ A.transpose(0, 2, 1) + 0.1 * np.eye(b)
    w, g = rng.standard_normal((batch, b)), rng.standard_normal((batch, b))
    pruned = rng.random((batch, b)) < 0.5
    together = weight_update(h_inv, w, pruned, g if linear else None)
    for r in range(batch):
        curvature = InverseHessianBlocks.from_blocks([h_inv[r]])  # one block: the route without batches
        instance = Instance(w[r], curvature, int(pruned[r].sum()), linear=g[r] if linear else None)
        assert together[r] == pytest.approx(best_update(instance, pruned[r]), rel=1e-8, abs=1e-8)
    curvature = InverseHessianBlocks.from_blocks(list(h_inv))
    whole = Instance(w.ravel(), curvature, int(pruned.sum()), linear=g.ravel() if linear else None)
    assert best_update(whole, pruned.ravel()) == pytest.approx(together.ravel(), rel=1e-12)


def test_blocks_of_many_sizes_mix_batches_and_singles(problem):
    case = problem(3, n=40, kind="inverse_hessian", blocks=15, linear=True, damping=0.05)
    _, counts = np.unique(case.instance.curvature.block_sizes, return_counts=True)
    assert (counts > 1).any()
    assert (counts == 1).any()
    pruned = draw_mask(5, 40)
    assert joint_loss(case.instance, pruned) == pytest.approx(case.joint_loss(pruned), rel=1e-8)


def test_a_batch_is_cut_where_memory_is_short(problem, monkeypatch):
    from cbs_opt.curvature import inverse_hessian_blocks as update

    case = problem(3, n=12, kind="inverse_hessian", blocks=12)
    pruned = np.arange(12) % 2 == 0
    expected = best_update(case.instance, pruned)
    monkeypatch.setattr(update, "_BATCH_BYTES", 16)
    assert best_update(case.instance, pruned) == pytest.approx(expected)


@given(SEEDS, st.integers(1, 4), st.integers(5, 9), st.booleans())
def test_singular_hessian_has_the_least_squares_update(seed, m, n, as_gradients):
    rng = np.random.default_rng(seed)
    G, w = rng.standard_normal((m, n)), rng.standard_normal(n)
    H = G.T @ G / m
    curvature = GradientFactor(G, 0.0) if as_gradients else HessianBlocks.from_blocks([H])
    pruned = draw_mask(seed, n)
    instance = Instance(w, curvature, int(pruned.sum()))
    K = ~pruned
    move = np.linalg.lstsq(G[:, K], G[:, pruned] @ w[pruned], rcond=None)[0]
    residual = G[:, K] @ move - G[:, pruned] @ w[pruned]
    losses = evaluate(instance, pruned)
    assert losses.joint_loss == pytest.approx(0.5 * residual @ residual / m, abs=1e-9)
    assert losses.selection_loss == pytest.approx(0.5 * w[pruned] @ H[np.ix_(pruned, pruned)] @ w[pruned])


@pytest.mark.parametrize("as_gradients", [True, False])
def test_linear_term_in_the_range_of_a_singular_hessian(as_gradients):
    rng = np.random.default_rng(4)
    G, w = rng.standard_normal((3, 8)), rng.standard_normal(8)
    g = G.T @ rng.standard_normal(3)  # the mean gradient of the same samples lies in the range of H
    curvature = GradientFactor(G, 0.0) if as_gradients else HessianBlocks.from_blocks([G.T @ G / 3])
    instance = Instance(w, curvature, 2, linear=g)
    pruned = np.arange(8) < 2
    updated = best_update(instance, pruned)
    assert (g + G.T @ (G @ (updated - w)) / 3)[2:] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("as_gradients", [True, False])
def test_linear_term_along_the_null_space_has_no_minimum(as_gradients):
    G = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])
    curvature = GradientFactor(G, 0.0) if as_gradients else HessianBlocks.from_blocks([G.T @ G / 2])
    instance = Instance(np.ones(3), curvature, 1, linear=np.array([0.0, 1.0, 0.0]))
    pruned = np.array([True, False, False])
    with pytest.raises(UnboundedError, match="null space"):
        best_update(instance, pruned)
    losses = evaluate(instance, pruned)
    assert (losses.joint_loss, losses.weights) == (None, None)
    assert losses.selection_loss == pytest.approx(0.5)
    bounded = evaluate(instance, np.array([False, True, False]))  # prunes the weight that could run away
    assert bounded.joint_loss == pytest.approx(-1.0)


@pytest.mark.parametrize("damping", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("linear", [True, False])
def test_update_by_gradients_keeps_its_digits_for_small_damping(problem, damping, linear):
    case = problem(12, n=30, m=6, damping=damping, linear=linear)
    pruned = np.arange(30) % 3 == 0
    updated = best_update(case.instance, pruned)
    delta = updated - case.w
    assert (case.g + case.H @ delta)[~pruned] == pytest.approx(0, abs=1e-7)


def test_nothing_and_everything_pruned(problem):
    for kind in ("hessian", "inverse_hessian", "gradients"):
        case = problem(2, n=6, kind=kind, blocks=2)
        nothing, everything = np.zeros(6, dtype=bool), np.ones(6, dtype=bool)
        assert evaluate(case.instance, nothing).selection_loss == 0
        assert evaluate(case.instance, nothing).joint_loss == pytest.approx(0, abs=1e-14)
        losses = evaluate(case.instance, everything)
        assert losses.joint_loss == pytest.approx(0.5 * case.w @ case.H @ case.w)
        assert losses.joint_loss == pytest.approx(losses.selection_loss)


@pytest.mark.parametrize("pruned", [[True] * 7, [1] * 8, np.zeros((1, 8), dtype=bool), None])
def test_masks_of_another_type_or_shape_are_refused(problem, pruned):
    instance = problem(2).instance
    for ask in (evaluate, selection_loss, joint_loss):
        with pytest.raises(InstanceError, match="`pruned` must be bool"):
            ask(instance, pruned)


def test_instance_is_frozen_and_apart_from_what_it_was_made_of():
    weights = np.array([1.0, 2.0])
    instance = Instance(weights, HessianBlocks.from_blocks([np.eye(2)]), 1)
    weights[0] = 5.0
    assert instance.weights[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        instance.weights[0] = 3.0
    with pytest.raises(AttributeError):
        instance.budget = Budget(2)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"weights": np.ones(3)}, "weights"),
        ({"weights": np.array([1, 2])}, "weights"),
        ({"weights": np.array([1.0, np.inf])}, "weights"),
        ({"linear": np.ones(1)}, "linear"),
        ({"linear": np.array([np.nan, 0.0])}, "linear"),
        ({"fixed": np.array([2, 0])}, "fixed"),
        ({"fixed": np.array([1.0, 0.0])}, "fixed"),
        ({"fixed": np.array([1, 0, 0])}, "fixed"),
        ({"fixed": np.array([1, 1])}, "fixed"),
        ({"budget": 3}, "budget"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, field):
    good = Instance(np.array([1.0, 2.0]), HessianBlocks.from_blocks([np.eye(2)]), 1)
    with pytest.raises(InstanceError, match=f"`{field}`"):
        replace(good, **parts)


@pytest.mark.parametrize(
    ("sparsity", "expected"), [(0, 0), (1, 10), (0.9, 9), (0.3, 3), (0.31, 4), (0.7, 7), (1e-12, 0)]
)
def test_sparsity_rounds_up(problem, sparsity, expected):
    assert problem(0, n=10).instance.with_sparsity(sparsity).budget.total == expected
