"""Dampings, divisions of the budget and scaled updates of one quadratic model."""

from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt.pruning.method import Method  # noqa: E402
from cbs_opt.pruning.problem import normalised, of_layers, problems, redamped, scaled_update  # noqa: E402


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    return model, torch.randn(50, 2, 5, 5), torch.randint(3, (50,))


SOURCES = {
    "fisher": {"source": "fisher"},
    "kfac": {"source": "kfac", "curvature": "hessian"},
    "reconstruction": {"source": "reconstruction", "curvature": "hessian"},
}


def dense(instance):
    return [instance.curvature.block(k) for k in range(instance.curvature.number_of_blocks)]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_another_damping_is_that_of_another_export(source, relative, data):
    name = "relative_damping" if relative else "damping"
    one, other = (cbs_opt.export(*data, **SOURCES[source], **{name: value}) for value in (0.5, 0.02))
    changed = redamped(one, 0.5, 0.02, relative=relative)
    for a, b in zip(dense(changed), dense(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7 * abs(b).max())
    noted = changed.metadata["damping"] if source != "fisher" else changed.curvature.damping
    np.testing.assert_allclose(noted, other.metadata["damping"], rtol=1e-6)
    back = redamped(changed, 0.02, 0.5, relative=relative)
    for a, b in zip(dense(back), dense(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7 * abs(b).max())


def test_relative_errors_have_layers_of_size_one(data):
    instance = cbs_opt.export(*data, **SOURCES["reconstruction"], relative_damping=0.01)
    scaled = normalised(instance)
    ends = [0, 36, 144]
    offsets = scaled.curvature.offsets
    for start, stop in pairwise(ends):
        of_layer = [k for k in range(scaled.curvature.number_of_blocks) if start <= offsets[k] < stop]
        size = sum(
            scaled.curvature.block_quadratic(k, instance.weights[scaled.curvature.block_slice(k)])
            for k in of_layer
        )
        assert size == pytest.approx(1)
    pruned = np.random.default_rng(0).random(instance.n) < 0.5
    np.testing.assert_allclose(
        cbs_opt.best_update(scaled, pruned), cbs_opt.best_update(instance, pruned), rtol=1e-6
    )


def test_the_same_fraction_of_every_layer(data):
    instance = cbs_opt.export(*data, damping=0.1)
    assert of_layers(instance, 72, None).group_budgets.tolist() == [18, 54]
    fixed = np.zeros(instance.n, np.int8)
    fixed[:30] = 1  # more than its share
    assert of_layers(instance, 72, fixed).group_budgets.tolist() == [30, 42]
    fixed[:30] = -1
    assert of_layers(instance, 72, fixed).group_budgets.tolist() == [6, 66]


def test_variants(data):
    instance = cbs_opt.export(*data, **SOURCES["reconstruction"], relative_damping=0.1)
    method = Method(source="reconstruction", split="auto", relative_damping=(0.1, 0.2))
    found = [(p.split, p.damping) for p in problems(instance, method, (0.1, 0.2))]
    assert found == [(s, d) for s in ("global", "layer", "normalised") for d in (0.1, 0.2)]
    fisher = cbs_opt.export(*data, damping=0.1)
    method = Method(source="fisher", split="auto", damping=0.1)
    assert [p.split for p in problems(fisher, method, (0.1,))] == ["global", "layer"]


def test_a_scaled_update(data):
    instance = cbs_opt.export(*data, damping=0.1).with_budget(90)
    result = cbs_opt.solve(instance, "magnitude", update=True)
    half = scaled_update(instance, result.pruned, result.weights, 0.5)
    assert (half[result.pruned] == 0).all()
    np.testing.assert_allclose(half, np.where(result.pruned, 0, 0.5 * (instance.weights + result.weights)))
