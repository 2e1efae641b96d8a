"""Masks for training on: they hold everywhere, come off cleanly, and travel in files."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt.errors import InstanceError, UsageError  # noqa: E402
from cbs_opt.instances.apply import prune_masks  # noqa: E402
from cbs_opt.instances.export import export  # noqa: E402
from cbs_opt.instances.masks import LayerMask, add_masks, read_masks, squash, write_masks  # noqa: E402
from cbs_opt.instances.plain import effective_tensors  # noqa: E402


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean(1))


def train(model, x, y, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [Attention, Recurrent, Tied])
def test_masks_hold_while_a_network_is_trained_on(kind):
    torch.manual_seed(0)
    model, x, y = kind(), torch.randn(20, 5, 8), torch.arange(20) % 4
    instance = export(model, x, y, sparsity=0.6, source="reconstruction")
    model.train()
    masks = prune_masks(model, instance, cbs_opt.solve(instance, "magnitude"))
    twin = copy.deepcopy(model)
    before = effective_tensors(model)
    for network in (model, twin):
        train(network, x, y)
        after = effective_tensors(network)
        for mask in masks:
            pruned = torch.from_numpy(mask.pruned)
            assert not after[mask.name][pruned].any()
            assert not torch.equal(after[mask.name], before[mask.name])
    with torch.no_grad():
        outputs, loose = model.eval()(x), twin.eval()(x)
        torch.testing.assert_close(outputs, loose)
        squash(model)
        torch.testing.assert_close(model(x), outputs)
        torch.testing.assert_close(twin(x), loose)  # a copy keeps its own masks
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    parameters = dict(model.named_parameters())
    assert all(not parameters[mask.name][torch.from_numpy(mask.pruned)].any() for mask in masks)
    if kind is Tied:
        assert model.a.weight is model.b.weight
    model.load_state_dict({name: tensor.clone() for name, tensor in kind().state_dict().items()})


def test_only_masks_are_baked_in():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 3), nn.Linear(3, 2))
    add_masks(model, [LayerMask("1.weight", np.eye(3, dtype=bool))])
    prune.random_unstructured(model[2], "weight", 0.5)
    zeros = model[2].weight == 0
    squash(model)
    assert "0.parametrizations.weight.original0" in model.state_dict()
    assert not model[1].weight.diagonal().any() and torch.equal(model[2].weight == 0, zeros)
    assert type(model[1]) is type(model[2]) is nn.Linear


def test_hooks_on_request_only_where_they_hold():
    model = nn.Sequential(nn.Linear(4, 3))
    mask = LayerMask("0.weight", np.arange(12).reshape(3, 4) % 2 == 0)
    add_masks(model, [mask], hooks=True)
    assert "0.weight_mask" in model.state_dict()
    for network, name, aliases, words in (
        (Attention(), "attention.out_proj.weight", (), "attention reads it past its hooks"),
        (Tied(), "a.weight", ("b.weight",), "several layers share it"),
    ):
        with pytest.raises(UsageError, match=words):
            add_masks(network, [LayerMask(name, np.ones((8, 8), bool), aliases)], hooks=True)
    with pytest.raises(InstanceError, match=r"no tensor 7\.weight"):
        add_masks(model, [LayerMask("7.weight", np.ones((3, 4), bool))])
    with pytest.raises(InstanceError, match=r"has shape \(3, 4\), its mask \(4, 3\)"):
        add_masks(nn.Sequential(nn.Linear(4, 3)), [LayerMask("0.weight", np.ones((4, 3), bool))])


def test_masks_travel_alone(tmp_path):
    masks = [
        LayerMask("a.weight", np.arange(12).reshape(3, 4) % 5 == 0, ("b.weight",)),
        LayerMask("c", np.ones(3, bool)),
    ]
    write_masks(tmp_path / "masks.safetensors", masks)
    found = {mask.name: mask.pruned for mask in read_masks(tmp_path / "masks.safetensors")}
    assert set(found) == {"a.weight", "b.weight", "c"}
    np.testing.assert_array_equal(found["b.weight"], masks[0].pruned)
    assert found["c"].all()
    from safetensors.torch import load_file, save_file

    raw = load_file(tmp_path / "masks.safetensors")
    assert raw["a.weight"].dtype == torch.bool and bool(raw["a.weight"][0, 1]) and not bool(raw["a.weight"][0, 0])
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("nothing", encoding="utf-8")
    for name, words in (
        ("weights.safetensors", "holds no masks"),
        ("text", "no masks"),
        ("absent", "no such file"),
    ):
        with pytest.raises(InstanceError, match=words):
            read_masks(tmp_path / name)
