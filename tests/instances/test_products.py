"""The reconstruction Hessian of every kind of layer: half the squared error of its output."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

from cbs_opt.errors import UsageError  # noqa: E402
from cbs_opt.instances.export import export  # noqa: E402
from cbs_opt.instances.prunable import select  # noqa: E402
from cbs_opt.instances.reconstruction import followed, input_covariances  # noqa: E402
from cbs_opt.instances.row_blocks import row_blocks  # noqa: E402


class HalfConv(nn.Module):
    """x·W + b, stored (inputs, outputs), as `Conv1D` of transformers does."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], -1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(4, 3, 5)

    def forward(self, x):
        return self.layer(x, x[..., :3].sin())


class Functional(nn.Module):
    """A weight used outside its layer: as a product, as kernels of one place, in two slices."""

    def __init__(self):
        super().__init__()
        self.kernels, self.both = nn.Conv1d(4, 3, 1), nn.Linear(4, 6)

    def forward(self, x):
        low, high = self.both.weight[:2], self.both.weight[2:]
        return torch.cat([x @ low.T, 2 * x @ high.t(), functional.linear(x, self.kernels.weight[..., 0])], -1)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer, self.kdim = nn.MultiheadAttention(4, 2, batch_first=True, **options), options.get("kdim", 4)

    def forward(self, x):
        keys = x[..., : self.kdim].flip(1) if self.kdim != 4 else x
        return self.layer(x, keys, keys.cos())[0]


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "tokens": (lambda: nn.Linear(4, 3, bias=False), (6, 4)),
    "Conv1D": (lambda: HalfConv(3, 4), (6, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 6, 5)),
    "same": (lambda: nn.Conv2d(4, 4, (2, 3), padding="same", dilation=(1, 2), groups=4), (4, 6, 5)),
    "reflect": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 1, 0), groups=2), (2, 4, 5, 3)),
    "transposed 1": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5)),
    "transposed 2": (lambda: nn.ConvTranspose2d(4, 3, (3, 2), stride=(1, 3), dilation=(2, 1)), (4, 3, 4)),
    "transposed 3": (lambda: nn.ConvTranspose3d(2, 4, 2, padding=1, groups=2), (2, 3, 3, 4)),
    "bilinear": (TwoInputs, (6, 4)),
    "functional": (Functional, (6, 4)),
    "attention's output": (Attention, (6, 4)),
}


def hessian_loss(covariances, deltas):
    """½ δᵀHδ over all rows of all tensors."""
    total = 0.0
    for layer in covariances:
        flat = layer.layout.to_rows(deltas[layer.name].reshape(-1).numpy())
        rows = flat.reshape(layer.layout.rows, -1)
        made = row_blocks([layer], [0.0])
        assert len(made.shared) == len(rows)
        stored = list(made.matrices(inverse=False))
        total += sum(row @ stored[s] @ row for row, s in zip(rows, made.shared, strict=True)) / 2
    return float(total)


@pytest.mark.parametrize("name", LAYERS)
def test_the_loss_is_half_the_squared_error_of_the_output(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    network = nn.Sequential(make()).double()
    x = torch.randn(7, *shape, dtype=torch.float64)
    names = select(network).names if "attention" not in name else ["0.layer.out_proj.weight"]
    covariances = input_covariances(network, x, names, chunk_bytes=5_000)
    parameters = dict(network.named_parameters())
    deltas = {tensor: torch.randn_like(parameters[tensor]) for tensor in names}
    with torch.no_grad():
        before = network(x)
        for tensor, delta in deltas.items():
            parameters[tensor] += delta
        error = ((network(x) - before) ** 2).sum() / len(x) / 2
    assert hessian_loss(covariances, deltas) == pytest.approx(float(error))


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 3}, {"add_bias_kv": True, "bias": False}])
def test_the_projections_of_attention_have_their_own_inputs(options):
    torch.manual_seed(0)
    network = Attention(**options).double()
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    keys = x[..., : network.kdim].flip(1) if network.kdim != 4 else x
    expected = [a.flatten(0, 1) for a in (x, keys, keys.cos())]
    found = input_covariances(network, x, [name for name in select(network).names if "out" not in name])
    ranges = [rows for layer in found for rows in layer.ranges]
    assert [rows.last - rows.first for rows in ranges] == [4, 4, 4]
    for rows, X in zip(ranges, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(rows.covariance), X.T @ X / 5)


