from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt import Stop, UsageError, get_solver, selection_loss, solve
from cbs_opt.solver import Context
from cbs_opt.solvers.paper.batch_evaluator import BatchEvaluator
from cbs_opt.solvers.paper.rmp import Draws, RmpParameters


@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.floats(0, 1),
    st.integers(1, 9),
    st.sampled_from([None, "layers", "2:4"]),
    st.booleans(),
)
def test_every_draw_meets_the_budget(problem, seed, n, rate, buckets, groups, fixed):
    fixed = fixed and n >= 8
    total = min(max(round(rate * n), int(fixed)), n - int(fixed))
    instance = problem(seed, n=n, m=3, budget=total, groups=groups, fixed=fixed).instance
    draws = Draws(instance, RmpParameters(buckets=buckets))
    rng = np.random.default_rng(seed)
    for _ in range(3):
        assert instance.admits(draws.draw(rng))


def buckets_of(rng, size, number):
    """The buckets that a draw with this generator makes."""
    bucket = np.empty(size, dtype=int)
    bucket[rng.permutation(size)] = np.arange(size) * number // size
    return bucket


@pytest.mark.parametrize(("n", "budget", "number"), [(60, 30, 6), (60, 31, 6), (61, 17, 7), (50, 45, 1)])
def test_buckets_are_pruned_by_magnitude_at_equal_rate(problem, n, budget, number):
    instance = problem(1, n=n, m=3, budget=budget).instance
    draws = Draws(instance, RmpParameters(buckets=number))
    magnitude = np.abs(instance.weights)
    different = set()
    for seed in range(5):
        pruned = draws.draw(np.random.default_rng(seed))
        bucket = buckets_of(np.random.default_rng(seed), n, number)
        for b in range(number):
            here = bucket == b
            assert abs(pruned[here].sum() - budget * here.sum() / n) < 1
            assert magnitude[here & pruned].max() <= magnitude[here & ~pruned].min()
        different.add(pruned.tobytes())
    assert len(different) == (1 if number == 1 else 5)


def test_first_draw_is_magnitude(problem):
    instance = problem(2, n=30, m=4).instance
    only = solve(instance, "rmp", parameters={"draws": 1})
    assert only.pruned.tolist() == solve(instance, "magnitude").pruned.tolist()
    assert only.iterations == 1


def test_result_is_the_best_draw(problem):
    instance = problem(2, n=30, m=4).instance
    result = solve(instance, "rmp", seed=5, parameters={"draws": 20})
    draws, rng = Draws(instance, RmpParameters()), Context(seed=5).rng()
    values = [selection_loss(instance, draws.draw(rng if r else None)) for r in range(20)]
    assert result.objective == pytest.approx(min(values), rel=1e-12)
    assert result.iterations == 20
    assert min(values) < values[0]


def test_batch_size_does_not_change_the_result(problem):
    instance = problem(3, n=30, m=4).instance
    runs = [solve(instance, "rmp", seed=1, batch_size=size) for size in (1, 7, 64)]
    assert len({run.pruned.tobytes() for run in runs}) == 1
    assert {run.iterations for run in runs} == {50}


@pytest.mark.parametrize("kind", ["hessian", "inverse_hessian", "gradients"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_evaluator_is_the_evaluator(problem, kind, dtype, monkeypatch):
    from cbs_opt.solvers.paper import batch_evaluator as batch

    monkeypatch.setattr(batch, "_PIECE_BYTES", 8 * 5 * 2)  # the columns of G two at a time
    instance = problem(4, n=14, m=5, kind=kind, blocks=3, linear=True, dtype=dtype).instance
    selections = np.random.default_rng(0).random((9, 14)) < 0.5
    values = BatchEvaluator(instance, Context(device="cpu")).values(selections)
    assert values == pytest.approx([selection_loss(instance, pruned) for pruned in selections], rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("groups", [None, "layers"])
def test_cbs_is_at_least_as_good_as_its_best_draw(problem, seed, groups):
    instance = problem(seed, n=40, m=9, groups=groups, damping=0.01).instance
    draws = solve(instance, "rmp", seed=seed)
    both = solve(instance, "cbs", seed=seed)
    assert both.objective <= draws.objective * (1 + 1e-12)
    assert both.extras["swaps"] > 0
    magnitude_walk = solve(instance, "ls", parameters={"epsilon_relative": 1e-6})
    everywhere = solve(instance, "cbs", seed=seed, parameters={"starts": 50})
    assert everywhere.objective <= min(both.objective, magnitude_walk.objective) * (1 + 1e-12)


def test_cbs_is_relative_by_default(problem, with_instance):
    given = problem(3, n=30, m=8, damping=0.01)
    tiny = with_instance(given, weights=2.0**-20 * given.w)
    first, second = solve(given.instance, "cbs"), solve(tiny.instance, "cbs")
    assert first.extras["swaps"] == second.extras["swaps"] > 0
    assert first.pruned.tolist() == second.pruned.tolist()


def test_draws_count_as_iterations_before_the_walk(problem):
    instance = problem(3, n=30, m=8, damping=0.01).instance
    assert solve(instance, "cbs", stop=Stop(max_iterations=10)).iterations == 10
    assert solve(instance, "cbs", stop=Stop(max_iterations=10)).extras["swaps"] == 0


def test_update_of_the_kept_weights(problem):
    given = problem(5, n=20)
    without, updated = (solve(given.instance, "cbs", update=update) for update in (False, True))
    assert without.weights is None
    delta = updated.weights - given.w
    assert 0.5 * delta @ given.H @ delta == pytest.approx(updated.joint_loss)
    assert updated.joint_loss < updated.selection_loss
    assert updated.objective == without.objective


@pytest.mark.parametrize(
    ("solver", "parameters"),
    [
        ("rmp", {"draws": 0}),
        ("rmp", {"buckets": 0}),
        ("cbs", {"starts": 0}),
        ("cbs", {"draws": 0}),
        ("cbs", {"epsilon": 1.0, "epsilon_relative": 1.0}),
        ("cbs", {"rho": 0}),
    ],
)
def test_parameters_out_of_range(solver, parameters):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        get_solver(solver)(parameters)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
@pytest.mark.parametrize("solver", ["rmp", "ls", "cbs"])
def test_cuda_that_is_not_there_is_said_and_the_cpu_works(problem, caplog, solver):
    instance = problem(1, n=30).instance
    there, here = (solve(instance, solver, device=device) for device in ("cuda", "cpu"))
    assert there.pruned.tolist() == here.pruned.tolist()
    assert there.environment["device"] == "cpu"
    assert "on the CPU, not on a card: torch finds no CUDA device here" in caplog.text
