"""E[g_r²] of every row against gradients taken by hand, one sample at a time; and the instances made of them."""

import numpy as np
import pytest

import cbs_opt
from cbs_opt import InstanceError, UsageError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from cbs_opt.instances.fisher_terms import fisher_terms  # noqa: E402
from cbs_opt.instances.kfac import shrunken  # noqa: E402
from cbs_opt.instances.losses import declared  # noqa: E402
from cbs_opt.instances.output_gradients import row_gradients  # noqa: E402
from cbs_opt.instances.prunable import select  # noqa: E402
from cbs_opt.instances.tensors import Layout  # noqa: E402
from cbs_opt.instances.unfused import UNFUSED  # noqa: E402

M, CLASSES = 6, 3


class Head(nn.Module):
    """A layer, and classes from all of its outputs; what follows the layer works in place."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            self.width = self.features(torch.randn(2, *shape)).flatten(1).shape[1]
        self.classes = nn.Parameter(torch.randn(self.width, CLASSES), requires_grad=False)

    def features(self, x):
        out = self.layer(x)
        out = out[0] if isinstance(out, tuple) else out
        return out.tanh_() if not isinstance(self.layer, nn.RNNBase) else out

    def forward(self, x):
        return torch.einsum("mw,wc->mc", self.features(x).flatten(1), self.classes)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x):
        other = x.flip(1)[..., : self.inner.kdim] if self.inner.kdim != 4 else x
        return self.inner(x, other, other[..., : self.inner.vdim])[0]


class ByHand(nn.Module):
    """x·W, in a matrix that lies the other way around than that of `Linear`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return torch.addmm(torch.ones(5, dtype=x.dtype), x, self.weight)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "tokens": (lambda: nn.Linear(4, 3), (5, 4)),
    "by hand": (ByHand, (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 6, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 3, 3)),
    "attention": (Attention, (5, 4)),
    "attention with others": (lambda: Attention(kdim=3, vdim=2, add_bias_kv=True), (5, 4)),
    "rnn": (lambda: nn.RNN(4, 3, batch_first=True), (5, 4)),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True, proj_size=2), (5, 4)),
    "gru": (lambda: nn.GRU(4, 3, batch_first=True, bias=False), (5, 4)),
}


def made(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    network = Head(make(), shape).double()
    layouts = {t.name: t.layout for t in select(network).tensors if t.name != "classes"}
    if name == "by hand":
        layouts = {"layer.weight": Layout((4, 5), inputs_first=True)}
    return network, torch.randn(M, *shape, dtype=torch.float64), torch.arange(M) % CLASSES, layouts


def by_perturbation(network, x, loss_of_one, layouts):
    """Mean of g_r² over samples and places: every output of every product gets a variable of its own."""
    squares = {name: torch.zeros(layout.rows, dtype=torch.float64) for name, layout in layouts.items()}
    places = dict.fromkeys(layouts, 0)
    for s in range(len(x)):
        for name, layout in layouts.items():
            tapped = []

            def products(W, b, a, tapped=tapped):
                out = functional.linear(a, W, b)
                tapped.append(torch.zeros_like(out).requires_grad_())
                return out + tapped[-1]

            loss = loss_of_one(slow(network, x[s : s + 1], name, products), s)
            for tap, g in zip(tapped, torch.autograd.grad(loss, tapped), strict=True):
                squares[name] += g.reshape(-1, layout.rows).square().sum(0)
                places[name] += tap[..., 0].numel()
    return {name: squares[name] / places[name] for name in layouts}


def slow(network, x, name, products):
    """The network with the products of one weight by a function of (weight, bias, inputs)."""
    layer, part = network.layer, name.split(".")[-1]

    def out(features):
        return features.flatten(1) @ network.classes

    if isinstance(layer, nn.Linear):
        return out(torch.tanh(products(layer.weight, layer.bias, x)))
    if isinstance(layer, ByHand):
        return out(torch.tanh(products(layer.weight.T, torch.ones(5, dtype=x.dtype), x)))
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        patches = functional.unfold(x, 3, padding=1).transpose(1, 2)
        features = products(layer.weight.flatten(1), layer.bias, patches).transpose(1, 2)
        return out(torch.tanh(features))
    if isinstance(layer, nn.RNN | nn.GRU):
        h, states = torch.zeros(1, 3, dtype=x.dtype), []
        linear = {"weight_ih_l0": functional.linear, "weight_hh_l0": functional.linear}
        linear[part] = lambda a, W, b: products(W, b, a)
        bias = [layer.bias_ih_l0, layer.bias_hh_l0] if layer.bias else [None, None]
        for step in x.unbind(1):
            i = linear["weight_ih_l0"](step, layer.weight_ih_l0, bias[0])
            r = linear["weight_hh_l0"](h, layer.weight_hh_l0, bias[1])
            if isinstance(layer, nn.RNN):
                h = torch.tanh(i + r)
            else:
                (ir, iz, new), (hr, hz, old) = i.chunk(3, -1), r.chunk(3, -1)
                z = torch.sigmoid(iz + hz)
                h = (1 - z) * torch.tanh(new + torch.sigmoid(ir + hr) * old) + z * h
            states.append(h)
        return out(torch.stack(states, 1))
    attention = layer.inner
    W, b = attention.in_proj_weight, attention.in_proj_bias
    project, close = functional.linear, functional.linear
    if part == "in_proj_weight":
        project = lambda a, W, b: products(W, b, a)  # noqa: E731
    else:
        close = lambda a, W, b: products(W, b, a)  # noqa: E731
    q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in project(x, W, b).chunk(3, -1))
    shares = torch.softmax(q @ k.transpose(-1, -2) / 2**0.5, -1)
    mixed = (shares @ v).transpose(1, 2).flatten(2)
    return out(torch.tanh(close(mixed, attention.out_proj.weight, attention.out_proj.bias)))


