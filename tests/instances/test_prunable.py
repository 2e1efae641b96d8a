"""What is pruned by default and by name, in which order its weights lie, and what is zero already."""

import logging
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt.errors import InstanceError, UsageError  # noqa: E402
from cbs_opt.instances.apply import apply, layer_masks, pruned_tensors  # noqa: E402
from cbs_opt.instances.export import export  # noqa: E402
from cbs_opt.instances.gradients import per_sample_gradients  # noqa: E402
from cbs_opt.instances.prunable import matches, select  # noqa: E402
from cbs_opt.instances.tensors import Layout  # noqa: E402


class Conv1D(nn.Module):
    """x·W + b, as in transformers."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)


class OwnLinear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return x @ self.weight.t()


class Gain(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return x * self.weight


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 6, 8))
        self.table = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight
        self.attention, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm((6, 8))
        self.mix, self.own, self.gain = Conv1D(8, 8), OwnLinear(8, 5), Gain(6, 8)
        self.up, self.rnn = nn.ConvTranspose1d(4, 2, 3, groups=2), nn.LSTM(5, 3)
        self.empty, self.counts = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(2, 2).int(), False)


def test_the_weights_of_layers_that_multiply_are_pruned_and_the_rest_is_named():
    selection = select(Everything())
    assert selection.names == (
        "attention.in_proj_weight", "attention.out_proj.weight", "mix.weight", "own.weight", "up.weight",
        "rnn.weight_ih_l0", "rnn.weight_hh_l0",
    )  # fmt: skip
    layouts = {tensor.name: tensor.layout for tensor in selection.tensors}
    assert layouts["mix.weight"].inputs_first and not layouts["own.weight"].inputs_first
    assert layouts["up.weight"] == Layout((4, 1, 3), inputs_first=True, groups=2)
    reasons = {left.names[0]: left.reason for left in selection.left_out}
    assert "no layer known to multiply" in reasons["cls_token"] == reasons["pos_embed"] == reasons["gain.weight"]
    assert reasons["norm.weight"] == "a scale of a normalisation"
    assert "shared with what is an embedding" in reasons["table.weight"]
    assert (reasons["empty"], reasons["counts"][:5]) == ("empty", "int32")
    assert reasons["rnn.bias_ih_l0"] == "a bias or scale (one axis)"
    assert next(left.names for left in selection.left_out if "embedding" in left.reason) == (
        "table.weight",
        "head.weight",
    )


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("fc1.weight", "fc1.weight", True),
        ("fc1", "fc1.weight", True),
        ("fc1", "fc10.weight", False),
        ("fc*", "fc10.weight", True),
        ("*.weight", "a.b.weight", True),
        ("re:.*lm_head", "model.lm_head.weight", True),
        ("re:fc1", "fc10.weight", False),
        (r"re:layers\.[0-3]\..*", "layers.2.mlp.weight", True),
        (r"re:layers\.[0-3]", "layers.12.mlp.weight", False),
    ],
)
def test_patterns(pattern, name, fits):
    assert matches(pattern, name) is fits


def test_names_and_patterns_choose():
    selection = select(Everything())
    assert selection.chosen(["attention"]).names == ("attention.in_proj_weight", "attention.out_proj.weight")
    assert selection.chosen(exclude=["re:.*rnn", "attention", "up"]).names == ("mix.weight", "own.weight")
    assert selection.chosen(["pos_embed", "re:mix.*"]).names == ("mix.weight", "pos_embed")
    assert selection.chosen(["head.weight"]).tensors[0].names == ("table.weight", "head.weight")
    assert selection.chosen(["*norm*"]).names == ("norm.weight", "norm.bias")
    excluded = selection.chosen(exclude=["own"])
    assert ("own.weight",) in [left.names for left in excluded.left_out if left.reason == "excluded"]
    for names, exclude, words in (
        (["fc"], None, "`--tensors`: the network has no parameter 'fc'; it has attention.in_proj_weight"),
        (None, ["fc"], "`--exclude`: the network has no parameter 'fc'"),
        (["re:("], None, "no regular expression"),
        (["counts"], None, "'counts' cannot be pruned: it is int32"),
        (["own"], ["own"], "leave nothing to prune"),
    ):
        with pytest.raises(UsageError, match=words.replace("(", r"\(") if "re" not in words else words):
            selection.chosen(names, exclude)


def test_the_log_tells_what_is_left_out(caplog):
    with caplog.at_level(logging.INFO, "cbs_opt"):
        select(Everything()).log()
    assert "to prune: attention.in_proj_weight, attention.out_proj.weight, mix.weight" in caplog.text
    assert "multiply by it (its name after --tensors prunes it): cls_token, pos_embed, gain.weight" in caplog.text


@pytest.mark.parametrize("source", ["fisher", "kfac"])
def test_frozen_layers_are_pruned_and_named(source, caplog):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    instances = {}
    for frozen in ("nothing", "0", "all"):
        network.requires_grad_(frozen != "all")
        network[0].requires_grad_(frozen == "nothing")
        with caplog.at_level(logging.INFO, logger="cbs_opt"):
            caplog.clear()
            instances[frozen] = export(network, x, y, source=source, sparsity=0.5)
        told = [text for text in caplog.messages if "frozen" in text]
        assert [text.endswith("--exclude keeps them): 0.weight") for text in told] == [True] * (frozen == "0")
    for instance in instances.values():
        assert [tensor["name"] for tensor in instance.metadata["tensors"]] == ["0.weight", "2.weight"]
        for k in range(instance.curvature.number_of_blocks):
            block, expected = instance.curvature.block(k), instances["nothing"].curvature.block(k)
            np.testing.assert_allclose(block, expected, rtol=1e-5, atol=1e-9)


def test_layers_without_a_shape_and_scripts_are_told():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        script = torch.jit.script(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(UsageError, match=r"is TorchScript, .*: give the Python module"):
        select(script)
    with pytest.raises(UsageError, match="has no shape yet: let the factory run the network once"):
        select(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("groups", [1, 2])
def test_layouts_lead_there_and_back(groups):
    layout = Layout((4, 3, 2, 2), inputs_first=True, groups=groups)
    assert layout.rows_shape == (3 * groups, 4 // groups, 2, 2) and layout.inputs == 16 // groups
    tensor = np.arange(48.0).reshape(4, 3, 2, 2)
    rows = layout.to_rows(tensor.ravel())
    for g in range(groups):
        for o in range(3):
            inputs = tensor[g * 4 // groups : (g + 1) * 4 // groups, o]
            assert rows.reshape(layout.rows, -1)[g * 3 + o].tolist() == inputs.ravel().tolist()
    both = np.stack([tensor.ravel(), -tensor.ravel()])
    np.testing.assert_array_equal(layout.from_rows(layout.to_rows(both)), both)
    torch.testing.assert_close(layout.to_rows(torch.from_numpy(both)), torch.from_numpy(layout.to_rows(both)))


def two_layers(first, second):
    torch.manual_seed(0)
    return nn.Sequential(first, nn.ReLU(), second), torch.randn(30, 8), torch.randint(4, (30,))


def test_patterns_and_rows_run_along_inputs_whatever_is_stored_first():
    model, x, y = two_layers(Conv1D(12, 8), Conv1D(4, 12))
    for along, axis in (("inputs", 0), ("outputs", 1)):
        instance = export(model, x, y, nm=(2, 4), nm_along=along)
        masks = layer_masks(instance, cbs_opt.solve(instance, "magnitude").pruned)
        for mask in masks:
            kept = ~mask.pruned.swapaxes(0, axis)  # groups of four along the first axis
            assert (kept.reshape(-1, 4, kept.shape[1]).sum(1) == 2).all()
    # The same network in layers of torch gives the same instance.
    plain, _, _ = two_layers(nn.Linear(8, 12), nn.Linear(12, 4))
    with torch.no_grad():
        for k in (0, 2):
            plain[k].weight.copy_(model[k].weight.T)
            plain[k].bias.copy_(model[k].bias)
    for options in ({"blocks": "row"}, {"source": "reconstruction"}, {"first_order": True}):
        ours, theirs = (export(net, x, y, **options) for net in (model, plain))
        np.testing.assert_array_equal(ours.weights, theirs.weights)
        np.testing.assert_array_equal(ours.curvature.block_sizes, theirs.curvature.block_sizes)
        for k in range(len(ours.curvature.block_sizes)):
            a, b = (instance.curvature.block(k) for instance in (ours, theirs))
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
    result = cbs_opt.solve(ours, "magnitude", update=True)
    apply(model, ours, result)
    apply(plain, theirs, result)
    torch.testing.assert_close(model[0].weight.T, plain[0].weight)
    assert int((model[0].weight == 0).sum()) + int((model[2].weight == 0).sum()) == ours.budget.total


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def test_a_tied_tensor_is_one_and_has_all_its_names():
    model, x, y = Tied(), torch.randn(20, 8), torch.arange(20) % 4
    instance = export(model, x, y, sparsity=0.5)
    assert instance.n == 64 + 32
    first = instance.metadata["tensors"][0]
    assert (first["name"], first["aliases"]) == ("a.weight", ["b.weight"])
    G = per_sample_gradients(model.eval(), x, y, ["a.weight"])
    np.testing.assert_allclose(instance.curvature.gradients[:, :64], G.numpy(), atol=1e-6)
    result = cbs_opt.solve(instance, "magnitude")
    # Copies, as an .npz or safetensors stores them, change under both names; one name is enough.
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = pruned_tensors(instance, result, copies)
    assert torch.equal(changed["a.weight"], changed["b.weight"]) and set(changed) == {*copies} - {"head.bias"}
    assert sum(int((changed[name] == 0).sum()) for name in ("a.weight", "head.weight")) == instance.budget.total
    del copies["a.weight"]
    assert torch.equal(pruned_tensors(instance, result, copies)["b.weight"], changed["b.weight"])
    with pytest.raises(InstanceError, match=r"b\.weight differs from the instance's weights"):
        pruned_tensors(instance, result, copies | {"b.weight": copies["b.weight"] + 1})
    assert export(model, x, y, ["b.weight"]).n == 64
    apply(model, instance, result)
    assert model.a.weight is model.b.weight and torch.equal(model.a.weight, changed["b.weight"])


def sparse_network(fraction=0.9):
    model, x, y = two_layers(nn.Linear(8, 12), nn.Linear(12, 4))
    with torch.no_grad():
        for k in (0, 2):
            weight = model[k].weight
            weight[weight.abs() < weight.abs().flatten().quantile(fraction)] = 0
    return model, x, y


def test_old_zeros_are_told_and_kept_where_asked(caplog):
    model, x, y = sparse_network()
    zeros = sum(int((model[k].weight == 0).sum()) for k in (0, 2))
    free = export(model, x, y, sparsity=0.5)
    assert free.metadata["zeros_before"] == zeros and free.budget.total == 72 and free.fixed is None
    assert "are zero already and may be moved by an update: --keep-mask" in caplog.text
    kept = export(model, x, y, sparsity=0.5, keep_mask=True)
    assert kept.budget.total == zeros and int(kept.fixed.sum()) == zeros
    assert f"{zeros} of 144 weights ({zeros / 144:.1%}) are pruned in place of 72 (50.0%)" in caplog.text
    denser = export(model, x, y, sparsity=0.95, keep_mask=True, blocks="layer", damping=1e-3)
    result = cbs_opt.solve(denser, "magnitude", update=True)
    assert denser.budget.total == 137 and result.pruned[denser.weights == 0].all()
    groups = export(model, x, y, nm=(2, 4), keep_mask=True)
    assert groups.budget.total >= zeros and (groups.budget.group_budgets >= 2).all()


def test_masks_of_torch_stay_masks():
    model, x, y = two_layers(nn.Linear(8, 12), nn.Linear(12, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    masked = (model[0].weight_mask == 0).numpy()
    instance = export(model, x, y, sparsity=0.6, blocks="layer", damping=1e-3)
    assert [tensor["name"] for tensor in instance.metadata["tensors"]] == ["0.weight", "2.weight"]
    np.testing.assert_array_equal(instance.fixed[:96].reshape(12, 8) == 1, masked)
    result = cbs_opt.solve(instance, "magnitude", update=True)
    masks = apply(model, instance, result)
    assert masks[0].pruned[masked].all()
    np.testing.assert_array_equal(model[0].weight.detach().numpy() == 0, masks[0].pruned)
    model(x)  # the hook computes it anew
    np.testing.assert_array_equal(model[0].weight.detach().numpy() == 0, masks[0].pruned)
    total = int((model[0].weight == 0).sum()) + int((model[2].weight == 0).sum())
    assert total == instance.budget.total == 87


def test_a_network_may_be_coarser_than_its_checkpoint():
    """A float16 network made from a float32 file: kept weights of the file stay as they are, to the last bit."""
    model, x, y = two_layers(nn.Linear(8, 12), nn.Linear(12, 4))
    fine = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.half()
    instance = export(model, x.half(), y, sparsity=0.5, source="reconstruction")
    assert [entry["dtype"] for entry in instance.metadata["tensors"]] == ["float16", "float16"]
    result = cbs_opt.solve(instance, "magnitude")
    for name, new in pruned_tensors(instance, result, fine).items():
        assert new.dtype == torch.float32 and torch.equal(new[new != 0], fine[name][new != 0])
    with pytest.raises(InstanceError, match="differs from the instance's weights"):
        pruned_tensors(instance, result, {**fine, "0.weight": fine["0.weight"] * 1.01})
    apply(model, instance, result)
    assert model[0].weight.dtype == torch.float16 and int((model[0].weight == 0).sum()) > 0
