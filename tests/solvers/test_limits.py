"""Limits of every kind, at any moment: never worse than magnitude or the warm start, on many large blocks."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    InverseHessianBlocks,
    SharedBlocks,
    SolverError,
    Status,
    Stop,
    evaluate,
    interrupt,
    linalg,
    solve,
    solver_names,
)
from cbs_opt.curvature import base, gradient_factor, shared_blocks
from cbs_opt.registry import get_solver
from cbs_opt.solvers.joint import backward, bulk_exchange, elimination, moves, stages
from cbs_opt.solvers.layers import solve as layers

BASELINES = {"random", "magnitude", "obd", "obs"}
"""Rules that are measured as they are."""

SIZES = (14, 9, 22, 12, 17, 6)


@pytest.fixture(autouse=True)
def small_problems_count_as_large(monkeypatch):
    """Blocks of a few weights go the way of thousands: stages, cores, checkpoints after every piece."""
    monkeypatch.setattr(backward, "DENSE_LIMIT", 8)
    monkeypatch.setattr(bulk_exchange, "DENSE_LIMIT", 8)
    monkeypatch.setattr(bulk_exchange, "_SMALLEST", 1)
    monkeypatch.setattr(moves, "CORE_LIMIT", 12)
    monkeypatch.setattr(moves, "KEPT_LIMIT", 10)
    monkeypatch.setattr(linalg, "_PANEL", 3)
    monkeypatch.setattr(gradient_factor, "_CHUNK_BYTES", 8 * 5 * 4)
    monkeypatch.setattr(gradient_factor, "_COPY_BYTES", 0)
    monkeypatch.setattr(layers, "TABLEAU_COLUMNS", 1100)  # reset after the test, which sets it
    for module in (backward, elimination):
        monkeypatch.setattr(module, "LAZY_STEPS", 3)
    for module in (
        base,
        shared_blocks,
        "cbs_opt.curvature.inverse_hessian_blocks",
        "cbs_opt.solvers.joint.tableau",
    ):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.LARGE_BLOCK", 4)


def many_blocks(kind, seed, share, groups):
    """Blocks of very different scale, as the layers of a network have."""
    rng = np.random.default_rng(seed)
    sizes = np.array((12,) * 6 if kind == "shared" else SIZES)
    n = int(sizes.sum())
    scale = np.repeat(10.0 ** rng.uniform(-3, 1, sizes.size), sizes)
    weights = rng.standard_normal(n) * np.repeat(rng.uniform(0.1, 2, sizes.size), sizes)
    G = (rng.standard_normal((5, n)) * scale * rng.random(n)).astype(np.float32)
    factor = GradientFactor(G, 1e-5, sizes)
    blocks = [factor.block(k) + 1e-3 * np.diag(factor.block(k).diagonal()) for k in range(sizes.size)]
    if kind == "gradients":
        curvature = factor
    elif kind == "hessian":
        curvature = HessianBlocks.from_blocks(blocks)
    elif kind == "inverse_hessian":
        curvature = InverseHessianBlocks.from_blocks([np.linalg.inv(H) for H in blocks])
    else:
        stored = HessianBlocks.from_blocks(blocks[:2])
        curvature = SharedBlocks(stored, [0, 0, 1, 0, 1, 1], 10.0 ** rng.uniform(-2, 2, 6))
    total = max(1, int(share * n))
    budget = Budget(total)
    if groups:
        group = np.arange(n) % 2
        half = min(total // 2, int((group == 1).sum()))
        budget = Budget(total, group, np.array([total - half, half]))
    return Instance(weights, curvature, budget)


class AtQuestion:
    """A rule that holds from the k-th question on."""

    def __init__(self, k):
        self.k, self.asked = k, 0

    def __call__(self):
        self.asked += 1
        return self.asked > self.k


def tasks():
    for name in solver_names():
        try:
            kinds = sorted(get_solver(name).supports.objectives)
        except SolverError:
            continue
        for objective in kinds:
            if name not in BASELINES | {"brute", "pyomo"}:
                yield pytest.param(name, objective, id=f"{name}-{objective}")


@pytest.mark.parametrize(("name", "objective"), list(tasks()))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_never_worse_than_what_is_known(name, objective, data):
    kind = data.draw(st.sampled_from(["gradients", "hessian", "inverse_hessian", "shared"]))
    layers.TABLEAU_COLUMNS = data.draw(st.sampled_from([4, 1100]))
    seed, share = data.draw(st.integers(0, 10_000)), data.draw(st.sampled_from([0.3, 0.6, 0.8]))
    instance = many_blocks(kind, seed, share, groups=data.draw(st.booleans()))
    known = [instance.budget.cheapest(np.abs(instance.weights))]
    start = None
    if get_solver(name).supports.warm_start and data.draw(st.booleans()):
        scores = data.draw(st.sampled_from(["diagonal", "random"]))
        start = instance.budget.cheapest(
            instance.weights**2 * instance.curvature.diagonal()
            if scores == "diagonal"
            else np.random.default_rng(seed).random(instance.n)
        )
        known.append(start)
    stop = data.draw(
        st.one_of(
            st.integers(0, 60).map(lambda k: Stop(should_stop=AtQuestion(k), time_limit=0.2)),
            st.integers(0, 3).map(lambda k: Stop(max_iterations=k, time_limit=0.2)),
            st.sampled_from([0.0, 0.001, 0.01, 0.03]).map(lambda s: Stop(time_limit=s)),
        )
    )
    try:
        result = solve(instance, name, objective=objective, stop=stop, warm_start=start, threads=1)
    except SolverError as error:
        assert "too large" in str(error) or "at most" in str(error)  # of the exact solvers
        return
    assert result.status is not Status.ERROR
    assert instance.admits(result.pruned)
    for pruned in known:
        losses = evaluate(instance, pruned)
        value = losses.selection_loss if objective == "selection" else losses.joint_loss
        assert result.objective <= value + 1e-9 * abs(value)


def test_a_stopped_elimination_does_not_mix_the_prices_of_blocks():
    """One block thinned out, the others not: every block is pruned as far as by magnitude."""
    instance = many_blocks("gradients", 3, 0.6, groups=False)
    magnitude = instance.budget.cheapest(np.abs(instance.weights))
    prices = np.full(instance.n, np.inf)
    part = instance.curvature.block_slice(2)
    prices[part] = 1e-9 * instance.weights[part] ** 2
    pruned = np.zeros(instance.n, dtype=bool)
    completed = stages.complete(instance, pruned, prices)
    for k in range(instance.curvature.number_of_blocks):
        here = instance.curvature.block_slice(k)
        assert completed[here].sum() == magnitude[here].sum()
    order = part.start + np.argsort(prices[part])
    assert completed[order[: int(magnitude[part].sum())]].all()


def test_a_computation_ends_between_two_panels():
    """`Interrupted` leaves the linear algebra at the question that is answered with yes."""
    A = np.eye(12) + 0.1
    for k in range(6):
        question = AtQuestion(k)
        with interrupt.interruptible(question), pytest.raises(interrupt.Interrupted):
            linalg.inverse_pd(A)
        assert question.asked == k + 1
    with interrupt.interruptible(lambda: True), interrupt.interruptible(None):
        np.testing.assert_allclose(linalg.inverse_pd(A) @ A, np.eye(12), atol=1e-12)
    B = A - 1.5 * np.eye(12)
    assert linalg.cholesky_lower(B) is None
    for single in (A, A.astype(np.float32)):
        L = linalg.cholesky_lower(single)
        np.testing.assert_allclose(L @ L.T, A, atol=1e-5)
        np.testing.assert_allclose(linalg.inverse_of_cholesky(L) @ A, np.eye(12), atol=1e-5)
        assert not np.triu(L, 1).any()
