"""From a network and samples to an instance: in memory, on disk, of every form."""

import numpy as np
import pytest

import cbs_opt
from cbs_opt import GradientFactor, InstanceError, UsageError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from cbs_opt.instances.export import Export, export  # noqa: E402
from cbs_opt.instances.gradients import per_sample_gradients  # noqa: E402
from cbs_opt.instances.recipe import Recipe  # noqa: E402


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return model.train(), torch.randn(60, 2, 6, 6), torch.randint(5, (60,))


def gradients_of(network):
    model, x, y = network
    modes = [module.training for module in model.modules()]
    G = per_sample_gradients(model.eval(), x, y, ["0.weight", "4.weight"]).double().numpy()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return G


def dense_form(G, sizes, damping):
    H = np.zeros((G.shape[1], G.shape[1]))
    ends = np.cumsum(sizes)
    for start, stop in zip(ends - sizes, ends, strict=True):
        H[start:stop, start:stop] = G[:, start:stop].T @ G[:, start:stop] / len(G) + damping * np.eye(stop - start)
    return H


def matrix(instance):
    curvature = instance.curvature
    return np.block(
        [
            [curvature.block(k) if k == j else np.zeros((b, c)) for j, c in enumerate(curvature.block_sizes)]
            for k, b in enumerate(curvature.block_sizes)
        ]
    )


