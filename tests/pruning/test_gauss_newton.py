"""Steps of all kept weights together towards the outputs of the dense network."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt import UsageError  # noqa: E402
from cbs_opt.errors import CbsError  # noqa: E402
from cbs_opt.instances.data import own_source  # noqa: E402
from cbs_opt.instances.losses import declared  # noqa: E402
from cbs_opt.instances.plan import make_plan  # noqa: E402
from cbs_opt.pruning import gauss_newton  # noqa: E402
from cbs_opt.pruning.gauss_newton import Distance, preconditioner, steps  # noqa: E402
from cbs_opt.pruning.network import working_copy  # noqa: E402
from cbs_opt.pruning.statistics import reestimate  # noqa: E402

T = gauss_newton.TEMPERATURE


class NoForwardMode(torch.autograd.Function):
    """Twice its input, with a derivative backwards only."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x):
        return NoForwardMode.apply(self.layer(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.last(self.encoder(self.first(x)).mean(1))


class Tokens(nn.Module):
    """Classes of each of five places, on the last axis."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def images():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model, torch.randn(9, 2, 5, 5), torch.randint(3, (9,)), "cross-entropy"


def tokens():
    y = torch.randint(3, (9, 5))
    y[0, :3] = -100  # places that do not count
    return Tokens(), torch.randn(9, 5, 6), y, "cross-entropy"


def values():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(9, 6), torch.randn(9, 2), "mse"


def prepared(model, x, y, loss, share=0.5):
    """A copy with a random selection pruned, the dense network, samples, the selection, the distance."""
    model.eval()
    source = own_source((x, y), model, "data")
    plan = make_plan(model, None, None, source="kfac", run=lambda network: network(x[:2]))
    found = working_copy(model, plan)
    pruned = np.random.default_rng(0).random(plan.weights.size) < share
    found.take(np.where(pruned, 0.0, plan.weights))
    return found, copy.deepcopy(model), source, pruned, Distance(declared(loss))


def distance_of(model, dense, x, y, loss):
    """The mean distance, written down anew."""
    z, target = model(x), dense(x)
    if loss == "mse":
        return 0.5 * (z - target).square().sum() / z.numel()
    if z.dim() == 3:
        z, target = z[y != -100], target[y != -100]
    log, aim = torch.log_softmax(z / T, 1), torch.softmax(target / T, 1)
    return T * T * nn.functional.kl_div(log, aim, reduction="batchmean")


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("case", [images, tokens, values])
def test_gradient_and_products(case, chunk, monkeypatch):
    """The gradient is that of the distance; where dense and pruned network agree, the matrix is its Hessian."""
    torch.manual_seed(0)
    monkeypatch.setattr(gauss_newton, "_CHUNK_BYTES", chunk)
    model, x, y, loss = case()
    found, dense, source, pruned, distance = prepared(model, x, y, loss)
    names = [place.name for place in found.places]
    for target in (dense, copy.deepcopy(found.model)):
        made = gauss_newton._Model(found, target, source, pruned, distance, lambda done, total: None)
        held = {name: p.detach().clone() for name, p in found.model.named_parameters()}

        def value(flat, held=held, target=target):
            weights, start = dict(held), 0
            for name in names:
                size = held[name].numel()
                weights[name] = flat[start : start + size].reshape(held[name].shape)
                start += size
            return distance_of(
                lambda inputs: torch.func.functional_call(found.model, weights, (inputs,)), target, x, y, loss
            )

        flat = torch.cat([held[name].reshape(-1) for name in names])
        # Rows of these layers lie in the order of their tensors.
        gradient = np.where(pruned, 0.0, torch.func.grad(value)(flat).detach().numpy())
        with gauss_newton._norms_as_factors(found.model):
            np.testing.assert_allclose(made.gradient(), gradient, atol=1e-6)
    hessian = torch.func.hessian(value)(flat).detach().double().numpy()
    d = np.where(pruned, 0.0, np.random.default_rng(1).normal(size=pruned.size))
    with gauss_newton._norms_as_factors(found.model):
        np.testing.assert_allclose(made.product(d), np.where(pruned, 0.0, hessian @ d), atol=3e-6)
    assert "forward" not in vars(found.model[1] if case is images else found.model)


def test_the_step_is_that_of_least_squares(monkeypatch):
    """One layer, squared distance: conjugate gradients without damping end at the minimum in as many steps."""
    torch.manual_seed(0)
    monkeypatch.setattr(gauss_newton, "DAMPING", 0.0)
    model, x, y = nn.Linear(6, 1, bias=False), torch.randn(40, 6), torch.randn(40, 1)
    found, dense, source, _, distance = prepared(model, x, y, "mse")
    pruned = np.array([False, True, False, False, True, False])
    found.take(np.where(pruned, 0.0, 1.0))
    K = preconditioner(found, source, distance, 0)
    *_, last = steps(found, dense, source, pruned, distance, K)
    best = torch.linalg.lstsq(x[:, ~pruned].double(), dense(x).detach().double()).solution.ravel()
    np.testing.assert_allclose((found.weights + last)[~pruned], best.numpy(), atol=1e-5)
    assert not last[pruned].any()


def test_the_preconditioner_is_the_curvature_of_one_layer():
    """For one row and squared distances K is the Hessian, up to its damping."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 1, bias=False), torch.randn(40, 6), torch.randn(40, 1)
    found, _, source, _, distance = prepared(model, x, y, "mse")
    H = (x.T @ x / 40).double().numpy()
    H[np.diag_indices(6)] += 0.01 * H.diagonal().mean()
    np.testing.assert_allclose(preconditioner(found, source, distance, 0).block(0), H, rtol=1e-5)


def test_drawn_gradients_have_the_curvature_as_second_moment():
    torch.manual_seed(0)
    distance = Distance(declared("cross-entropy"))
    z = torch.tensor([[2.0, -1.0, 0.5]]).repeat(40000, 1).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    (g,) = torch.autograd.grad(distance.drawn(z, torch.ones(40000, 1), generator), z)
    C = torch.stack([distance.curvature(z[:1].detach(), e[None])[0] for e in torch.eye(3)])
    torch.testing.assert_close(g.T @ g / 40000, C, atol=5e-3, rtol=0.0)


# Within `prune`

FAST = {"solver": "magnitude", "threads": 1, "relative_damping": 0.01, "samples": 200}


def blobs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    centres = 2 * torch.randn(4, 12, generator=torch.Generator().manual_seed(7))
    return centres[y] + 3 * torch.randn(count, 12, generator=generator), y


@pytest.fixture(scope="module")
def trained(train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    x, y = blobs(600)
    return train(model, x, y)


def test_each_step_lowers_the_loss(trained):
    losses = []
    for count in (0, 1, 3):
        pruned = cbs_opt.prune(trained, blobs(900), 0.85, gauss_newton=count, **FAST)
        (stage,) = pruned.stages
        assert stage.gauss_newton == count, "a step that does not pay is not counted"
        assert stage.samples == min(200 * (1 + count), 810)
        assert ("Gauss-Newton" in stage.line()) == (count > 0)
        losses.append(stage.loss)
        for layer, tensor in zip(pruned.layers, (pruned.model[k].weight for k in (0, 2, 4)), strict=True):
            assert not bool(tensor[torch.from_numpy(layer.pruned)].any())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 4),
        ({"stages": 2}, 2),
        ({"stages": 5}, 1),
        ({"gauss_newton": 0}, 0),
        ({"held_out": 0}, 0),
        ({"update_scale": 0.0, "refit": "no"}, 0),
        ({"source": "reconstruction"}, 0),
        ({"source": "fisher"}, 0),
    ],
)
def test_steps_that_nobody_asked_for(trained, options, count):
    pruned = cbs_opt.prune(trained, blobs(300), 0.8, **(FAST | options))
    assert pruned.method.gauss_newton == count
    assert pruned.to_dict()["method"].get("gauss_newton", 0) == count


