"""What the joint solvers keep between moves: lazy inverses, saved points, weights apart, and early stops."""

import itertools
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    InverseHessianBlocks,
    SolverError,
    Stop,
    joint_loss,
    solve,
)
from cbs_opt.solvers.joint import backward, elimination, tableau
from cbs_opt.solvers.joint import inverse as inverses
from cbs_opt.solvers.joint.elimination import CoupledElimination, UncoupledElimination
from cbs_opt.solvers.joint.inverse import LazyInverse, conditional_inverse
from cbs_opt.solvers.joint.moves import JointMoves
from cbs_opt.solvers.joint.uncoupled import UncoupledWeights


def positive_definite(rng, n, damping=1e-2):
    A = rng.standard_normal((n, n))
    return A @ A.T / n + damping * np.eye(n)


def with_dead_weights(rng, n=12, m=7, dead=(1, 4, 9), damping=1e-2, **more):
    """A gradient factor of which some columns are zero."""
    G = rng.standard_normal((m, n)) * rng.lognormal(0.0, 1.0, n)
    G[:, list(dead)] = 0.0
    budget = more.pop("budget", n // 2)
    return Instance(3.0 * rng.random(n) - 1.0, GradientFactor(G, damping), budget, **more)


@pytest.mark.parametrize("seed", range(3))
def test_lazy_inverse_follows_its_set(seed, monkeypatch):
    monkeypatch.setattr(inverses, "_TERMS", 5)  # so that the terms are added up several times
    rng = np.random.default_rng(seed)
    H = positive_definite(rng, 16)
    kept = list(range(8))
    lazy = LazyInverse(np.linalg.inv(H[np.ix_(kept, kept)]))
    for step in range(40):
        outside = [i for i in range(16) if i not in kept]
        s, new = int(rng.integers(len(kept))), int(rng.choice(outside))
        what = ("replace", "append", "remove")[step % 3]
        row = lazy.row(s)
        rest = [i for i in kept if i != kept[s]] if what == "replace" else list(kept)
        if what == "remove":
            lazy.remove(s, row)
            kept[s] = kept[-1]
            kept.pop()
        else:
            u = np.linalg.solve(H[np.ix_(rest, rest)], H[rest, new])
            pivot = H[new, new] - u @ H[rest, new]
            if what == "replace":
                lazy.replace(s, row, np.insert(u, s, 0.0), pivot)
                kept[s] = new
            else:
                lazy.append(u, pivot)
                kept.append(new)
        expected = np.linalg.inv(H[np.ix_(kept, kept)])
        np.testing.assert_allclose(lazy.row(0), expected[0], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(lazy.diagonal, expected.diagonal(), rtol=1e-8)
    np.testing.assert_allclose(lazy.copy().matrix(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("m", "size"), [(6, 10), (30, 10), (6, 4)])
def test_conditional_inverse_by_either_route(m, size):
    rng = np.random.default_rng(m)
    curvature = GradientFactor(rng.standard_normal((m, 12)), 1e-3)
    index = np.sort(rng.permutation(12)[:size])
    H = curvature.block(0)[np.ix_(index, index)]
    np.testing.assert_allclose(conditional_inverse(curvature, 0, index) @ H, np.eye(size), atol=1e-8)


def test_going_back_restores_every_price():
    rng = np.random.default_rng(2)
    blocks = [positive_definite(rng, 9), np.diag(rng.random(5) + 0.1), positive_definite(rng, 6)]
    instance = Instance(rng.standard_normal(20), HessianBlocks.from_blocks(blocks), 11)
    pruned = instance.budget.cheapest(np.abs(instance.weights))
    moves = JointMoves(instance, pruned)
    assert sum(isinstance(part, UncoupledWeights) for part in moves.tableaux) == 1
    for _ in range(3):
        moves.apply(moves.best_move())
    here, loss, best = moves.pruned(), moves.doubled, moves.best_move()
    moves.save()
    for _ in range(2):
        for _ in range(7):
            move = moves.best_move()
            for block, weight in moves.apply(move):
                moves.forbid(block, weight, True)
        assert (moves.pruned() != here).any()
        for block, weight in itertools.product(range(3), range(5)):
            moves.forbid(block, weight, False)
        for block, part in enumerate(moves.tableaux):
            for weight in range(part.tabu.size):
                moves.forbid(block, weight, False)
        moves.go_back()
        np.testing.assert_array_equal(moves.pruned(), here)
        assert moves.doubled == pytest.approx(loss, rel=1e-12)
        again = moves.best_move()
        assert again.change == pytest.approx(best.change, rel=1e-9)


def test_threads_do_not_change_the_moves(monkeypatch):
    monkeypatch.setattr(tableau, "_PARALLEL_ENTRIES", 1)
    rng = np.random.default_rng(3)
    instance = with_dead_weights(rng, n=40, m=20)
    pruned = instance.budget.cheapest(np.abs(instance.weights))
    with ThreadPoolExecutor(2) as pool:
        one, two = JointMoves(instance, pruned), JointMoves(instance, pruned, pool, 2)
        for _ in range(20):
            move, same = one.best_move(), two.best_move()
            assert move == same
            for moves in (one, two):
                for block, weight in moves.apply(move):
                    moves.forbid(block, weight, weight % 3 == 0)
    assert one.doubled == two.doubled


def test_every_exchange_costs_what_the_evaluator_says():
    rng = np.random.default_rng(4)
    instance = with_dead_weights(rng, linear=0.1 * rng.standard_normal(12) * (np.arange(12) != 3))
    moves = JointMoves(instance, instance.budget.cheapest(np.abs(instance.weights)))
    assert moves.doubled / 2 == pytest.approx(joint_loss(instance, moves.pruned()), rel=1e-9)
    last = []
    for _ in range(25):
        before, move = moves.doubled, moves.best_move()
        for block, weight in last:
            moves.forbid(block, weight, False)
        last = moves.apply(move)
        for block, weight in last:
            moves.forbid(block, weight, True)
        assert moves.doubled - before == pytest.approx(move.change, rel=1e-7, abs=1e-12)
        assert moves.doubled / 2 == pytest.approx(joint_loss(instance, moves.pruned()), rel=1e-9)


def test_coupled_weights_of_every_curvature():
    rng = np.random.default_rng(5)
    H = positive_definite(rng, 6)
    H[2, :] = H[:, 2] = 0.0
    H[2, 2] = 3.0
    expected = np.arange(6) != 2
    G = rng.standard_normal((4, 6)) * expected
    for curvature in (
        HessianBlocks.from_blocks([H]),
        InverseHessianBlocks.from_blocks(
            [np.linalg.inv(H) * np.outer(expected, expected) + np.diag(~expected / 3.0)]
        ),
        GradientFactor(G, 0.5),
    ):
        np.testing.assert_array_equal(curvature.coupled(0), expected)


@pytest.mark.parametrize("seed", range(5))
def test_dead_weights_do_not_hide_the_optimum(seed):
    rng = np.random.default_rng(seed)
    fixed = np.zeros(12, dtype=np.int8)
    fixed[4], fixed[7] = 1, -1
    instance = with_dead_weights(rng, fixed=fixed, linear=0.05 * rng.standard_normal(12))
    assert solve(instance, "joint").objective == pytest.approx(
        solve(instance, "brute", objective="joint").objective, rel=1e-9
    )


def greedy(instance):
    """Greedy elimination by the evaluator alone."""
    pruned = np.zeros(instance.n, dtype=bool)
    for _ in range(instance.budget.total):
        left = np.flatnonzero(~pruned)
        losses = []
        for i in left:
            pruned[i] = True
            losses.append(joint_loss(instance, pruned))
            pruned[i] = False
        pruned[left[int(np.argmin(losses))]] = True
    return pruned


@pytest.mark.parametrize("seed", range(4))
def test_dead_weights_leave_the_elimination_greedy(seed, monkeypatch):
    monkeypatch.setattr(elimination, "LAZY_STEPS", 3)
    monkeypatch.setattr(backward, "LAZY_STEPS", 3)
    instance = with_dead_weights(np.random.default_rng(seed), n=20, m=9, dead=(0, 3, 8, 11, 17), budget=13)
    np.testing.assert_array_equal(backward.eliminate(instance), greedy(instance))


class StopsAfter:
    """A rule that holds from the k-th question on."""

    def __init__(self, k):
        self.left = k

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("number_of_blocks", [1, 3])
def test_an_early_stop_completes_the_elimination(groups, number_of_blocks, monkeypatch):
    for module in (elimination, backward):
        monkeypatch.setattr(module, "LAZY_STEPS", 4)
    rng = np.random.default_rng(8)
    n = 60
    G = rng.standard_normal((30, n)) * rng.random(n)
    G[:, ::11] = 0.0
    budget = Budget(40, np.arange(n) % 2, np.array([15, 25])) if groups else Budget(40)
    curvature = GradientFactor(G, 1e-3, np.full(number_of_blocks, n // number_of_blocks))
    fixed = np.where(np.arange(n) == 5, -1, 0).astype(np.int8)
    instance = Instance(rng.standard_normal(n), curvature, budget, fixed=fixed)
    magnitude = joint_loss(instance, budget.cheapest(np.abs(instance.weights), fixed))
    losses = []
    for questions in (0, 1, 2, 4, 1000):
        pruned = backward.eliminate(instance, should_stop=StopsAfter(questions), threads=1)
        assert instance.admits(pruned)
        losses.append(joint_loss(instance, pruned))
    assert losses[0] == magnitude  # no elimination yet
    assert max(losses[2:]) < magnitude
    assert losses[-1] == min(losses)


def test_an_early_stop_uses_the_prices_of_the_stages(monkeypatch):
    monkeypatch.setattr(backward, "DENSE_LIMIT", 20)
    rng = np.random.default_rng(9)
    instance = with_dead_weights(rng, n=80, m=10, dead=range(0, 80, 9), budget=60)
    pruned = backward.eliminate(instance, should_stop=StopsAfter(3))
    assert instance.admits(pruned)
    assert joint_loss(instance, pruned) < joint_loss(instance, instance.budget.cheapest(np.abs(instance.weights)))


def test_prices_of_both_eliminations_agree_where_nothing_is_coupled():
    rng = np.random.default_rng(10)
    instance = Instance(rng.standard_normal(9), HessianBlocks.from_blocks([np.diag(rng.random(9) + 0.1)]), 4)
    states = [
        kind(instance, 0, np.arange(9), instance.weights) for kind in (UncoupledElimination, CoupledElimination)
    ]
    for state in states:
        state.removable[3] = False
    assert [weight for _, weight in states[0].rest()] == [weight for _, weight in states[1].rest()]
    assert states[0].cheapest() == pytest.approx(states[1].cheapest())
    made = [state.remove(5) for state in states]
    assert [weight for _, weight in made[0]] == [weight for _, weight in made[1]]
    assert [loss for loss, _ in made[0]] == pytest.approx([loss for loss, _ in made[1]])


def ill_conditioned(damping):
    """Weights of many magnitudes on gradients that nearly depend on each other."""
    rng = np.random.default_rng(11)
    G = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 40)) + 1e-4 * rng.standard_normal((40, 40))
    return Instance(rng.standard_normal(40), GradientFactor(G, damping), 20)


@pytest.mark.parametrize("damping", [1e-2, 1e-10])
def test_drift_is_measured_and_said_where_it_is_large(damping, caplog):
    instance = ill_conditioned(damping)
    with caplog.at_level(logging.WARNING, logger="cbs_opt"):
        result = solve(instance, "joint", stop=Stop(max_iterations=300))
    drift = result.extras["drift"]
    assert isinstance(drift, float)
    assert (drift > 1e-6) == (damping == 1e-10)
    assert ("rounding moved the loss" in caplog.text) == (drift > 1e-6)
    # What is reported is the evaluator's figure, whatever the tableau thought.
    assert result.objective == pytest.approx(joint_loss(instance, result.pruned), rel=1e-12)


def test_a_block_singular_to_working_precision_is_one_sentence():
    rng = np.random.default_rng(12)
    v = rng.standard_normal(8)
    H = np.outer(v, v) + 1e-18 * np.eye(8)
    instance = Instance(rng.standard_normal(8), HessianBlocks.from_blocks([H]), 4)
    with pytest.raises(SolverError, match=r"singular.*damping"):
        solve(instance, "joint")
    with pytest.raises(SolverError, match=r"singular.*damping"):
        solve(instance, "joint", warm_start=np.arange(8) < 4)
