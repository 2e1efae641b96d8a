"""Gradients of the errors of layers against another network's outputs, compared with automatic differentiation."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from cbs_opt.errors import InstanceError  # noqa: E402
from cbs_opt.instances.output_errors import output_error_gradients  # noqa: E402
from cbs_opt.instances.prunable import select  # noqa: E402


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


def outputs(model, x):
    found = {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, out, name=name: found.__setitem__(f"{name}.weight", out)
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 26])
def test_gradients_are_those_of_the_error_of_each_layer(chunk_bytes):
    original, x = network(), torch.randn(7, 2, 5, 5)
    model = copy.deepcopy(original)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
        for a, b in zip(model.modules(), original.modules(), strict=True):
            if isinstance(a, nn.Conv2d | nn.Linear):
                a.bias.copy_(b.bias)  # errors are those of the products
    layouts = {tensor.name: tensor.layout for tensor in select(model).tensors}
    found = output_error_gradients(model, original, x, layouts, chunk_bytes=chunk_bytes)
    for name, layout in layouts.items():
        weight = dict(model.named_parameters())[name]
        targets = outputs(original, x)[name].detach()
        error = 0.5 * (outputs(model, x)[name] - targets).square().sum() / len(x)
        (expected,) = torch.autograd.grad(error, weight)
        torch.testing.assert_close(
            torch.from_numpy(found[name]).float(), expected.reshape(layout.rows, -1), atol=1e-4, rtol=1e-4
        )


def test_without_changes_there_is_no_error():
    model = network()
    layouts = {tensor.name: tensor.layout for tensor in select(model).tensors}
    found = output_error_gradients(model, copy.deepcopy(model), torch.randn(3, 2, 5, 5), layouts)
    assert max(abs(gradient).max() for gradient in found.values()) < 1e-5


class Repeated(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.layer, self.times = nn.Linear(3, 3), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x)
        return x


def test_networks_of_another_form():
    layouts = {tensor.name: tensor.layout for tensor in select(Repeated(1)).tensors}
    output_error_gradients(Repeated(2), Repeated(2), torch.randn(3, 3), layouts)
    with pytest.raises(InstanceError, match="do not make the same products"):
        output_error_gradients(Repeated(2), Repeated(1), torch.randn(3, 3), layouts)
