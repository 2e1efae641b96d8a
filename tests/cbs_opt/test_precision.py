"""What an ill-conditioned inverse Hessian can say: no optimum is claimed beyond its precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance, InverseHessianBlocks, read_instance, selection_loss, solve


def exactly(instance, pruned):
    """The selection loss in 60 digits, of the matrix as it is stored."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        H = mpmath.matrix(instance.curvature.inverse_block(0).tolist()) ** -1
        v = mpmath.matrix(np.where(pruned, instance.weights, 0.0).tolist())
        return float((v.T * H * v)[0] / 2)


def with_condition(exponent, seed=0, n=12):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    A = (basis * np.logspace(0, exponent, n)) @ basis.T
    return Instance(rng.standard_normal(n), InverseHessianBlocks.from_blocks([0.5 * (A + A.T)]), Budget(n // 2))


@pytest.mark.parametrize("solver", ["exact", "search", "brute"])
def test_no_optimum_is_claimed_beyond_the_precision(solver, caplog):
    instance = read_instance(Path(__file__).with_name("inverse-condition-1e14.npz"))
    result = solve(instance, solver, objective="selection")
    assert result.status == "converged"
    assert result.extras["relative_error"] > 1e-6
    assert "so ill-conditioned that losses hold only to about" in caplog.text
    truth = exactly(instance, result.pruned)
    assert abs(result.objective - truth) <= result.extras["relative_error"] * truth
    assert result.bound <= truth


def test_well_conditioned_inverses_are_proven_as_before(caplog):
    result = solve(with_condition(6), "exact", objective="selection")
    assert result.status == "optimal"
    assert "relative_error" not in result.extras
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("exponent", [4, 8, 11])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_estimate_covers_the_error(exponent, seed):
    instance = with_condition(exponent, seed)
    rng = np.random.default_rng(seed)
    estimates, errors = [], []
    for _ in range(10):
        pruned = rng.permutation(instance.n) < instance.n // 2
        loss, truth = selection_loss(instance, pruned), exactly(instance, pruned)
        estimates.append(instance.curvature.relative_error(np.where(pruned, instance.weights, 0.0)))
        errors.append(abs(loss - truth) / truth)
    assert max(errors) <= max(estimates) + 1e-14
    assert np.median(estimates) <= 1e4 * max(*errors, 1e-16)


def test_other_forms_state_no_error():
    H = np.diag([1.0, 1e14])
    assert HessianBlocks.from_blocks([H]).relative_error(np.ones(2)) == 0.0
    inverse = InverseHessianBlocks.from_blocks([H])
    assert inverse.relative_error(np.ones(2)) == 0.0, "nothing has been inverted"
    inverse.block(0)
    assert inverse.relative_error(np.zeros(2)) == 0.0