@pytest.mark.parametrize("name", ["linear", "tokens", "by hand", "conv2d", "attention", "rnn", "gru"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_squares_are_those_of_a_loop(name, fisher):
    network, x, y, layouts = made(name)
    found = row_gradients(
        network, x, y, layouts, fisher_terms(fisher, declared("cross-entropy")), chunk_bytes=9_000
    )
    if fisher == "empirical":
        expected = by_perturbation(network, x, lambda out, s: functional.cross_entropy(out, y[s : s + 1]), layouts)
    else:
        expected = dict.fromkeys(layouts, 0.0)
        for c in range(CLASSES):
            label = torch.tensor([c])

            def weighted(out, s, label=label):
                return torch.softmax(out, 1)[0, label].detach().sqrt().sum() * functional.cross_entropy(out, label)

            part = by_perturbation(network, x, weighted, layouts)
            expected = {key: expected[key] + part[key] for key in layouts}
    assert layouts
    for key in layouts:
        assert expected[key].min() > 0
        np.testing.assert_allclose(found[key].squares, expected[key].numpy(), rtol=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_drawn_labels_agree_with_all_classes(name):
    network, x, y, layouts = made(name)
    exact = row_gradients(network, x, None, layouts, fisher_terms("exact", declared("cross-entropy")))
    again = row_gradients(network, x, y, layouts, fisher_terms("exact", declared("cross-entropy")), chunk_bytes=1)
    terms = fisher_terms("sampled", declared("cross-entropy"), seed=1)
    copies = 300
    sampled = row_gradients(network, x.repeat(copies, *[1] * (x.dim() - 1)), None, layouts, terms)
    assert set(exact) == set(layouts)
    for key in layouts:
        assert exact[key].squares.min() > 0
        np.testing.assert_allclose(again[key].squares, exact[key].squares, rtol=1e-9)
        np.testing.assert_allclose(sampled[key].squares, exact[key].squares, rtol=0.25)
        assert abs(sampled[key].squares.sum() / exact[key].squares.sum() - 1) < 0.1


@pytest.mark.parametrize("name", ["attention", "attention with others", "rnn", "lstm", "gru"])
@pytest.mark.parametrize("packed", [False, True])
def test_calls_written_out_give_what_torch_gives(name, packed):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(M, *shape, dtype=torch.float64)
    if packed:
        if not isinstance(layer, nn.RNNBase):
            pytest.skip("sequences are packed for recurrent networks")
        lengths = torch.tensor([2, 5, 1, 4, 3, 5])
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)

    class WrittenOut(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if (unfused := UNFUSED.get(func.__name__)) is None:
                return func(*args, **(kwargs or {}))
            WrittenOut.calls += 1
            return unfused(*args, **(kwargs or {}))

    expected = layer(x)
    with WrittenOut():
        found = layer(x)
    assert WrittenOut.calls == 1
    torch.testing.assert_close(found, expected)


def test_cells_and_embeddings():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.cell, self.gate = nn.GRUCell(3, 3), nn.LSTMCell(3, 3)
            self.out.weight = self.table.weight

        def forward(self, tokens):
            h, state = None, None
            for step in self.table(tokens).unbind(1):
                h = self.cell(step, h)
                state = self.gate(h, state)
            return self.out(state[0])

    torch.manual_seed(0)
    network, tokens, y = Words().double(), torch.randint(4, (8, 3)), torch.arange(8) % 5
    layouts = {name: Layout(tuple(p.shape)) for name, p in network.named_parameters() if p.dim() == 2}
    found = row_gradients(network, tokens, y, layouts, fisher_terms("empirical", declared("cross-entropy")))
    assert set(found) == {"table.weight", *(f"{c}.weight_{k}h" for c in ("cell", "gate") for k in "ih")}
    table = found["table.weight"]
    shares = torch.softmax(network(tokens), 1)
    g = shares - functional.one_hot(y, 5)
    np.testing.assert_allclose(table.squares, g.square().mean(0).detach().numpy(), rtol=1e-9)
    expected = np.zeros(5)
    for s in range(8):
        read = network.table(tokens[s : s + 1]).detach().requires_grad_()
        h, state = None, None
        for step in read.unbind(1):
            h = network.cell(step, h)
            state = network.gate(h, state)
        loss = functional.cross_entropy(network.out(state[0]), y[s : s + 1])
        (gradient,) = torch.autograd.grad(loss, read)
        np.add.at(expected, tokens[s].numpy(), gradient[0].square().mean(1).numpy() / 8)
    np.testing.assert_allclose(table.shifts, expected, rtol=1e-9)
    assert expected[4] == 0 < expected[:4].min()


def test_targets_drawn_for_other_losses_give_the_gauss_newton_matrix():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3)).double()
    x, layouts = torch.randn(3000, 4, dtype=torch.float64), {"0.weight": Layout((3, 4))}
    squares = row_gradients(network, x, None, layouts, fisher_terms("sampled", declared("mse")))[
        "0.weight"
    ].squares
    np.testing.assert_allclose(squares, [2 / 3] * 3, rtol=0.1)  # (1/3) Σ (ŷ − y)² has the second derivative 2/3
    p = torch.sigmoid(network(x)).detach()
    squares = row_gradients(network, x, None, layouts, fisher_terms("sampled", declared("bce")))[
        "0.weight"
    ].squares
    np.testing.assert_allclose(squares, (p * (1 - p)).mean(0).numpy() / 3, rtol=0.1)
    for loss, fisher in (("mse", "exact"), ("l1", "sampled"), (lambda a, b: a.sum(), "sampled")):
        with pytest.raises(UsageError, match=r"classes of a classifier|no distribution"):
            fisher_terms(fisher, declared(loss))
    tokens = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)))
    with pytest.raises(UsageError, match="one class a sample"):
        row_gradients(
            tokens.double(),
            x[:9],
            torch.zeros(9, 1).long(),
            layouts,
            fisher_terms("exact", declared("cross-entropy")),
        )