def test_no_steps_of_its_own_where_they_take_long(trained, monkeypatch, caplog):
    one = gauss_newton.operations(trained, own_source(blobs(10), trained, "data"), 200)
    assert one == 6 * gauss_newton.ITERATIONS * 200 * 2 * (12 * 24 + 24 * 24 + 24 * 4)
    monkeypatch.setattr("cbs_opt.pruning.run.OWN_OPERATIONS", 1.5 * one)
    with caplog.at_level("INFO", logger="cbs_opt"):
        pruned = cbs_opt.prune(trained, blobs(300), 0.8, **FAST)
    assert pruned.method.gauss_newton == 1 and "--gauss-newton N" in caplog.text
    asked = cbs_opt.prune(trained, blobs(300), 0.8, gauss_newton=2, **FAST)
    assert asked.method.gauss_newton == 2


@pytest.mark.parametrize("choice", ("yes", "auto"))
def test_statistics_are_those_of_the_network_after_the_steps(choice, train, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))
    x, y = blobs(600)
    train(model, x, y)
    plain = cbs_opt.prune(model, (x, y), 0.85, gauss_newton=0, recalibrate_bn=choice, held_out=100, **FAST)
    restored = []

    def noted(network, samples):
        restored.append(network[0].weight.detach().clone())
        reestimate(network, samples)

    with monkeypatch.context() as patched:  # the first call comes before the steps, the last is of magnitude alone
        patched.setattr("cbs_opt.pruning.stage.reestimate", noted)
        pruned = cbs_opt.prune(model, (x, y), 0.85, gauss_newton=15, recalibrate_bn=choice, held_out=100, **FAST)
    restored = restored[-2:-1]
    assert pruned.stages[0].gauss_newton > 0 and pruned.after.loss < plain.after.loss
    assert pruned.stages[0].recalibrated
    assert len(restored) == 1 and torch.equal(restored[0], pruned.model[0].weight), "not those of a rejected step"
    unlike = cbs_opt.prune(model, (x, y), 0.85, gauss_newton=2, recalibrate_bn="no", held_out=100, **FAST)
    if choice == "yes":
        assert not torch.equal(pruned.model[1].running_mean, plain.model[1].running_mean)
    assert torch.equal(unlike.model[1].running_mean, model[1].running_mean)


