"""The published searches judged from outside, and WoodFisher's update."""

import numpy as np
import pytest

from cbs_opt import HessianBlocks, Instance, best_update, selection_loss, solve
from cbs_opt.solvers.paper.judged import judged_draws, judged_search
from cbs_opt.solvers.paper.ls import LocalSearchParameters
from cbs_opt.solvers.paper.rmp import Draws, RmpParameters
from cbs_opt.solvers.paper.single_updates import single_weight_update


@pytest.mark.parametrize("seed", range(4))
def test_judged_by_the_model_the_searches_are_those_of_the_solvers(problem, seed):
    instance = problem(seed, n=40, m=6).instance

    def judge(pruned):
        return selection_loss(instance, pruned)

    rng = np.random.default_rng(np.random.SeedSequence(seed))
    drawn = judged_draws(instance, RmpParameters(draws=9, buckets=5), judge, rng)
    alone = solve(instance, "rmp", parameters={"draws": 9, "buckets": 5}, seed=seed)
    assert drawn.pruned.tolist() == alone.pruned.tolist()
    assert drawn.judgements == 9
    start = solve(instance, "magnitude").pruned
    found = judged_search(instance, start, LocalSearchParameters(epsilon=1e-9), judge)
    alone = solve(instance, "ls", parameters={"epsilon": 1e-9})
    assert found.pruned.tolist() == alone.pruned.tolist()
    assert found.swaps == alone.extras["swaps"]
    assert found.value == pytest.approx(alone.objective)


def test_the_judge_decides_not_the_model(problem):
    """The best step by another loss is kept, even if a later one has a lower objective; NaN is never the best."""
    instance = problem(5, n=200, m=12).instance
    start = solve(instance, "magnitude").pruned
    parameters = LocalSearchParameters(epsilon=1e-9, tau=0, rho=1)
    steps = [start]

    def counting(pruned):
        steps.append(pruned.copy())
        return {3: -1.0, 4: float("nan")}.get(len(steps), float(len(steps)))

    found = judged_search(instance, start, parameters, counting, value=0.0, patience=2)
    assert found.value == -1.0
    assert found.pruned.tolist() == steps[2].tolist()
    assert found.judgements == 4  # a worse one, the better one, and two in a row that are not
    assert selection_loss(instance, steps[4]) < selection_loss(instance, steps[2])
    worse = judged_search(instance, start, parameters, lambda pruned: 1.0, value=0.0, patience=2)
    assert worse.pruned.tolist() == start.tolist()
    assert worse.judgements == 2


def test_the_first_of_equal_draws_is_magnitude(problem):
    instance = problem(1, n=50, m=5).instance
    drawn = judged_draws(instance, RmpParameters(draws=5), lambda pruned: 1.0, np.random.default_rng(0))
    assert drawn.pruned.tolist() == Draws(instance, RmpParameters()).draw(None).tolist()


@pytest.mark.parametrize("kind", ["hessian", "inverse_hessian", "gradients"])
def test_single_updates_are_added_up(problem, kind):
    instance = problem(3, n=14, m=5, kind=kind, budget=6, blocks=2).instance
    pruned = solve(instance, "obs").pruned
    expected = instance.weights.copy()
    for k in range(instance.curvature.number_of_blocks):
        part = instance.curvature.block_slice(k)
        inverse = np.linalg.inv(instance.curvature.block(k))
        for q in np.flatnonzero(pruned[part]):
            expected[part] -= instance.weights[part][q] / inverse[q, q] * inverse[:, q]
    expected[pruned] = 0
    np.testing.assert_allclose(single_weight_update(instance, pruned), expected, rtol=1e-8, atol=1e-10)


def test_one_pruned_weight_is_updated_best():
    H = np.array([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.5]])
    instance = Instance(np.array([1.0, -0.2, 0.7]), HessianBlocks.from_blocks([H]), 1)
    pruned = np.array([False, True, False])
    np.testing.assert_allclose(single_weight_update(instance, pruned), best_update(instance, pruned), rtol=1e-12)
