"""Weights multiplied where no graph is recorded: in functions with their own backward pass, and under no_grad."""

import copy

import numpy as np
import pytest

import cbs_opt
from cbs_opt import UsageError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from cbs_opt.instances.fisher_terms import fisher_terms  # noqa: E402
from cbs_opt.instances.losses import declared  # noqa: E402
from cbs_opt.instances.output_gradients import row_gradients  # noqa: E402
from cbs_opt.instances.tensors import Layout  # noqa: E402

LAYOUTS = {"first": Layout((5, 4)), "second": Layout((3, 5))}


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class Both(torch.autograd.Function):
    """Two layers in one function, in the newer style, with an input that is changed in place."""

    @staticmethod
    def forward(x, first, second):
        h = x @ first.t()
        return functional.linear(h.tanh_(), second), h

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, first, second = inputs
        ctx.save_for_backward(x, first, second, output[1])

    @staticmethod
    def backward(ctx, g, gh):
        x, first, second, h = ctx.saved_tensors
        inner = (g @ second + gh) * (1 - h**2)
        return inner @ first, inner.t() @ x, g.t() @ h


class Outer(torch.autograd.Function):
    """A function that calls another one."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return 2 * Product.apply(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g @ w, 2 * g.t() @ x


class Quantised(torch.autograd.Function):
    """Rounds its results, and says in its backward pass that it does not; so does its gradient by the weight."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t() + 1.0

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 3 * g @ w, g.t() @ x


class Once(torch.autograd.Function):
    """Cannot be run outside of its own context."""

    @staticmethod
    def forward(ctx, x, w):
        assert isinstance(ctx, torch.autograd.function.BackwardCFunction)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        return None, None


kept = Product.apply  # as many networks keep it


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 5))
        self.way = way
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x):
        if self.way == "both":
            return Both.apply(x, self.first, self.second)[0]
        if self.way == "checkpoint":
            h = checkpoint(lambda z: functional.linear(z, self.first).tanh(), x, use_reentrant=True)
        elif self.way == "no_grad":
            with torch.no_grad():
                h = functional.linear(x, self.first).tanh()
                self.seen = h.mean(0)
        elif self.way == "outer":
            h = Outer.apply(x, self.first).mul_(0.5).tanh_()
        elif self.way == "once":
            h = Once.apply(x, self.first).tanh()
        elif self.way == "function":
            h = kept(x, self.first).tanh_()
        else:
            h = functional.linear(x, self.first).tanh()
        return Product.apply(h, self.second) if self.way == "function" else functional.linear(h, self.second)


def made(way, *, trained=True):
    torch.manual_seed(0)
    return Net(way).double().requires_grad_(trained), torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("way", ["function", "both", "outer", "checkpoint", "no_grad"])
def test_gradients_are_those_of_plain_layers(way, trained):
    (network, x, y), (plain, *_) = made(way, trained=trained), made("plain")
    for terms in ("empirical", "exact"):
        found, expected = (
            row_gradients(net, x, y, LAYOUTS, fisher_terms(terms, declared("cross-entropy")), chunk_bytes=2000)
            for net in (network, plain)
        )
        for name in LAYOUTS:
            assert expected[name].squares.min() > 0
            np.testing.assert_allclose(found[name].squares, expected[name].squares, rtol=1e-9)
            np.testing.assert_array_equal(found[name].places, expected[name].places)
    assert not network.seen.requires_grad
    assert "apply" not in vars(torch.autograd.Function.__mro__[1])  # nothing stays behind


def test_what_lies_before_a_function_follows_its_own_backward_pass():
    class Rounded(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.first, self.second, self.factor = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5)), factor

        def forward(self, x):
            h = self.first(x)
            if self.factor is None:
                return Quantised.apply(h, self.second)
            return functional.linear(h.detach() + self.factor * (h - h.detach()), self.second) + 1.0

    torch.manual_seed(0)
    network = Rounded(None).double()
    plain = copy.deepcopy(network)
    plain.factor = 3.0
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    layouts = {"first.weight": Layout((5, 4)), "second": Layout((3, 5))}
    found, expected = (
        row_gradients(net, x, y, layouts, fisher_terms("empirical", declared("cross-entropy")))
        for net in (network, plain)
    )
    for name in layouts:
        np.testing.assert_allclose(found[name].squares, expected[name].squares, rtol=1e-9)


def test_a_function_that_cannot_run_twice_is_named():
    network, x, y = made("once")
    with pytest.raises(UsageError, match=r"'first' .*in the function Once, which cannot"):
        row_gradients(network, x, y, LAYOUTS, fisher_terms("empirical", declared("cross-entropy")))


def test_a_layer_by_a_function_is_pruned_as_a_linear_layer():
    class Layer(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(o, i))

        def forward(self, x):
            return Product.apply(x, self.weight)

    torch.manual_seed(0)
    network = nn.Sequential(Layer(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plain = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    plain.load_state_dict(network.state_dict())
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    options = {"source": "kfac", "fisher": "exact", "sparsity": 0.5}
    first, second = (cbs_opt.export(net, x, y, **options) for net in (network, plain))
    np.testing.assert_allclose(first.curvature.block_scale, second.curvature.block_scale, rtol=1e-5)


def test_fisher_names_what_no_gradient_reaches(caplog):
    network, x, y = made("no_grad")
    cbs_opt.export(network, x, y, names=["first", "second"], source="fisher", sparsity=0.5)
    assert "first: the loss has no gradient there, as under `torch.no_grad`" in caplog.text
    caplog.clear()
    cbs_opt.export(network, x, y, names=["second"], source="fisher", sparsity=0.5)
    assert "no gradient" not in caplog.text
