"""Kept weights that are fitted to the outputs of the dense network, layer after layer in one pass."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt.instances.data import own_source  # noqa: E402
from cbs_opt.instances.plan import make_plan  # noqa: E402
from cbs_opt.pruning import refits  # noqa: E402
from cbs_opt.pruning.network import working_copy  # noqa: E402
from cbs_opt.pruning.refits import refit  # noqa: E402

M = 80


class Twice(nn.Module):
    """A layer that is used twice, before one that is used once."""

    def __init__(self):
        super().__init__()
        self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.relu(self.again(torch.relu(self.again(x)))))


def pruned_copy(model, x, share=0.5, seed=0):
    """A copy with a random selection pruned, the selection, and the samples."""
    torch.manual_seed(seed)
    source = own_source((x, torch.zeros(len(x), dtype=torch.int64)), model, "data")
    plan = make_plan(model, None, None, source="kfac", run=lambda network: network(x[:1]))
    found = working_copy(model, plan)
    pruned = np.random.default_rng(seed).random(plan.weights.size) < share
    found.take(np.where(pruned, 0.0, plan.weights))
    return found, pruned, source


def least_squares(X, target, mask, bias=0.0):
    """Row by row the kept weights with the least error; X (places, K), target (places, rows)."""
    W = torch.zeros(mask.shape, dtype=torch.float64)
    for r, kept in enumerate(mask):
        W[r, kept] = torch.linalg.lstsq(X[:, kept].double(), (target[:, r] - bias).double()).solution
    return W


def masks_of(found, pruned):
    return {place.name: torch.from_numpy(~place.tensor(pruned)) for place in found.places}


@torch.no_grad()
def test_each_layer_has_the_least_error_with_the_inputs_that_it_gets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(M, 8)
    found, pruned, source = pruned_copy(model, x)
    refit(found, model, source, pruned, 0.0, relative=False, statistics=False)
    masks = masks_of(found, pruned)
    first = least_squares(x, x @ model[0].weight.T, masks["0.weight"])
    torch.testing.assert_close(found.model[0].weight.double(), first, atol=1e-4, rtol=1e-4)
    hidden = torch.relu(x @ found.model[0].weight.T)
    target = torch.relu(x @ model[0].weight.T) @ model[2].weight.T
    second = least_squares(hidden, target, masks["2.weight"])
    torch.testing.assert_close(found.model[2].weight.double(), second, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.model[2].bias, model[2].bias)


@torch.no_grad()
@pytest.mark.parametrize("damping", [0.0, 1e6])
def test_groups_of_channels_and_a_damping(damping):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    ).eval()
    x = torch.randn(M, 4, 5, 5)
    found, pruned, source = pruned_copy(model, x)
    before = found.model[0].weight.clone()
    refit(found, model, source, pruned, damping, relative=True, statistics=False)
    if damping:
        torch.testing.assert_close(found.model[0].weight, before, atol=1e-4, rtol=1e-4)
        return
    mask = masks_of(found, pruned)["0.weight"].reshape(6, 18)
    target = model[0](x).movedim(1, -1).reshape(-1, 6)
    for g in range(2):
        X = nn.functional.unfold(x[:, 2 * g : 2 * g + 2], 3).movedim(1, -1).reshape(-1, 18)
        rows = slice(3 * g, 3 * g + 3)
        expected = least_squares(X, target[:, rows], mask[rows])
        torch.testing.assert_close(
            found.model[0].weight[rows].reshape(3, 18).double(), expected, atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("statistics", [True, False])
def test_batch_norms_take_their_statistics_on_the_way(statistics):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = 2 * torch.randn(M, 8) + 1
    found, pruned, source = pruned_copy(model, x)
    refit(found, model, source, pruned, 0.0, relative=False, statistics=statistics)
    norm, hidden = found.model[1], found.model[0](x)
    assert not norm.training and norm.momentum == model[1].momentum
    mean = hidden.mean(0) if statistics else torch.zeros(6)
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-5, rtol=1e-5)
    target = model[3].weight.double() @ torch.relu(model[1](model[0](x))).double().T
    passed = (
        nn.functional.batch_norm(hidden, None, None, norm.weight, norm.bias, True) if statistics else norm(hidden)
    )
    inputs = torch.relu(passed)
    expected = least_squares(inputs, target.T, masks_of(found, pruned)["3.weight"])
    torch.testing.assert_close(found.model[3].weight.double(), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_what_is_used_twice_stays():
    torch.manual_seed(0)
    model = Twice().eval()
    x = torch.randn(M, 6)
    found, pruned, source = pruned_copy(model, x)
    before = copy.deepcopy(found.model)
    refit(found, model, source, pruned, 1e-3, relative=True, statistics=False)
    assert torch.equal(found.model.again.weight, before.again.weight)
    assert not torch.equal(found.model.last.weight, before.last.weight)
    assert (found.model.last.weight[~masks_of(found, pruned)["last.weight"]] == 0).all()


@torch.no_grad()
def test_as_many_samples_as_memory_allows(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(M, 8)
    found, pruned, source = pruned_copy(model, x)
    monkeypatch.setattr(refits, "MEMORY", 40 * 4 * (6 + 3 + 3 * 6 + 3 * 8))  # of 40 samples
    refit(found, model, source, pruned, 0.0, relative=False, statistics=False)
    expected = least_squares(x[:40], x[:40] @ model[0].weight.T, masks_of(found, pruned)["0.weight"])
    torch.testing.assert_close(found.model[0].weight.double(), expected, atol=1e-4, rtol=1e-4)


def wide(x):
    """A convolution at 100 places a sample, half of each of its weights, the images, and what all places take."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1, bias=False), nn.Flatten()).eval()
    found, pruned, source = pruned_copy(model, x, 0.3)
    found.take(0.5 * found.weights)
    return model, found, pruned, source, len(x) * 4 * 100 * (6 + 3 * 6 + 3 * 2)


