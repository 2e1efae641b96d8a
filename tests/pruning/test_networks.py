"""Networks and data of every kind go through `cbs_opt.prune`, in one shot and in stages."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import cbs_opt  # noqa: E402


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)

    def forward(self, input_ids):
        return self.head(self.layer(self.embed(input_ids)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def classes(count, features=6):
    return torch.randn(count, features), torch.randint(3, (count,))


def tokens():
    x = torch.randint(20, (60, 6))
    return {"input_ids": x, "labels": x}


def tied():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))


NETWORKS = {
    "tokens": (Language, tokens, {"loss": "next-token"}),
    "weight norm, a loader": (weight_norm, lambda: DataLoader(TensorDataset(*classes(60)), batch_size=7), {}),
    "half precision": (lambda: nn.Linear(6, 3).to(torch.bfloat16), lambda: classes(60), {}),
    "sequences of several lengths": (
        Recurrent,
        lambda: [(torch.randn(12, t, 5), torch.randint(2, (12,))) for t in (3, 5, 3, 7)],
        {},
    ),
    "tied": (tied, lambda: classes(60), {}),
    "another loss": (
        lambda: nn.Linear(6, 1),
        lambda: (torch.randn(60, 6), torch.randn(60, 1)),
        {
            "loss": lambda outputs, targets: (outputs - targets).abs().mean(1),
            "metric": "r2",
        },
    ),
}


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("source", ["kfac", "fisher"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, source, stages):
    torch.manual_seed(0)
    make, data, options = NETWORKS[name]
    batch = {"batch": 4, "samples": 40} if source == "fisher" and stages > 1 else {}
    model = make()
    pruned = cbs_opt.prune(
        model, data(), 0.5, source=source, stages=stages, solver="magnitude", threads=1, **batch, **options
    )
    total = sum(layer.pruned.size for layer in pruned.layers)
    assert sum(layer.count for layer in pruned.layers) == pytest.approx(total / 2, abs=1)
    named = dict(pruned.model.named_parameters(remove_duplicate=False))
    for key, mask in pruned.masks.items():
        assert bool((named[key][~mask] == 0).all())
    assert np.isfinite(pruned.after.loss)
    kinds = {p.dtype for p in model.parameters()}
    assert {p.dtype for p in pruned.model.parameters()} == kinds


def test_weights_without_values_are_told():
    with pytest.raises(cbs_opt.UsageError, match="'weight' has no values"):
        cbs_opt.prune(nn.Linear(6, 3, device="meta"), classes(10), 0.5)
