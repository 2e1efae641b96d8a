"""Certificates: they prove what the run claims, and nothing that is not true."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt import Budget, GradientFactor, HessianBlocks, Instance, Status, Stop, solve
from cbs_opt import certificate as checking
from cbs_opt.certificate import verify
from cbs_opt.errors import SolutionError
from cbs_opt.files.certificate_file import (
    INHERIT,
    LEAF,
    NOTHING,
    POINT,
    SINGLE,
    VALUE,
    Certificate,
    read_certificate,
    write_certificate,
)
from cbs_opt.solvers.exact.certify import Certifier
from cbs_opt.solvers.exact.turns import SearchTurns
from cbs_opt.solvers.trees import best_first, recorder, tables

STREAMS = (
    "branch",
    "how",
    "fixed_counts",
    "fixings",
    "diagonals",
    "product_counts",
    "products",
    "product_prices",
    "codes",
    "numbers",
)


def certified(instance, objective, path, **more):
    """The result of a run and its certificate."""
    result = solve(
        instance, "exact", objective=objective, threads=1, parameters={"certificate": str(path)}, **more
    )
    assert result.status is not Status.ERROR
    return result, read_certificate(path)


def dense(cases, objective, seed=0, groups=False, damping=None):
    """One block that needs a tree of some hundred nodes."""
    rng = np.random.default_rng(seed)
    n = 60 if objective == "selection" else 36
    G = cases.factor(rng, n, "output")
    damping = 1e-4 * float((G**2).mean()) if damping is None else damping
    budget = Budget(n // 2, np.arange(n) // (n // 3), np.full(3, n // 6)) if groups else Budget(n // 2)
    return Instance(rng.normal(size=n), GradientFactor(G, damping, [n]), budget)


def several(cases, seed=0):
    """Blocks under one budget, three of them too large to enumerate."""
    rng = np.random.default_rng(seed)
    blocks = []
    for n in (24, 22, 20, 9):
        G = cases.factor(rng, n, "output")
        blocks.append(G.T @ G / len(G) + 1e-3 * np.mean(G**2) * np.eye(n))
    return Instance(rng.normal(size=75), HessianBlocks.from_blocks(blocks), Budget(37))


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_small_problems(cases, family, objective, tmp_path, monkeypatch):
    """Every optimum that is claimed is proven, and no bound lies above the optimum, interrupted runs included."""
    for kind, seed in itertools.product(cases.kinds, range(12)):
        most = 18 if seed % 2 else 2
        monkeypatch.setattr("cbs_opt.solvers.trees.tables.MAX_WEIGHTS", most)
        monkeypatch.setattr("cbs_opt.certificate.SMALL", most)
        instance, _, values, sizes = cases.make(seed, family, kind, objective)
        stop = Stop(max_iterations=1 + seed) if seed % 4 == 3 else None
        result, certificate = certified(instance, objective, tmp_path / "c.npz", stop=stop)
        found = verify(instance, certificate)
        best = int(np.argmin(values))
        where = f"{kind}, seed {seed}: {instance.describe()}"
        assert found.bound <= values[best] + 1e-9 * abs(values[best]) + 1e-12 * sizes[best], where
        if result.status is Status.OPTIMAL:
            assert found.optimal, where
        else:
            assert found.bound >= result.bound - 1e-6 * abs(result.bound) - 1e-12 * sizes[best], where


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("interrupted", [True, False])
def test_blocks_without_tables_yet_are_no_dense_tree(cases, objective, interrupted, tmp_path, monkeypatch):
    """Stopped, or closed, after the heuristic: what is certified are the components, not one tree over all."""
    instance, asked = several(cases), []
    take = SearchTurns.take

    def stops(self):
        take(self)
        asked.append(True)
        if not interrupted:
            self._outer.report_bound(self._outer.objective)

    monkeypatch.setattr(SearchTurns, "take", stops)
    monkeypatch.setattr(Certifier, "_dense", lambda self: pytest.fail("a tree over all blocks"))
    stop = Stop(should_stop=lambda: interrupted and bool(asked))
    path, best = tmp_path / "c.npz", solve(instance, "exact", objective=objective)
    asked.clear()
    result = solve(
        instance, "exact", objective=objective, stop=stop, parameters={"certificate": str(path), "heuristic": 1}
    )
    found = verify(instance, read_certificate(path))
    assert asked and found.bound <= best.objective * (1 + 1e-9)
    if interrupted:
        assert result.status is Status.INTERRUPTED and result.extras["certificate"]["nodes"] == 0
    elif result.objective <= best.objective * (1 + 1e-9):
        assert found.optimal


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_an_interrupt_ends_the_recording(cases, objective, tmp_path, monkeypatch):
    """What is recorded by then is a valid proof; the root too is left when the interrupt comes in it."""
    instance = dense(cases, objective)
    best = solve(instance, "exact", objective=objective).objective
    for nodes in (0, 7):
        begun = []

        def stops(self, most, should_stop, nodes=nodes, begun=begun, run=recorder.Recorder.run):
            begun.append(self)
            return run(self, most, should_stop)

        with monkeypatch.context() as patch:
            patch.setattr(recorder.Recorder, "run", stops)
            stop = Stop(should_stop=lambda nodes=nodes, begun=begun: bool(begun) and begun[0].nodes >= nodes)
            _, certificate = certified(instance, objective, tmp_path / "c.npz", stop=stop)
        assert begun and certificate.branch.size <= 4 * nodes + 4
        assert verify(instance, certificate).bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("groups", [False, True])
def test_one_tree(cases, objective, groups, tmp_path):
    instance = dense(cases, objective, groups=groups)
    result, certificate = certified(instance, objective, tmp_path / "c.npz")
    found = verify(instance, certificate)
    assert result.status is Status.OPTIMAL
    assert found.optimal
    assert found.objective == result.objective
    assert found.nodes > 20
    assert result.extras["certificate"]["optimal"] is True
    assert result.extras["certificate"]["bytes"] == (tmp_path / "c.npz").stat().st_size < 10**6


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_several_pieces(cases, objective, tmp_path):
    instance = several(cases)
    result, certificate = certified(instance, objective, tmp_path / "c.npz")
    found = verify(instance, certificate)
    assert result.status is Status.OPTIMAL
    assert found.optimal
    assert (found.pieces, found.trees > 2) == (4, True)


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_limits_and_size(cases, objective, tmp_path, monkeypatch):
    """A stopped run has its bound proven; a certificate that grows too large proves less, and says so."""
    instance = dense(cases, objective)
    result, certificate = certified(instance, objective, tmp_path / "c.npz", stop=Stop(max_iterations=30))
    found = verify(instance, certificate)
    assert result.bound * (1 - 1e-6) <= found.bound <= found.objective
    assert not found.optimal
    monkeypatch.setattr("cbs_opt.solvers.exact.certify.MOST_NODES", 12)
    result, certificate = certified(instance, objective, tmp_path / "c.npz")
    cut = verify(instance, certificate)
    assert result.status is Status.OPTIMAL
    assert not cut.optimal
    assert 0 < cut.bound < result.objective
    assert result.extras["certificate"]["optimal"] is False


def test_nothing_of_a_solver_is_imported():
    code = (
        "import sys, cbs_opt.certificate, cbs_opt.cli.check\n"
        "bad = [m for m in sys.modules if m.startswith(('cbs_opt.solvers', 'numba', 'torch'))]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def tree_end(certificate):
    """The certificate without its last node."""
    shorter = {key: getattr(certificate, key)[:-1] for key in ("branch", "how", "fixed_counts")}
    return replace(certificate, tree_nodes=certificate.tree_nodes - 1, **shorter)


def with_entry(certificate, key, at, value):
    array = getattr(certificate, key).copy()
    array[at] = value
    return replace(certificate, **{key: array})


def swapped(certificate):
    """Another feasible incumbent."""
    pruned = certificate.pruned.copy()
    pruned[[np.argmax(pruned), np.argmin(pruned)]] = [False, True]
    return replace(certificate, pruned=pruned)


def first(certificate, condition):
    return int(np.flatnonzero(condition(certificate))[0])


TAMPERED = {
    "a bit of the incumbent": (
        lambda c: with_entry(c, "pruned", 0, not c.pruned[0]),
        "does not meet the budget",
    ),
    "two bits of the incumbent": (swapped, "has the loss"),
    "a better objective": (lambda c: replace(c, objective=c.objective * 0.999), "has the loss"),
    "a higher bound": (
        lambda c: replace(c, objective=c.objective, bound=c.bound * 1.0001),
        "prove a bound|lies above",
    ),
    "a leaf less": (tree_end, "ends before"),
    "another instance": (lambda c: replace(c, instance_sha256="0" * 64), "another instance"),
    "another budget": (lambda c: replace(c, budget=c.budget + 1), "--budget"),
    "another damping": (lambda c: replace(c, damping=2 * c.damping), "--damping"),
    "a leaf called infeasible": (
        lambda c: with_entry(c, "how", first(c, lambda c: (c.branch == -1) & (c.how == POINT)), NOTHING),
        "prove a bound|more than the trees use|codes",
    ),
    "a child forgotten": (
        lambda c: with_entry(c, "branch", first(c, lambda c: c.branch >= 0), SINGLE),
        "are not connected|codes|ends too early",
    ),
    "a branch on a decided weight": (
        lambda c: with_entry(c, "branch", np.flatnonzero(c.branch >= 0)[:2], c.branch[c.branch >= 0][0]),
        "not open",
    ),
    "numbers of another point": (
        lambda c: replace(c, numbers=np.zeros_like(c.numbers)),
        "prove a bound",
    ),
    "a number that is none": (
        lambda c: with_entry(c, "numbers", 0, np.nan),
        "NaN",
    ),
    "leaves without a bound of their own": (
        lambda c: replace(
            c,
            how=np.where((c.branch == -1) & (c.how == POINT), INHERIT, c.how).astype(np.uint8),
        ),
        "prove a bound|more than the trees use|decided|codes",
    ),
    "one weight too many": (
        lambda c: replace(c, pruned=np.append(c.pruned, False)),
        "shape",
    ),
    "pieces": (
        lambda c: with_entry(c, "pieces", 0, 1),
        "splits block 0",
    ),
    "a weight out of range": (
        lambda c: with_entry(c, "branch", first(c, lambda c: c.branch >= 0), 10**6),
        "not open",
    ),
}


@pytest.fixture(scope="module", params=["selection", "joint"])
def honest(cases, request, tmp_path_factory):
    """An instance with a hash, and its certificate."""
    instance = replace(dense(cases, request.param), sha256="1" * 64)
    _, certificate = certified(instance, request.param, tmp_path_factory.mktemp("honest") / "c.npz")
    assert verify(instance, certificate).optimal
    return instance, certificate


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_refused(what, honest):
    instance, certificate = honest
    change, sentence = TAMPERED[what]
    with pytest.raises(SolutionError, match=sentence) as refusal:
        verify(instance, change(certificate))
    assert "\n" not in str(refusal.value)


def test_a_diagonal_that_is_too_large_is_no_proof(honest):
    instance, certificate = honest
    if not certificate.diagonals.size:
        pytest.skip("the tree needed no diagonal")
    with pytest.raises(SolutionError, match="prove a bound"):
        verify(instance, replace(certificate, diagonals=100 * np.abs(certificate.diagonals) + 1))


@pytest.mark.parametrize("seed", range(3))
def test_multipliers_of_products_are_certified(seed, cases, tmp_path, monkeypatch):
    """A tree with products, which only long ones need: proven, and neither larger nor fewer multipliers pass."""
    monkeypatch.setattr(recorder, "HARD", 0)
    monkeypatch.setattr(best_first.Patience, "before_shift", lambda self, cost: 3)
    instance = dense(cases, "selection", seed, groups=seed == 1)
    result, certificate = certified(instance, "selection", tmp_path / "c.npz")
    assert certificate.product_prices.size > 100
    found = verify(instance, certificate)
    assert found.optimal
    assert found.bound <= result.objective
    for change in (100.0, -1.0, np.nan):
        with pytest.raises(SolutionError, match=r"prove a bound|must be positive and finite"):
            verify(instance, replace(certificate, product_prices=change * certificate.product_prices))
    none = replace(
        certificate, product_counts=0 * certificate.product_counts, products=certificate.products[:0],
        product_prices=certificate.product_prices[:0],
    )  # fmt: skip
    with pytest.raises(SolutionError, match="prove a bound"):
        verify(instance, none)


MUTANTS = 25


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["selection", "joint"]), st.booleans())
def test_no_change_proves_more_than_the_truth(cases, seed, objective, enumerated):
    """Whatever is done to its arrays, a certificate is refused or its bound is true."""
    rng = np.random.default_rng(seed)
    kept = checking.SMALL, tables.MAX_WEIGHTS
    try:
        checking.SMALL = tables.MAX_WEIGHTS = 18 if enumerated else 2
        case = (4 + int(rng.integers(5)), cases.families[seed % 5], "hessian", objective)
        instance, _, values, sizes = cases.make(*case)
        best = int(np.argmin(values))
        truth = values[best] + 1e-9 * abs(values[best]) + 1e-12 * sizes[best]
        with tempfile.TemporaryDirectory() as folder:
            _, certificate = certified(instance, objective, Path(folder) / "c.npz")
        certificate = replace(certificate, bound=-1e300)  # so that only the truth of the bound is at stake
        for _ in range(MUTANTS):
            mutant = certificate
            for _ in range(int(rng.integers(1, 4))):
                mutant = mutated(mutant, rng)
            try:
                found = verify(instance, mutant)
            except SolutionError:
                continue
            assert found.bound <= truth
    finally:
        checking.SMALL, tables.MAX_WEIGHTS = kept


def mutated(certificate, rng):
    """One entry of one array is another; of the points most often, since they are refused least."""
    key = str(rng.choice([*STREAMS, "numbers", "codes", "diagonals", "tree_count", "tree_nodes"]))
    array = getattr(certificate, key)
    if not array.size:
        return certificate
    at = int(rng.integers(array.size))
    value = array[at]
    if array.dtype.kind == "f":
        value = rng.choice([0.0, -value, 10 * value, value + rng.normal(), np.finfo(array.dtype).max, 1e30, 1e-30])
    elif key == "codes":
        value = value ^ np.uint8(1 << int(rng.integers(8)))
    elif key == "how":
        value = rng.integers(0, 20)
    else:
        value = value + rng.integers(-3, 4)
    return with_entry(certificate, key, at, value)


def test_fields_are_all_written(honest, tmp_path):
    _, certificate = honest
    write_certificate(tmp_path / "again.npz", certificate)
    again = read_certificate(tmp_path / "again.npz")
    for field in fields(certificate):
        one, other = getattr(certificate, field.name), getattr(again, field.name)
        assert np.array_equal(one, other), field.name
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None), field.name


def test_a_selection_that_the_budget_forces_cannot_be_left_out():
    """Keep weight 2 and the budget prunes 0 and 1, the optimum: a node that keeps 0 there must answer for it."""
    H = np.array([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
    instance = Instance(np.array([1.0, 1.0, 9.0]), HessianBlocks.from_blocks([H]), Budget(2))
    pruned = np.array([False, True, True])
    loss = checking.selection_loss(instance, pruned)
    forged = Certificate(
        instance_sha256="", objective_kind="selection", budget=2, damping=None, pruned=pruned, objective=loss,
        bound=loss, pieces=np.zeros(3, np.int32), tree_piece=np.zeros(1, np.int32),
        tree_count=np.full(1, -1, np.int32), tree_nodes=np.full(1, 6, np.int64),
        # 2 kept: weight 0 is kept too, which leaves nothing. 2 pruned: 0 kept, 1 kept.
        branch=np.array([2, SINGLE, LEAF, 0, LEAF, LEAF], np.int32),
        how=np.array([NOTHING, VALUE, NOTHING, NOTHING, VALUE, VALUE], np.uint8),
        fixed_counts=np.array([0, 1, 0, 0, 0, 0], np.int32), fixings=np.zeros(1, np.int32),
        diagonals=np.zeros(0), product_counts=np.zeros(0, np.int32), products=np.zeros(0, np.int32),
        product_prices=np.zeros(0), codes=np.zeros(0, np.uint8), numbers=np.zeros(0),
    )  # fmt: skip
    with pytest.raises(SolutionError, match="prove a bound"):
        verify(instance, forged)
