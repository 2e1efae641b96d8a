"""cbs-export, cbs-solve and cbs-apply on the tensors that people have; every file is judged by torch alone."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch import nn  # noqa: E402

from cbs_opt.cli import apply as apply_cli  # noqa: E402
from cbs_opt.cli import export as export_cli  # noqa: E402
from cbs_opt.cli import info as info_cli  # noqa: E402
from cbs_opt.cli import solve as solve_cli  # noqa: E402

NETS = """
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

X, Y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.lm_head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.lm_head(torch.relu(self.b(torch.relu(self.a(x)))))

class Conv1D(nn.Module):
    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)

def seeded(make):
    torch.manual_seed(0)
    return make()

def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)))

def plain():
    return mlp(), (X, Y)

def tied():
    return seeded(Tied), (X, Y)

def gpt_like():
    return seeded(lambda: nn.Sequential(Conv1D(12, 8), nn.ReLU(), Conv1D(4, 12))), (X, Y)

def normed():
    model = mlp()
    parametrizations.weight_norm(model[0])
    return model, (X, Y)

def orthogonal():
    model = mlp()
    parametrizations.orthogonal(model[0])
    return model, (X, Y)

def masked():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model, (X, Y)

def sparse():
    model = mlp()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[layer.weight.abs() < layer.weight.abs().flatten().quantile(0.9)] = 0
    return model, (X, Y)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(NETS, encoding="utf-8")
    sys.modules.pop("own_nets", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_nets

    yield own_nets
    sys.modules.pop("own_nets", None)


def run(name, checkpoint, *options, out="out", objective="selection", apply=()):
    budget = [] if "--nm" in options else ["--sparsity", "0.7"]
    spec = f"./own_nets.py:{name}"
    arguments = [spec, "--checkpoint", checkpoint, "--damping", "1e-3", *budget, *options, "-o", "i.npz"]
    assert export_cli.main([*map(str, arguments)]) == 0
    assert (
        solve_cli.main(["i.npz", "--objective", objective, "--time-limit", "0.2", "--solution", "s.npz", "-q"])
        == 0
    )
    arguments = ["i.npz", "s.npz", "--network", spec, "--checkpoint", checkpoint, "-o", out, "--json", "r.json"]
    assert apply_cli.main([*map(str, arguments), "--no-magnitude", *apply]) == 0
    return json.loads(Path("r.json").read_text(encoding="utf-8"))


def zeros(tensors, *names):
    return [int((torch.as_tensor(np.asarray(tensors[name])) == 0).sum()) for name in names]


@pytest.mark.parametrize("source", ["fisher", "reconstruction", "kfac"])
def test_tied_tensors_stay_tied_in_every_container(source, nets, tmp_path, capsys):
    model, _ = nets.tied()
    np.savez(tmp_path / "copies.npz", **{name: tensor.numpy() for name, tensor in model.state_dict().items()})
    safetensors.save_model(model, str(tmp_path / "one.safetensors"))
    torch.save(model.state_dict(), tmp_path / "shared.pt")
    report = run("tied", "copies.npz", "--source", source, objective="joint")
    after = np.load("out")
    a, _, head = zeros(after, "a.weight", "b.weight", "lm_head.weight")
    assert np.array_equal(after["a.weight"], after["b.weight"])
    assert a + head == report["zeros_after"] == round(0.7 * 96 + 0.4) and report["sparsity"] == (a + head) / 96
    assert [layer["aliases"] for layer in report["layers"]] == [["b.weight"], []]
    report = run("tied", "one.safetensors", "--source", source, objective="joint")
    (name,) = safetensors.load_file("one.safetensors").keys() - {"lm_head.weight", "lm_head.bias"}
    assert zeros(safetensors.load_file("out"), name) == [report["layers"][0]["zeros_after"]]
    run("tied", "shared.pt", "--source", source, "--exclude", "re:.*lm_head", out="out.pt")
    after = torch.load("out.pt")
    assert zeros(after, "a.weight", "b.weight", "lm_head.weight") == [45, 45, 0]
    assert after["a.weight"].data_ptr() == after["b.weight"].data_ptr()
    capsys.readouterr()


def test_inputs_first_patterns_and_masks_alone(nets, capsys):
    model, _ = nets.gpt_like()
    torch.save(model.state_dict(), "in.pt")
    report = run("gpt_like", "in.pt", "--nm", "2:4", apply=["--masks", "masks.safetensors"])
    after, masks = torch.load("out"), safetensors.load_file("masks.safetensors")
    for layer in report["layers"]:
        weight = after[layer["name"]]
        assert ((weight.reshape(-1, 4, weight.shape[1]) == 0).sum(1) == 2).all()  # along the inputs, stored first
        assert torch.equal(masks[layer["name"]], weight != 0)
    assert "to prune: 0.weight, 2.weight" in capsys.readouterr().err


def test_transposable_patterns(nets, capsys):
    """Export, solve, check, apply: 2:4 along both sides, whatever is stored first."""
    model, _ = nets.gpt_like()
    torch.save(model.state_dict(), "in.pt")
    options = ["--nm", "2:4", "--nm-along", "both", "--source", "reconstruction"]
    report = run("gpt_like", "in.pt", *options, objective="joint")
    after = torch.load("out")
    for layer in report["layers"]:
        zero = after[layer["name"]] == 0
        tiles = zero.reshape(zero.shape[0] // 4, 4, zero.shape[1] // 4, 4)
        assert (tiles.sum(1) == 2).all() and (tiles.sum(3) == 2).all()
    assert solve_cli.main(["i.npz", "--check", "s.npz"]) == 0
    assert info_cli.main(["i.npz", "--json", "-"]) == 0
    out = capsys.readouterr().out
    content = json.loads(out[out.index("{") :])
    assert content["cross_groups"] == content["groups"] == content["weights"] // 4
    assert content["metadata"]["nm_along"] == "both"
    with np.load("s.npz") as file:
        solution = dict(file)
    rows = np.argsort(-solution["pruned"].astype(int), kind="stable")
    solution["pruned"] = np.zeros_like(solution["pruned"])
    solution["pruned"][rows[: content["budget"]]] = True
    solution["pruned"][:4] = [False, True, True, False]  # the number is right, a pattern is not
    del solution["weights"]
    np.savez("wrong.npz", **solution)
    assert solve_cli.main(["i.npz", "--check", "wrong.npz"]) == 3
    assert solve_cli.main(["i.npz", "--solver", "ls"]) == 4
    assert "a second partition of the weights (`cross_groups`)" in capsys.readouterr().err


def test_masks_and_old_zeros(nets, capsys):
    model, _ = nets.masked()
    torch.save(model.state_dict(), "masked.pt")
    for name in ("masked", "plain"):  # the network has the mask itself, or only the checkpoint does
        report = run(name, "masked.pt", "--source", "reconstruction", objective="joint")
        after = torch.load("out")
        effective = after["0.weight_orig"] * after["0.weight_mask"]
        assert not effective[model[0].weight_mask == 0].any()
        assert report["layers"][0]["zeros_before"] == 48 and report["zeros_before"] == 48
        assert int((effective == 0).sum()) + zeros(after, "2.weight")[0] == report["zeros_after"]
    model, _ = nets.sparse()
    torch.save(model.state_dict(), "sparse.pt")
    before = sum(zeros(model.state_dict(), "0.weight", "2.weight"))
    report = run("plain", "sparse.pt", "--source", "reconstruction", "--keep-mask", objective="joint")
    assert report["zeros_before"] == report["zeros_after"] == before == report["pruned_count"]
    output = capsys.readouterr()
    assert "are pruned in place of 101 (70.1%)" in output.err


def test_parametrised_weights(nets, capsys):
    model, (x, y) = nets.normed()
    torch.save(model.state_dict(), "normed.pt")
    report = run("normed", "normed.pt", objective="joint")
    fresh, _ = nets.normed()
    fresh.load_state_dict(torch.load("out"))
    found = int((fresh[0].weight == 0).sum()) + int((fresh[2].weight == 0).sum())
    assert found == report["zeros_after"] == 101
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(fresh(x), y))
    assert report["after"]["loss"] == pytest.approx(loss, rel=1e-5)
    model, _ = nets.orthogonal()
    torch.save(model.state_dict(), "orthogonal.pt")
    report = run("orthogonal", "orthogonal.pt")
    after = torch.load("out")
    assert sum(zeros(after, "0.weight", "2.weight")) == report["zeros_after"] == 101
    assert "0.weight is written as a plain tensor" in capsys.readouterr().err
    arguments = ["i.npz", "s.npz", "--checkpoint", "orthogonal.pt", "-o", "out"]
    assert apply_cli.main(arguments) == 3
    assert "prunes the tensor 0.weight, which" in capsys.readouterr().err


def test_folders_of_shards_and_dictionaries_by_name(nets, tmp_path, capsys):
    model, _ = nets.plain()
    state = model.state_dict()
    (tmp_path / "hf").mkdir()
    files = {"a.safetensors": ["0.weight", "0.bias"], "b.safetensors": ["2.weight", "2.bias"]}
    for file, names in files.items():
        safetensors.save_file({name: state[name] for name in names}, f"hf/{file}")
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    report = run("plain", "hf", out="pruned")
    shards = {**safetensors.load_file("pruned/a.safetensors"), **safetensors.load_file("pruned/b.safetensors")}
    assert sum(zeros(shards, "0.weight", "2.weight")) == report["zeros_after"] == 101
    assert apply_cli.main(["i.npz", "s.npz", "--checkpoint", "hf", "-o", "hf"]) == 2
    (tmp_path / "file").touch()
    assert apply_cli.main(["i.npz", "s.npz", "--checkpoint", "hf", "-o", "file"]) == 2
    errors = capsys.readouterr().err
    assert "hf: is an input; the output would overwrite it" in errors and "file: must be a folder" in errors
    torch.save({"state_dict": state, "state_dict_ema": {name: 2 * t for name, t in state.items()}}, "timm.pt")
    run("plain", "timm.pt", "--checkpoint-key", "state_dict_ema")  # noted in the instance for cbs-apply
    after = torch.load("out")
    assert zeros(after["state_dict"], "0.weight") == [0] and zeros(after["state_dict_ema"], "0.weight")[0] > 0
    assert export_cli.main(["plain", "--checkpoint", "timm.pt", "--data", "x", "-o", "i.npz"]) == 2
    assert export_cli.main(["own_nets:plain", "--exclude", "conv", "-o", "i.npz"]) == 2
    assert "`--exclude`: the network has no parameter 'conv'; it has 0.weight" in capsys.readouterr().err