FORMS = {
    "gradients": ({}, [152]),
    "gradients by layer": ({"curvature": "gradients", "blocks": "layer"}, [72, 80]),
    "hessian by layer": ({"curvature": "hessian"}, [72, 80]),
    "inverse by size": ({"blocks": 50}, [50, 22, 50, 30]),
    "inverse by row": ({"blocks": "row", "dtype": "float32"}, [18] * 4 + [16] * 5),
    "batches": ({"batch": 4, "first_order": True}, [152]),
    "relative damping": ({"relative_damping": 0.5, "blocks": "layer", "first_order": True}, [72, 80]),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("memory", [None, 5_000])
def test_every_form_in_memory_and_on_disk(name, memory, network, tmp_path):
    options, sizes = FORMS[name]
    G = gradients_of(network)
    if options.get("batch"):
        means = G.reshape(-1, options["batch"], G.shape[1]).mean(1)
        G = options["batch"] ** 0.5 * (means - G.mean(0)) + G.mean(0)  # the scale of single samples
    damping = 1e-5
    if "relative_damping" in options:
        damping = options["relative_damping"] * np.square(G).mean()
    path = tmp_path / "instance.npz"
    if memory is None or Recipe(**options).form == "gradients":
        here = export(*network, sparsity=0.5, memory=memory, **options)
    else:
        with pytest.raises(UsageError, match="of which memory has"):
            export(*network, memory=memory, **options)
        here = export(*network, sparsity=0.5, **options)
    if memory is not None and here.curvature.kind != "gradients":
        memory = 5 * 10**6  # a block needs some
    there = export(*network, sparsity=0.5, memory=memory, path=path, **options)
    assert list(tmp_path.iterdir()) == [path]
    for instance in (here, there):
        assert instance.curvature.block_sizes.tolist() == sizes
        tolerance = 1e-3 if options.get("dtype") == "float32" else 1e-6
        H = dense_form(G, np.array(sizes), damping)
        assert np.abs(matrix(instance) - H).max() <= tolerance * np.abs(H).max()
        assert instance.budget.total == 76
        assert instance.metadata["damping"] == pytest.approx(damping)
        if options.get("first_order"):
            np.testing.assert_allclose(instance.linear, gradients_of(network).mean(0), atol=1e-7)
        else:
            assert instance.linear is None
    cbs_opt.write_instance(tmp_path / "again.npz", here)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_mini_batches_estimate_the_matrix_of_single_samples():
    """Against a direct computation: the mean of g gᵀ over single samples, for batches of every size."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].bias += torch.tensor([2.0, 0.0, -2.0])  # no minimum: the mean gradient is not small
    x, y = torch.randn(10_000, 3), torch.randint(3, (10_000,))
    names = ["0.weight", "2.weight"]
    single = per_sample_gradients(model, x, y, names).double().numpy()
    direct, mean = single.T @ single / len(single), single.mean(0)
    assert np.linalg.norm(mean) ** 2 > 0.05 * np.trace(direct)
    for batch in (1, 4, 20):
        made = export(model, x, y, batch=batch, damping=0.0, first_order=True)
        assert np.linalg.norm(made.curvature.block(0) - direct) < 0.2 * np.linalg.norm(direct), batch
        np.testing.assert_allclose(made.linear, mean, atol=1e-6)


def test_weights_and_metadata(network):
    model, x, y = network
    instance = export(model, x, y, ["4.weight", "0.weight"], metadata={"network": "mine"})
    expected = torch.cat([model[4].weight.flatten(), model[0].weight.flatten()]).detach().double().numpy()
    np.testing.assert_array_equal(instance.weights, expected)
    metadata = instance.metadata
    assert [(t["name"], t["shape"], t["offset"]) for t in metadata["tensors"]] == [
        ("4.weight", [5, 16], 0),
        ("0.weight", [4, 2, 3, 3], 80),
    ]
    assert (metadata["network"], metadata["samples"], metadata["batch"]) == ("mine", 60, 1)
    model.eval()
    with torch.no_grad():
        outputs = model(x)
    assert metadata["dense_accuracy"] == pytest.approx(float((outputs.argmax(1) == y).float().mean()))
    assert metadata["dense_loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-5)


def test_reconstruction(network, tmp_path):
    model, x, y = network
    path = tmp_path / "instance.npz"
    here = export(model, x, y, source="reconstruction", relative_damping=0.01, blocks=10)
    there = export(model, x, y, source="reconstruction", relative_damping=0.01, blocks=10, path=path)
    assert here.curvature.block_sizes.tolist() == [10, 8] * 4 + [10, 6] * 5
    assert here.curvature.shared.tolist() == [0, 1] * 4 + [2, 3] * 5
    assert there.curvature.stored.block_sizes.tolist() == [10, 8, 10, 6]
    np.testing.assert_array_equal(here.curvature.stored.flat, there.curvature.stored.flat)
    cbs_opt.write_instance(tmp_path / "again.npz", here)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    first, second = here.metadata["damping"]
    model.eval()
    with torch.no_grad():
        hidden = model[:4](x).double().numpy()
    H = hidden.T @ hidden / 60
    assert second == pytest.approx(0.01 * np.diag(H).mean(), rel=1e-5) and first != second
    expected = H[:10, :10] + second * np.eye(10)
    np.testing.assert_allclose(here.curvature.block(8), expected, atol=1e-5 * np.abs(H).max())


def test_a_regression_with_its_own_loss(network):
    model, x, _ = network

    def squared_error(outputs, targets):
        return ((outputs - targets) ** 2).mean()

    instance = export(model, x, torch.randn(60, 5), loss=squared_error)
    assert isinstance(instance.curvature, GradientFactor)
    assert "dense_accuracy" not in instance.metadata and "squared_error" in instance.metadata["hessian"]


def test_a_stop_keeps_the_gradients_that_are_there(network, tmp_path):
    model, x, y = network
    seen = []
    job = Export(model, x, y, None, Recipe(), should_stop=lambda: True, progress=lambda *now: seen.append(now))
    job._chunk_bytes = 20_000
    instance = job.instance()
    m = instance.curvature.m
    assert 1 <= m < 60 and instance.metadata["samples"] == m and instance.metadata["interrupted"]
    assert ("gradients", m, 60) in seen
    # A file that is written while the gradients come has been promised all of them.
    job = Export(model, x, y, None, Recipe(memory=1), should_stop=lambda: True)
    with pytest.raises(KeyboardInterrupt):
        job.write(tmp_path / "instance.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, x, y: (m, x, y[:-1]), InstanceError, "there are 60 inputs but 59 labels"),
        (lambda m, x, y: (m, x[:0], y[:0]), InstanceError, "0 samples are too few"),
        (lambda m, x, y: (m, x, y + 1), InstanceError, r"labels must lie in \[0, 4\], .* got 1 … 5"),
        (lambda m, x, y: (m, x, y.float()), InstanceError, "labels must be class numbers, int64"),
        (lambda m, x, y: (m, x[:, :1], y), InstanceError, r"does not take inputs of shape \(1, 6, 6\)"),
        (lambda m, x, y: (m, x / 0, y), InstanceError, "the loss of the samples is not finite"),
        (
            lambda m, x, y: (m, x, y, ["7.weight"]),
            UsageError,
            "the network has no parameter '7.weight'; it has 0.w",
        ),
        (lambda m, x, y: (m, x, y, ["0.weight"] * 2), UsageError, "named twice"),
        (lambda m, x, y: (nn.BatchNorm1d(3), x, y), UsageError, "two axes or more"),
    ],
)
def test_what_does_not_fit_together(change, error, message, network):
    with pytest.raises(error, match=message):
        export(*change(*network))


def test_single_precision_that_is_too_coarse_is_refused(network, tmp_path):
    model, x, y = network
    path = tmp_path / "instance.npz"
    with pytest.raises(InstanceError, match=r"not positive in float32: raise the damping or store float64"):
        export(model, 100 * x, y, blocks="layer", damping=1e-9, dtype="float32", path=path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
def test_where_there_is_no_cuda_the_cpu_works(network, caplog):
    there, here = (export(*network, device=device) for device in ("cuda", "cpu"))
    assert there.curvature.diagonal().tolist() == here.curvature.diagonal().tolist()
    assert "torch finds no CUDA device" in caplog.text


@pytest.mark.shared
def test_resnet20_equals_a_loop_of_autograd(shared_instances, tmp_path):
    from cbs_opt.instances.checkpoints import load_checkpoint
    from cbs_opt.instances.data import read_samples
    from cbs_opt.instances.networks import load_network

    data = shared_instances.parent
    network = load_network("resnet20")
    load_checkpoint(network.model, data / "resnet20-cifar10.npz")
    network.model.double()  # in single precision the loop itself is off by more than 1e-6
    samples = read_samples(data / "cifar10-test.npz", network, "test", 4)
    instance = export(network.model, samples.inputs, samples.labels, network.prunable)
    parameters = [dict(network.model.named_parameters())[name] for name in network.prunable]
    assert instance.n == 267_264
    for row, x, y in zip(instance.curvature.gradients, samples.inputs, samples.labels, strict=True):
        loss = nn.functional.cross_entropy(network.model(x[None]), y[None])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).numpy()
        assert np.linalg.norm(row - expected) <= 1e-6 * np.linalg.norm(expected)


def test_a_stream_of_another_size_leaves_nothing(tmp_path):
    from cbs_opt.files.npz import Stream, write_npz

    with pytest.raises(ValueError, match="has 80 bytes, the stream gave 40"):
        write_npz(tmp_path / "a.npz", {"a": Stream(np.dtype(float), (2, 5), iter([np.zeros(5)]))})
    assert not list(tmp_path.iterdir())
