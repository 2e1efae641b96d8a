"""Algorithms 1 and 2 on a card against the CPU: the same values, the same masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbs_opt import Status, Stop, read_instance, selection_loss, solve
from cbs_opt.monitor import Monitor
from cbs_opt.selection import SelectionObjective
from cbs_opt.solvers.device import all_pairs, local_search
from cbs_opt.solvers.device.all_pairs import AllPairs
from cbs_opt.solvers.device.draws import DeviceDraws
from cbs_opt.solvers.device.local_search import DeviceLocalSearch
from cbs_opt.solvers.device.objective import DeviceObjective
from cbs_opt.solvers.paper.all_swaps import GAIN, improve_by_all_pairs
from cbs_opt.solvers.paper.ls import LocalSearch, LocalSearchParameters
from cbs_opt.solvers.paper.rmp import Draws, RmpParameters

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["hessian", "gradients"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_objective_is_the_evaluator(problem, card, kind, blocks):
    instance = problem(4, n=14, m=5, kind=kind, blocks=blocks, linear=True, damping=0.01).instance
    objective = DeviceObjective(SelectionObjective(instance), card)
    rng = np.random.default_rng(0)
    selections, x = rng.random((9, 14)) < 0.5, rng.random((4, 14))
    values = objective.values(torch.tensor(selections, device=card.device)).cpu().numpy()
    assert values == pytest.approx([selection_loss(instance, pruned) for pruned in selections], rel=1e-12)
    products = objective.products(torch.tensor(x, device=card.device)).cpu().numpy()
    host = objective.problem
    assert products == pytest.approx(np.array([host.gradient(row) - host.c for row in x]), rel=1e-11, abs=1e-14)
    for k, Q in enumerate(objective.matrices()):
        assert Q.cpu().numpy() == pytest.approx(host.block(k), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("n", "budget", "number"), [(60, 30, 6), (61, 17, 7), (50, 45, 1), (40, 3, None)])
def test_draws_prune_buckets_by_magnitude_at_equal_rate(problem, card, n, budget, number):
    instance = problem(1, n=n, m=3, budget=budget, fixed=True).instance
    draws = Draws(instance, RmpParameters(buckets=number))
    make = [DeviceDraws(draws.magnitude, draws.always, draws.groups, number, 5, card.device) for _ in range(2)]
    first, again = (made.draw(8).cpu().numpy() for made in make)
    assert (first == again).all()
    assert all(instance.admits(pruned) for pruned in first)
    assert (make[0].draw(8).cpu().numpy() != first).any() == (number != 1)
    if number == 1:
        assert (first == draws.draw(None)).all()


def test_draws_are_of_the_kind_of_the_cpu(problem, card):
    """How often each weight is pruned agrees, to what 2,000 draws of each tell."""
    instance = problem(2, n=24, m=3, budget=11).instance
    draws = Draws(instance, RmpParameters(buckets=4))
    there = DeviceDraws(draws.magnitude, draws.always, draws.groups, 4, 0, card.device).draw(2000)
    rng = np.random.default_rng(0)
    here = np.mean([draws.draw(rng) for _ in range(2000)], axis=0)
    assert np.abs(there.cpu().numpy().mean(axis=0) - here).max() < 0.06


def masks_of(instance, parameters, starts, card):
    """The selection after every step of every start, by the card."""
    search = LocalSearch(instance, parameters)
    objective = DeviceObjective(search.problem, card)
    found = DeviceLocalSearch(objective, search.groups, parameters.threshold, parameters.rho, parameters.tau)
    steps = []

    def report(values, selection, taken):
        steps.append([(float(v), selection(k)) for k, v in enumerate(values)])
        return False

    found.walk(torch.tensor(np.stack(starts), device=card.device), parameters.steps, report)
    return steps


@pytest.mark.parametrize("options", [{}, {"blocks": 3}, {"groups": "layers", "blocks": 2}, {"fixed": True}])
@pytest.mark.parametrize("kind", ["hessian", "gradients"])
def test_local_search_takes_the_steps_of_the_cpu(problem, card, options, kind):
    instance = problem(7, n=30, m=9, damping=0.01, kind=kind, linear=True, **options).instance
    parameters = LocalSearchParameters(epsilon_relative=1e-6, rho=3, tau=4, steps=6)
    start = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
    steps = masks_of(instance, parameters, [start], card)
    expected = [x.copy() for x, _, taken in LocalSearch(instance, parameters).steps(start) if taken]
    assert [step[0][1].tolist() for step in steps[1 : 1 + len(expected)]] == [x.tolist() for x in expected]
    assert len(expected) > 1


def test_launches_that_are_cut_take_the_same_steps(problem, card, monkeypatch):
    instance = problem(7, n=30, m=9, damping=0.01, blocks=2, linear=True).instance
    parameters = LocalSearchParameters(epsilon_relative=1e-6, rho=3, tau=4, steps=4)
    draws, rng = Draws(instance, RmpParameters()), np.random.default_rng(0)
    starts = [draws.draw(rng) for _ in range(3)]
    whole = masks_of(instance, parameters, starts, card)
    monkeypatch.setattr(local_search, "_LAUNCH", 3 * 2 * int(instance.curvature.block_sizes.max()))
    pieces = masks_of(instance, parameters, starts, card)
    assert len(pieces) == len(whole) > 2
    for before, after in zip(whole, pieces, strict=True):
        assert [value for value, _ in before] == [value for value, _ in after]
        assert [x.tolist() for _, x in before] == [x.tolist() for _, x in after]


def test_many_starts_are_searched_as_each_alone(problem, card):
    instance = problem(8, n=26, m=9, damping=0.01).instance
    parameters = LocalSearchParameters(epsilon_relative=1e-6, steps=4)
    draws, rng = Draws(instance, RmpParameters()), np.random.default_rng(0)
    starts = [draws.draw(rng) for _ in range(3)]
    together = sorted(value for step in masks_of(instance, parameters, starts, card) for value, _ in step)
    alone = [masks_of(instance, parameters, [start], card) for start in starts]
    # A start that has converged is reported once more, when alone.
    assert {f"{value:.12e}" for value in together} == {
        f"{value:.12e}" for steps in alone for step in steps for value, _ in step
    }


@pytest.mark.shared
@pytest.mark.parametrize(
    ("budget", "epsilon", "swaps"),
    [
        pytest.param(3205, 1e-4, 23, marks=pytest.mark.slow),
        (1780, 1e-4, 1),
        pytest.param(3205, 1e-8, 94, marks=pytest.mark.slow),
        pytest.param(1780, 1e-8, 173, marks=pytest.mark.slow),
    ],
)
def test_published_trajectory_on_a_card(shared_instances, card, budget, epsilon, swaps):
    instance = read_instance(shared_instances / "digits-mlp-s0.npz").with_budget(budget)
    parameters = LocalSearchParameters(epsilon=epsilon, steps=40)
    start = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
    steps = masks_of(instance, parameters, [start], card)
    taken, before = 0, start
    for k, (x, _, made) in enumerate(LocalSearch(instance, parameters).steps(start)):
        if made:
            assert (steps[k + 1][0][1] == x).all()
            taken += int((x != before).sum()) // 2
            before = x.copy()
    assert taken == swaps


@pytest.mark.parametrize("options", [{}, {"blocks": 3}, {"groups": "layers", "blocks": 2}, {"fixed": True}])
@pytest.mark.parametrize("kind", ["hessian", "gradients"])
def test_no_swap_gains_after_all_pairs(problem, card, monkeypatch, options, kind):
    monkeypatch.setattr(all_pairs, "_PAIRS", 40)  # several pieces
    monkeypatch.setattr(all_pairs, "_TOGETHER", 4)
    instance = problem(11, n=40, m=60, damping=0.01, kind=kind, linear=True, **options).instance
    search = LocalSearch(instance, LocalSearchParameters())
    there = DeviceLocalSearch(DeviceObjective(search.problem, card), search.groups, lambda doubled: 0.0, 10, 20)
    start, reported = Draws(instance, RmpParameters()).draw(np.random.default_rng(0)), []
    x = torch.tensor(start, device=card.device)
    swaps = AllPairs(there, GAIN).improve(x, lambda: False, lambda value, pruned: reported.append((value, pruned)))
    assert swaps >= len(reported) > 0
    value, pruned = reported[-1]
    assert pruned.tolist() == x.cpu().tolist() and instance.admits(pruned)
    assert value == pytest.approx(selection_loss(instance, pruned), rel=1e-12)
    assert [value for value, _ in reported] == sorted((value for value, _ in reported), reverse=True)
    assert improve_by_all_pairs(search, pruned, Monitor(Stop())) == 0
    assert AllPairs(there, GAIN).improve(x, lambda: True, reported.append) == 0


@pytest.mark.parametrize("solver", ["rmp", "ls", "cbs"])
def test_solvers_on_a_card(problem, card, caplog, solver):
    caplog.set_level("INFO")
    instance = problem(3, n=30, m=8, damping=0.01).instance
    there, here = (solve(instance, solver, device=device) for device in ("cuda", "cpu"))
    assert there.environment["device"] == card.name
    assert "as asked for" in caplog.text
    assert there.objective == pytest.approx(selection_loss(instance, there.pruned), rel=1e-12)
    assert there.objective <= solve(instance, "magnitude").objective
    if solver == "ls":
        assert there.pruned.tolist() == here.pruned.tolist()
        assert there.extras == here.extras and there.iterations == here.iterations
    if solver == "rmp":
        assert there.iterations == 50
        assert solve(instance, solver, device="cuda", stop=Stop(max_iterations=9)).iterations == 9


def test_a_card_that_fails_is_replaced_by_the_cpu(problem, card, caplog, monkeypatch):
    instance = problem(3, n=30, m=8, damping=0.01).instance

    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DeviceObjective, "values", fail)
    result = solve(instance, "cbs", device="cuda")
    assert result.status is Status.CONVERGED
    assert result.pruned.tolist() == solve(instance, "cbs", device="cpu").pruned.tolist()
    assert "illegal memory access" in caplog.text and "on the CPU instead" in caplog.text
    assert result.environment["device"] == f"{card.name}, which failed; cpu"


def test_short_memory_makes_smaller_batches(problem, card, caplog, monkeypatch):
    caplog.set_level("INFO")
    instance = problem(3, n=30, m=8, damping=0.01).instance
    values = DeviceObjective.values

    def short(self, selections):
        if len(selections) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values(self, selections)

    whole = solve(instance, "rmp", device="cuda")
    monkeypatch.setattr(DeviceObjective, "values", short)
    assert solve(instance, "rmp", device="cuda").objective == pytest.approx(whole.objective, rel=1e-12)
    assert "at a time" in caplog.text
