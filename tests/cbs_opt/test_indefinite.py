"""Indefinite selection problems: convex form, losses, bounds, certificates; enumeration is the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cbs_opt
from cbs_opt import HessianBlocks, Instance, InstanceError, SharedBlocks, SolverError, UsageError
from cbs_opt.convex_form import convex_form, convex_shift
from cbs_opt.errors import UnboundedError
from cbs_opt.testing import make_problem


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1e-9, 1.0, 1e7]), st.booleans())
def test_convex_form_keeps_every_loss(seed, n, size, zeros):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, n)) * size
    w = rng.uniform(-2, 2, n) * (rng.random(n) < 0.7 if zeros else 1)
    blocks = [A + A.T, np.eye(2) * size]
    linear = rng.standard_normal(n + 2) * size
    instance = Instance(np.append(w, [1.0, -1.0]), HessianBlocks.from_blocks(blocks), 1, linear=linear)
    convex = convex_form(instance)
    assert convex.curvature.is_convex
    H, v = np.zeros((n + 2, n + 2)), np.abs(convex.weights)
    H[:n, :n], H[n:, n:] = np.abs(convex.curvature.block(0)), size * np.eye(2)
    terms = v @ H @ v + np.abs(convex.linear) @ v
    for _ in range(8):
        pruned = rng.random(n + 2) < 0.5
        loss = cbs_opt.selection_loss(instance, pruned)
        assert cbs_opt.selection_loss(convex, pruned) == pytest.approx(loss, abs=1e-12 * terms)


def test_convex_form_of_a_convex_instance_is_itself(problem):
    instance = problem(0, kind="hessian").instance
    assert convex_form(instance) is instance


@given(st.integers(0, 10**6), st.integers(2, 30))
def test_shift_is_semidefinite_and_better_than_the_spectral_one(seed, n):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, n))
    Q = (A + A.T) * np.outer(*[rng.uniform(0.1, 1, n)] * 2)
    d = convex_shift(Q)
    least = float(np.linalg.eigvalsh(Q)[0])
    assert np.linalg.eigvalsh(Q + np.diag(d))[0] >= -1e-12 * np.abs(Q).max()
    assert d.sum() <= n * max(-least, 0.0) * 1.002 + 1e-12


def test_known_shift():
    """[[0, 1], [1, 0]]: d₁ d₂ ≥ 1 is needed, the least sum has d = (1, 1)."""
    assert convex_shift(np.array([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx([1.0, 1.0], rel=2e-3)


@pytest.mark.parametrize("solver", ["exact", "highs", "brute"])
@pytest.mark.parametrize("groups", [None, "layers"])
def test_proven_optimum_of_an_indefinite_problem(solver, groups):
    case = make_problem(3, n=10, kind="hessian", indefinite=True, groups=groups)
    result = cbs_opt.solve(case.instance, solver)
    optimum = case.optimum("selection")
    assert optimum < 0  # so that the gap is relative to its absolute value
    assert result.status == "optimal" and result.objective == pytest.approx(optimum)
    assert result.bound <= optimum + 1e-12 and 0 <= result.gap <= 1e-6
    assert result.joint_loss is None and result.weights is None


@pytest.mark.parametrize("solver", ["relax", "search", "exact"])
def test_bounds_are_below_the_optimum(solver):
    for seed in range(6):
        case = make_problem(seed, n=11, kind="hessian", indefinite=True, budget=seed + 2, linear=seed % 2 == 0)
        result = cbs_opt.solve(case.instance, solver, stop=cbs_opt.Stop(max_iterations=3))
        assert result.bound <= case.optimum("selection") + 1e-9 * case.scale()
        assert result.objective >= case.optimum("selection") - 1e-9 * case.scale()


@pytest.mark.parametrize("blocks", [1, 2])
def test_certificate_of_an_indefinite_problem(blocks, tmp_path):
    case = make_problem(5, n=40, kind="hessian", indefinite=True, blocks=blocks, budget=20)
    file = tmp_path / "proof.npz"
    result = cbs_opt.solve(case.instance, "exact", parameters={"certificate": str(file)})
    certificate = cbs_opt.read_certificate(file)
    found = cbs_opt.verify_certificate(case.instance, certificate)
    assert found.optimal and found.objective == pytest.approx(result.objective)
    other = make_problem(6, n=40, kind="hessian", indefinite=True, blocks=blocks, budget=20)
    with pytest.raises(cbs_opt.SolutionError, match="the file states"):
        cbs_opt.verify_certificate(other.instance, certificate)


def test_a_certificate_of_the_joint_loss_is_refused(problem, tmp_path):
    from dataclasses import replace

    file = tmp_path / "proof.npz"
    case = make_problem(5, n=9, kind="hessian", indefinite=True)
    cbs_opt.solve(case.instance, "exact", parameters={"certificate": str(file)})
    forged = replace(cbs_opt.read_certificate(file), objective_kind="joint")
    with pytest.raises((cbs_opt.SolutionError, UnboundedError), match="indefinite"):
        cbs_opt.verify_certificate(case.instance, forged)


def test_what_an_indefinite_hessian_refuses():
    instance = make_problem(0, kind="hessian", indefinite=True).instance
    for solver in ("joint", "backward", "exact", "highs", "brute"):
        with pytest.raises(
            SolverError, match=rf"'{solver}' cannot take.*block 0 .* indefinite.*only the objective"
        ):
            cbs_opt.solve(instance, solver, objective="joint")
    with pytest.raises(UsageError, match=r"`update`: block 0 .* indefinite"):
        cbs_opt.solve(instance, "obd", update=True)
    with pytest.raises(SolverError, match="solver 'obs' cannot take an indefinite Hessian"):
        cbs_opt.solve(instance, "obs")
    pruned = np.arange(8) < 4
    with pytest.raises(UnboundedError, match="indefinite"):
        cbs_opt.joint_loss(instance, pruned)
    with pytest.raises(InstanceError, match="stored block 0 must be positive semidefinite"):
        SharedBlocks(instance.curvature, [0, 0])
    assert cbs_opt.evaluate(instance, pruned).joint_loss is None


def test_indefinite_files_are_read_and_verified(tmp_path):
    case = make_problem(1, kind="hessian", indefinite=True, n=10, blocks=2)
    cbs_opt.write_instance(tmp_path / "i.npz", case.instance)
    instance = cbs_opt.read_instance(tmp_path / "i.npz")
    assert instance.curvature.indefinite_blocks == case.instance.curvature.indefinite_blocks
    assert cbs_opt.verify(instance, cbs_opt.solve(instance, "search")).valid


def test_magnitude_is_that_of_the_instance():
    """The convex form keeps the weights, and so the order of rules that look at them alone."""
    case = make_problem(2, kind="hessian", indefinite=True)
    pruned = cbs_opt.solve(case.instance, "magnitude").pruned
    assert np.abs(case.w[pruned]).max() <= np.abs(case.w[~pruned]).min()


def test_shift_that_overflows_is_one_sentence():
    H = np.array([[0.0, 1e200], [1e200, 0.0]])
    instance = Instance(np.array([1e-200, 1e200]), HessianBlocks.from_blocks([H]), 1)
    with pytest.raises(SolverError) as refusal:
        cbs_opt.solve(instance, "search")
    assert "\n" not in str(refusal.value)