def test_rows_are_factor_times_covariance(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].bias[1] = -1000.0  # a row that is never active
    x, y = torch.randn(40, 6), torch.arange(40) % 3
    options = {"source": "kfac", "fisher": "exact", "sparsity": 0.5, "device": "cpu"}
    here = cbs_opt.export(model, x, y, **options)
    there = cbs_opt.export(model, x, y, path=tmp_path / "i.npz", **options)
    cbs_opt.write_instance(tmp_path / "again.npz", here)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "i.npz").read_bytes()
    assert there.curvature.number_of_stored == 2 and here.metadata["fisher"] == "exact"
    np.testing.assert_array_equal(
        cbs_opt.export(model, x, **options).curvature.block_scale, here.curvature.block_scale
    )
    X = x.double().numpy()
    S = X.T @ X / 40
    S += 0.01 * S.diagonal().mean() * np.eye(6)
    np.testing.assert_allclose(here.curvature.stored.block(0), S, rtol=1e-6, atol=1e-8)
    scale = here.curvature.block_scale
    p = torch.softmax(model(x).double(), 1).detach()
    q = (p * (1 - p)).numpy()
    variances = q.var(0) / 39
    expected = (1 - (share := variances.mean() / q.mean(0).var(ddof=1))) * q.mean(0) + share * q.mean()
    assert 0 < share < 1
    np.testing.assert_allclose(scale[5:], expected, rtol=1e-5)
    assert scale[1] == pytest.approx(1e-12 * scale.max()) and scale[0] > 1e-6 * scale.max()
    fixed = cbs_opt.export(model, x, y, damping=0.5, **options)
    assert fixed.curvature.stored.block(0)[0, 0] == pytest.approx(X[:, 0] @ X[:, 0] / 40 + 0.5, rel=1e-6)
    assert fixed.metadata["damping"] == 0.5
    drawn = [
        cbs_opt.export(model, x, y, seed=s, **options | {"fisher": "sampled"}).curvature.block_scale
        for s in (0, 0, 1)
    ]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def test_means_of_few_samples_are_drawn_together():
    """The estimate is nearer to the expectations than the means are, and the means where they say enough."""
    rng = np.random.default_rng(0)
    truth = rng.gamma(4.0, 0.25, 200)
    errors = {}
    for m in (3, 10_000):
        draws = truth[:, None] * rng.exponential(size=(200, m))
        means, variances = draws.mean(1), draws.var(1) / m
        found = shrunken(means, variances)
        errors[m] = ((found - truth) ** 2).mean() / ((means - truth) ** 2).mean()
        assert found.mean() == pytest.approx(means.mean())
    assert errors[3] < 0.8 and errors[10_000] == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(shrunken(np.array([1.0, 3.0]), np.full(2, np.inf)), [2, 2])  # one place only
    np.testing.assert_array_equal(shrunken(np.array([0.0, 2.0, 0.0]), np.ones(3)), [0, 2, 0])
    np.testing.assert_allclose(
        shrunken(np.array([1.0, 0.0, 3.0]), np.full(3, 9.0)), [2, 0, 2]
    )  # nothing but error


