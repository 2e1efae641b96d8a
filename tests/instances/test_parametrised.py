"""Weights that are computed from other tensors: pruned by effective value, in networks and in checkpoints."""

import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt.errors import InstanceError  # noqa: E402
from cbs_opt.instances.apply import apply, pruned_tensors  # noqa: E402
from cbs_opt.instances.checkpoints import load_checkpoint, read_checkpoint, write_checkpoint  # noqa: E402
from cbs_opt.instances.export import export  # noqa: E402
from cbs_opt.instances.masks import LayerMask, add_masks  # noqa: E402
from cbs_opt.instances.plain import effective_tensors, plain_model, set_effective  # noqa: E402


def old(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def spectral_transposed():
    return parametrizations.spectral_norm(nn.ConvTranspose1d(8, 8, 1))


FORMS = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "weight_norm of columns": lambda: parametrizations.weight_norm(nn.Linear(8, 8), dim=1),
    "weight_norm of all": lambda: parametrizations.weight_norm(nn.Linear(8, 8), dim=None),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral_norm, transposed": spectral_transposed,
    "old weight_norm": lambda: old(lambda: nn.utils.weight_norm(nn.Linear(8, 8))),
    "old weight_norm of all": lambda: old(lambda: nn.utils.weight_norm(nn.Linear(8, 8), dim=None)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "torch's masks": lambda: prune.random_unstructured(nn.Linear(8, 8), "weight", 0.3),
    "our masks": lambda: masked(nn.Linear(8, 8)),
}
BAKED = {"orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "squares": lambda: squared()}


def masked(layer):
    add_masks(layer, [LayerMask("weight", np.arange(64).reshape(8, 8) % 3 == 0)])
    return layer


class Square(nn.Module):
    def forward(self, weight):
        return weight**2


def squared():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Square())
    return layer


def network(name):
    torch.manual_seed(0)
    layer = {**FORMS, **BAKED}[name]()
    model = (
        nn.Sequential(nn.Unflatten(1, (8, 1)), layer, nn.Flatten())
        if "transposed" in name
        else nn.Sequential(layer)
    )
    return model.eval()


def weight_of(model):
    return next(value for key, value in effective_tensors(model).items() if key.endswith("weight"))


def pruned(name):
    model = network(name)
    x, y = torch.randn(40, 8), torch.randint(8, (40,))
    instance = export(model, x, y, sparsity=0.6, blocks="row", damping=1e-3)
    return model, x, instance, cbs_opt.solve(instance, "magnitude", update=True)


@pytest.mark.parametrize("name", [*FORMS, *BAKED])
def test_effective_values_are_pruned_and_the_network_stays_as_it_was(name):
    model = network(name)
    state = copy.deepcopy(model.state_dict())
    x, y = torch.randn(40, 8), torch.randint(8, (40,))
    before = model(x)
    plain = plain_model(model)
    assert not any("parametrizations" in key or "_orig" in key for key in plain.model.state_dict())
    torch.testing.assert_close(plain.model(x), before)
    instance = export(model, x, y, sparsity=0.6)
    (entry,) = instance.metadata["tensors"]
    assert entry["name"].endswith("weight") and instance.n == 64
    expected = weight_of(model)
    expected = expected[..., 0].T if "transposed" in name else expected
    np.testing.assert_allclose(instance.weights, expected.double().numpy().ravel(), rtol=1e-6)
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("row", [False, True])
def test_a_form_holds_the_pruned_values_in_network_and_file(name, row, tmp_path):
    model, x, instance, result = pruned(name)
    torch.save(model.state_dict(), tmp_path / "in.pt")
    path = instance.metadata["tensors"][0]["name"]
    tensors = read_checkpoint(tmp_path / "in.pt", {path})
    torch.testing.assert_close(tensors[path], weight_of(model), rtol=1e-6, atol=1e-7)
    new = pruned_tensors(instance, result, tensors)[path]
    if row and "spectral" not in name:  # one direction of weight_norm vanishes
        new[0], new[:, 0] = 0, 0
    write_checkpoint(tmp_path / "out.pt", {path: new}, tmp_path / "in.pt")
    fresh = network(name)
    fresh.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))  # by torch alone, strictly
    set_effective(model, path, new)
    for found in (weight_of(fresh), weight_of(model)):
        assert torch.equal(found == 0, new == 0)
        torch.testing.assert_close(found, new, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BAKED)
def test_what_no_parameter_produces_is_written_plain_and_told(name, tmp_path, caplog):
    model, x, instance, result = pruned(name)
    torch.save(model.state_dict(), tmp_path / "in.pt")
    assert "0.weight" not in read_checkpoint(tmp_path / "in.pt", {"0.weight"})  # only the network knows
    new = pruned_tensors(instance, result, effective_tensors(model))["0.weight"]
    write_checkpoint(tmp_path / "out.pt", {"0.weight": new}, tmp_path / "in.pt")
    apply(model, instance, result)
    assert "is written as a plain tensor" in caplog.text and "it is removed, and the tensor plain" in caplog.text
    assert torch.equal(model[0].weight, new) and type(model[0]) is nn.Linear
    fresh = network(name)
    load_checkpoint(fresh, tmp_path / "out.pt")
    assert torch.equal(fresh[0].weight, new)
    torch.testing.assert_close(fresh(x), model(x))


def test_plain_and_parametrised_checkpoints_load_into_one_another(tmp_path):
    torch.manual_seed(1)
    plain, normed = nn.Sequential(nn.Linear(8, 8)), network("weight_norm")
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    torch.save(normed.state_dict(), tmp_path / "normed.pt")
    expected = weight_of(normed).clone()
    load_checkpoint(normed, tmp_path / "plain.pt")
    assert torch.equal(normed[0].weight, plain[0].weight)
    load_checkpoint(plain, tmp_path / "normed.pt")
    torch.testing.assert_close(plain[0].weight.detach(), expected)


def test_masks_of_a_checkpoint_hold_in_a_plain_network(tmp_path):
    source = network("torch's masks")
    torch.save(source.state_dict(), tmp_path / "masked.pt")
    plain = nn.Sequential(nn.Linear(8, 8))
    load_checkpoint(plain, tmp_path / "masked.pt")
    assert torch.equal(weight_of(plain), weight_of(source))
    instance = export(plain, torch.randn(20, 8), torch.randint(8, (20,)), sparsity=0.5, blocks="row", damping=1e-3)
    np.testing.assert_array_equal(instance.fixed == 1, (source[0].weight_mask == 0).numpy().ravel())


def test_names_that_only_look_like_a_form_are_tensors(tmp_path):
    tensors = {"w_g": torch.randn(3, 4), "w_v": torch.randn(3, 4), "x_orig": torch.randn(2)}
    torch.save(tensors, tmp_path / "in.pt")
    assert set(read_checkpoint(tmp_path / "in.pt", {"w_g", "w_v", "w"})) == {"w_g", "w_v"}
    write_checkpoint(tmp_path / "out.pt", {"w_g": torch.zeros(3, 4)}, tmp_path / "in.pt")
    assert not read_checkpoint(tmp_path / "out.pt")["w_g"].any()
    with pytest.raises(InstanceError, match=r"holds no tensor x"):
        write_checkpoint(tmp_path / "out.pt", {"x": torch.zeros(2)}, tmp_path / "in.pt")