class Recurrent(nn.Module):
    def __init__(self, kind, packed=False, **options):
        super().__init__()
        self.layer, self.packed = getattr(nn, kind)(4, 3, batch_first=True, **options), packed

    def forward(self, x):
        if not self.packed:
            return self.layer(x)[0]
        lengths = torch.arange(len(x)) % x.shape[1] + 1
        sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.layer(sequence)[0], batch_first=True)[0]


def steps_by_hand(layer, x, lengths):
    """Inputs of every matrix by name, and the outputs, one sequence and one step at a time."""
    seen = {name: [] for name, _ in layer.named_parameters() if name.startswith("weight")}
    sequences = [row[:length] for row, length in zip(x, lengths, strict=True)]
    width = layer.proj_size or layer.hidden_size
    for depth in range(layer.num_layers):
        directions = []
        for ending in (f"_l{depth}", f"_l{depth}_reverse")[: 1 + layer.bidirectional]:
            W = {key: getattr(layer, f"weight_{key}{ending}", None) for key in ("ih", "hh", "hr")}
            b = {key: getattr(layer, f"bias_{key}{ending}") for key in ("ih", "hh")}
            outputs = []
            for sequence in sequences:
                h, c, states = x.new_zeros(width), x.new_zeros(layer.hidden_size), []
                for step in sequence if not ending.endswith("reverse") else sequence.flip(0):
                    seen[f"weight_ih{ending}"].append(step)
                    seen[f"weight_hh{ending}"].append(h)
                    i, r = W["ih"] @ step + b["ih"], W["hh"] @ h + b["hh"]
                    if layer.mode == "GRU":
                        (ir, iz, inew), (hr, hz, hnew) = i.chunk(3), r.chunk(3)
                        z = torch.sigmoid(iz + hz)
                        h = (1 - z) * torch.tanh(inew + torch.sigmoid(ir + hr) * hnew) + z * h
                    elif layer.mode == "LSTM":
                        gi, gf, gg, go = (i + r).chunk(4)
                        c = torch.sigmoid(gf) * c + torch.sigmoid(gi) * torch.tanh(gg)
                        h = torch.sigmoid(go) * torch.tanh(c)
                        if W["hr"] is not None:
                            seen[f"weight_hr{ending}"].append(h)
                            h = W["hr"] @ h
                    else:
                        h = torch.tanh(i + r)
                    states.append(h)
                outputs.append(torch.stack(states if not ending.endswith("reverse") else states[::-1]))
            directions.append(outputs)
        sequences = [torch.cat(parts, -1) for parts in zip(*directions, strict=True)]
    return {name: torch.stack(steps) for name, steps in seen.items()}, sequences


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RNN", {}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
        ("LSTM", {"num_layers": 2, "bidirectional": True, "packed": True}),
        ("LSTM", {"proj_size": 2, "num_layers": 2, "packed": True}),
    ],
)
def test_the_matrices_of_recurrent_networks_are_seen_at_every_step(kind, options):
    torch.manual_seed(0)
    network = Recurrent(kind, **options).double()
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    lengths = [5] * 6 if not network.packed else [1, 2, 3, 4, 5, 1]
    with torch.no_grad():
        expected, outputs = steps_by_hand(network.layer, x, lengths)
        torch.testing.assert_close(network(x)[3, : lengths[3]], outputs[3])
    found = input_covariances(network, x, list(select(network).names))
    assert {layer.name.removeprefix("layer.") for layer in found} == set(expected)
    for layer in found:
        X = expected[layer.name.removeprefix("layer.")]
        torch.testing.assert_close(torch.from_numpy(layer.ranges[0].covariance), X.T @ X / 6)


def test_cells_are_seen_at_every_call():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.lstm = nn.GRUCell(4, 3), nn.LSTMCell(3, 2)

        def forward(self, x):
            h, state, self.seen = None, None, []
            for step in x.unbind(1):
                self.seen.append(torch.zeros(len(x), 3) if h is None else h)
                h = self.gru(step, h)
                state = self.lstm(h, state)
            return state[0]

    torch.manual_seed(0)
    network, x = Cells(), torch.randn(5, 3, 4)
    found = {
        layer.name: layer.ranges[0].covariance for layer in input_covariances(network, x, select(network).names)
    }
    with torch.no_grad():
        network(x)
    H = torch.cat(network.seen).double()
    torch.testing.assert_close(torch.from_numpy(found["gru.weight_hh"]), H.T @ H / 5, atol=1e-6, rtol=1e-5)
    assert set(found) == {"gru.weight_ih", "gru.weight_hh", "lstm.weight_ih", "lstm.weight_hh"}


