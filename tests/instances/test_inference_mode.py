"""Calls inside torch.inference_mode, and networks and data that were made there, give what they give outside."""

import copy

import numpy as np
import pytest

import cbs_opt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from cbs_opt.instances.gradients import gradient_rows, per_sample_gradients  # noqa: E402


def made():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    return network, (torch.randn(60, 5), torch.arange(60) % 3)


def pruned(network, data, source):
    done = cbs_opt.prune(network, data, 0.5, source=source, stages=2, max_iterations=3, threads=1)
    return {name: mask.numpy() for name, mask in done.masks.items()}, done


@pytest.mark.parametrize("source", ["kfac", "fisher", "reconstruction"])
@pytest.mark.parametrize("where", ["the call", "the network and the data"])
def test_prune_and_export(source, where, tmp_path):
    network, data = made()
    expected, _ = pruned(network, data, source)
    options = {"source": source, "sparsity": 0.5}
    curvature = cbs_opt.export(network, *data, **options).curvature
    if where == "the call":
        with torch.inference_mode():
            found, done = pruned(network, data, source)
            again = cbs_opt.export(network, *data, path=tmp_path / "i.npz", **options)
            assert torch.is_inference_mode_enabled()
            result = cbs_opt.solve(again, "magnitude")
            other = copy.deepcopy(network)
            cbs_opt.apply(other, again, result)
            assert sum(int((p == 0).sum()) for p in other.parameters()) >= result.pruned.sum()
    else:
        with torch.inference_mode():
            theirs, x, y = copy.deepcopy(network), data[0].clone(), data[1].clone()
        assert theirs[0].weight.is_inference()
        found, done = pruned(theirs, (x, y), source)
        again = cbs_opt.export(theirs, x, y, **options)
        assert theirs[0].weight.is_inference()
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask)
    assert not any(p.is_inference() for p in done.model.parameters())
    for k in range(curvature.number_of_blocks):
        np.testing.assert_allclose(again.curvature.block(k), curvature.block(k), rtol=1e-5, atol=1e-9)


def test_gradients():
    network, (x, y) = made()
    names = ["0.weight", "3.weight"]
    expected = per_sample_gradients(network, x, y, names)
    assert expected.abs().max() > 1e-3
    with torch.inference_mode():
        found = per_sample_gradients(network, x, y, names)
        rows = torch.cat(list(gradient_rows(network, x, y, names)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(rows, expected)
