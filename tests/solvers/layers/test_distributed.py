"""Layers as tasks of an engine: budgets at one price, killed workers, stops, and what is refused."""

import sys

import numpy as np
import pytest

import cbs_opt
from cbs_opt import SolverError, UsageError
from cbs_opt.engines import Processes, Ray, Serial
from cbs_opt.price_curves import counts_at_one_price
from cbs_opt.solvers.layers.distributed import ScoutTask, scout_task, solve_distributed
from cbs_opt.solvers.layers.price_curves import curve_of
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, row_losses
from cbs_opt.solvers.layers.refit import refit_layer
from cbs_opt.solvers.layers.solve import solve_layers

SHAPES = [(12, 24, 1.0), (6, 36, 10.0), (9, 16, 0.1)]


def layers(seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for rows, columns, size in SHAPES:
        X = rng.standard_normal((3 * columns, columns)) / np.sqrt(1 + np.arange(columns))
        X = X @ np.linalg.qr(rng.standard_normal((columns, columns)))[0]
        S = size * (X.T @ X / len(X) + 0.01 * np.eye(columns))
        out.append(Layer(rng.standard_normal((rows, columns)), S, rng.uniform(0.5, 2, rows)))
    return out


@pytest.mark.parametrize("objective", ["joint", "selection"])
def test_rounds_come_near_to_one_search_over_all_layers(objective):
    those, budget = layers(), LayerBudget(total=480)
    one = solve_layers(those, budget, objective=objective)
    found = []
    many = solve_distributed(
        those, budget, Serial(), objective=objective, report=lambda value, masks: found.append((value, masks))
    )
    assert budget.satisfied(many.pruned) and many.compared
    assert all(budget.satisfied(masks) for _, masks in found)
    assert many.objective <= 1.03 * one.objective
    weights = [
        refit_layer(layer, mask) if objective == "joint" else np.where(mask, 0.0, layer.weights)
        for layer, mask in zip(those, many.pruned, strict=True)
    ]
    exact = sum(
        0.5 * float(layer.scale @ np.einsum("rk,rk->r", (w - layer.weights) @ layer.hessian, w - layer.weights))
        for layer, w in zip(those, weights, strict=True)
    )
    assert many.objective == pytest.approx(exact, rel=1e-5)
    again = solve_distributed(those, budget, Serial(), objective=objective, warm_start=one.pruned)
    assert again.objective <= one.objective * (1 + 1e-6)


def test_budgets_that_do_not_couple_layers_keep_their_bounds():
    those = layers()
    found = solve_distributed(
        those, LayerBudget(pattern=(2, 4)), Serial(), objective="selection", bound_share=0.4, max_rounds=1
    )
    assert found.bound is not None and 0 < found.bound <= found.objective


def test_counts_meet_at_one_price():
    those = layers()
    curves = [curve_of(layer, "joint") for layer in those]
    sizes = [layer.weights.size for layer in those]
    for total in (0, 1, 300, 600, sum(sizes) - 1, sum(sizes)):
        counts = counts_at_one_price(curves, np.ones(3), total, [0, 0, 0], sizes)
        assert sum(counts) == total
        assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    counts = counts_at_one_price(curves, np.ones(3), 400, [0, 0, 0], sizes)
    dearer = counts_at_one_price(curves, np.array([1.0, 8.0, 1.0]), 400, [0, 0, 0], sizes)
    assert dearer[1] < counts[1]  # a layer whose losses are larger than its curve says prunes less
    assert counts_at_one_price(curves, np.ones(3), 400, [0, 100, 0], [288, 110, 144])[1] in range(100, 111)


def killing(folder):
    """Wraps the work of an engine: layer 1 kills its worker at its first solve, layer 2 at every one."""

    def wrap(work):
        def deadly(task):
            # By value to the workers, who cannot import a test.
            import os
            import pathlib
            import signal

            if type(task).__name__ == "SolveTask" and task.index:
                mark = pathlib.Path(folder) / str(task.index)
                if task.index == 2 or not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return work(task)

        return deadly

    return wrap


class Deadly:
    """An engine whose workers die as `killing` says."""

    def __init__(self, engine, folder):
        self.engine, self.folder, self.workers = engine, folder, engine.workers

    def kept(self):
        from contextlib import contextmanager

        @contextmanager
        def kept():
            with self.engine.kept() as engine:
                yield Deadly(engine, self.folder)

        return kept()

    def run(self, tasks, work, should_stop):
        yield from self.engine.run(tasks, killing(self.folder)(work), should_stop)


def check_killed(engine, folder, caplog):
    those, budget = layers(), LayerBudget(total=480)
    found = solve_distributed(those, budget, Deadly(engine, str(folder)), max_rounds=1)
    assert budget.satisfied(found.pruned)
    assert (folder / "1").exists() and (folder / "2").exists()
    assert "its task is run again (try 2)" in caplog.text
    assert "layer 2 was not solved: its worker was killed at every try" in caplog.text
    exact = [
        row_losses(layer, refit_layer(layer, mask)).sum() for layer, mask in zip(those, found.pruned, strict=True)
    ]
    assert found.objective == pytest.approx(sum(exact), rel=1e-5)
    size = np.abs(those[2].weights)  # the layer that was not solved has the magnitude selection of its share
    assert size[found.pruned[2]].max() <= size[~found.pruned[2]].min()
    for k in (0, 1):
        magnitude = LayerBudget(total=int(found.pruned[k].sum())).cheapest([those[k]], [np.abs(those[k].weights)])
        assert exact[k] < 0.9 * row_losses(those[k], refit_layer(those[k], magnitude[0])).sum()


@pytest.mark.skipif(sys.platform == "win32", reason="workers are killed by signals of Unix")
def test_a_killed_worker_loses_only_its_layer(tmp_path, caplog):
    check_killed(Processes(2, tries=2), tmp_path, caplog)


@pytest.mark.slow
def test_a_killed_worker_of_ray_loses_only_its_layer(tmp_path, caplog):
    pytest.importorskip("ray", reason="NOT TESTED: the engine `ray`, Ray is not installed")
    check_killed(Ray(2, tries=2), tmp_path, caplog)


def test_a_layer_that_cannot_be_priced_is_an_error_in_words():
    singular = Layer(np.ones((2, 3)), np.ones((3, 3)))
    answer = scout_task(ScoutTask(0, singular, "joint", ()))
    assert answer.curve is None and "LinAlgError" in answer.error
    with pytest.raises(SolverError, match="layer 0 cannot be priced: LinAlgError"):
        solve_distributed([singular], LayerBudget(total=2), Serial())


def test_a_stop_keeps_the_incumbent():
    those, budget = layers(), LayerBudget(total=480)
    for questions in range(6):
        left = [questions]

        def stop(left=left):
            left[0] -= 1
            return left[0] < 0

        found = solve_distributed(those, budget, Serial(), should_stop=stop)
        assert budget.satisfied(found.pruned)
        assert np.isfinite(found.objective)
        assert found.compared == (questions > 2)


def test_what_has_no_layers_takes_no_engine(problem):
    instance = problem(0, kind="hessian", blocks=2).instance
    with pytest.raises(SolverError, match="divides an instance by layers whose rows share a Hessian"):
        cbs_opt.solve(instance, "joint", engine="processes")
    with pytest.raises(SolverError, match="solver 'magnitude' cannot take an engine"):
        cbs_opt.solve(instance, "magnitude", engine=Processes(1))
    with pytest.raises(UsageError, match="`engine` must be 'serial', 'processes', 'ray' or an Engine, got 3"):
        cbs_opt.solve(instance, engine=3)
    with pytest.raises(UsageError, match="there is no engine 'dask'"):
        cbs_opt.solve(instance, engine="dask")
    assert cbs_opt.solve(instance, "joint", engine="serial").pruned.any()
