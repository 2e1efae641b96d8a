"""The inner loops on blocks: NumPy, numba and Triton give the same points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbs_opt.solvers.device.lanes import CpuEngine, Lanes, TritonEngine, padded_size
from cbs_opt.solvers.kernels import selection_numba, selection_numpy

pytestmark = pytest.mark.gpu

SIZES = (5, 12, 20)
STARTS = 2


def blocks(card, dtype=torch.float64, seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    P = padded_size(max(sizes))
    q, c = np.zeros((len(sizes), P, P)), np.zeros((len(sizes), P))
    for b, n in enumerate(sizes):
        G = rng.normal(size=(n + 2, n)) * 10.0 ** rng.uniform(-1, 1, n)
        q[b, :n, :n] = G.T @ G / n
        c[b, :n] = rng.normal(size=n)
    device = card.device
    lanes = Lanes(
        torch.tensor(q, dtype=dtype, device=device),
        torch.tensor(c, dtype=dtype, device=device),
        torch.tensor(sizes, device=device),
    )
    count = torch.tensor([n // 2 for n in sizes], device=device)
    x = torch.tensor(rng.random((len(sizes), STARTS, P)), dtype=dtype, device=device)
    return lanes, count, x


def copy(state):
    return type(state)(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(state).items()})


def same(first, second, tolerance):
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.cpu().numpy() == pytest.approx(other.cpu().numpy(), rel=tolerance, abs=tolerance), name
        elif isinstance(value, torch.Tensor):
            assert value.tolist() == other.tolist(), name
        else:
            assert value == other, name


@pytest.mark.parametrize(("stall", "steps"), [(1000, 14), (4, 30)])
def test_tabu_search_is_the_same_in_numpy_numba_and_triton(card, stall, steps):
    lanes, count, x = blocks(card)
    rng = torch.arange(1, 1 + len(SIZES) * STARTS, device=card.device).view(len(SIZES), STARTS)
    tenure = torch.tensor([[1, 2], [3, 4], [5, 30]], dtype=torch.int32, device=card.device)  # 30: nothing is free
    states = [lanes.tabu_state(lanes.round(x, count), rng) for _ in range(3)]
    start = copy(states[0])
    engines = (CpuEngine(selection_numpy), CpuEngine(selection_numba), TritonEngine())
    for state, engine in zip(states, engines, strict=True):
        for part in (steps // 2, steps - steps // 2):  # two calls go on where one would
            engine.tabu(lanes, state, part, stall, tenure)
    reference = states[0]
    if stall > steps:
        assert reference.clock == steps
        same(reference, states[1], 1e-12)
        same(reference, states[2], 1e-12)
    for state in states:
        assert state.best.tolist() == reference.best.tolist()
        assert state.y.sum(2).tolist() == start.y.sum(2).tolist()
        assert lanes.values(state.best).cpu().numpy() == pytest.approx(state.f_best.cpu().numpy(), rel=1e-10)
        assert lanes.refresh(state) < 1e-10
    assert (reference.f_best < start.f_best).any() and (reference.f_best <= start.f_best).all()


def test_single_precision_drifts_little_and_says_so(card):
    lanes, count, x = blocks(card, torch.float32)
    exact, _, _ = blocks(card)
    rng = torch.ones(len(SIZES), STARTS, dtype=torch.int64, device=card.device)
    state = lanes.tabu_state(lanes.round(x, count), rng)
    TritonEngine().tabu(
        lanes, state, 20, 100, torch.full((len(SIZES), STARTS), 3, dtype=torch.int32).to(card.device)
    )
    assert state.f.dtype == state.h.dtype == torch.float32
    values = exact.values(state.best).cpu().numpy()
    assert state.f_best.cpu().numpy() == pytest.approx(values, rel=1e-4, abs=1e-4)
    assert 0 <= lanes.refresh(state) < 1e-4
    assert state.f_best.cpu().numpy() == pytest.approx(values, rel=1e-6, abs=1e-6)


def test_what_is_no_number_does_not_pass(card):
    from cbs_opt.device import DeviceError

    lanes, count, x = blocks(card, torch.float32)
    state = lanes.tabu_state(
        lanes.round(x, count), torch.ones(len(SIZES), STARTS, dtype=torch.int64).to(card.device)
    )
    state.f[1, 0] = torch.nan
    with pytest.raises(DeviceError, match="not a number"):
        lanes.refresh(state)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.2])
def test_pairwise_descent_is_the_same_in_numpy_numba_and_triton(card, t):
    lanes, _, x = blocks(card, seed=2)
    x = torch.where(lanes.inside, x, 0.0)
    shift = (t * lanes.diagonal[:, None, :]).expand(x.shape).contiguous()
    tolerance = torch.full(x.shape[:2], 1e-9, dtype=torch.float64, device=card.device)
    points = [x.clone() for _ in range(3)]
    done = []
    for point, engine in zip(
        points, (CpuEngine(selection_numpy), CpuEngine(selection_numba), TritonEngine()), strict=True
    ):
        h = lanes.gradients(point) + shift * (0.5 - point)
        done.append(engine.descend(lanes, point, h, shift, 15, tolerance).tolist())
        again = lanes.gradients(point) + shift * (0.5 - point)
        inside = lanes.inside.expand(h.shape)
        assert h[inside].cpu().numpy() == pytest.approx(again[inside].cpu().numpy(), rel=1e-9, abs=1e-9)
    assert done[0] == done[1] == done[2] and max(map(max, done[0])) > 5
    for point in points[1:]:
        assert point.cpu().numpy() == pytest.approx(points[0].cpu().numpy(), rel=1e-9, abs=1e-9)
    assert points[2].sum(2).cpu().numpy() == pytest.approx(x.sum(2).cpu().numpy())


def test_rounding_takes_the_largest_and_the_first_of_equals(card):
    lanes, count, x = blocks(card)
    x[:] = 0.5
    x[:, :, 3] = 1.0
    y = lanes.round(x, count)
    assert y.sum(2).tolist() == [[n // 2] * STARTS for n in SIZES]
    assert y[0, 0].tolist()[:5] == [1, 0, 0, 1, 0]
