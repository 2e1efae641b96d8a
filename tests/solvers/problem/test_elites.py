"""Elites stay apart from each other, keep the best, and take new ones in; the roulette learns."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.problem.elites import Elites, Roulette


def point(*ones, n=12):
    y = np.zeros(n, dtype=bool)
    y[list(ones)] = True
    return y


def test_the_worst_gives_way_and_near_ones_do_not_gather():
    elites = Elites(size=2, apart=4)
    assert elites.offer(point(0, 1, 2), 5.0)
    assert not elites.offer(point(0, 1, 3), 6.0), "near and worse"
    assert elites.offer(point(0, 1, 3), 4.0), "near and better: in place of it"
    assert elites.values == [4.0]
    assert not elites.full
    assert elites.offer(point(5, 6, 7), 3.0)
    assert elites.full
    assert not elites.offer(point(8, 9, 10), 9.0)
    assert elites.offer(point(8, 9, 10), 9.0, force=True), "new blood in place of the worst"
    assert sorted(elites.values) == [3.0, 9.0]
    best, value = elites.best()
    assert value == 3.0
    assert best.tolist() == point(5, 6, 7).tolist()


def test_points_are_kept_as_they_were():
    elites, y = Elites(2, 2), point(0, 1)
    elites.offer(y, 1.0)
    y[:] = False
    assert elites.points[0].sum() == 2


def test_disputed_variables_are_those_on_which_points_differ():
    elites = Elites(4, 2)
    assert elites.disputed().size == 0
    elites.offer(point(0, 1, 2), 1.0)
    assert elites.disputed().size == 0
    elites.offer(point(0, 1, 5), 2.0)
    assert sorted(elites.disputed().tolist()) == [2, 5]


def test_parents_are_different():
    elites, rng = Elites(3, 2), np.random.default_rng(0)
    for k in range(3):
        elites.offer(point(k, k + 3, k + 6), float(k))
    for _ in range(20):
        one, other = elites.parents(rng, 2)
        assert (one != other).any()
    assert len(elites.parents(rng, 9)) == 3


def test_the_roulette_prefers_what_succeeds_and_gives_nothing_up():
    roulette, rng = Roulette(3), np.random.default_rng(1)
    counts = np.zeros(3, dtype=int)
    for _ in range(600):
        k = roulette.choose(rng)
        counts[k] += 1
        roulette.learn(k, k == 1)
    assert counts[1] > 400
    assert counts.min() > 0
