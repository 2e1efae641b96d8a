"""Layers of an instance while kernels are compiled: the search for long rows answers until they are there."""

import numpy as np
import pytest

import cbs_opt
from cbs_opt import Budget, HessianBlocks, Instance, SharedBlocks, Stop
from cbs_opt.registry import get_solver
from cbs_opt.solvers.kernels import loading

get_solver("joint")  # what is imported now does not count against the limits below


@pytest.fixture
def instance():
    rng = np.random.default_rng(2)
    X = rng.standard_normal((90, 30)) / np.sqrt(1 + np.arange(30))
    X = X @ np.linalg.qr(rng.standard_normal((30, 30)))[0]
    S = X.T @ X / 90 + 1e-3 * np.eye(30)
    shared = SharedBlocks(HessianBlocks(S.ravel(), [30]), np.zeros(12, dtype=np.int64), rng.uniform(0.5, 2, 12))
    return Instance(rng.standard_normal(360), shared, Budget(220))


@pytest.fixture
def never_compiled(monkeypatch):
    """Kernels that are not there until the run ends."""

    def wait(*units, should_stop):
        while not should_stop():
            pass
        return False

    monkeypatch.setattr(loading, "is_loaded", lambda *units: False)
    monkeypatch.setattr(loading, "wait", wait)
    monkeypatch.setattr(loading, "request", lambda *units: None)


def run(instance, stop, **options):
    return cbs_opt.solve(instance, "joint", stop=stop, parameters={"proof": 0}, threads=1, **options)


def test_within_a_time_limit_there_is_an_answer_without_kernels(instance, never_compiled):
    result = run(instance, Stop(time_limit=1.5))
    assert result.status == "time_limit" and result.iterations > 0
    assert result.objective < 0.8 * cbs_opt.solve(instance, "magnitude").joint_loss
    assert result.solve_seconds < 6  # also on a busy machine
    again = run(instance, Stop(time_limit=1), warm_start=result)
    assert again.objective <= result.objective * (1 + 1e-9)


def test_a_run_that_counts_iterations_does_not_depend_on_the_compilation(instance, never_compiled):
    left = [40]

    def stop():
        left[0] -= 1
        return left[0] < 0

    result = run(instance, Stop(max_iterations=3, time_limit=5, should_stop=stop))
    assert result.iterations == 0
    magnitude = instance.budget.cheapest(np.abs(instance.weights))
    assert (result.pruned == magnitude).all()


def test_what_was_found_is_the_start_of_the_search(instance, monkeypatch):
    asked = [30]

    def is_loaded(*units):
        asked[0] -= 1
        return asked[0] < 0

    monkeypatch.setattr(loading, "is_loaded", is_loaded)
    result = run(instance, Stop(time_limit=4))
    before = [row.objective for row in result.history if row.objective is not None]
    assert asked[0] < 0 and before == sorted(before, reverse=True)
    assert result.objective <= before[-1] * (1 + 1e-9)
