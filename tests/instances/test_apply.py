"""A solution in its network: what is pruned, what moves, what is refused, and the pictures of it."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cbs_opt  # noqa: E402
from cbs_opt import Budget, GradientFactor, Instance, Solution  # noqa: E402
from cbs_opt.errors import InstanceError, OutputError, SolutionError, UsageError  # noqa: E402
from cbs_opt.instances.apply import apply, layer_masks, prune_masks  # noqa: E402
from cbs_opt.instances.data import open_samples  # noqa: E402
from cbs_opt.instances.fisher import tensor_table  # noqa: E402
from cbs_opt.instances.mask_pictures import draw_masks, kept_density  # noqa: E402
from cbs_opt.instances.masks import LayerMask, squash  # noqa: E402
from cbs_opt.instances.networks import Network  # noqa: E402
from cbs_opt.instances.scores import evaluate, torch_device  # noqa: E402

NAMES = ["0.weight", "2.weight"]


@pytest.fixture
def model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))


@pytest.fixture
def instance(model):
    tensors = [dict(model.named_parameters())[name].detach() for name in NAMES]
    weights = np.concatenate([tensor.numpy().ravel() for tensor in tensors])
    gradients = np.random.default_rng(0).standard_normal((60, weights.size))
    table = tensor_table(NAMES, [tuple(tensor.shape) for tensor in tensors])
    return Instance(weights, GradientFactor(gradients, 1e-3), Budget(30), metadata={"tensors": table})


def vector(model):
    return np.concatenate([dict(model.named_parameters())[name].detach().numpy().ravel() for name in NAMES])


def test_a_selection_zeroes_exactly_the_pruned_weights(model, instance):
    before, biases = vector(model), model[0].bias.clone()
    result = cbs_opt.solve(instance, "magnitude")
    masks = apply(model, instance, result)
    after = vector(model)
    assert not after[result.pruned].any()
    np.testing.assert_array_equal(after[~result.pruned], before[~result.pruned])
    assert torch.equal(model[0].bias, biases)
    assert [(mask.name, mask.pruned.shape) for mask in masks] == [("0.weight", (5, 6)), ("2.weight", (3, 5))]
    assert sum(mask.count for mask in masks) == 30
    np.testing.assert_array_equal(masks[1].pruned, model[2].weight.detach().numpy() == 0)
    assert masks[0].sparsity == pytest.approx((model[0].weight == 0).double().mean().item())


def test_updated_weights_are_taken_over(model, instance):
    result = cbs_opt.solve(instance, "magnitude", update=True)
    apply(model, instance, result)
    np.testing.assert_array_equal(vector(model), result.weights.astype(np.float32))
    assert not vector(model)[result.pruned].any()
    assert np.abs(vector(model) - instance.weights)[~result.pruned].max() > 1e-3


def test_masks_hold_through_training(model, instance):
    result = cbs_opt.solve(instance, "magnitude", update=True)
    prune_masks(model, instance, result)
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    for _ in range(3):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * (parameter.grad + 0.1)  # as weight decay would, pruned weights are pushed too
    model(x)
    trained = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach().numpy()
    assert not trained[result.pruned].any()
    assert (trained != result.weights.astype(np.float32))[~result.pruned].any()
    assert squash(model) is model and type(model[0]) is torch.nn.Linear
    assert not vector(model)[result.pruned].any()
    np.testing.assert_array_equal(vector(model), trained)


def refused(model, instance, solution, words, error=InstanceError):
    before = vector(model)
    with pytest.raises(error, match=words):
        apply(model, instance, solution)
    np.testing.assert_array_equal(vector(model), before)


def test_another_network_is_refused_and_stays_as_it_was(model, instance):
    solution = Solution(np.arange(instance.n) < 30)
    other = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    refused(other, instance, solution, r"0\.weight differs .* in 30 of 30 places")
    with torch.no_grad():
        model[2].weight[1, 1] += 0.01
    refused(model, instance, solution, r"2\.weight differs .* in 1 of 15 places")
    with torch.no_grad():
        model[2].weight[1, 1] = float("nan")
    with pytest.raises(InstanceError, match="in 1 of 15 places"):
        apply(model, instance, solution)


def test_other_tensors_are_named(model, instance):
    solution = Solution(np.arange(instance.n) < 30)

    def with_table(table):
        return replace(instance, metadata={"tensors": table})

    first, second = instance.metadata["tensors"]
    for table, words in (
        ([{**first, "name": "conv.weight"}, second], "prunes the tensor conv.weight, which the network does not"),
        ([{**first, "shape": [6, 5]}, second], r"0\.weight has shape \(6, 5\) .* and \(5, 6\) in the network"),
        ([first], "its tensors hold 30 weights, the instance 45"),
        ([first, {**second, "offset": 29}], "2.weight, 15 weights from 29 on, does not continue"),
        ([first, {**second, "name": "0.weight", "shape": [5, 3]}], "does not continue"),
        ([{"name": "x"}], "name, shape and offset"),
        ([{**first, "shape": [5, -6]}, second], "name, shape and offset"),
        ("all", "must be a list"),
        ([], "must be a list"),
    ):
        refused(model, with_table(table), solution, words)
    refused(model, replace(instance, metadata={}), solution, "does not name its tensors")
    assert [mask.name for mask in layer_masks(with_table([second, first]), solution.pruned)] == NAMES


def test_another_instances_solution_is_refused(model, instance):
    refused(model, instance, Solution(np.zeros(9, dtype=bool)), "for 9 weights", SolutionError)
    stamped = replace(instance, sha256="a" * 64)
    refused(model, stamped, Solution(np.zeros(45, dtype=bool), "b" * 64), "do not belong together", SolutionError)


def score_network(model, data):
    return Network("user:net", model, ("weight",), None, None, data)


def test_accuracy_and_loss_are_those_of_torch(model):
    x, y = torch.randn(230, 6), torch.arange(230) % 3
    source = open_samples(None, score_network(model, (x, y)), "test")
    told = []
    score = evaluate(model, source, progress=told.append)
    logits = model(x)
    assert score.samples == 230 and told == [100, 200, 230]
    assert score.accuracy == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert score.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-6)
    stopped = evaluate(model, source, should_stop=lambda: bool(told.pop(0) > 100) if told else True)
    assert stopped.samples == 100
    assert evaluate(model, source, should_stop=lambda: True) is None


def test_scoring_says_what_does_not_fit(model):
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    for net, data, words in (
        (model, (torch.randn(4, 7), y), r"does not take inputs of shape \(7,\)"),
        (model, (x, y + 1), r"labels must lie in \[0, 2\], the network's classes, got 1 … 3: they count from 1"),
        (torch.nn.Flatten(0), (x, y), "one output a sample makes no classes: declare the loss"),
    ):
        with pytest.raises((InstanceError, UsageError), match=words):
            evaluate(net, open_samples(None, score_network(net, data), "test"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
def test_cuda_asked_for_and_absent(caplog):
    assert torch_device("auto").type == torch_device("cpu").type == "cpu" and not caplog.text
    assert torch_device("cuda").type == "cpu" and "torch finds no CUDA device" in caplog.text


def test_density_is_the_kept_fraction_of_each_cell():
    pruned = np.random.default_rng(0).random((30, 7, 3, 3)) < 0.6
    np.testing.assert_array_equal(kept_density(pruned), 1.0 - pruned.reshape(30, 63))
    cells = kept_density(pruned, 10, 9)
    expected = 1 - pruned.reshape(10, 3, 9, 7).mean((1, 3))
    np.testing.assert_allclose(cells, expected)
    uneven = kept_density(pruned, 7, 11)
    assert uneven.shape == (7, 11) and uneven.min() >= 0 and uneven.max() <= 1
    assert kept_density(np.zeros(5, dtype=bool)).tolist() == [[1, 1, 1, 1, 1]]
    assert not kept_density(np.ones((500, 900), dtype=bool)).any()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_show_every_layer(tmp_path, suffix):
    rng = np.random.default_rng(0)
    layers = [LayerMask(f"layer{i}.weight", rng.random((9, 40)) < i / 6) for i in range(6)]
    path = tmp_path / f"masks{suffix}"
    draw_masks(path, layers, "test")
    if suffix == ".png":
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 800
        assert len(np.unique(pixels)) > 20
    else:
        assert path.read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_pictures_that_cannot_be_drawn(tmp_path):
    layers = [LayerMask("w", np.ones((2, 2), dtype=bool))]
    with pytest.raises(UsageError, match=r"must end in \.png"):
        draw_masks(tmp_path / "masks.gif", layers)
    with pytest.raises(OutputError, match="cannot be written"):
        draw_masks(tmp_path / "no" / "masks.png", layers)