def test_a_class_without_a_sample_is_not_worth_nothing():
    """Of 30 classes 20 samples show a part; the rows of the others are pruned as others are."""
    torch.manual_seed(0)
    model = nn.Linear(8, 30)
    with torch.no_grad():
        model.weight.mul_(8.0)
    x = torch.randn(20, 8)
    scale = cbs_opt.export(model, x, source="kfac", fisher="sampled", sparsity=0.5).curvature.block_scale
    assert scale.min() > 0.1 * scale.mean()


@pytest.mark.parametrize("T", [0.5, 4.0])
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
@pytest.mark.parametrize("loss", ["cross-entropy", "nll"])
def test_at_a_temperature_the_factors_are_second_derivatives_of_the_divergence(T, fisher, loss):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(50, 4, dtype=torch.float64)
    z = model(x).detach()

    def divergence(scores):
        p = torch.softmax(z / T, 1)
        return T * T * (p * (torch.log(p) - torch.log_softmax(scores / T, 1))).sum()

    H = torch.autograd.functional.hessian(divergence, z)
    expected = torch.stack([H[i, :, i].diagonal() for i in range(50)]).mean(0)
    copies = 1 if fisher == "exact" else 400
    terms = fisher_terms(fisher, declared(loss), temperature=T)
    network = model if loss == "cross-entropy" else nn.Sequential(model, nn.LogSoftmax(1))
    layouts = {("weight" if network is model else "0.weight"): Layout((3, 4))}
    (found,) = row_gradients(network, x.repeat(copies, 1), None, layouts, terms).values()
    np.testing.assert_allclose(found.squares, expected.numpy(), rtol=1e-9 if fisher == "exact" else 0.05)


