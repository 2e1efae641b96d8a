"""Networks with other tensors in place of their own."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from cbs_opt.instances.batches import Bundle  # noqa: E402
from cbs_opt.instances.gradients import per_sample_gradients  # noqa: E402
from cbs_opt.instances.substitution import call_with  # noqa: E402


def twice():
    """A module with two names, whose weight a third module shares."""
    layer, other = nn.Linear(5, 5), nn.Linear(5, 5)
    other.weight = layer.weight
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), other)


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.weight"])
def test_every_place_is_replaced_and_restored(name):
    torch.manual_seed(0)
    model, x = twice(), torch.randn(3, 5)
    held = {k: id(v) for k, v in model.named_parameters(remove_duplicate=False)}
    new = torch.randn(5, 5)
    found = call_with(model, {name: new}, x)
    assert {k: id(v) for k, v in model.named_parameters(remove_duplicate=False)} == held
    torch.testing.assert_close(found, call_with(model, {name: new}, Bundle(((x,), {}), 3)))
    with torch.no_grad():
        model[0].weight.copy_(new)
    torch.testing.assert_close(found, model(x))


def test_an_unknown_name():
    with pytest.raises(KeyError):
        call_with(twice(), {"7.weight": torch.zeros(5, 5)}, torch.randn(3, 5))


def test_gradients_of_a_module_with_two_names():
    torch.manual_seed(0)
    model, x, y = twice(), torch.randn(3, 5), torch.randint(5, (3,))
    held = {k: id(v) for k, v in model.named_parameters(remove_duplicate=False)}
    rows = per_sample_gradients(model, x, y, ["0.weight"])
    assert {k: id(v) for k, v in model.named_parameters(remove_duplicate=False)} == held
    for s in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[s : s + 1]), y[s : s + 1]).backward()
        torch.testing.assert_close(rows[s], model[0].weight.grad.flatten())
