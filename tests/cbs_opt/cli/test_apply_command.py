"""`cbs-apply`: from an instance, a solution and a checkpoint to a pruned checkpoint and its scores."""

import itertools
import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

import cbs_opt  # noqa: E402
from cbs_opt import Budget, GradientFactor, Instance, Solution, read_instance  # noqa: E402
from cbs_opt.cli.apply import main  # noqa: E402
from cbs_opt.instances import digits  # noqa: E402
from cbs_opt.instances.checkpoints import checkpoint_sha256, read_checkpoint  # noqa: E402
from cbs_opt.instances.fisher import tensor_table  # noqa: E402

NAMES = ["0.weight", "2.weight", "4.weight"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint of the digits network, in three containers, and an instance for each."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("trained")
    model = digits.train_digits_network(digits.read_digits())
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    torch.save(state, folder / "model.pt")
    np.savez(folder / "model.npz", about=np.array('{"made": "here"}'), **{k: v.numpy() for k, v in state.items()})
    for name in ("model.safetensors", "model.pt", "model.npz"):
        make_instance(folder / f"{name}.instance", folder / name, {"network": "digits-mlp"})
    return folder


def make_instance(path, checkpoint, metadata, weights=None):
    tensors = read_checkpoint(checkpoint)
    names = list(tensors) if weights is None else weights
    w = np.concatenate([tensors[name].numpy().ravel() for name in names])
    gradients = np.random.default_rng(0).standard_normal((2, w.size)).astype(np.float32)
    facts = {
        "tensors": tensor_table(names, [tuple(tensors[name].shape) for name in names]),
        "checkpoint": {"file": checkpoint.name, "sha256": checkpoint_sha256(checkpoint)},
    }
    instance = Instance(w, GradientFactor(gradients, 1e-3), Budget(w.size // 2), metadata=facts | metadata)
    cbs_opt.write_instance(path, instance)
    instance = read_instance(path)
    result = cbs_opt.solve(instance, "magnitude")
    cbs_opt.write_solution(path.with_suffix(".solution"), Solution(result.pruned, instance.sha256))
    return instance, result


def command(folder, name="model.pt", out="out", *more):
    instance = folder / f"{name}.instance"
    files = [instance, instance.with_suffix(".solution"), "--checkpoint", folder / name, "-o", out]
    return main([*map(str, files), *map(str, more)])


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.npz"])
def test_the_pruned_checkpoint_and_its_scores(trained, tmp_path, name, capsys):
    out, picture, report = tmp_path / "out", tmp_path / "masks.png", tmp_path / "report.json"
    options = ["--data", "digits", "--picture", picture, "--json", report]
    assert command(trained, name, out, *options) == 0
    before, after = read_checkpoint(trained / name), read_checkpoint(out)
    content = json.loads(report.read_text())
    instance = read_instance(trained / f"{name}.instance")
    result = cbs_opt.solve(instance, "magnitude")
    flat = np.concatenate([after[key].numpy().ravel() for key in NAMES])
    np.testing.assert_array_equal(flat == 0, result.pruned)
    assert all(torch.equal(torch.where(after[key] == 0, 0, before[key]), after[key]) for key in NAMES)
    data = digits.read_digits()
    x = data.x_test.float()
    for when, tensors in (("before", before), ("after", after)):
        h = (x @ tensors["0.weight"].T).relu()
        logits = (h @ tensors["2.weight"].T).relu() @ tensors["4.weight"].T
        assert content[when]["accuracy"] == pytest.approx((logits.argmax(1) == data.y_test).double().mean().item())
        loss = torch.nn.functional.cross_entropy(logits, data.y_test).item()
        assert content[when]["loss"] == pytest.approx(loss, rel=1e-5)
        assert content[when]["samples"] == len(x)
    assert content["output"]["sha256"] == checkpoint_sha256(out)
    assert content["pruned_count"] == 1780 == sum(layer["pruned"] for layer in content["layers"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "0.weight" in printed and "50.00%" in printed
    if name.endswith("npz"):
        with np.load(out) as npz:
            assert str(npz["about"]) == '{"made": "here"}'


def test_json_alone_on_stdout_and_nothing_scored_without_data(trained, tmp_path, capsys):
    assert command(trained, "model.pt", tmp_path / "out.pt", "--json", "-", "-q") == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content["before"] is None and content["after"] is None and content["network"] == "digits-mlp"
    assert printed.err == ""


def test_samples_and_normalisation_are_as_asked(trained, tmp_path, capsys):
    scores = []
    for more in ([], ["--samples", 100], ["--samples", 100, "--seed", 1], ["--mean", "0.5", "--std", "0.5"]):
        options = ["--data", "digits", "--split", "train", "--json", "-", "-q", *more]
        assert command(trained, "model.pt", tmp_path / "out.pt", *options) == 0
        scores.append(json.loads(capsys.readouterr().out)["before"])
    assert [score["samples"] for score in scores] == [1437, 100, 100, 1437]
    assert len({score["loss"] for score in scores}) == 4


def test_the_normalisation_of_the_export_is_used(trained, tmp_path, capsys):
    path = tmp_path / "noted.instance"
    said = {"network": "digits-mlp", "normalisation": {"mean": [0.5], "std": [0.25]}}
    make_instance(path, trained / "model.pt", said)
    noted = [path, path.with_suffix(".solution"), "--checkpoint", trained / "model.pt", "-o", tmp_path / "out.pt"]
    losses = []
    for more in ([], ["--mean", 0, "--std", 1], ["--mean", 0.5, "--std", 0.25]):
        assert main([*map(str, [*noted, "--data", "digits", "--json", "-", "-q", *more])]) == 0
        losses.append(json.loads(capsys.readouterr().out)["before"]["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_updated_weights_reach_the_file(trained, tmp_path):
    path = tmp_path / "model.instance"
    instance, result = make_instance(path, trained / "model.pt", {"network": "digits-mlp"})
    weights = np.where(result.pruned, 0.0, 2 * instance.weights)
    cbs_opt.write_solution(path.with_suffix(".solution"), Solution(result.pruned, instance.sha256, weights))
    out = tmp_path / "out.pt"
    arguments = [path, path.with_suffix(".solution"), "--checkpoint", trained / "model.pt", "-o", out, "-q"]
    assert main([*map(str, arguments)]) == 0
    tensors = read_checkpoint(out)
    np.testing.assert_array_equal(np.concatenate([tensors[name].numpy().ravel() for name in NAMES]), weights)


@pytest.mark.parametrize(("more", "factor"), [([], 2.0), (["--update-scale", "0.5"], 1.5), (["--no-update"], 1.0)])
def test_a_part_of_the_update(trained, tmp_path, capsys, more, factor):
    path = tmp_path / "model.instance"
    instance, result = make_instance(path, trained / "model.pt", {"network": "digits-mlp"})
    weights = np.where(result.pruned, 0.0, 2 * instance.weights)
    cbs_opt.write_solution(path.with_suffix(".solution"), Solution(result.pruned, instance.sha256, weights))
    out = tmp_path / "out.pt"
    arguments = [path, path.with_suffix(".solution"), "--checkpoint", trained / "model.pt", "-o", out, "-q", *more]
    assert main([*map(str, arguments)]) == 0
    assert capsys.readouterr() == ("", "")
    tensors = read_checkpoint(out)
    found = np.concatenate([tensors[name].numpy().ravel() for name in NAMES])
    np.testing.assert_allclose(found, np.where(result.pruned, 0.0, factor * instance.weights), rtol=1e-6)


def test_a_part_of_an_update_that_is_not_there(trained, tmp_path, capsys):
    assert command(trained, "model.pt", tmp_path / "out.pt", "--update-scale", "0.5") == 2
    assert "has no updated weights for `--update-scale`" in capsys.readouterr().err
    assert command(trained, "model.pt", tmp_path / "out.pt", "--update-scale", "1", "--no-update") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_instances_that_say_less_are_taken_with_a_warning(trained, tmp_path, capsys):
    path = tmp_path / "model.instance"
    _, result = make_instance(path, trained / "model.pt", {"checkpoint": None, "network": "my own kind"})
    cbs_opt.write_solution(path.with_suffix(".solution"), Solution(result.pruned))
    out = str(tmp_path / "out.pt")
    base = [str(path), str(path.with_suffix(".solution")), "--checkpoint", str(trained / "model.pt"), "-o", out]
    assert main(base) == 0
    errors = capsys.readouterr().err
    assert "does not name its checkpoint" in errors and "does not name its instance" in errors
    assert main([*base, "--data", "digits"]) == 2
    assert "'my own kind' is not a known network" in capsys.readouterr().err
    assert main([*base, "--data", "digits", "--network", "digits-mlp"]) == 0


FACTORY = """
import torch
from cbs_opt.instances.digits import read_digits

def make():
    data = read_digits()
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 40, bias=False), torch.nn.ReLU(), torch.nn.Linear(40, 20, bias=False), torch.nn.ReLU(),
        torch.nn.Linear(20, 10, bias=False),
    )
    return net, (data.x_train.float(), data.y_train), (data.x_test.float(), data.y_test)
"""


def test_a_factory_runs_only_when_it_is_named(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("apply_factory.py").write_text("open('sprung', 'w')\n" + FACTORY, encoding="utf-8")
    path = tmp_path / "model.instance"
    make_instance(path, trained / "model.pt", {"network": "apply_factory:make"})
    base = [
        str(path),
        str(path.with_suffix(".solution")),
        "--checkpoint",
        str(trained / "model.pt"),
        "-o",
        "out.pt",
    ]
    assert main([*base, "-q"]) == 0
    assert main([*base, "--data", "digits"]) == 2
    assert "is a factory, which is code" in capsys.readouterr().err
    assert not Path("sprung").exists()
    assert main([*base, "--network", "apply_factory:make", "--json", "-", "-q"]) == 0
    assert Path("sprung").exists()
    content = json.loads(capsys.readouterr().out)
    assert content["before"]["samples"] == 360 and content["before"]["accuracy"] > 0.9
    sys.modules.pop("apply_factory", None)


class Trap:
    def __reduce__(self):
        return open, ("sprung", "w")


def test_what_does_not_belong_together_is_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = trained / "model.pt.instance"
    good = {"i": source, "s": source.with_suffix(".solution"), "c": trained / "model.pt"}
    torch.save({name: torch.zeros(2, 2) for name in NAMES}, "small.pt")
    Path("trap.pt").write_bytes(pickle.dumps(Trap()))
    other, _ = make_instance(tmp_path / "other.instance", trained / "model.pt", {"seed": 1})
    make_instance(tmp_path / "first.instance", trained / "model.pt", {"checkpoint": None}, NAMES[:1])
    Path("no-layers.npz").write_bytes(b"")
    cases = [
        ({"c": trained / "model.safetensors"}, 3, "SHA-256 .* do not belong together"),
        ({"s": "other.solution"}, 3, "belongs to another instance"),
        ({"i": "first.instance", "s": "first.solution", "c": "small.pt"}, 3, r"0\.weight has shape \(40, 64\)"),
        (
            {"i": "first.instance", "s": "first.solution", "c": "trap.pt"},
            3,
            "is a pickle, but no file of torch.save",
        ),
        ({"s": "no-layers.npz"}, 3, "is not an .npz archive"),
        ({"c": "absent.pt"}, 3, "No such file"),
        ({"i": "absent.npz"}, 3, "no such file"),
        ({"more": ["--data", "absent.npz"]}, 3, "no such file"),
        (
            {"more": ["--data", "digits", "--network", "mlpnet"]},
            3,
            "does not fit the network: it lacks fc1.weight",
        ),
        ({"more": ["--data", "digits", "--network", "lenet"]}, 2, "not a known network"),
        ({"more": ["--picture", "x.gif"]}, 2, "must end in .png"),
        ({"more": ["--picture", "out.pt"]}, 2, "named for two outputs"),
        ({"more": ["--samples", "0"]}, 2, "whole number"),
        ({"more": ["--data", "digits", "--std", "0"]}, 2, "`std` must be above 0"),
        ({"more": ["-q", "-v"]}, 2, "exclude each other"),
        ({"o": trained / "model.pt"}, 2, "would overwrite it"),
        ({"o": "no/out.pt"}, 3, "cannot be written"),
    ]
    if Path("/dev/full").exists():
        cases.append(({"o": "/dev/full"}, 3, "/dev/full: cannot be written: No space left"))
    hashes = {path: checkpoint_sha256(path) for path in trained.iterdir()}
    for change, code, words in cases:
        use = {**good, "o": "out.pt", "more": [], **change}
        arguments = [use["i"], use["s"], "--checkpoint", use["c"], "-o", use["o"], *use["more"]]
        assert main([*map(str, arguments)]) == code, change
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cbs-apply:")]
        assert len(errors) == 1
        assert re.search(words, errors[0]), (words, errors)
        assert not Path("out.pt").exists() and not list(tmp_path.glob(".*"))
    assert not Path("sprung").exists()
    assert hashes == {path: checkpoint_sha256(path) for path in trained.iterdir()}
    assert other.n == 3560


def test_an_interrupt_keeps_the_checkpoint(trained, tmp_path, monkeypatch, capsys):
    from cbs_opt.cli.common import Interrupts

    asked = itertools.chain([False, False], itertools.repeat(True))
    monkeypatch.setattr(Interrupts, "__call__", lambda self: next(asked))
    assert command(trained, "model.pt", tmp_path / "out.pt", "--data", "digits", "--json", "-", "-q") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["before"]["samples"] == 200 and content["after"] is None
    assert (tmp_path / "out.pt").exists()


def test_as_a_command(trained, tmp_path, run):
    instance = trained / "model.npz.instance"
    done = run(
        "apply",
        *(instance, instance.with_suffix(".solution"), "--checkpoint", trained / "model.npz"),
        *("-o", tmp_path / "out.npz", "--data", "digits"),
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and "360 samples of digits" in done.stderr