def test_temperatures_that_make_no_sense():
    model, x = nn.Linear(4, 3), torch.randn(9, 4)
    for wrong in (0, -1, 1e300, float("nan"), "4"):
        with pytest.raises(UsageError, match=r"`temperature` must be a number from 0.001 to 1000, got"):
            cbs_opt.export(model, x, source="kfac", fisher="sampled", temperature=wrong)
    with pytest.raises(UsageError, match=r"`temperature` is of the class probabilities.* got kfac and empirical"):
        cbs_opt.export(model, x, source="kfac", temperature=2.0)
    with pytest.raises(UsageError, match=r"`temperature` is of the class probabilities.* got reconstruction"):
        cbs_opt.export(model, x, source="reconstruction", temperature=2.0)
    with pytest.raises(UsageError, match=r"`temperature` is of class probabilities.* got sampled and mse"):
        cbs_opt.export(model, x, torch.randn(9, 3), source="kfac", fisher="sampled", loss="mse", temperature=2.0)
    with pytest.raises(UsageError, match=r"takes a pass for each of the 120 classes, at most 100: take `sampled`"):
        cbs_opt.export(nn.Linear(4, 120), x, source="kfac", fisher="exact", temperature=2.0)
    made = cbs_opt.export(model, x, source="kfac", fisher="exact", temperature=2, sparsity=0.5)
    assert made.metadata["temperature"] == 2 and made.metadata["hessian"].endswith("at temperature 2")


def test_options_that_make_no_sense():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(10, 4)
    with pytest.raises(InstanceError, match=r"no labels.*`--fisher sampled` or `exact`"):
        cbs_opt.export(model, x, source="kfac")
    with pytest.raises(UsageError, match="`fisher` chooses the labels of `source` kfac, got reconstruction"):
        cbs_opt.export(model, x, source="reconstruction", fisher="exact")
    with pytest.raises(UsageError, match="kfac has a block for each output row"):
        cbs_opt.export(model, x, source="kfac", fisher="exact", blocks="layer")


@pytest.mark.parametrize("first", ["x W", "x Wt"])
def test_a_matrix_used_from_both_sides_counts_what_an_untied_copy_says(first):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6) / 2)
            self.scale = nn.Parameter(torch.randn(5, 6 if first == "x Wt" else 4))

        def forward(self, x, back=None):
            back = self.w if back is None else back
            v, u = (self.w, back) if first == "x Wt" else (self.w.t(), back.t())
            return functional.linear(torch.tanh(functional.linear(x @ self.scale, v)), u.t())

    torch.manual_seed(0)
    network = Tied().double()
    x = torch.randn(9, 5, dtype=torch.float64)
    y = torch.randn(9, 6 if first == "x Wt" else 4, dtype=torch.float64)
    found = row_gradients(network, x, y, {"w": Layout((4, 6))}, fisher_terms("empirical", declared("mse")))["w"]
    squares, shifts = np.zeros(4), np.zeros(4)
    for s in range(9):
        back = network.w.detach().clone().requires_grad_()
        loss = functional.mse_loss(network(x[s : s + 1], back), y[s : s + 1])
        own, other = (g.numpy() for g in torch.autograd.grad(loss, [network.w, back]))
        # The row's own product is of one place, g xᵀ: ‖g_r x‖² = g_r² ‖x‖²; that from the other side is h_r g_j.
        side = own if first == "x Wt" else other
        across = other if first == "x Wt" else own
        a = (x[s] @ network.scale).detach()
        if first == "x Wt":
            squares += (side**2).sum(1) / float(a @ a) / 9
        else:
            h = torch.tanh(functional.linear(a, network.w.t())).detach()
            squares += (side**2).sum(1) / float(h @ h) / 9
        shifts += (across**2).mean(1) / 9
    np.testing.assert_allclose(found.squares, squares, rtol=1e-9)
    np.testing.assert_allclose(found.shifts, shifts, rtol=1e-9)
    assert shifts.min() > 0
