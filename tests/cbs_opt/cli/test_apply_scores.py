"""`cbs-apply` on networks of every kind: losses, metrics, magnitude beside, several solutions, ONNX, no scores."""

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt.cli.apply import main as apply_main  # noqa: E402
from cbs_opt.cli.export import main as export_main  # noqa: E402
from cbs_opt.cli.solve import main as solve_main  # noqa: E402

FACTORIES = """
import torch
from torch import nn

torch.manual_seed(0)
X, Y = torch.randn(60, 8), torch.randint(0, 4, (60,))

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
    def forward(self, x, scale=None):
        return {"hidden": self.net[0](x), "logits": self.net(x if scale is None else x * scale)}

def plain(): return mlp(), (X, Y), (X, Y)
def regression(): return nn.Sequential(*mlp()[:2], nn.Linear(12, 1)), (X, X.sum(1)), (X, X.sum(1)), "mse"
def undeclared(): return regression()[:3]
def weighted():
    data = {"x": X, "scale": torch.ones(60, 1), "labels": Y.int()}
    return Named(), data, data, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0, 1.0, 0.5])), "top-2"
class Bessel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
    def forward(self, x):
        h = self.net(x)
        return h + 0.1 * torch.special.bessel_j0(h)
def bessel(): return Bessel(), (X, Y), (X, Y)
def half(): return mlp().bfloat16(), (X.bfloat16(), Y), (X.bfloat16(), Y)
def unlabelled(): return mlp(), lambda model: [model(X[k : k + 20]) for k in (0, 20, 40)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores")
    (path / "nets_for_scores.py").write_text(FACTORIES, encoding="utf-8")
    return path


@pytest.fixture
def pruned(folder, monkeypatch):
    """`pruned(name, …)`: the report of export, solve and apply, and the network with the file's weights."""
    monkeypatch.chdir(folder)

    def run(name, *more, source="fisher", objective="selection"):
        spec = f"./nets_for_scores.py:{name}"
        from cbs_opt.instances.networks import load_network

        model = load_network(spec).model
        torch.save(model.state_dict(), "in.pt")
        options = ["--checkpoint", "in.pt", "--source", source, "--relative-damping", "0.1", "-q"]
        assert export_main([spec, *options, "-o", "i.npz", "--sparsity", "50%"]) == 0
        assert (
            solve_main(["i.npz", "--objective", objective, "--max-iterations", "50", "--solution", "s.npz", "-q"])
            == 0
        )
        files = ["i.npz", "s.npz", "--checkpoint", "in.pt", "-o", "out.pt", "--json", "r.json", "-q"]
        assert apply_main([*files, "--network", spec, *more]) == 0
        module = next(
            m for m in sys.modules.values() if getattr(m, "__file__", "") == str(folder / "nets_for_scores.py")
        )
        model.load_state_dict(torch.load("out.pt", weights_only=True))
        return json.loads((folder / "r.json").read_text()), model.eval(), module

    return run


