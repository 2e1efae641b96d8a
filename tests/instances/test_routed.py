"""Mixtures of experts: which weights a sample uses depends on the sample."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from cbs_opt import apply, export, prune, solve  # noqa: E402
from cbs_opt.instances.output_errors import output_error_gradients  # noqa: E402
from cbs_opt.instances.prunable import select  # noqa: E402
from cbs_opt.instances.reconstruction import input_covariances  # noqa: E402


class Routed(nn.Module):
    """Each sample goes through the expert that the sign of its first entry names; the last one gets none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        h = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                h = h.index_add(0, rows, expert(x[rows]))
        return self.out(torch.tanh(h))


@pytest.fixture
def data():
    """40 samples, of which the first 10 go to the first expert."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    x[:10, 0] = -x[:10, 0].abs()
    return x, torch.arange(40) % 2


def names(instance):
    return [tensor["name"] for tensor in instance.metadata["tensors"]]


@pytest.mark.parametrize("source", ["reconstruction", "kfac"])
def test_experts_that_the_first_sample_does_not_use_are_found(data, source, caplog):
    x, y = data
    with caplog.at_level("WARNING", "cbs_opt"):
        instance = export(Routed(), x, y, source=source, sparsity=0.5)
    assert names(instance) == ["experts.0.weight", "experts.1.weight", "out.weight"]
    assert "experts.2.weight is left out" in caplog.text and "does not use it on these samples" in caplog.text


def test_an_expert_counts_the_samples_that_it_gets(data, caplog):
    x, _ = data
    with caplog.at_level("WARNING", "cbs_opt"):
        layers = input_covariances(Routed(), x, ["experts.0.weight", "experts.1.weight", "experts.2.weight"])
    first, second, third = (layer.ranges[0].covariance for layer in layers)
    X = x.double().numpy()
    left = X[:, 0] <= 0
    np.testing.assert_allclose(first, X[left].T @ X[left] / 40, rtol=1e-6)
    np.testing.assert_allclose(second, X[~left].T @ X[~left] / 40, rtol=1e-6)
    level = (first.diagonal().mean() + second.diagonal().mean()) / 2
    np.testing.assert_allclose(third, level * np.eye(4))
    assert "experts.2.weight: no sample reaches it" in caplog.text


def test_an_expert_with_other_samples_than_before_has_no_target(data):
    x, _ = data
    network, original = Routed(), Routed()
    original.load_state_dict(network.state_dict())
    with torch.no_grad():
        network.out.weight.mul_(0.5)
    layouts = {t.name: t.layout for t in select(network).tensors if not t.name.startswith("experts.2")}
    same = output_error_gradients(network, original, x, layouts)
    assert np.abs(same["out.weight"]).max() > 0 and not same["experts.0.weight"].any()
    network.forward = lambda x: Routed.forward(network, x * torch.tensor([-1.0, 1, 1, 1]))  # other experts
    other = output_error_gradients(network, original, x, layouts)
    assert not other["experts.0.weight"].any() and not other["experts.1.weight"].any()
    assert np.abs(other["out.weight"]).max() > 0


@pytest.mark.parametrize("options", [{}, {"stages": 2}, {"sequential": True}, {"samples": 2}])
def test_a_mixture_is_pruned(data, options):
    result = prune(Routed(), data, 0.5, held_out=data, time_limit=1.0, **options)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_layer_without_gradients_is_named(data, caplog):
    class Gated(Routed):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 2)

        def forward(self, x):
            return super().forward(x) + 0 * self.gate(x).argmax(1, keepdim=True)

    with caplog.at_level("WARNING", "cbs_opt"):
        export(Gated(), *data, source="kfac", sparsity=0.5)
    assert "gate.weight: the loss has no gradient by its outputs" in caplog.text and "--exclude" in caplog.text


def experts_of(W, x, h, products):
    """The outputs of each expert for its samples, h with them."""
    chosen = (x[:, 0] > 0).long()
    for k in range(len(W)):
        rows = (chosen == k).nonzero()[:, 0]
        if len(rows):
            h = h.index_add(0, rows, products(x[rows], k))
    return h


ROUTED = {
    "rows of a stack": lambda s, x, h: experts_of(s.stack, x, h, lambda a, k: functional.linear(a, s.stack[k])),
    "transposed": lambda s, x, h: experts_of(s.stack, x, h, lambda a, k: a @ s.stack[k].T),
    "sorted": lambda s, x, h: torch.zeros_like(h).index_copy(
        0,
        (x[:, 0] > 0).long().argsort(stable=True),
        functional.grouped_mm(
            x[(x[:, 0] > 0).long().argsort(stable=True)],
            s.stack.mT,
            offs=torch.bincount((x[:, 0] > 0).long(), minlength=len(s.stack)).cumsum(0).int(),
        ),
    ),
}
ALL = {
    "bmm": lambda s, x, h: torch.bmm(x.expand(3, -1, -1), s.stack.mT).sum(0),
    "baddbmm": lambda s, x, h: torch.baddbmm(torch.zeros(3, len(x), 4), x.expand(3, -1, -1), s.stack.mT).sum(0),
    "matmul": lambda s, x, h: (x @ s.stack.mT).sum(0),
    "from the left": lambda s, x, h: (s.stack @ x.T).sum(0).T,
    "einsum": lambda s, x, h: torch.einsum("bi,eoi->beo", x, s.stack).sum(1),
    "einsum over the weight first": lambda s, x, h: torch.einsum("eoi,...i", s.stack, x).sum(-2),
    "einsum in turns": lambda s, x, h: torch.einsum("ebi,eoi->ebo", x.expand(3, -1, -1), s.stack).sum(0),
}


class Stacked(nn.Module):
    """The same experts in one tensor (experts, outputs, inputs), or (experts, inputs, outputs)."""

    def __init__(self, modules, how, inputs_first):
        super().__init__()
        W = torch.stack([expert.weight.detach() for expert in modules.experts])
        self.w = nn.Parameter(W.mT.contiguous() if inputs_first else W)
        self.out, self.how, self.inputs_first = modules.out, how, inputs_first

    @property
    def stack(self):
        return self.w.mT if self.inputs_first else self.w

    def forward(self, x):
        return self.out(torch.tanh(self.how(self, x, x.new_zeros(len(x), 4))))


class Dense(Routed):
    """All samples go through all experts."""

    def forward(self, x):
        return self.out(torch.tanh(sum(expert(x) for expert in self.experts)))


def without_biases(model):
    for expert in model.experts:
        expert.bias = None
    return model


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("source", ["reconstruction", "kfac"])
@pytest.mark.parametrize("how", [*ROUTED, *ALL])
def test_a_stack_of_matrices_is_as_many_layers(data, source, how, inputs_first):
    if how == "sorted" and not hasattr(functional, "grouped_mm"):
        pytest.skip("torch has no grouped_mm")
    x, y = data
    modules = without_biases(Routed() if how in ROUTED else Dense())
    if how in ROUTED:  # the third expert gets samples too, so that nothing is left out
        x = torch.cat([x, x])
        y = torch.cat([y, y])
        modules.experts = modules.experts[:2]
    stacked = Stacked(modules, {**ROUTED, **ALL}[how], inputs_first)
    options = {"source": source, "sparsity": 0.5, "curvature": "hessian", "damping": 1e-3}
    expected = export(modules, x, y, **options)
    with torch.no_grad():
        torch.testing.assert_close(stacked(x), modules(x))
    found = export(stacked, x, y, names=["w", "out.weight"], **options)
    np.testing.assert_array_equal(found.weights, expected.weights)
    np.testing.assert_allclose(hessian(found), hessian(expected), rtol=1e-5, atol=1e-6)


def hessian(instance):
    H = np.zeros((instance.n, instance.n))
    for k in range(instance.curvature.number_of_blocks):
        part = instance.curvature.block_slice(k)
        H[part, part] = instance.curvature.block(k)
    return H


@pytest.mark.parametrize("inputs_first", [False, True])
def test_a_pruned_stack_goes_back_where_it_was(data, inputs_first):
    model = Stacked(without_biases(Dense()), ALL["einsum"], inputs_first)
    before = model.w.detach().clone()
    instance = export(model, *data, names=["w"], source="reconstruction", sparsity=0.5)
    solution = solve(instance, "magnitude", objective="selection")
    apply(model, instance, solution)
    order = before.mT if inputs_first else before
    kept = order.contiguous().flatten()[torch.from_numpy(~solution.pruned)]
    after = (model.w.mT if inputs_first else model.w).detach().contiguous().flatten()
    assert int((after == 0).sum()) == 24 and torch.equal(after[torch.from_numpy(~solution.pruned)], kept)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bi,eoi->bo", "summed in an einsum"),
        ("bo,eoo->bo", "takes a diagonal"),
        ("bi,eoj->beo", "summed in an einsum"),
    ],
)
def test_sums_that_are_no_products_are_left_out(data, equation, reason, caplog):
    def how(s, x, h):
        made = torch.einsum(equation, x, s.stack)
        return made if made.dim() == 2 else made.sum(1)

    model = Stacked(without_biases(Dense()), how, False)
    with caplog.at_level("WARNING", "cbs_opt"):
        instance = export(model, *data, names=["w", "out.weight"], source="reconstruction", sparsity=0.5)
    assert names(instance) == ["out.weight"] and reason in caplog.text
