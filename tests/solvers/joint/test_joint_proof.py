"""Search and proof of small joint problems: they share the time, and no result has a swap that gains."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt import Budget, HessianBlocks, Instance, Monitor, Status, Stop, joint_loss, selection_loss, solve
from cbs_opt.solver import Context
from cbs_opt.solvers.exact import turns
from cbs_opt.solvers.joint.swap_search import JointSearch
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.trees import prove
from cbs_opt.testing import make_problem

SHAPES = {
    "one block": {"n": 20},
    "blocks": {"n": 20, "blocks": 3},
    "layers": {"n": 20, "blocks": 2, "groups": "layers"},
    "linear": {"n": 16, "linear": True, "blocks": 2},
    "everything": {"n": 20, "fixed": True, "linear": True, "groups": "layers", "blocks": 2},
}


def best_change(instance, pruned):
    """The best change of the joint loss by a feasible swap."""
    before, best = joint_loss(instance, pruned), 0.0
    for i in np.flatnonzero(pruned):
        for j in np.flatnonzero(~pruned):
            other = pruned.copy()
            other[i], other[j] = False, True
            if instance.admits(other):
                best = min(best, joint_loss(instance, other) - before)
    return best


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(["gradients", "hessian", "inverse_hessian"]),
    st.sampled_from([0, 100]),
)
def test_no_result_has_a_swap_that_gains(seed, shape, kind, proof):
    made = make_problem(seed, kind=kind, damping=1e-3, **SHAPES[shape])
    result = solve(made.instance, "joint", seed=seed, parameters={"proof": proof, "patience": 12})
    assert result.status in (Status.CONVERGED, Status.OPTIMAL)
    assert best_change(made.instance, result.pruned) >= -2e-9 * abs(result.objective) - 1e-10 * made.scale()


class Unprovable:
    """A prover that never closes a gap, and counts what it is given."""

    one_tree = True

    def __init__(self, bound):
        self.bound, self.runs = bound, []

    def run(self, context, out_of_time=None):
        """Until it is told to stop."""
        monitor = context.monitor
        monitor.report_bound(self.bound)
        while not monitor.should_stop():
            monitor.advance()
        self.runs.append(monitor.iterations)


def shared(bound, limit=None):
    """Run search and proof on a clock that ticks whenever it is asked; the prover, and when the search ended."""
    ticks = iter(range(10**9))
    monitor = Monitor(Stop(time_limit=limit), clock=lambda: next(ticks) * 1e-3)
    monitor.report(1.0, np.array([True, False]))
    searched = []

    def search(until):
        searched.append(until)
        while monitor.elapsed < min(until, 1e6) and not monitor.should_stop():
            pass

    prover = Unprovable(bound)
    prove.prove_within(prover, Context("joint", 0, monitor, None), search)
    return prover, searched, monitor


def test_a_hopeless_proof_has_a_tenth_of_the_time():
    prover, searched, monitor = shared(bound=0.1, limit=10.0)
    assert len(prover.runs) == 1
    assert searched[0] == pytest.approx(10.0, abs=0.1)
    assert monitor.bound == 0.1


def test_a_promising_proof_has_most_of_it():
    prover, searched, _ = shared(bound=0.9, limit=10.0)
    assert len(prover.runs) == 2
    assert searched[0] == pytest.approx(10.0 - 0.81 * 9.0, abs=0.2)
    assert prover.runs[1] > prover.runs[0]


def test_without_a_limit_the_proof_has_a_budget(caplog):
    with caplog.at_level("INFO", logger="cbs_opt"):
        prover, searched, _ = shared(bound=0.5)
    assert prover.runs == [prove.LEAST_NODES]
    assert searched == [], "nothing better was found"
    assert f"after {prove.LEAST_NODES} nodes" in caplog.text


def correlated(n, seed=0):
    """A dense problem whose proof takes long."""
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((4 * n, 8)) @ rng.standard_normal((8, n)) + 0.3 * rng.standard_normal((4 * n, n))
    return Instance(rng.standard_normal(n), HessianBlocks.from_blocks([G.T @ G / (4 * n)]), Budget(n // 2))


@pytest.mark.parametrize(("objective", "loss"), [("selection", selection_loss), ("joint", joint_loss)])
def test_exact_starts_from_a_heuristic_at_every_size(objective, loss, monkeypatch):
    """Where a tree of a few nodes does not end it."""
    monkeypatch.setattr(turns, "SHORT", 1)
    instance = correlated(40)
    stop = Stop(max_iterations=50)
    with_heuristic = solve(instance, "exact", objective=objective, stop=stop)
    solver = "search" if objective == "selection" else "joint"
    good = solve(instance, solver, parameters={"proof": 0}, stop=Stop(max_iterations=300))
    assert with_heuristic.objective <= good.objective * (1 + 1e-2)
    assert with_heuristic.objective == pytest.approx(loss(instance, with_heuristic.pruned))


@pytest.mark.parametrize("solver", ["joint", "search"])
@pytest.mark.parametrize("limit", [None, 20.0])
def test_groups_over_several_blocks_are_proven_in_one_tree(solver, limit):
    loading.wait(f"{'joint' if solver == 'joint' else 'selection'}_tree")  # the limit is that of the proof
    rng = np.random.default_rng(4)
    factors = [rng.standard_normal((6, size)) for size in (5, 2, 2, 2)]
    blocks = [A.T @ A + 0.1 * np.eye(A.shape[1]) for A in factors]
    budget = Budget(7, np.array([0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]), np.array([5, 2]))
    instance = Instance(rng.standard_normal(11), HessianBlocks.from_blocks(blocks), budget)
    objective = "joint" if solver == "joint" else "selection"
    result = solve(instance, solver, objective=objective, stop=Stop(time_limit=limit), threads=1)
    assert result.status is Status.OPTIMAL
    assert result.objective == pytest.approx(solve(instance, "brute", objective=objective).objective, rel=1e-9)


def test_rows_that_share_a_hessian_are_searched_as_layers_while_kernels_compile(monkeypatch):
    """The search over layers gets ahead without kernels; what could be proven waits for them."""
    instance = make_problem(0, kind="hessian", n=24, shared=(0, 1, 0, 0)).instance
    for seconds, limit, layered in (
        (16.0, 5.0, True),
        (16.0, 60.0, False),
        (0.0, 5.0, False),
        (16.0, None, False),
    ):
        monkeypatch.setattr(loading, "seconds_to_compile", lambda *units, seconds=seconds: seconds)
        solver = JointSearch()
        solver.prepare(instance, Context("joint", 0, Monitor(Stop(time_limit=limit)), threads=1))
        assert (solver._layered is not None) is layered


def test_seconds_to_compile_are_those_of_what_is_not_there(monkeypatch):
    monkeypatch.setattr(loading, "_loaded", {"joint"})
    monkeypatch.setattr(loading, "is_ready", lambda units: units == ["joint_tables"])
    assert loading.seconds_to_compile("joint", "joint_tables") == 0
    assert loading.seconds_to_compile("joint", "joint_tree") == loading.UNITS["joint_tree"].seconds
    units = loading.UNITS
    expected = units["selection_tree"].seconds + units["selection_relaxation"].seconds
    assert loading.seconds_to_compile("selection_tree", "selection_tree") == expected