@torch.no_grad()
def test_products_with_many_places_keep_some_of_them_of_all_samples(monkeypatch):
    x = torch.randn(M, 2, 10, 10)
    x[: M // 2, 0] = 0  # the two channels are seen in different samples
    x[M // 2 :, 1] = 0
    model, found, pruned, source, memory = wide(x)
    monkeypatch.setattr(refits, "MEMORY", 7 * memory // 8)
    refit(found, model, source, pruned, 1e-4, relative=True, statistics=False)
    kept = masks_of(found, pruned)["0.weight"]
    torch.testing.assert_close(found.model[0].weight, model[0].weight * kept, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_sums_over_some_places_have_the_size_of_those_over_all(monkeypatch):
    x = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1).expand(M, 2, 10, 10)
    fitted = []
    for share in (1.0, 0.875):
        model, found, pruned, source, memory = wide(x)
        monkeypatch.setattr(refits, "MEMORY", int(share * memory))
        refit(found, model, source, pruned, 50.0, relative=False, statistics=False)
        fitted.append(found.model[0].weight.clone())
    assert (fitted[0] != model[0].weight).any() and not torch.equal(fitted[0], 0.5 * model[0].weight)
    torch.testing.assert_close(fitted[1], fitted[0], atol=1e-3, rtol=1e-3)


class Attending(nn.Module):
    """A layer whose outputs all meet each other: the largest tensor is of no weight."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.softmax(h @ h.transpose(1, 2), -1) @ h)


@torch.no_grad()
def test_memory_of_what_lies_between_layers_counts():
    model = Attending().eval()
    found, _, _ = pruned_copy(model, torch.randn(3, 50, 4))
    layouts = {place.name: place.layout for place in found.places}
    needs = refits._needs(model, torch.randn(3, 50, 4), layouts)
    assert needs.passing == 4 * (3 * 50 * 50 + 3 * 50 * 4)


class Multiplying(nn.Module):
    """A large weight that is used by its transpose."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 500))

    def forward(self, x):
        return x @ self.weight.t()


@torch.no_grad()
def test_a_view_of_a_weight_is_no_memory_of_a_sample():
    model = Multiplying().eval()
    found, _, _ = pruned_copy(model, torch.randn(3, 500))
    layouts = {place.name: place.layout for place in found.places}
    assert refits._needs(model, torch.randn(1, 500), layouts).passing == 4 * (3 * 8 + 3 * 500)


def test_a_stop_on_the_way(monkeypatch):
    """It ends between two layers; of a run it leaves the selection with the update, not fitted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(M, 8), torch.randint(3, (M,))
    fitted = []
    fit = refits._Fit._fitted

    def counted(self, *args):
        fitted.append(args)
        return fit(self, *args)

    monkeypatch.setattr(refits._Fit, "_fitted", counted)
    options = {"solver": "magnitude", "threads": 1, "relative_damping": 0.01}
    pruned = cbs_opt.prune(model, (x, y), 0.5, refit="yes", should_stop=lambda: len(fitted) > 0, **options)
    assert len(fitted) == 1 and pruned.interrupted and pruned.sparsity == 0.5
    plain = cbs_opt.prune(model, (x, y), 0.5, refit="no", **options)
    assert torch.equal(pruned.model[2].weight, plain.model[2].weight)
