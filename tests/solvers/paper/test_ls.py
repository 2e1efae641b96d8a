from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import Status, Stop, UsageError, get_solver, read_instance, solve

PUBLISHED = [  # budget, ε, objective to five digits, swaps
    (3205, 1e-4, "1.6133e-03", 23),
    (3205, 1e-8, "8.0874e-04", 94),
    (1780, 1e-4, "9.9167e-05", 1),
    (1780, 1e-8, "2.8056e-06", 173),
]


@pytest.fixture(scope="module")
def digits(shared_instances):
    return read_instance(shared_instances / "digits-mlp-s0.npz")


@pytest.mark.shared
@pytest.mark.parametrize(("budget", "epsilon", "objective", "swaps"), PUBLISHED)
def test_published_trajectory(digits, budget, epsilon, objective, swaps):
    result = solve(digits.with_budget(budget), "ls", parameters={"epsilon": epsilon, "steps": 40})
    assert f"{result.objective:.4e}" == objective
    assert result.extras["swaps"] == swaps


def dense_search(Q, c, pruned, epsilon, rho, tau, steps):
    """Algorithm 1 written down from the paper, on a dense matrix, with every number computed afresh."""
    x, n, swaps = pruned.copy(), pruned.size, 0

    def doubled(x):
        return x @ Q @ x + 2 * c @ x

    best, best_value = x.copy(), doubled(x)
    for _ in range(steps):
        P, C = np.flatnonzero(x), np.flatnonzero(~x)
        if P.size == 0 or C.size == 0:
            break

        def alpha(i, x):
            return 2 * c[i] + Q[i, i] + 2 * sum(Q[i, j] for j in range(n) if x[j] and j != i)

        def beta(j, x):
            return 2 * c[j] + Q[j, j] + 2 * sum(Q[j, i] for i in range(n) if x[i])

        start = x.copy()
        pi = sorted(P, key=lambda i: -alpha(i, start))
        theta = sorted(C, key=lambda j: beta(j, start) - 2 * Q[pi[0], j])
        taken, failures, used = 0, 0, set()
        for k, i in enumerate(pi):
            window = range(max(1, k - rho), min(k + rho, len(theta))) if k else range(1)
            for position in window:
                if position in used:
                    continue
                swapped = x.copy()
                swapped[i], swapped[theta[position]] = False, True
                if doubled(x) - doubled(swapped) >= epsilon:
                    x = swapped
                    used.add(position)
                    taken += 1
                    break
            else:
                if k == 0:
                    break
                failures += 1
                if failures > tau:
                    break
        if taken == 0:
            break
        swaps += taken
        if doubled(x) < best_value:
            best, best_value = x.copy(), doubled(x)
    return best, best_value / 2, swaps


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("linear", [False, True])
def test_same_walk_as_the_algorithm_written_down_plainly(problem, seed, linear):
    given = problem(seed, n=30, m=9, blocks=1 + seed % 3, linear=linear, budget=12, damping=0.01)
    Q, c = given.w[:, None] * given.H * given.w, -given.g * given.w
    start = given.instance.budget.cheapest(np.abs(given.w))
    parameters = {"epsilon": 1e-6, "rho": 3, "tau": 4, "steps": 30}
    expected, value, swaps = dense_search(Q, c, start, **parameters)
    result = solve(given.instance, "ls", parameters=parameters)
    assert result.extras["swaps"] == swaps
    assert result.objective == pytest.approx(value, rel=1e-9)
    assert result.pruned.tolist() == expected.tolist()
    assert swaps > 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [None, "layers"])
def test_the_first_pair_of_the_result_does_not_gain(problem, seed, groups):
    given = problem(seed, n=24, m=8, budget=10, groups=groups, damping=0.01)
    result = solve(given.instance, "ls", parameters={"epsilon_relative": 1e-6, "steps": 500})
    assert result.status is Status.CONVERGED
    Q, x = given.w[:, None] * given.H * given.w, result.pruned
    s = 2 * Q @ x
    for members in given.instance.budget.members(24):
        inside, outside = members[x[members]], members[~x[members]]
        i = inside[np.argmax(s[inside] - Q[inside, inside])]
        gains = (s[i] - Q[i, i]) - (s[outside] + Q[outside, outside]) + 2 * Q[i, outside]
        assert gains.max() < 1e-6 * 2 * result.objective * (1 + 1e-6)


def test_large_negative_weights_that_are_kept_can_be_pruned(problem):
    H = np.diag([1.0, 1.0, 1e-6, 1e-6])
    H[0, 1] = H[1, 0] = 0.9
    from cbs_opt import HessianBlocks, Instance

    instance = Instance(np.array([1.0, 1.0, -9.0, -8.0]), HessianBlocks.from_blocks([H]), 2)
    result = solve(instance, "ls")
    assert result.pruned.tolist() == [False, False, True, True]


def test_default_epsilon_is_the_published_one(problem, with_instance):
    given = problem(3, n=20, m=8, budget=8, damping=0.01)
    tiny = with_instance(given, weights=1e-4 * given.w)
    assert solve(given.instance, "ls").extras["swaps"] > 0
    assert solve(tiny.instance, "ls").extras["swaps"] == 0
    relative = [
        solve(p.instance, "ls", parameters={"epsilon_relative": 1e-6}).extras["swaps"] for p in (given, tiny)
    ]
    assert relative[0] == relative[1] > 0


def test_fixed_weights_take_no_part(problem):
    given = problem(4, n=20, fixed=True, damping=0.01)
    result = solve(given.instance, "ls", parameters={"epsilon": 1e-9})
    assert result.extras["swaps"] > 0
    assert result.pruned[0]
    assert not result.pruned[-1]


def test_columns_are_dropped_and_made_again_when_memory_is_short(problem, monkeypatch):
    from cbs_opt.solvers.paper import ls

    given = problem(5, n=30, m=9, budget=12, damping=0.01).instance
    expected = solve(given, "ls", parameters={"epsilon": 1e-9})
    monkeypatch.setattr(ls.ColumnCache.__init__, "__defaults__", (1000,))
    again = solve(given, "ls", parameters={"epsilon": 1e-9})
    assert again.extras["swaps"] == expected.extras["swaps"] > 0
    assert again.pruned.tolist() == expected.pruned.tolist()


def test_steps_and_iteration_limit(problem):
    given = problem(5, n=40, m=9, budget=16, damping=0.01).instance
    assert solve(given, "ls", parameters={"epsilon": 1e-9, "steps": 1}).iterations == 1
    limited = solve(given, "ls", parameters={"epsilon": 1e-9}, stop=Stop(max_iterations=1))
    assert (limited.iterations, limited.status) == (1, Status.ITERATION_LIMIT)


@pytest.mark.parametrize(
    "parameters",
    [{"rho": 0}, {"tau": -1}, {"steps": -1}, {"epsilon": -1e-3}, {"epsilon_relative": -1.0}, {"rho": 1.5}],
)
def test_parameters_out_of_range(parameters):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        get_solver("ls")(parameters)
