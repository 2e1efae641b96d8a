"""Per-sample gradients and the blocks made of them, against plain loops."""

import numpy as np
import pytest

from cbs_opt import InstanceError
from cbs_opt.instances.fisher import fisher_inverse_blocks, row_blocks, tensor_table

torch = pytest.importorskip("torch")

from cbs_opt.instances.gradients import per_sample_gradients  # noqa: E402
from cbs_opt.instances.training import multilayer_perceptron, one_thread, train  # noqa: E402


@pytest.fixture
def network():
    generator = torch.Generator().manual_seed(1)
    model = multilayer_perceptron([5, 4, 3], generator)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (7,), generator=generator)
    return model, x, y


@pytest.mark.parametrize("names", [["0.weight", "2.weight"], ["2.weight"], ["2.weight", "0.weight"]])
@pytest.mark.parametrize("chunk_size", [1, 3, 256])
def test_gradients_are_those_of_one_sample_at_a_time(network, names, chunk_size):
    model, x, y = network
    rows = per_sample_gradients(model, x, y, names, chunk_size=chunk_size)
    parameters = dict(model.named_parameters())
    for s in range(len(x)):
        loss = torch.nn.functional.cross_entropy(model(x[s : s + 1]), y[s : s + 1])
        expected = torch.autograd.grad(loss, [parameters[name] for name in names])
        torch.testing.assert_close(rows[s], torch.cat([g.flatten() for g in expected]))


def test_gradients_leave_the_model_alone(network):
    model, x, y = network
    before = [parameter.clone() for parameter in model.parameters()]
    rows = per_sample_gradients(model, x, y, ["0.weight"])
    assert not rows.requires_grad
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_an_unknown_tensor_is_refused(network):
    with pytest.raises(KeyError):
        per_sample_gradients(*network, ["3.weight"])


@pytest.mark.parametrize("m", [4, 40])  # Woodbury, and the block itself
def test_inverse_blocks_match_woodfisher_steps(m):
    rng = np.random.default_rng(0)
    sizes, damping = [3, 6, 1], 1e-3
    G = rng.standard_normal((m, 10))
    curvature = fisher_inverse_blocks(G, damping, sizes)
    for k, b in enumerate(sizes):
        inverse = np.eye(b) / damping
        for g in G[:, curvature.block_slice(k)]:  # one rank-one step a sample
            moved = inverse @ g
            inverse -= np.outer(moved, moved) / (m + g @ moved)
        np.testing.assert_allclose(curvature.inverse_block(k), inverse, rtol=1e-8, atol=1e-8 / damping)


def test_a_singular_block_is_refused():
    with pytest.raises(InstanceError, match="singular"):
        fisher_inverse_blocks(np.ones((2, 5)), 0.0, [5])


def test_rows_and_offsets():
    shapes = [(2, 3), (4, 2, 1)]
    assert row_blocks(shapes) == [3, 3, 2, 2, 2, 2]
    assert [entry["offset"] for entry in tensor_table(["a", "b"], shapes)] == [0, 6]


def test_training_repeats_itself(network):
    _, x, y = network

    def trained():
        generator = torch.Generator().manual_seed(2)
        model = multilayer_perceptron([5, 4, 3], generator)
        with one_thread():
            train(model, x, y, generator, epochs=3, batch_size=4)
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))
