"""Instances whose rows share a stored Hessian, from the export to the pruned network."""

import copy

import numpy as np
import pytest

import cbs_opt
from cbs_opt import HessianBlocks, Instance, SharedBlocks, Stop, evaluate, solve

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(80, 12)


@pytest.mark.parametrize("form", ["hessian", "inverse-hessian"])
@pytest.mark.parametrize("solver", ["magnitude", "obd", "obs", "rmp", "cbs", "search", "relax", "exact", "joint"])
def test_solvers_take_rows_that_share(network, solver, form):
    model, x = network
    shared = cbs_opt.export(
        model, x, source="reconstruction", curvature=form, relative_damping=0.1, sparsity=0.6, device="cpu"
    )
    assert isinstance(shared.curvature, SharedBlocks) and shared.curvature.number_of_stored == 2
    copies = HessianBlocks.from_blocks([shared.curvature.block(k) for k in range(10)])
    objective = "joint" if solver == "joint" else None
    result = solve(shared, solver, objective=objective, stop=Stop(time_limit=2, max_iterations=20), update=True)
    assert int(result.pruned.sum()) == shared.budget.total == 58
    losses = evaluate(Instance(shared.weights, copies, shared.budget), result.pruned)
    assert result.selection_loss == pytest.approx(losses.selection_loss, rel=1e-9)
    assert result.joint_loss == pytest.approx(losses.joint_loss, rel=1e-9)
    pruned = copy.deepcopy(model)
    cbs_opt.apply(pruned, shared, result)
    with torch.no_grad():
        error = ((pruned[0](x) - model[0](x)) ** 2).sum() / len(x) / 2
    weights = np.asarray(result.weights) - shared.weights
    delta, damping = weights[:72].reshape(6, 12), shared.metadata["damping"][0]
    H = shared.curvature.block(0) - damping * np.eye(12)
    assert float(error) == pytest.approx(np.einsum("ri,ij,rj->", delta, H, delta) / 2, rel=1e-4)


def test_a_layer_is_stored_once_and_checked_before_the_work(network, tmp_path):
    model = nn.Linear(600, 300)
    x = torch.randn(40, 600)
    path = tmp_path / "layer.npz"
    options = {"source": "reconstruction", "relative_damping": 0.01, "dtype": "float32", "device": "cpu"}
    instance = cbs_opt.export(model, x, curvature="hessian", path=path, memory=30_000_000, **options)
    assert (instance.n, instance.curvature.number_of_stored) == (180_000, 1)
    assert path.stat().st_size < 4 * 600**2 + 8 * 180_000 + 20_000
    with pytest.raises(cbs_opt.UsageError, match=r"memory.*--blocks"):
        cbs_opt.export(model, x, curvature="hessian", path=path, memory=5_000_000, **options)
    with pytest.raises(cbs_opt.UsageError, match=r"covariances of the inputs .* 2\.88 MB"):
        cbs_opt.export(model, x, curvature="hessian", path=path, memory=2_900_000, blocks=20, **options)
    missing = tmp_path / "nowhere" / "layer.npz"
    with pytest.raises(cbs_opt.errors.OutputError, match="there is no directory"):
        cbs_opt.export(model, x, path=missing, **options)
