"""Networks: the tensors that the papers prune, users' factories, and inputs prepared as they should be."""

import sys

import pytest

torch = pytest.importorskip("torch")

from cbs_opt.errors import InstanceError, UsageError  # noqa: E402
from cbs_opt.instances.networks import load_network, network_names  # noqa: E402
from cbs_opt.instances.preparation import Preparation  # noqa: E402

PRUNED = {
    "mlpnet": ([31_360, 800, 200], (784,)),
    "cifarnet": ([2_400, 25_600, 51_200, 36_864, 640], (3, 32, 32)),
    "resnet20": ([2_304] * 6 + [4_608] + [9_216] * 5 + [18_432] + [36_864] * 5, (3, 32, 32)),
    "digits-mlp": ([2_560, 800, 200], (64,)),
}


def sizes(network):
    parameters = dict(network.model.named_parameters())
    return [parameters[name].numel() for name in network.prunable]


@pytest.mark.parametrize("name", PRUNED)
def test_exactly_the_tensors_of_the_papers_are_pruned(name):
    network = load_network(name)
    expected, inputs = PRUNED[name]
    assert sizes(network) == expected
    assert not network.model.training
    with torch.no_grad():
        assert network.model(torch.zeros(2, *inputs)).shape == (2, network.classes)


def test_mobilenet_has_its_thirteen_blocks_at_every_width():
    full = load_network("mobilenetv1")
    assert sum(sizes(full)) == 4_209_088
    assert sizes(full)[0] == 864 and sizes(full)[-1] == 1_024_000
    depthwise = [size for name, size in zip(full.prunable, sizes(full), strict=True) if ".dw." in name]
    assert len(depthwise) == 13 and sum(depthwise) == 44_640
    assert sum(sizes(load_network("mobilenetv1-0.75"))) == 2_568_144
    small = load_network("mobilenetv1-0.25")
    with torch.no_grad():
        assert small.model(small.prepare(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))).shape == (1, 1000)


def test_an_unknown_network_is_told_what_is_known():
    with pytest.raises(UsageError, match="'lenet' is not a known network: mlpnet, cifarnet"):
        load_network("lenet")
    with pytest.raises(UsageError, match="mobilenetv1-900"):
        load_network("mobilenetv1-900")
    assert "resnet20" in network_names()


def test_pixels_become_what_the_checkpoints_expect():
    images = torch.arange(3 * 28 * 28, dtype=torch.int64).reshape(3, 28, 28).to(torch.uint8)
    x = load_network("mlpnet").prepare(images)
    assert x.shape == (3, 784) and x.dtype == torch.float32
    torch.testing.assert_close(x, ((images.double() / 255 - 0.1307) / 0.3081).flatten(1).float())
    mobile = load_network("mobilenetv1").prepare(torch.full((1, 224, 224, 3), 200, dtype=torch.uint8))
    torch.testing.assert_close(mobile, torch.full((1, 3, 224, 224), 200 / 127.5 - 1))


def test_channels_first_or_last_flat_or_floating_are_the_same_image():
    prepare = load_network("cifarnet").prepare
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    expected = prepare(images)
    assert expected.shape == (4, 3, 32, 32)
    torch.testing.assert_close(prepare(images.permute(0, 3, 1, 2)), expected)
    torch.testing.assert_close(prepare(images / 255), expected)
    grey = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
    mlp = load_network("mlpnet").prepare
    for form in (grey.flatten(1), grey.unsqueeze(1), grey.unsqueeze(3)):
        torch.testing.assert_close(mlp(form), mlp(grey))


def test_normalisation_can_be_replaced():
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    ours = load_network("resnet20", mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    torch.testing.assert_close(ours.prepare(images), load_network("cifarnet").prepare(images))
    torch.testing.assert_close(load_network("resnet20").prepare(images), images.permute(0, 3, 1, 2) / 127.5 - 1)
    for mean, std, words in (
        ((1, 2), None, "`mean` must be one number or 3"),
        (None, (0,), "`std` must be above 0"),
        ((float("nan"),), None, "finite"),
    ):
        with pytest.raises(UsageError, match=words):
            load_network("resnet20", mean=mean, std=std)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "28 × 28, got 32 × 32 × 3"),
        (torch.zeros(2, dtype=torch.uint8), "single numbers"),
        (torch.full((2, 28, 28), 7.0), r"must lie in \[0, 1\].* from 7 to 7"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, words):
    with pytest.raises(InstanceError, match=words):
        load_network("mlpnet").prepare(images)


def test_preparation_of_any_shape_finds_the_channels():
    prepare = Preparation(None)
    assert prepare(torch.zeros(2, 5, 6)).shape == (2, 1, 5, 6)
    assert prepare(torch.zeros(2, 5, 6, 3)).shape == prepare(torch.zeros(2, 3, 5, 6)).shape == (2, 3, 5, 6)
    with pytest.raises(UsageError, match="3 numbers, the images have 1 channels"):
        Preparation(None, mean=(0, 0, 0))(torch.zeros(2, 5, 6))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the current directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    names = []

    def write(text):
        names.append(f"user_module_{len(names)}_{tmp_path.name.replace('-', '_')}")
        (tmp_path / f"{names[-1]}.py").write_text(text, encoding="utf-8")
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.matrix = nn.Parameter(torch.zeros(5, 2))

    def forward(self, x):
        return self.norm(self.inner(self.table(x).mean(1))) @ self.matrix

def alone():
    return Net().train()

def with_data():
    return Net(), (torch.zeros(3, 2, dtype=torch.long), torch.tensor([0, 1, 0]))

def with_both():
    return Net(), [1], [2]

def nothing():
    return {"net": Net()}

def broken_off():
    return 4, 5

def flat():
    return nn.LayerNorm(3)

def broken():
    raise ZeroDivisionError("no luck")
"""


def test_a_users_factory_is_found_in_the_current_directory(module):
    name, before = module(FACTORY), list(sys.path)
    alone = load_network(f"{name}:alone")
    assert alone.prunable == ("inner.weight",)
    assert not alone.model.training
    assert (alone.data, alone.test_data, alone.prepare, alone.classes) == (None, None, None, None)
    assert len(load_network(f"{name}:with_data").data) == 2
    both = load_network(f"{name}:with_both")
    assert (both.data, both.test_data) == ([1], [2])
    assert load_network(f"{name}:alone", mean=[0.5]).prepare(torch.ones(1, 2, 2)).shape == (1, 1, 2, 2)
    assert sys.path == before


def test_a_factory_that_fails_is_told_in_one_sentence(module):
    name = module(FACTORY)
    for spec, words in (
        (f"{name}:nothing", "a dictionary must have `model`"),
        (f"{name}:broken_off", r"must return a model, \(model, data\)"),
        (f"{name}:flat", "no parameter with two axes"),
        (f"{name}:broken", "fails with ZeroDivisionError: no luck"),
        (f"{name}:absent", "has no function 'absent'"),
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all'"),
        (f"{module('import no_such_package')}:f", "there is no module 'no_such_package'"),
        (f"{module('def f(:')}:f", "fails with SyntaxError"),
        (":f", "must be module:factory"),
    ):
        with pytest.raises(UsageError, match=words):
            load_network(spec)
