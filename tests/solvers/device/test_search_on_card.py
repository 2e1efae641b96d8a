"""The relaxation and the selection search on a card."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbs_opt import Budget, Stop, selection_loss, solve
from cbs_opt.monitor import Monitor
from cbs_opt.solvers.device.lanes import TritonEngine
from cbs_opt.solvers.problem.selection_problem import SelectionProblem, Storage
from cbs_opt.solvers.selection import device_cores, device_roaming, device_search
from cbs_opt.solvers.selection import search as search_module
from cbs_opt.solvers.selection.device_columns import DeviceColumns, DeviceIncumbent
from cbs_opt.solvers.selection.device_relaxation import DeviceRelaxation
from cbs_opt.solvers.selection.device_search import DeviceSearch
from cbs_opt.solvers.selection.incumbent import Incumbent
from cbs_opt.solvers.selection.parameters import SearchParameters
from cbs_opt.solvers.selection.relaxation import Relaxation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dense_bytes", [0, 1 << 28])
@pytest.mark.parametrize("blocks", [1, 3])
def test_columns_on_a_card(problem, card, dense_bytes, blocks):
    instance = problem(4, n=24, m=9, kind="gradients", blocks=blocks, damping=0.01, linear=True).instance
    host = SelectionProblem(instance, storage=Storage(dense_bytes=dense_bytes))
    there = DeviceColumns(host.columns, card)
    rng = np.random.default_rng(0)
    x = rng.random(host.n)
    assert there.product(there.tensor(x)).cpu().numpy() == pytest.approx(host.columns.product(x), rel=1e-11)
    coupled = [k for k, component in enumerate(host.components) if component.coupled]
    cores = [(k, np.sort(rng.permutation(host.columns.blocks[k].size)[:5])) for k in coupled]
    q = there.core_matrices(cores, 32).cpu().numpy()
    for (k, local), Q in zip(cores, q, strict=True):
        n = local.size
        assert Q[:n, :n] == pytest.approx(host.columns.blocks[k].submatrix(local), rel=1e-11, abs=1e-15)
        assert not Q[n:].any() and not Q[:, n:].any()
    y = (x > 0.5).astype(float)
    points = Incumbent(host, y), DeviceIncumbent(host, y, there)
    for point in points:
        point.move(np.array([1, 3]), 1 - y[[1, 3]])
    assert points[0].f == pytest.approx(points[1].f, rel=1e-11)
    assert points[1].loss() == pytest.approx(selection_loss(instance, host.expand(points[1].y)), rel=1e-11)


@pytest.mark.parametrize("groups", [None, "layers"])
@pytest.mark.parametrize("t", [0.0, 0.01])
def test_relaxation_on_a_card_is_that_of_the_cpu(problem, card, groups, t):
    instance = problem(5, n=40, m=30, blocks=2, groups=groups, damping=0.02, kind="gradients").instance
    host = SelectionProblem(instance)
    here, there = Relaxation(host), DeviceRelaxation(host, DeviceColumns(host.columns, card))
    here.solve(t, tolerance=1e-9)
    there.run(t, 600, 1e-12, lambda: False)
    x = there.numpy()
    assert ((x >= 0) & (x <= 1)).all()
    assert np.bincount(host.group, x, host.budget.size) == pytest.approx(host.budget, abs=1e-6)
    if t == 0:
        assert there.value() == pytest.approx(here.value(), rel=1e-5)
        assert host.certified_bound(x) == pytest.approx(here.bound(), rel=1e-3)
    else:
        concave = t / 2 * host.columns.diagonal @ (x * (1 - x) - here.x * (1 - here.x))
        assert there.value() + concave <= here.value() + 0.05 * abs(here.value())


def test_points_harden_together_as_each_alone(problem, card):
    instance = problem(5, n=40, m=30, blocks=2, groups="layers", damping=0.02, kind="gradients").instance
    host = SelectionProblem(instance)
    there = DeviceRelaxation(host, DeviceColumns(host.columns, card))
    there.run(1e-3, 100, 1e-9, lambda: False)
    many = there.scattered(3, 1.0, torch.Generator(card.device).manual_seed(1))
    assert many.concave[0].tolist() == there.there.diagonal.tolist()
    alone = []
    for row in range(3):
        one = many.scattered(1, 0.0, torch.Generator(card.device).manual_seed(1))
        one.concave = many.concave[row : row + 1]
        alone.append(one)
    for t in (0.03, 0.3, 1.2):
        for relaxation in (many, *alone):
            relaxation.run(t, 30, 0.0, lambda: False)
    x = many.x.cpu().numpy()
    for row, one in zip(x, alone, strict=True):
        assert one.numpy() == pytest.approx(row, abs=1e-6)
        assert np.bincount(host.group, row, host.budget.size) == pytest.approx(host.budget, abs=1e-6)
    assert np.minimum(x, 1 - x).max() < 0.5 and not np.array_equal(x[0].round(), x[2].round())


def test_projection_meets_the_sums_and_leaves_points_of_the_set(problem, card):
    instance = problem(5, n=40, m=30, groups="layers", damping=0.02, kind="gradients").instance
    host = SelectionProblem(instance)
    there = DeviceRelaxation(host, DeviceColumns(host.columns, card))
    assert there.project(there.x).cpu().numpy() == pytest.approx(there.x.cpu().numpy(), abs=1e-7)
    points = torch.randn(3, host.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there.price = there.price.repeat(3, 1)
    found, metric = there.project(points.to(card.device)).cpu().numpy(), there.metric.cpu().numpy()
    for x, z in zip(found, points.numpy(), strict=True):
        is_projection(host, metric, x, z)


def is_projection(host, metric, x, z):
    assert np.bincount(host.group, x, host.budget.size) == pytest.approx(host.budget, abs=1e-6)
    inner = (x > 1e-6) & (x < 1 - 1e-6)
    for g in range(host.budget.size):  # one price for all that lie inside
        price = (metric * (x - z))[inner & (host.group == g)]
        assert price.size < 2 or np.ptp(price) < 1e-5 * np.abs(price).max()


@pytest.mark.parametrize(("blocks", "per_block"), [(1, False), (3, False), (2, True)])
def test_search_on_a_card_finds_what_the_cpu_finds(problem, with_instance, card, blocks, per_block):
    given = problem(6, n=48, m=30, kind="gradients", damping=0.02, blocks=blocks)
    if per_block:
        sizes = given.instance.curvature.block_sizes
        groups = np.repeat(np.arange(blocks), sizes)
        given = with_instance(given, budget=Budget(int((sizes // 2).sum()), groups, sizes // 2))
    instance = given.instance
    parameters = {"proof": 0}
    here = solve(instance, "search", device="cpu", parameters=parameters | {"patience": 40})
    there = solve(instance, "search", device="cuda", parameters=parameters | {"patience": 2})
    assert there.environment["device"] == card.name
    assert there.objective <= here.objective * 1.001
    assert there.objective == pytest.approx(selection_loss(instance, there.pruned), rel=1e-12)
    assert there.bound is not None and there.bound <= here.objective
    assert 0 <= there.extras["drift"] < 1e-9


def test_large_problems_are_relaxed_on_the_card(problem, card, monkeypatch):
    for name, value in (("_PATH_ITERATIONS", 40), ("_TIGHT_ITERATIONS", 40), ("_HARDEN_ITERATIONS", 4)):
        monkeypatch.setattr(device_search, name, value)
    monkeypatch.setattr(device_search, "_BOUND_EVERY", 1)
    monkeypatch.setattr(search_module, "is_large", lambda *arguments: True)
    instance = problem(6, n=48, m=30, kind="gradients", damping=0.02, blocks=3).instance
    there = solve(instance, "search", device="cuda", parameters={"proof": 0, "patience": 2})
    here = solve(instance, "search", device="cpu", parameters={"proof": 0, "patience": 40})
    assert there.objective <= here.objective * 1.001 and there.bound is not None
    assert 0.8 * here.bound <= there.bound <= here.objective


def test_a_visit_by_the_triton_kernels(problem, card, monkeypatch):
    monkeypatch.setattr(device_cores, "_RATIO", 30.0)  # two rounds of hardening
    monkeypatch.setattr(device_cores, "_CYCLES", 1)
    instance = problem(6, n=16, m=30, blocks=2, kind="gradients", damping=0.02).instance
    host, offered = SelectionProblem(instance), []
    search = DeviceSearch(
        host, SearchParameters(stall=3), Monitor(Stop()), offered.append, 0, card, engine=TritonEngine()
    )
    start = Incumbent(host, host.smallest(-host.columns.diagonal))
    found = search.visit(start)
    assert found.f < start.f and offered[-1].f == found.f
    assert 0 <= search.drift < 1e-9
    assert instance.admits(host.expand(found.y))


def test_cores_of_a_large_block(problem, card, monkeypatch):
    monkeypatch.setattr(device_search, "LARGEST", 16)
    monkeypatch.setattr(device_roaming, "LARGEST", 16)
    monkeypatch.setattr(device_search, "_CORE", 16)
    roamed, improve = [], device_roaming.Roaming.improve

    def noted(self, point, should_stop):
        before = point.f
        made = improve(self, point, should_stop)
        roamed.append(before - point.f)
        assert point.f == pytest.approx(Incumbent(point.problem, point.y).f, rel=1e-10)
        return made

    monkeypatch.setattr(device_roaming.Roaming, "improve", noted)
    instance = problem(6, n=48, m=30, kind="gradients", damping=0.02).instance
    found = solve(instance, "search", device="cuda", parameters={"proof": 0, "patience": 1})
    assert roamed and min(roamed) >= 0
    assert found.objective <= 1.02 * solve(instance, "search", device="cpu", parameters={"proof": 0}).objective


def test_limits_on_a_card(problem, card):
    instance = problem(6, n=48, m=30, kind="gradients", damping=0.02).instance
    for stop in (Stop(max_iterations=0), Stop(time_limit=0.0), Stop(should_stop=lambda: True)):
        assert instance.admits(solve(instance, "search", device="cuda", parameters={"proof": 0}, stop=stop).pruned)


def test_what_a_card_does_not_take_runs_on_the_cpu(problem, card, caplog):
    caplog.set_level("INFO")
    instance = problem(6, n=24, m=30, kind="gradients", damping=0.02, groups="2:4").instance
    found = solve(instance, "search", device="cuda", parameters={"proof": 0})
    assert found.environment["device"] == "cpu" and "several groups share a block" in caplog.text


def test_relax_on_a_card(problem, card):
    instance = problem(6, n=48, m=30, kind="gradients", damping=0.02).instance
    there, here = (solve(instance, "relax", device=device) for device in ("cuda", "cpu"))
    assert there.environment["device"] == card.name
    assert there.bound == pytest.approx(here.bound, rel=1e-3) and there.bound <= here.objective
    assert there.objective <= 1.05 * here.objective
    assert there.extras["relaxed_objective"] == pytest.approx(here.extras["relaxed_objective"], rel=1e-5)
    assert there.extras.keys() == here.extras.keys()
    stopped = solve(instance, "relax", device="cuda", stop=Stop(max_iterations=0))
    assert instance.admits(stopped.pruned)


def test_many_lanes_are_asked_for_limits_more_often(problem, card, monkeypatch):
    """Shorter launches lead to the same points."""
    instance = problem(6, n=48, m=30, kind="gradients", damping=0.02, blocks=3).instance
    host = SelectionProblem(instance)

    def visited(lane_steps):
        monkeypatch.setattr(device_cores, "_LANE_STEPS", lane_steps)
        search = DeviceSearch(host, SearchParameters(), Monitor(Stop()), lambda point: None, 0, card)
        launches, engine = [], search.cores.engine
        tabu, descend = engine.tabu, engine.descend
        monkeypatch.setattr(engine, "tabu", lambda *a: (launches.append(a[2]), tabu(*a)))
        monkeypatch.setattr(engine, "descend", lambda *a: (launches.append(a[4]), descend(*a))[1])
        return search.visit(Incumbent(host, host.smallest(-host.columns.diagonal))), launches

    (long, few), (short, many) = visited(1 << 40), visited(1)
    assert set(few) == {2000} and set(many) == {64} and len(many) > len(few)
    assert short.f == pytest.approx(long.f, rel=1e-9)
