"""Tabu search on a large dense block: the kernels against the search written down in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbs_opt.device import DeviceError
from cbs_opt.solvers.device import dense

pytestmark = pytest.mark.gpu

MASK = (1 << 64) - 1


def wait(seed, count, tenure):
    z = (seed + (count + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return tenure + (z ^ (z >> 31)) % tenure


def by_hand(Q, c, y, seed, tenure, steps):
    """The best value, its point and the last point; all in float64."""
    y, release = y.copy(), np.zeros(y.size, dtype=int)
    half, h = 0.5 * np.diag(Q), Q @ y + c
    f = best = 0.5 * y @ Q @ y + c @ y
    point = y.copy()
    for now in range(1, steps + 1):
        free = release <= now - 1
        drop = np.where(free & (y == 1), half - h, np.inf)
        i = int(np.argmin(drop))
        if not drop[i] < np.inf:
            continue
        h, y[i] = h - Q[i], 0
        add = np.where(free & (y == 0) & (np.arange(y.size) != i), half + h, np.inf)
        j = int(np.argmin(add)) if np.isfinite(add).any() else i
        h, y[j] = h + Q[j], 1
        release[i] = now + wait(seed, 2 * now, tenure)
        if j != i:
            release[j] = now + wait(seed, 2 * now + 1, tenure)
        f = 0.5 * y @ Q @ y + c @ y
        if f < best - 1e-12 * abs(best):
            best, point = f, y.copy()
    return best, point, y


def make(card, n, starts, seed=0):
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(n // 2, n))
    # Multiples of 1/64: sums are exact in float32, so that both searches see the same ties.
    Q, c = np.round(G.T @ G * 4) / 64, np.round(rng.normal(size=n) * 64) / 64
    y = np.zeros((starts, n))
    for row in y:
        row[rng.permutation(n)[: n // 3]] = 1
    return Q, c, y


@pytest.mark.parametrize(("n", "tile"), [(40, 16), (33, 64)])
def test_steps_are_those_written_down(card, monkeypatch, n, tile):
    monkeypatch.setattr(dense, "TILE", tile)
    monkeypatch.setattr(dense, "_GRAPH_STEPS", 3)
    Q, c, y = make(card, n, 2)
    seeds, tenure = [3, 1 << 40], [2, 5]
    device = card.device
    search = dense.DenseTabu(
        torch.tensor(Q, dtype=torch.float32, device=device),
        torch.tensor(c, device=device),
        torch.tensor(y > 0, device=device),
        torch.tensor(seeds, device=device),
        torch.tensor(tenure, device=device),
        steps=6,
    )
    assert search.run() == 6 and search.run() == 6
    for s in range(2):
        best, point, last = by_hand(Q, c, y[s], seeds[s], tenure[s], 12)
        assert search.objectives[s].item() == pytest.approx(best, rel=1e-12)
        assert search.best[s].tolist() == point.tolist()
        states = torch.cat([branch.state for branch in search.branches])
        assert (states[s] & 1).tolist() == last.tolist()
    assert search.drift < 1e-12
    assert (search.objectives.cpu().numpy() < [0.5 * row @ Q @ row + c @ row for row in y]).all()


def test_a_search_with_nothing_to_exchange(card, monkeypatch):
    """Everything waits: no variable may move, and the point stays."""
    monkeypatch.setattr(dense, "TILE", 16)
    monkeypatch.setattr(dense, "_GRAPH_STEPS", 4)
    Q, c, _ = make(card, 6, 1)
    y = np.array([[1, 0, 0, 0, 0, 0]])
    search = dense.DenseTabu(
        torch.tensor(Q, dtype=torch.float32, device=card.device),
        torch.tensor(c, device=card.device),
        torch.tensor(y > 0, device=card.device),
        torch.tensor([1], device=card.device),
        torch.tensor([16], device=card.device),
        steps=8,
    )
    search.run()
    best, point, _ = by_hand(Q, c, y[0].astype(float), 1, 16, 8)
    assert search.objectives[0].item() == pytest.approx(best) and search.best[0].tolist() == point.tolist()
    search.branches[0].f[0] = torch.inf
    with pytest.raises(DeviceError, match="not a number"):
        search.run()


def test_branches_are_refreshed_each_with_its_own_points(card, monkeypatch):
    """Eight starts are two branches: both are those of one branch for each start."""
    monkeypatch.setattr(dense, "TILE", 16)
    monkeypatch.setattr(dense, "_GRAPH_STEPS", 2)
    monkeypatch.setattr(dense, "_REFRESH_BYTES", 8 * 12 * 5)  # Q in three pieces
    Q, c, y = make(card, 12, 8)
    device = card.device

    def search(part):
        return dense.DenseTabu(
            torch.tensor(Q, dtype=torch.float32, device=device),
            torch.tensor(c, device=device),
            torch.tensor(y[part] > 0, device=device),
            torch.arange(8, device=device)[part],
            torch.full((8,), 2, device=device)[part],
            steps=2,
        )

    found = search(slice(None))
    assert [branch.S for branch in found.branches] == [4, 4]
    found.run()
    for s in (0, 5):
        alone = search(slice(s, s + 1))
        alone.run()
        assert found.best[s].tolist() == alone.best[0].tolist()
        assert found.objectives[s].item() == alone.objectives[0].item()
    best = found.best.cpu().numpy()
    values = [0.5 * row @ Q @ row + c @ row for row in best.astype(float)]
    assert found.objectives.cpu().numpy() == pytest.approx(values, rel=1e-12)
