"""What people hand over as data, and what of it goes into the network."""

import collections
import dataclasses
import itertools
import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

from cbs_opt import InstanceError  # noqa: E402
from cbs_opt.instances.batches import Bundle, call, map_leaves, slices  # noqa: E402
from cbs_opt.instances.own_data import UNSIZED, own_samples  # noqa: E402

torch.manual_seed(0)
X, Y = torch.randn(60, 8), torch.randint(0, 4, (60,))
ONES = torch.ones(60, 8)
MLP = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


class Scaled(nn.Module):
    def forward(self, x, scale):
        return x * scale


class ByName(nn.Module):
    def forward(self, *, x, scale=None):
        return x if scale is None else x * scale


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield X[0], Y[0]


Pair = collections.namedtuple("Pair", "scale x labels")


def halves(*parts):
    return [tuple(part[:20] for part in parts), tuple(part[20:] for part in parts)]


def read(data, model=MLP, limit=None, seed=None):
    return own_samples(data, model, "the data", limit, seed)


FORMS = {
    "pair": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "list of a pair": [X, Y],
    "batches": halves(X, Y),
    "a batch with an index": halves(X, Y, torch.arange(60)),
    "dictionary": {"anything": X, "labels": Y},
    "dictionaries": [{"input": x, "target": y} for x, y in halves(X, Y)],
    "nested": [((x,), y) for x, y in halves(X, Y)],
    "loader": DataLoader(TensorDataset(X, Y), batch_size=7),
    "data set": TensorDataset(X, Y),
    "samples": list(zip(X, Y, strict=True)),
    "samples with numbers": [(x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)],
    "samples as dictionaries": [{"input": x, "label": int(y)} for x, y in zip(X, Y, strict=True)],
    "collated": (
        [{"v": X[k].tolist(), "c": int(Y[k])} for k in range(60)],
        lambda items: (torch.tensor([i["v"] for i in items]), torch.tensor([i["c"] for i in items])),
    ),
    "generator": (batch for batch in halves(X, Y)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_inputs_and_labels(name):
    owned = read(FORMS[name])
    assert torch.equal(owned.inputs, X) and torch.equal(owned.targets, Y)


BUNDLES = {
    "two inputs and a label": (Scaled(), halves(X, ONES, Y)),
    "a tuple of inputs": (Scaled(), ((X, ONES), Y)),
    "dictionary by keyword": (Scaled(), {"x": X, "scale": ONES, "labels": Y, "extra": X}),
    "inputs by keyword": (ByName(), ({"x": X, "scale": ONES}, Y)),
    "named tuple": (Scaled(), [Pair(ONES, X, Y)]),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_forms_of_several_inputs(name):
    model, data = BUNDLES[name]
    owned = read(data, model)
    assert isinstance(owned.inputs, Bundle) and len(owned.inputs) == 60
    assert torch.equal(call(model, owned.inputs[10:13]), X[10:13]) and torch.equal(owned.targets, Y)


def test_what_is_left_out_is_said(caplog):
    with caplog.at_level(logging.WARNING, "cbs_opt"):
        read(halves(X, Y, torch.arange(60)))
        read({"x": X, "scale": ONES, "labels": Y, "extra": X}, Scaled())
    assert "part 3 is left out" in caplog.text and "extra is left out" in caplog.text


def test_no_labels():
    assert read(X).targets is None
    assert torch.equal(read([(X[:30],), (X[30:],)]).inputs, X)
    assert torch.equal(read([X[:30], X[30:], X]).inputs, torch.cat([X, X]))
    assert read([(X, ONES)], Scaled()).targets is None


def test_a_calibration_loop_is_recorded():
    def loop(model):
        for start in itertools.count(0, 20):
            model(X[start : start + 20])

    owned = read(loop, limit=40)
    assert torch.equal(owned.inputs, X[:40]) and owned.targets is None
    owned = read(lambda model: model(scale=ONES, x=X), Scaled())
    assert torch.equal(call(Scaled(), owned.inputs), X)
    with pytest.raises(InstanceError, match="does not call the model"):
        read(lambda model: None)
    with pytest.raises(InstanceError, match="fails with ZeroDivisionError"):
        read(lambda model: 1 / 0)


def test_loaders_without_an_end(caplog):
    assert len(read(itertools.repeat((X, Y)), limit=100, seed=0).inputs) == 100
    with caplog.at_level(logging.WARNING, "cbs_opt"):
        count = len(read(Endless()).inputs)
    assert UNSIZED <= count < UNSIZED + 100 and "has no length" in caplog.text


def test_a_draw_asks_a_data_set_only_for_what_is_drawn():
    asked = []

    class Watched(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, k):
            asked.append(k)
            return X[k], Y[k]

    owned = read(Watched(), limit=7, seed=1)
    assert sorted(asked) == sorted(set(asked)) and len(asked) == 7
    assert torch.equal(owned.inputs, X[asked]) and torch.equal(owned.targets, Y[asked])
    pair, loader = (read(data, limit=7, seed=1).targets for data in ((X, Y), DataLoader(TensorDataset(X, Y), 5)))
    assert torch.equal(pair, loader) and torch.equal(pair, owned.targets)


def test_sequences_of_several_lengths():
    batches = [(torch.full((4, t), float(t))[..., None], torch.full((4,), t)) for t in (3, 5, 3)]
    owned = read(batches)
    assert len(owned.inputs) == 12
    parts = list(slices(owned.inputs, 7))
    assert [part.stop - part.start for part in parts] == [7, 1, 4]
    for part in parts:
        x, y = owned.inputs[part], owned.targets[part]
        assert (x == y[:, None, None]).all() and x.shape[1] == int(y[0])
    drawn = read(batches, limit=9, seed=0)
    again = torch.cat([drawn.targets[part] for part in slices(drawn.targets, 99)])
    assert len(again) == 9 and set(again.tolist()) == {3, 5}


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        ((X, Y[:9]), MLP, "60 inputs and 9 labels"),
        ([], MLP, "at least one"),
        (7, MLP, "must be .inputs, labels., a dictionary, a loader"),
        ([(X, ["a"] * 60)], MLP, "no tensor"),
        ([(X, Y), (X,)], MLP, "2 batches, 1 of them with labels"),
        ([{"q": X, "labels": Y}], Scaled(), "forward needs x, scale: rename"),
        ([object()], MLP, "a batch must be .inputs, labels., a dictionary of tensors"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_told_in_a_sentence(data, model, words):
    with pytest.raises(InstanceError, match=words) as caught:
        read(data, model)
    assert "\n" not in str(caught.value)


def test_trees():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        more: tuple = ()

    changed = map_leaves(lambda leaf: leaf * 2, Output(torch.ones(2), (1, {"a": 3})))
    assert isinstance(changed, Output) and changed.more == (2, {"a": 6}) and changed.logits.tolist() == [2, 2]
    bundle = Bundle((X, {"mask": np.pi, "square": torch.eye(8)}), 60)
    part = bundle[5:9]
    assert len(part) == 4 and part.tree[0].shape == (4, 8) and part.tree[1]["square"].shape == (8, 8)


def test_samples_with_several_targets():
    """A list of them, a data set and a loader are read alike."""
    targets = {"class": Y, "value": X[:, :2]}
    samples = [(X[k], {"class": Y[k], "value": X[k, :2]}) for k in range(60)]
    for data in (samples, DataLoader(samples, 20), [(x, (t["class"], t["value"])) for x, t in samples]):
        read_in = read(data)
        assert len(read_in.inputs) == len(read_in.targets) == 60
        assert torch.equal(read_in.inputs, X)
        tree = read_in.targets.tree
        found = dict(zip(targets, tree, strict=True)) if not isinstance(tree, dict) else tree
        assert all(torch.equal(found[name], values) for name, values in targets.items())
    assert len(read(samples, limit=7, seed=0).targets) == 7


def test_lists_of_numbers():
    found = read((X.tolist(), Y.tolist()))
    assert torch.equal(found.inputs, X) and torch.equal(found.targets, Y)
    assert torch.equal(read((X, Y.tolist())).targets, Y)
    with pytest.raises(InstanceError):
        read(([[1.0, 2.0], [3.0]], [0, 1]))