def test_a_transformer():
    """Fused attention has no forward mode; the step is made without it."""
    torch.manual_seed(0)
    model = Encoder().eval()
    x = torch.randn(300, 5, 6)
    y = model(x).argmax(1).detach()
    pruned = cbs_opt.prune(model, (x, y), 0.7, gauss_newton=1, **FAST)
    assert pruned.stages[0].gauss_newton == 1
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_is_refused(trained):
    with pytest.raises(UsageError, match="whole number of at least 0"):
        cbs_opt.prune(trained, blobs(100), 0.5, gauss_newton=-1)
    with pytest.raises(UsageError, match="reconstruction and kfac"):
        cbs_opt.prune(trained, blobs(100), 0.5, gauss_newton=1, source="fisher")
    with pytest.raises(UsageError, match="update_scale"):
        cbs_opt.prune(trained, blobs(100), 0.5, gauss_newton=1, update_scale=0.0, refit="no")


def test_nothing_is_done_without_samples_that_are_held_out(trained):
    pruned = cbs_opt.prune(trained, blobs(300), 0.8, gauss_newton=2, held_out=0, **FAST)
    assert pruned.stages[0].gauss_newton == 0


def test_a_network_without_forward_mode_stays_as_it_is(caplog):
    torch.manual_seed(0)
    model, data = Stubborn().eval(), blobs(300)
    with caplog.at_level("INFO", logger="cbs_opt"):
        pruned = cbs_opt.prune(model, data, 0.8, gauss_newton=2, **FAST)
    assert pruned.stages[0].gauss_newton == 0
    assert "forward mode" in caplog.text
    plain = cbs_opt.prune(model, data, 0.8, **FAST)
    assert torch.equal(pruned.model.layer.weight, plain.model.layer.weight)


def test_a_stop_keeps_the_steps_done(trained, monkeypatch):
    """It comes in the second step."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return steps(*args, **kwargs)

    monkeypatch.setattr("cbs_opt.pruning.stage.steps", counted)
    pruned = cbs_opt.prune(trained, blobs(900), 0.85, gauss_newton=3, should_stop=lambda: len(calls) > 1, **FAST)
    assert pruned.interrupted
    assert pruned.stages[0].gauss_newton == 1


def test_stages_continue_from_a_state(trained, tmp_path):
    options = {"gauss_newton": 1, "stages": 3, **FAST}
    whole = cbs_opt.prune(trained, blobs(900), 0.8, **options)
    done = []
    options |= {"state": tmp_path / "state"}
    cbs_opt.prune(trained, blobs(900), 0.8, on_stage=done.append, should_stop=lambda: len(done) > 0, **options)
    again = cbs_opt.prune(trained, blobs(900), 0.8, **options)
    assert len(done) == 1
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_an_unfit_network_is_told(trained):
    """Errors of the distance are the library's own."""
    found, dense, source, pruned, distance = prepared(Stubborn(), *blobs(40), "cross-entropy")
    K = preconditioner(found, source, distance, 0)
    with pytest.raises(CbsError, match="forward mode"):
        steps(found, dense, source, pruned, distance, K)


@pytest.mark.parametrize("names", ["twice in a sequence", "a list of one layer"])
def test_a_module_with_two_names(names, train):
    """It has its own tensors afterwards, and takes steps."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 12)
    body = [layer, nn.ReLU(), layer, nn.ReLU()]
    if names == "a list of one layer":
        body = [nn.Sequential(nn.ModuleList([layer] * 3)[0], nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*body, nn.Linear(12, 4))
    x, y = blobs(600)
    train(model, x, y, rate=0.01)
    pruned = cbs_opt.prune(model, (x, y), 0.6, gauss_newton=2, **FAST)
    assert pruned.stages[0].gauss_newton > 0
    assert all(type(tensor) is nn.Parameter for tensor in pruned.model.parameters())


def test_no_error_of_a_step_loses_the_network(trained, monkeypatch, caplog):
    """It comes in the second step."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no such operator")
        return steps(*args, **kwargs)

    monkeypatch.setattr("cbs_opt.pruning.stage.steps", failing)
    pruned = cbs_opt.prune(trained, blobs(900), 0.85, gauss_newton=3, **FAST)
    assert pruned.stages[0].gauss_newton == 1
    assert "no such operator" in caplog.text