class Tied(nn.Module):
    """A tensor that is an embedding, a layer, and a layer's transpose."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        scores = self.out(torch.tanh(self.table(tokens)))
        return functional.linear(scores, self.out.weight.T)


def test_all_uses_of_a_tied_tensor_count():
    torch.manual_seed(0)
    network, tokens = Tied().double(), torch.randint(6, (9, 3))
    (layer,) = input_covariances(network, tokens, ["table.weight"])
    with torch.no_grad():
        X = torch.tanh(network.table(tokens)).flatten(0, 1)
        scores = network.out(X)
    torch.testing.assert_close(torch.from_numpy(layer.ranges[0].covariance), X.T @ X / 9)
    shifts = torch.bincount(tokens.flatten(), minlength=6) / 9 + scores.square().sum(0) / 9
    torch.testing.assert_close(torch.from_numpy(layer.ranges[0].shifts), shifts)
    total = (X.square().sum() / 9 / 4 + shifts.mean()).item()
    assert layer.mean_diagonal == pytest.approx(total)


def test_what_cannot_be_followed_is_left_out_with_a_reason(caplog):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.unused = nn.Linear(4, 3), nn.Linear(3, 3)
            self.normed, self.experts = nn.Linear(4, 3), nn.Parameter(torch.randn(2, 4, 3))

        def forward(self, x):
            scaled = self.normed.weight / self.normed.weight.norm()
            return self.good(x) + functional.linear(x, scaled) + torch.einsum("bi,eio->bo", x, self.experts)

    torch.manual_seed(0)
    network, x = Mixed(), torch.randn(12, 4)
    layouts = {t.name: t.layout for t in select(network).tensors}
    names, reasons = followed(network, lambda model: [model(x)], layouts)
    assert names == ["good.weight"]
    assert "does not use it" in reasons["unused.weight"] and "torch's" in reasons["normed.weight"]
    with caplog.at_level("WARNING", "cbs_opt"):
        instance = export(network, x, torch.arange(12) % 3, source="reconstruction")
    assert [tensor["name"] for tensor in instance.metadata["tensors"]] == ["good.weight"]
    assert "unused.weight is left out" in caplog.text and "normed.weight is left out" in caplog.text


def test_a_product_written_by_hand_tells_where_its_inputs_run():
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return functional.linear(torch.relu(x @ self.first), self.second)

    torch.manual_seed(0)
    network, x = ByHand(), torch.randn(12, 4)
    for source in ("fisher", "reconstruction"):
        instance = export(network, x, torch.arange(12) % 3, ["first", "second"], source=source, blocks="row")
        assert instance.curvature.block_sizes.tolist() == [4] * 5 + [5] * 3
        assert instance.metadata["tensors"][0]["inputs_first"]
        assert instance.weights[:4].tolist() == network.first[:, 0].tolist()


@pytest.mark.parametrize("source", ["kfac", "reconstruction"])
def test_a_layer_inside_vmap_is_left_out_with_the_reason(source, caplog):
    class Mapped(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.a, self.b, self.inside = nn.Linear(4, 5), nn.Linear(5, 3), inside

        def forward(self, x):
            h = torch.vmap(lambda row: self.a(row).tanh())(x)
            return torch.vmap(self.b)(h) if self.inside else self.b(h)

    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    with caplog.at_level("WARNING", "cbs_opt"):
        instance = export(Mapped(False), x, y, source=source)
    assert [tensor["name"] for tensor in instance.metadata["tensors"]] == ["b.weight"]
    assert "a.weight is left out" in caplog.text and "inside torch.vmap" in caplog.text
    with pytest.raises(UsageError, match=r"inside torch.vmap.*`--source fisher` needs none"):
        export(Mapped(True), x, y, source=source)
    assert export(Mapped(True), x, y, source="fisher").n == 35
