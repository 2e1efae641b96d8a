"""Blocks of the Fisher and reconstruction Hessians against textbook formulae in float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from cbs_opt import InstanceError, UsageError  # noqa: E402
from cbs_opt.instances import curvature as blocks_module  # noqa: E402
from cbs_opt.instances.curvature import block_sizes, fisher_blocks  # noqa: E402
from cbs_opt.instances.reconstruction import LayerCovariance, RowRange, input_covariances  # noqa: E402
from cbs_opt.instances.row_blocks import row_blocks  # noqa: E402
from cbs_opt.instances.tensors import Layout  # noqa: E402


def gradients(m, n, seed=0):
    """Gradients as uneven as those of networks, some columns all zero."""
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((m, n)) * rng.lognormal(0, 2, n)
    G[:, :: max(n // 5, 2)] = 0
    return G.astype(np.float32)


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("damping", [1e-5, 1.0])
@pytest.mark.parametrize("m", [7, 40, 100])  # below, between and above the block sizes
@pytest.mark.parametrize("inverse", [True, False])
def test_fisher_blocks_equal_the_direct_ones(m, damping, inverse):
    sizes = [40, 1, 60, 20]
    G = gradients(m, sum(sizes))
    start = 0
    made = list(fisher_blocks(G, damping, sizes, inverse=inverse))
    assert [block.shape for block in made] == [(b, b) for b in sizes]
    for b, block in zip(sizes, made, strict=True):
        part = G[:, start : start + b].astype(np.float64)
        H = part.T @ part / m + damping * np.eye(b)
        assert_close(block, np.linalg.inv(H) if inverse else H)
        assert block.dtype == np.float64
        np.testing.assert_array_equal(block, block.T)
        start += b


@pytest.mark.parametrize("panel_bytes", [1, 8 * 30 * 25, 1 << 28])
def test_panels_of_columns_and_rows_change_nothing(panel_bytes, monkeypatch):
    G, sizes = gradients(30, 90), [5, 40, 10, 35]
    expected = list(fisher_blocks(G, 1e-4, sizes, inverse=True))
    monkeypatch.setattr(blocks_module, "PANEL_BYTES", panel_bytes)
    monkeypatch.setattr(blocks_module, "_PANEL_ROWS", 16)
    for found, whole in zip(fisher_blocks(G, 1e-4, sizes, inverse=True), expected, strict=True):
        assert_close(found, whole)
        np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("m", [3, 20])
def test_a_singular_block_has_no_inverse(m):
    with pytest.raises(InstanceError, match=r"block 1 of the Fisher matrix is singular.*raise the damping"):
        list(fisher_blocks(np.ones((m, 7)) * np.array([1, 1, 1, 1, 1, 1, 0]), 0.0, [1, 6], inverse=True))


def test_blocks_of_a_size_never_hold_two_tensors():
    shapes = [(3, 4), (2, 5), (7,)]
    assert block_sizes(shapes, 5) == [5, 5, 2, 5, 5, 5, 2]
    assert block_sizes(shapes, 100) == block_sizes(shapes, "layer") == [12, 10, 7]
    assert block_sizes(shapes, "full") == [29]
    assert block_sizes(shapes[:2], "row") == [4, 4, 4, 5, 5]
    for wrong in (0, -3, True, "rows", 2.5):
        with pytest.raises(UsageError, match="`blocks` must be"):
            block_sizes(shapes, wrong)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "tokens": (lambda: nn.Linear(4, 3), (6, 4)),
    "convolution": (lambda: nn.Conv2d(4, 3, 3, stride=2, padding=1), (4, 6, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same"), (4, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, (1, 3), groups=4, bias=False), (4, 6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_reconstruction_loss_is_half_the_squared_error_of_the_output(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(11, *shape, dtype=torch.float64)
    covariances = input_covariances(nn.Sequential(layer), x, ["0.weight"], chunk_bytes=5_000)
    weight = layer.weight
    rows = row_blocks(covariances, [0.0])
    assert (len(rows.stored), rows.shared.size) == (getattr(layer, "groups", 1), weight.shape[0])
    stored = list(rows.matrices(inverse=False))
    made = [stored[s] for s in rows.shared]
    delta = torch.randn_like(weight)
    with torch.no_grad():
        before = layer(x)
        weight += delta
        error = ((layer(x) - before) ** 2).sum() / len(x) / 2
    moves = delta.flatten(1).numpy()
    assert sum(move @ H @ move for move, H in zip(moves, made, strict=True)) / 2 == pytest.approx(float(error))


def test_reconstruction_blocks_are_damped_cut_and_inverted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(30, 5)
    covariances = input_covariances(model, x, ["0.weight", "2.weight"])
    X = x.double().numpy()
    H = X.T @ X / 30
    rows = row_blocks(covariances, [0.1, 0.2], 4)
    made = list(rows.matrices(inverse=True))
    assert rows.sizes == [len(block) for block in made] == [4, 1, 3]
    assert rows.shared.tolist() == [0, 1] * 3 + [2] * 2 and not rows.plain and not rows.scaled
    assert_close(made[0], np.linalg.inv(H[:4, :4] + 0.1 * np.eye(4)))
    assert_close(made[1], 1 / (H[4:, 4:] + 0.1))
    hidden = torch.relu(model[0](x)).detach().double().numpy()
    assert_close(made[-1], np.linalg.inv(hidden.T @ hidden / 30 + 0.2 * np.eye(3)))


def test_rows_share_what_they_add_to_their_diagonals():
    S, T = np.diag([1.0, 2.0, 3.0]), np.eye(3)
    shifts = np.array([0.5, 0.0, 0.5, 2.0])
    layer = LayerCovariance("w", Layout((6, 3)), (RowRange(0, 4, S, shifts), RowRange(4, 6, T)))
    rows = row_blocks([layer], [0.25], 2)
    assert rows.shared.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 6, 7]
    assert rows.sizes == [2, 1] * 4
    stored = list(rows.matrices(inverse=False))
    assert [block.diagonal().tolist() for block in stored[:4]] == [[1.75, 2.75], [3.75], [1.25, 2.25], [3.25]]
    scales = {"w": np.array([1.0, 2.0, 0.25, 1.0, 3.0, 3.0])}
    scaled = row_blocks([layer], [0.25], None, scales)
    assert scaled.scaled and scaled.scale.tolist() == scales["w"].tolist()
    made = list(scaled.matrices(inverse=False))
    for row, H in enumerate([S + shift * np.eye(3) for shift in shifts]):
        np.testing.assert_allclose(made[scaled.shared[row]], H + 0.25 * np.eye(3))
    distinct = LayerCovariance("w", Layout((2, 3)), (RowRange(0, 2, S, np.array([3.0, 1.0])),))
    assert row_blocks([distinct], [0.0]).plain and row_blocks([distinct], [0.0]).shared.tolist() == [0, 1]


def test_reconstruction_refuses_what_it_is_not_for():
    x = torch.randn(4, 5)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    for name in ("0.bias", "1.weight"):
        with pytest.raises(UsageError, match=f"'{name}' has no reconstruction error"):
            input_covariances(model, x, [name])
    with pytest.raises(UsageError, match=r"has no weight '7\.weight'"):
        input_covariances(model, x, ["7.weight"])
    holder = nn.Module()
    holder.used, holder.aside = nn.Linear(5, 3), nn.Linear(2, 2)
    holder.forward = holder.used.forward
    with pytest.raises(InstanceError, match=r"none of the layers is called"):
        input_covariances(holder, x, ["aside.weight"])
    with pytest.raises(InstanceError, match=r"not finite"):
        input_covariances(nn.Sequential(nn.Linear(5, 3)), x / 0, ["0.weight"])
