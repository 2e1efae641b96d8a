"""Rows of the gradient matrix, by every route, against a loop of automatic differentiation."""

import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from cbs_opt import InstanceError  # noqa: E402
from cbs_opt.instances.gradients import gradient_rows  # noqa: E402


class Residual(nn.Module):
    """Batch norm, layers that work in place, a sum with what came before, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu_(self.norm(self.first(x)))
        y = self.again(torch.relu_(self.again(x)))
        y += x
        return self.last(y.mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class Direct(nn.Module):
    """Uses its layer's weight beside the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return functional.linear(torch.tanh(self.layer(x)), self.layer.weight)


class Branching(nn.Module):
    """Takes a branch that depends on the data, which torch.func cannot follow, and uses weights beside layers."""

    def __init__(self):
        super().__init__()
        self.layer = Direct()

    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else self.layer(-2 * x)


class Mixing(nn.Module):
    """Subtracts the mean of the batch: its rows in a batch are not those of single samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        y = self.layer(x)
        return y - 0.5 * y.mean(0) * (len(y) > 1)


def convolutions(**options):
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, **options), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


TOKENS = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.AdaptiveAvgPool1d(3), nn.Flatten())

NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)), (5,), "layers"),
    "tokens": (lambda: TOKENS, (7, 5), "layers"),
    "stride, padding": (lambda: convolutions(stride=2, padding=(1, 2)), (4, 8, 7), "layers"),
    "dilation, groups": (lambda: convolutions(dilation=2, groups=2, bias=False), (4, 8, 7), "layers"),
    "same, circular": (lambda: convolutions(padding="same", padding_mode="circular"), (4, 8, 7), "layers"),
    "same, even kernel": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, (2, 4), padding="same"), nn.Flatten(), nn.Tanh()),
        (4, 3, 3),
        "layers",
    ),
    "depthwise, pointwise": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=4, padding="valid"), nn.ReLU6(), nn.Conv2d(8, 5, 1, stride=2), nn.Flatten()
        ),
        (4, 5, 5),
        "layers",
    ),
    "batch norm, in place, twice": (Residual, (2, 5, 5), "layers"),
    "norms": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), (5,), "torch.func"),
    "tied": (Tied, (5,), "torch.func"),
    "weight used directly": (Direct, (5,), "torch.func"),
    "mixing": (Mixing, (5,), "torch.func"),
    "branching": (Branching, (5,), "automatic differentiation of one sample at a time"),
}


def make(name, m=9):
    network, shape, route = NETWORKS[name]
    torch.manual_seed(0)
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(m, *shape)
    model.eval()
    y = torch.randint(model(x).shape[1], (m,))
    names = [name for name, _ in model.named_parameters() if "norm" not in name]
    return model, x, y, names, route


def by_loop(model, x, y, names, loss=functional.cross_entropy):
    parameters = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for s in range(len(x)):
        gradients = torch.autograd.grad(loss(model(x[s : s + 1]), y[s : s + 1]), parameters)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows).numpy()


def rows_of(*arguments, **options):
    return torch.cat(list(gradient_rows(*arguments, **options))).numpy()


def assert_same(found, expected):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected, axis=1).max() <= 1e-6 * np.linalg.norm(expected, axis=1).max()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:Using padding")
def test_rows_equal_a_loop_of_autograd_by_the_expected_route(name, caplog, monkeypatch):
    monkeypatch.setattr("cbs_opt.instances.gradients._seconds", lambda route, x, y: len(x) * 1.0)
    model, x, y, names, route = make(name)
    expected = by_loop(model, x, y, names)
    with caplog.at_level(logging.DEBUG, "cbs_opt"):
        assert_same(rows_of(model, x, y, names), expected)
    assert f"gradients: by {route}" in caplog.messages


@pytest.mark.parametrize("name", ["mlp", "batch norm, in place, twice", "tied"])
@pytest.mark.parametrize("chunk_bytes", [1, 1_500])
def test_the_size_of_pieces_changes_nothing(name, chunk_bytes):
    model, x, y, names, _ = make(name)
    pieces = list(gradient_rows(model, x, y, names, chunk_bytes=chunk_bytes))
    assert len(pieces) > 1
    assert_same(torch.cat(pieces).numpy(), rows_of(model, x, y, names))


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("batch", [2, 4])
def test_a_row_of_a_batch_is_the_mean_of_its_samples(batch, chunk_bytes):
    model, x, y, names, _ = make("batch norm, in place, twice")
    single = by_loop(model, x, y, names)
    used = len(x) // batch * batch
    expected = single[:used].reshape(-1, batch, single.shape[1]).mean(1)
    assert_same(rows_of(model, x, y, names, batch=batch, chunk_bytes=chunk_bytes), expected)


def test_tensors_in_another_order_and_another_loss():
    model, x, y, names, _ = make("mlp")

    def loss(outputs, targets):
        return ((outputs - targets.unsqueeze(1)) ** 2).mean()

    assert_same(rows_of(model, x, y, names[::-1], loss=loss), by_loop(model, x, y, names[::-1], loss))


def test_the_model_is_left_as_it_was():
    model, x, y, names, _ = make("batch norm, in place, twice")
    model.train()
    model.norm.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as for a network that is only to be used
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = rows_of(model, x, y, names)
    assert np.abs(rows).max() > 0
    assert model.training and not model.norm.training and model.last.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_gradient_that_is_not_finite_names_its_sample():
    model, x, y, names, _ = make("mlp", m=40)
    x[37, 2] = torch.nan
    with pytest.raises(InstanceError, match=r"the gradient of sample 37 has NaN"):
        rows_of(model, x, y, names)


def test_an_unknown_parameter_is_refused():
    model, x, y, _, _ = make("mlp")
    with pytest.raises(KeyError):
        rows_of(model, x, y, ["nothing.weight"])


@pytest.mark.parametrize(
    ("slow", "route"), [(True, "automatic differentiation of one sample"), (False, "torch.func")]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_trial_chooses_the_route_of_a_recurrent_network(slow, route, caplog, monkeypatch):
    """The clock is replaced: one route takes twice the time of the other, a sample."""
    seconds = iter([2.0, 1.0] if slow else [1.0, 2.0])
    monkeypatch.setattr("cbs_opt.instances.gradients._seconds", lambda route, x, y: len(x) * next(seconds))

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model, x, y = Last(), torch.randn(9, 5, 3), torch.arange(9) % 2
    names = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"]
    with caplog.at_level(logging.DEBUG, "cbs_opt"):
        assert_same(rows_of(model, x, y, names), by_loop(model, x, y, names))
    assert f"gradients: by {route}" in caplog.text


def test_short_memory_of_a_card_makes_smaller_pieces(caplog):
    from cbs_opt.instances.batches import by_memory

    caplog.set_level(logging.INFO, "cbs_opt")
    model, x, y, most = nn.Linear(2, 2), torch.arange(22.0).reshape(11, 2), torch.arange(11), 3

    def route(inputs, targets):
        if len(inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs + targets[:, None]

    assert by_memory(route, model, x, y, slice(1, 11), True).tolist() == (x + y[:, None])[1:].tolist()
    assert "gradients of 5 samples at a time, not 10" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        by_memory(route, model, x, y, slice(1, 11), False)
    most = 0
    with pytest.raises(InstanceError, match="too short for the gradients of one sample"):
        by_memory(route, model, x, y, slice(0, 3), True)