@pytest.mark.parametrize(("source", "objective"), [("fisher", "selection"), ("reconstruction", "joint")])
def test_scores_are_those_of_an_independent_look(pruned, source, objective):
    report, model, nets = pruned("weighted", source=source, objective=objective)
    with torch.no_grad():
        logits = model(nets.X)["logits"]
    y = nets.Y
    weight = torch.tensor([1.0, 4.0, 1.0, 0.5])
    assert report["after"]["metric"] == "top-2" and report["after"]["accuracy"] is None
    best = (logits.topk(2, 1).indices == y[:, None]).any(1).double().mean()
    assert report["after"]["value"] == pytest.approx(float(best))
    assert report["after"]["loss"] == pytest.approx(
        float(nn.functional.cross_entropy(logits, y, weight)), rel=1e-5
    )
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if name.endswith("weight"))
    assert zeros == report["pruned_count"] == 72
    assert report["magnitude"]["loss"] != report["after"]["loss"]
    size = report["size"]
    assert (size["dense"], size["bitmask"]) == (4 * 144, 144 // 8 + 4 * 72)


def test_magnitude_is_the_smallest_weights(pruned):
    report, _, nets = pruned("plain")
    plain = nets.mlp()
    flat = torch.cat([plain[0].weight.flatten(), plain[2].weight.flatten()]).abs()
    cut = flat.sort().values[71]
    with torch.no_grad():
        for layer in (plain[0], plain[2]):
            layer.weight[layer.weight.abs() <= cut] = 0
        expected = nn.functional.cross_entropy(plain(nets.X), nets.Y)
    assert report["magnitude"]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_values_and_half_precision(pruned):
    report, model, nets = pruned("regression")
    y = nets.X.sum(1)
    with torch.no_grad():
        out = model(nets.X)[:, 0]
    assert report["after"]["metric"] == "r2"
    assert report["after"]["value"] == pytest.approx(
        float(1 - ((out - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()), rel=1e-4
    )
    report, model, nets = pruned("half", source="reconstruction")
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(nets.X.bfloat16()).float(), nets.Y)
    assert report["after"]["loss"] == pytest.approx(float(loss), rel=1e-3)


def test_what_cannot_be_scored_is_still_pruned(pruned, caplog, folder, capsys):
    assert pruned("unlabelled", source="reconstruction")[0]["after"] is None
    assert pruned("undeclared", source="reconstruction")[0]["after"] is None
    assert pruned("plain", "--no-score")[0]["after"] is None
    assert export_main(["./nets_for_scores.py:undeclared", "-o", "u.npz", "-q"]) == 2
    assert "declare the loss, `--loss mse`" in capsys.readouterr().err
    assert export_main(["./nets_for_scores.py:undeclared", "-o", "u.npz", "-q", "--loss", "mse"]) == 0
    assert cbs_opt.read_instance("u.npz").metadata["declared_loss"] == "mse"


def test_the_limit_on_the_drop_holds_for_one_solution_too(pruned, folder, monkeypatch, capsys):
    pruned("plain")
    monkeypatch.setattr("cbs_opt.instances.scores.cost", lambda before, after: 5.0)
    assert solve_main(["i.npz", "--solver", "obd", "--solution", "one.npz", "-q"]) == 0
    spec = ["--checkpoint", "in.pt", "-o", "one.pt", "--network", "./nets_for_scores.py:plain", "-q"]
    assert apply_main(["i.npz", "one.npz", *spec, "--max-drop", "4"]) == 1
    assert not (folder / "one.pt").exists()
    assert apply_main(["i.npz", "one.npz", *spec, "--max-drop", "6"]) == 0
    assert (folder / "one.pt").exists()


def test_the_sparsest_solution_within_a_drop(pruned, capsys):
    pruned("plain")
    spec = [
        "--checkpoint",
        "in.pt",
        "-o",
        "many.pt",
        "--network",
        "./nets_for_scores.py:plain",
        "--json",
        "r.json",
        "-q",
    ]
    assert (
        solve_main(["i.npz", "--sparsity", ".3", ".6", ".9", "--solver", "obd", "--solution", "m.npz", "-q"]) == 0
    )
    files = ["i.npz", "m-0.6.npz", "m-0.3.npz", "m-0.9.npz"]
    assert apply_main([*files, *spec]) == 2
    assert "`--max-drop`" in capsys.readouterr().err
    assert apply_main([*files, *spec, "--max-drop", "100"]) == 0
    report = json.loads(open("r.json").read())  # noqa: PTH123, SIM115
    assert report["sparsity"] == pytest.approx(0.9, abs=0.01) and len(report["path"]) == 3
    drops = {
        trial["sparsity"]: 100 * (report["before"]["value"] - trial["score"]["value"]) for trial in report["path"]
    }
    middle = sorted(drops.values())[1]
    assert apply_main([*files, *spec, "--max-drop", str(max(middle, 0) + 1e-9)]) == 0
    report = json.loads(open("r.json").read())  # noqa: PTH123, SIM115
    assert report["sparsity"] == max(s for s, drop in drops.items() if drop <= max(middle, 0) + 1e-9)


def test_the_result_as_onnx(pruned, folder):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    _, model, nets = pruned("plain", "--onnx", "out.onnx")
    x = nets.X[:7].numpy()
    found = ReferenceEvaluator(onnx.load(folder / "out.onnx")).run(None, {"input": x})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(nets.X[:7]).numpy(), atol=1e-5)


def test_a_network_that_torch_cannot_write_as_onnx(pruned, folder, capfd):
    """Everything else is written and reported; nothing of torch's is on stdout."""
    pytest.importorskip("onnx")
    pruned("bessel", source="reconstruction")
    files = [
        "i.npz",
        "s.npz",
        "--checkpoint",
        "in.pt",
        "-o",
        "other.pt",
        "--network",
        "./nets_for_scores.py:bessel",
    ]
    capfd.readouterr()
    code = apply_main([*files, "--onnx", "other.onnx"])
    out, err = capfd.readouterr()
    assert code == 3 and (folder / "other.pt").exists() and not (folder / "other.onnx").exists()
    assert out.startswith("layer ") and "written   other.pt" in out and "graph" not in out
    last = err.strip().splitlines()[-1]
    assert "other.onnx: torch cannot write this network as ONNX" in last
