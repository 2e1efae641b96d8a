"""Peers of best-subset selection: the regression that they are given, what becomes of what they find."""

from __future__ import annotations

import numpy as np
import pytest

import cbs_opt
from cbs_opt import Budget
from cbs_opt.bench.peers import MissingPeerError
from cbs_opt.bench.runs.configuration import read_configuration
from cbs_opt.bench.runs.task import Task, run_task
from cbs_opt.bench.subset_peers import SUBSET_PEERS, regression_of, solve_subset, unavailable_peer


def strong_signal(seed=0, m=60, n=12):
    """Three columns that every method finds."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((m, n)) * rng.uniform(0.5, 2.0, n)
    return cbs_opt.from_regression(X, 5 * X[:, 2] - 4 * X[:, 5] + 6 * X[:, 9], 1e-3, keep=3, intercept=False)


@pytest.mark.parametrize("kind", ["gradients", "hessian", "inverse_hessian"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_regression_has_the_joint_loss(kind, blocks, problem):
    case = problem(blocks, n=9, kind=kind, blocks=blocks, m=5)
    instance = case.instance
    X, y, ridge = regression_of(instance)
    rng = np.random.default_rng(0)
    totals, losses = [], []
    for _ in range(6):
        kept = np.sort(rng.permutation(9)[:4])
        A = np.vstack([X[:, kept], np.sqrt(len(y) * ridge) * np.eye(4)])
        beta = np.linalg.lstsq(A, np.concatenate([y, np.zeros(4)]), rcond=None)[0]
        residual = y - X[:, kept] @ beta
        totals.append(residual @ residual / (2 * len(y)) + 0.5 * ridge * beta @ beta)
        losses.append(case.joint_loss(~np.isin(np.arange(9), kept)))
    assert np.array(totals) - totals[0] == pytest.approx(np.array(losses) - losses[0], abs=1e-8 * max(losses))


@pytest.mark.parametrize("name", SUBSET_PEERS)
def test_peers_find_a_strong_signal(name):
    if (missing := unavailable_peer(name)) is not None:
        pytest.skip(f"NOT TESTED: {missing}")
    instance = strong_signal()
    pruned = solve_subset(name, instance, 20.0)
    assert np.flatnonzero(~pruned).tolist() == [2, 5, 9]
    assert solve_subset(name, instance.with_kept(0), 20.0).all()


def test_what_they_do_not_take(problem):
    for options in ({"groups": "layers"}, {"fixed": True}, {"linear": True}):
        with pytest.raises(MissingPeerError, match="one budget, without"):
            regression_of(problem(0, **options).instance)


def test_rows_of_peers(tmp_path):
    cbs_opt.write_instance(tmp_path / "i.npz", strong_signal())
    instance = cbs_opt.read_instance(tmp_path / "i.npz")
    best = cbs_opt.solve(instance, "exact", objective="joint").objective
    row = run_task(Task.of(instance, "omp", objective="joint")).row
    assert (row.kind, row.status, row.bound) == ("ok", "converged", None)
    assert row.objective == pytest.approx(best)
    grouped = cbs_opt.Instance(
        instance.weights, instance.curvature, Budget(9, np.arange(12) % 2, [4, 5]), metadata=instance.metadata
    )
    cbs_opt.write_instance(tmp_path / "g.npz", grouped)
    row = run_task(Task.of(cbs_opt.read_instance(tmp_path / "g.npz"), "omp", objective="joint")).row
    assert row.kind == "unsupported" and "one budget" in row.message


def test_configuration_with_kept_weights(tmp_path):
    shipped = read_configuration("best-subset")
    assert shipped.solvers[0].keep == (5, 10) and shipped.solvers[0].sparsities == ()
    assert {entry.name for entry in shipped.solvers} >= {"exact", *SUBSET_PEERS}
    head = f'instances = ["{tmp_path}/i.npz"]\n'
    for body, words in (
        ('keep = [-1]\n[[solvers]]\nname = "obd"\n', "`keep` must be a list of whole numbers ≥ 0"),
        ('[[solvers]]\nname = "omp"\nobjective = "selection"\n', "'omp' minimises joint only"),
        ('[[solvers]]\nname = "omp"\nparameters = { a = 1 }\n', "peer 'omp' has no parameters"),
    ):
        (tmp_path / "c.toml").write_text(head + body)
        with pytest.raises(cbs_opt.CbsError, match=words):
            read_configuration(tmp_path / "c.toml")


def test_budgets_of_a_plan(tmp_path):
    from cbs_opt.bench.runs.runner import make_plan

    cbs_opt.write_instance(tmp_path / "i.npz", strong_signal())
    text = 'instances = ["i.npz"]\nkeep = [KEEP]\n[[solvers]]\nname = "obd"\n'
    (tmp_path / "c.toml").write_text(text.replace("KEEP", "2, 5"))
    assert sorted(task.budget for task in make_plan(read_configuration(tmp_path / "c.toml")).tasks) == [7, 10]
    (tmp_path / "c.toml").write_text('sparsities = ["file"]\n' + text.replace("KEEP", "2"))
    assert sorted(task.budget for task in make_plan(read_configuration(tmp_path / "c.toml")).tasks) == [9, 10]
    (tmp_path / "c.toml").write_text(text.replace("KEEP", "13"))
    with pytest.raises(cbs_opt.UsageError, match="`keep` 13 is more than the 12 weights"):
        make_plan(read_configuration(tmp_path / "c.toml"))
