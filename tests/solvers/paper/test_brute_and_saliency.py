from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import CbsError, GradientFactor, HessianBlocks, Instance, SolverError, Status, Stop, solve


@pytest.mark.parametrize("kind", ["hessian", "inverse_hessian", "gradients"])
@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("extras", [{}, {"linear": True, "fixed": True}, {"groups": "layers", "blocks": 3}])
def test_brute_against_itertools_and_dense_formulae(problem, kind, objective, extras):
    for seed in range(4):
        given = problem(seed, n=9, kind=kind, damping=0.02, **extras)
        table = [(given.loss(objective, pruned), pruned) for pruned in given.selections()]
        value, best = min(table, key=lambda row: row[0])
        result = solve(given.instance, "brute", objective=objective)
        assert result.status is Status.OPTIMAL
        assert result.objective == pytest.approx(value, rel=1e-8)
        assert result.bound == pytest.approx(value, rel=1e-8)
        assert result.iterations == len(table)
        assert result.pruned.tolist() == best.tolist()


def test_brute_refuses_more_than_25_weights(problem):
    with pytest.raises(SolverError, match="at most 25 weights, the instance has 26"):
        solve(problem(1, n=26).instance, "brute")


def test_brute_at_its_largest(problem):
    given = problem(1, n=25, budget=2)
    result = solve(given.instance, "brute")
    assert result.iterations == 300
    assert result.objective == pytest.approx(given.optimum("selection"), rel=1e-8)


def test_brute_without_any_bounded_selection():
    instance = Instance(
        np.ones(4), GradientFactor(np.array([[1.0, 0, 0, 0]]), 0.0), 1, linear=np.array([0.0, 1, 1, 1])
    )
    with pytest.raises(CbsError, match=r"no minimum|has a minimum") as refusal:
        solve(instance, "brute", objective="joint")
    assert "AssertionError" not in str(refusal.value)
    for name in ("magnitude", "obd"):
        with pytest.raises(CbsError, match="no minimum"):
            solve(instance, name, objective="joint")


def test_brute_chooses_among_bounded_selections_only():
    G = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    instance = Instance(np.array([1.0, 2.0, 3.0]), GradientFactor(G, 0.0), 1, linear=np.array([0.0, 1.0, 0.0]))
    result = solve(instance, "brute", objective="joint")
    assert result.pruned.tolist() == [False, True, False]
    assert result.objective == pytest.approx(-2.0)


def test_stopped_enumeration_claims_nothing(problem, monkeypatch):
    from cbs_opt.solvers.exact import brute

    monkeypatch.setattr(brute, "_CHUNK", 64)
    result = solve(problem(1, n=12).instance, "brute", stop=Stop(max_iterations=50))
    assert result.status is Status.ITERATION_LIMIT
    assert result.bound is None
    assert 50 <= result.iterations < 924


def expected_scores(name, given):
    w, H, g = given.w, given.H, given.g
    if name == "magnitude":
        return np.abs(w)
    if name == "obd":
        return 0.5 * w**2 * H.diagonal() - g * w
    inverse = np.linalg.inv(H)
    return (w - inverse @ g) ** 2 / (2 * inverse.diagonal())


@pytest.mark.parametrize("name", ["magnitude", "obd", "obs"])
@pytest.mark.parametrize("kind", ["hessian", "inverse_hessian", "gradients"])
@pytest.mark.parametrize("extras", [{}, {"linear": True}, {"m": 3}, {"groups": "2:4", "fixed": True}])
def test_scores_decide(problem, name, kind, extras):
    given = problem(7, **{"n": 12, "kind": kind, "blocks": 2, "damping": 0.05, **extras})
    scores = expected_scores(name, given)
    result = solve(given.instance, name)
    expected = min(given.selections(), key=lambda pruned: scores[pruned].sum())
    assert result.pruned.tolist() == expected.tolist()


def test_obs_is_exact_for_one_weight(problem):
    for seed in range(5):
        given = problem(seed, n=9, budget=1, linear=seed % 2 == 0, damping=0.05)
        result = solve(given.instance, "obs", objective="joint")
        assert result.objective == pytest.approx(given.optimum("joint"), rel=1e-8)


def test_random_is_uniform_enough(problem):
    instance = problem(1, n=6, budget=2).instance
    counts = np.sum([solve(instance, "random", seed=s).pruned for s in range(300)], axis=0)
    assert counts.sum() == 600
    assert (abs(counts - 100) < 40).all()


def test_zero_hessian_costs_nothing():
    instance = Instance(np.ones(5), HessianBlocks.from_blocks([np.zeros((5, 5))]), 2)
    for name in ("magnitude", "obd", "ls", "rmp", "cbs", "brute"):
        result = solve(instance, name)
        assert (result.selection_loss, result.joint_loss) == (0, 0)
