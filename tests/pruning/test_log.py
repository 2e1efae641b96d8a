"""What the log of a run says: each thing once, with its cause."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt.instances.data import own_source  # noqa: E402
from cbs_opt.pruning.method import Method  # noqa: E402
from cbs_opt.pruning.run import Run  # noqa: E402

FAST = {"solver": "magnitude", "threads": 1}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def trained(width=10):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, 4))
    x = torch.randn(300, width)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), (x, y)


@pytest.mark.parametrize(
    ("options", "text"), [({"nm": "2:4"}, "no multiples of 4"), ({"keep_at_least": 0.6}, "every layer keeps 0.6")]
)
@pytest.mark.parametrize("stages", [1, 3])
def test_budgets_are_explained_once(stages, options, text, caplog):
    model, data = trained()
    given = {"sparsity": 0.8} if "nm" not in options else {}
    cbs_opt.prune(model, data, stages=stages, **given, **options, **FAST)
    assert sum(text in line for line in warnings(caplog)) == 1, warnings(caplog)


def test_layers_that_pruning_has_cut_off_are_no_fault_of_the_network(caplog):
    """All of the last layer is pruned: the layers before have no gradient then."""
    model, data = trained()
    options = {"layers": {"2.weight": 1.0, "0.weight": 0.5}, "gauss_newton": 1, "stages": 2, "final_stages": 1}
    cbs_opt.prune(model, data, **options, **FAST)
    assert not any("has no gradient by its outputs" in line for line in warnings(caplog)), warnings(caplog)


def test_layers_without_gradient_of_the_dense_network_are_named(caplog):
    model, data = trained()
    with torch.no_grad():
        model[2].weight.zero_()
    cbs_opt.prune(model, data, 0.5, gauss_newton=1, **FAST)
    named = [line for line in warnings(caplog) if "has no gradient by its outputs" in line]
    assert len(named) == 1 and named[0].startswith("0.weight")


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.dead = nn.Linear(10, 4), nn.Linear(10, 4)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("source", "what"), [("kfac", "curvature by kfac"), ("reconstruction", "reconstruction error")]
)
def test_what_is_left_out_is_named_by_its_source(source, what, caplog):
    _, data = trained()
    cbs_opt.prune(Unused(), data, 0.5, source=source, **FAST)
    (line,) = (line for line in warnings(caplog) if "is left out" in line)
    assert line.startswith("dead.weight") and f"its {what} cannot be computed" in line


def test_gauss_newton_steps_show_their_progress(caplog):
    model, data = trained()
    seen = []
    run = Run(
        model,
        own_source(data, model, "the data"),
        Method(sparsity=0.8, gauss_newton=2, **FAST),
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    with caplog.at_level("INFO", logger="cbs_opt"):
        run()
    steps = [row for row in seen if row[0] == "Gauss-Newton step 1 of at most 2"]
    assert len(steps) > 3 and all(0 <= done <= total for _, done, total in steps)
    assert steps == sorted(steps) and any("Gauss-Newton step 2 of" in what for what, _, _ in seen)
    assert "Gauss-Newton step 1: held-out loss" in caplog.text
