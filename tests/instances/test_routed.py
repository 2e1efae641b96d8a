"""Mixtures of experts: which weights a sample uses depends on the sample."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cbs_opt import export, prune  # noqa: E402
from cbs_opt.instances.output_errors import output_error_gradients  # noqa: E402
from cbs_opt.instances.prunable import select  # noqa: E402
from cbs_opt.instances.reconstruction import input_covariances  # noqa: E402


class Routed(nn.Module):
    """Each sample goes through the expert that the sign of its first entry names; the last one gets none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        h = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                h = h.index_add(0, rows, expert(x[rows]))
        return self.out(torch.tanh(h))


@pytest.fixture
def data():
    """40 samples, of which the first 10 go to the first expert."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    x[:10, 0] = -x[:10, 0].abs()
    return x, torch.arange(40) % 2


def names(instance):
    return [tensor["name"] for tensor in instance.metadata["tensors"]]


@pytest.mark.parametrize("source", ["reconstruction", "kfac"])
def test_experts_that_the_first_sample_does_not_use_are_found(data, source, caplog):
    x, y = data
    with caplog.at_level("WARNING", "cbs_opt"):
        instance = export(Routed(), x, y, source=source, sparsity=0.5)
    assert names(instance) == ["experts.0.weight", "experts.1.weight", "out.weight"]
    assert "experts.2.weight is left out" in caplog.text and "does not use it on these samples" in caplog.text


def test_an_expert_counts_the_samples_that_it_gets(data, caplog):
    x, _ = data
    with caplog.at_level("WARNING", "cbs_opt"):
        layers = input_covariances(Routed(), x, ["experts.0.weight", "experts.1.weight", "experts.2.weight"])
    first, second, third = (layer.ranges[0].covariance for layer in layers)
    X = x.double().numpy()
    left = X[:, 0] <= 0
    np.testing.assert_allclose(first, X[left].T @ X[left] / 40, rtol=1e-6)
    np.testing.assert_allclose(second, X[~left].T @ X[~left] / 40, rtol=1e-6)
    level = (first.diagonal().mean() + second.diagonal().mean()) / 2
    np.testing.assert_allclose(third, level * np.eye(4))
    assert "experts.2.weight: no sample reaches it" in caplog.text


def test_an_expert_with_other_samples_than_before_has_no_target(data):
    x, _ = data
    network, original = Routed(), Routed()
    original.load_state_dict(network.state_dict())
    with torch.no_grad():
        network.out.weight.mul_(0.5)
    layouts = {t.name: t.layout for t in select(network).tensors if not t.name.startswith("experts.2")}
    same = output_error_gradients(network, original, x, layouts)
    assert np.abs(same["out.weight"]).max() > 0 and not same["experts.0.weight"].any()
    network.forward = lambda x: Routed.forward(network, x * torch.tensor([-1.0, 1, 1, 1]))  # other experts
    other = output_error_gradients(network, original, x, layouts)
    assert not other["experts.0.weight"].any() and not other["experts.1.weight"].any()
    assert np.abs(other["out.weight"]).max() > 0


@pytest.mark.parametrize("options", [{}, {"stages": 2}, {"sequential": True}, {"samples": 2}])
def test_a_mixture_is_pruned(data, options):
    result = prune(Routed(), data, 0.5, held_out=data, time_limit=1.0, **options)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_layer_without_gradients_is_named(data, caplog):
    class Gated(Routed):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 2)

        def forward(self, x):
            return super().forward(x) + 0 * self.gate(x).argmax(1, keepdim=True)

    with caplog.at_level("WARNING", "cbs_opt"):
        export(Gated(), *data, source="kfac", sparsity=0.5)
    assert "gate.weight: the loss has no gradient by its outputs" in caplog.text and "--exclude" in caplog.text
