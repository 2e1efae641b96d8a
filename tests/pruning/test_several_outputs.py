"""Networks with several outputs and targets, and a loss of all of them."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt.errors import InstanceError  # noqa: E402
from cbs_opt.instances.factory import parts_of  # noqa: E402
from cbs_opt.instances.own_data import own_samples  # noqa: E402

FAST = {"solver": "magnitude", "threads": 1}


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.classes, self.values = nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x):
        hidden = self.body(x)
        return {"cls": self.classes(hidden), "reg": self.values(hidden)}


class TwoInputs(Heads):
    def forward(self, a, b):
        return super().forward(a + b)


def of_dictionary(outputs, targets):
    errors = functional.mse_loss(outputs["reg"], targets["r"])
    return functional.cross_entropy(outputs["cls"], targets["y"]) + errors


def of_tuple(outputs, targets):
    return of_dictionary(outputs, {"y": targets[0], "r": targets[1]})


def right(outputs, targets):
    return (outputs["cls"].argmax(1) == targets["y"]).float().mean()


torch.manual_seed(0)
X = torch.randn(300, 8)
Y, R = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long(), 2 * X[:, 2:4]
TARGETS = {"y": Y, "r": R}


def trained(kind=Heads):
    torch.manual_seed(0)
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        of_dictionary(model(X), TARGETS).backward()
        optimizer.step()
    other = kind()
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("source", ["kfac", "fisher", "reconstruction"])
def test_every_source_takes_the_loss(source):
    pruned = cbs_opt.prune(trained(), (X, TARGETS), 0.6, loss=of_dictionary, metric=right, source=source, **FAST)
    assert pruned.before.samples == 30 and pruned.before.loss < 1 and pruned.before.value > 0.8
    assert all(0 < layer.pruned.mean() < 1 for layer in pruned.layers), "no head is pruned away"


def test_gauss_newton_steps_towards_all_outputs(caplog):
    losses = []
    for count in (0, 2):
        pruned = cbs_opt.prune(trained(), (X, TARGETS), 0.6, loss=of_dictionary, gauss_newton=count, **FAST)
        losses.append(pruned.after.loss)
    assert pruned.stages[0].gauss_newton > 0 and losses[1] < losses[0]


def test_reconstruction_needs_no_loss(caplog):
    pruned = cbs_opt.prune(trained(), (X, TARGETS), 0.6, source="reconstruction", **FAST)
    assert pruned.after is None
    assert "not scored" in caplog.text and "declare a loss of all outputs" in caplog.text
    with pytest.raises(InstanceError, match="declare a loss of all outputs"):
        cbs_opt.prune(trained(), (X, TARGETS), 0.6, **FAST)


def test_labels_in_a_tuple():
    pruned = cbs_opt.prune(trained(), (X, (Y, R)), 0.6, loss=of_tuple, **FAST)
    named = cbs_opt.prune(trained(), (X, TARGETS), 0.6, loss=of_dictionary, **FAST)
    assert pruned.after.loss == named.after.loss


def test_labels_in_a_tuple_of_several_inputs():
    data = (X / 2, X / 2), (Y, R)
    pruned = cbs_opt.prune(trained(TwoInputs), data, 0.6, loss=of_tuple, **FAST)
    assert pruned.before.samples == 30
    batches = own_samples(((X[:3], Y[:3]), (X[3:], Y[3:])), trained(), "the data", None, None)
    assert torch.equal(batches.targets, Y), "two batches, as the network needs one input"


def test_labels_of_some_batches_only():
    with pytest.raises(InstanceError, match=r"taken for 2 batches, 1 of them with labels.*\(inputs, \(y, z\)\)"):
        cbs_opt.prune(trained(), [X, [Y, R]], 0.6, loss=of_tuple, **FAST)


def test_no_labels_for_a_loss_of_its_own():
    with pytest.raises(InstanceError, match=r"no labels, and none can be drawn.*reconstruction"):
        cbs_opt.prune(trained(), X, 0.6, loss=of_tuple, **FAST)


def test_a_factory_without_test_data():
    model = trained()
    made = parts_of((model, (X, TARGETS), of_dictionary, right), "nets:make")
    assert made.test_data is None and made.loss is of_dictionary and made.metric is right
    made = parts_of((model, (X, Y), "mse"), "nets:make")
    assert made.test_data is None and made.loss == "mse"
    loop = parts_of((model, (X, Y), lambda network: network(X)), "nets:make")
    assert loop.test_data is not None and loop.loss is None
