"""The public checkpoints beside the repository score what their README says, through the package's readers."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cbs_opt import Budget, GradientFactor, Instance, solve  # noqa: E402
from cbs_opt.instances.apply import apply  # noqa: E402
from cbs_opt.instances.checkpoints import load_checkpoint  # noqa: E402
from cbs_opt.instances.data import open_samples  # noqa: E402
from cbs_opt.instances.fisher import tensor_table  # noqa: E402
from cbs_opt.instances.networks import load_network  # noqa: E402
from cbs_opt.instances.scores import evaluate  # noqa: E402

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def data(shared_instances):
    return shared_instances.parent


def loaded(data, name, checkpoint):
    network = load_network(name)
    load_checkpoint(network.model, data / checkpoint)
    return network


def accuracy(network, path, limit=None):
    return evaluate(network.model, open_samples(path, network, "test", limit)).accuracy


@pytest.mark.parametrize(("sparsity", "expected"), [(0.0, 93.97), (0.9, 90.28), (0.98, 32.25)])
def test_mlpnet_pruned_by_magnitude_scores_as_published(data, sparsity, expected):
    network = loaded(data, "mlpnet", "mlpnet-mnist.npz")
    tensors = {name: dict(network.model.named_parameters())[name].detach() for name in network.prunable}
    weights = np.concatenate([tensor.numpy().ravel() for tensor in tensors.values()])
    table = tensor_table(list(tensors), [tuple(tensor.shape) for tensor in tensors.values()])
    budget = Budget(math.ceil(sparsity * weights.size))
    curvature = GradientFactor(np.zeros((1, weights.size), np.float32), 1.0)
    instance = Instance(weights, curvature, budget, metadata={"tensors": table})
    apply(network.model, instance, solve(instance, "magnitude"))
    assert 100 * accuracy(network, data / "mnist-images.npz") == pytest.approx(expected, abs=0.011)


@pytest.mark.parametrize(
    ("name", "checkpoint", "images", "limit", "expected", "within"),
    [
        ("cifarnet", "cifarnet-cifar10.npz", "cifar10-test.npz", 2000, 0.8193, 0.03),
        ("resnet20", "resnet20-cifar10.npz", "cifar10-test.npz", 500, 0.9143, 0.04),
        ("mobilenetv1-0.75", "mobilenetv1-0.75-imagenet.npz", "imagenet-sample-1000.npz", 60, 0.832, 0.15),
    ],
)
def test_a_part_of_the_images_scores_near_the_whole(data, name, checkpoint, images, limit, expected, within):
    network = loaded(data, name, checkpoint)
    assert accuracy(network, data / images, limit) == pytest.approx(expected, abs=within)
