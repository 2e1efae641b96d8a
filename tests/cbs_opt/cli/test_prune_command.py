"""`cbs-prune` as a user runs it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from safetensors.torch import load_file, save_file  # noqa: E402

from cbs_opt.cli.prune import main  # noqa: E402
from cbs_opt.instances import digits  # noqa: E402

NAMES = ["0.weight", "2.weight", "4.weight"]
FISHER = ["--source", "fisher", "--batch", "4", "--samples", "400", "--damping", "0.1", "--solver", "magnitude"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "model.safetensors"
    model = digits.train_digits_network(digits.read_digits())
    save_file({name: tensor.float() for name, tensor in model.state_dict().items()}, path)
    return path


def arguments(checkpoint, out, *more):
    given = [
        "digits-mlp",
        "--checkpoint",
        checkpoint,
        "--data",
        "digits",
        "--test-data",
        "digits",
        "-o",
        out,
        *more,
    ]
    return [str(argument) for argument in given]


def zeros(path):
    return sum(int((tensor == 0).sum()) for tensor in load_file(path).values())


def test_stages_with_every_output(checkpoint, tmp_path, capsys):
    out, table, picture, report = (tmp_path / n for n in ("out.safetensors", "t.csv", "p.png", "r.json"))
    code = main(
        arguments(checkpoint, out, *FISHER, "--sparsity", "80%", "--stages", "3", "--table", table,
                  "--picture", picture, "--json", report)
    )  # fmt: skip
    text, log = capsys.readouterr()
    assert code == 0
    assert zeros(out) == 2848
    content = json.loads(report.read_text())
    assert content["pruned_count"] == 2848 and content["schema"] == 1
    assert [stage["stage"] for stage in content["stages"]] == [1, 2, 3]
    rows = list(csv.DictReader(table.open()))
    assert [float(row["loss"]) for row in rows] == [stage["loss"] for stage in content["stages"]]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert content["test"]["after"]["value"] > 0.8
    assert f"accuracy {content['test']['before']['value']:.4g} → {content['test']['after']['value']:.4g}" in text
    assert log.count("pruned, held-out loss") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "p.png", "r.json", "t.csv"]


def test_json_on_stdout_is_all_there_is(checkpoint, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(arguments(checkpoint, out, *FISHER, "--sparsity", ".5", "--json", "-", "-q")) == 0
    text, log = capsys.readouterr()
    assert json.loads(text)["sparsity"] == 0.5
    assert log == ""


def test_the_largest_sparsity_within_a_drop(checkpoint, tmp_path, capsys):
    out, report = tmp_path / "out.safetensors", tmp_path / "r.json"
    options = [*FISHER, "--sparsity", ".99", "--accuracy-drop", "2", "--json", report]
    for stages in ("1", "3"):
        assert main(arguments(checkpoint, out, *options, "--stages", stages)) == 0
        content = json.loads(report.read_text())
        assert 0.2 < content["sparsity"] < 0.99
        assert content["before"]["value"] - content["after"]["value"] <= 0.02
        assert zeros(out) == content["pruned_count"]
    capsys.readouterr()
    nothing = [*FISHER, "--sparsity", ".99", "--accuracy-drop", "0", "--update-scale", "0"]
    assert main(arguments(checkpoint, tmp_path / "none.safetensors", *nothing, "--tensors", "4.weight")) in (0, 1)


def test_a_factory_without_checkpoint(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))\n"
        "    x = torch.randn(200, 6)\n"
        "    return model, (x, x.sum(1, keepdim=True)), (x[:50], x[:50].sum(1, keepdim=True)), 'mse', 'r2'\n"
    )
    monkeypatch.chdir(tmp_path)
    code = main(["mine:make", "--sparsity", ".5", "--solver", "magnitude", "--time-limit", "1", "-o", "out.pt"])
    text, _ = capsys.readouterr()
    assert code == 0
    state = torch.load("out.pt", weights_only=True)
    assert sum(int((tensor == 0).sum()) for name, tensor in state.items() if "weight" in name) == 28
    assert "r2" in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--update-scale", "2", "--no-update"], "exclude each other"),
        (["--picture", "p.bmp"], "a picture must end in"),
        (["--stages", "0"], "must be a whole number ≥ 1"),
        (["--source", "fisher", "--sequential"], "layer by layer"),
        (["--held-out", "100000"], "leaves none to prune with"),
    ],
)
def test_bad_options(checkpoint, tmp_path, capsys, more, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(checkpoint, tmp_path / "out.safetensors", *more)) == 2
    text, log = capsys.readouterr()
    assert words in log and "Traceback" not in log and text == ""


def run_until(checkpoint, out, line, number, stage):
    """Start a command and send a signal when a line of its log is there; the code and the log."""
    command = [sys.executable, "-m", "cbs_opt.cli.prune", *arguments(checkpoint, out, *FISHER, *stage)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = ""
    for text in process.stderr:
        log += text
        if line in text:
            os.kill(process.pid, number)
            break
    rest = process.communicate(timeout=100)
    return process.returncode, rest[0], log + rest[1]


@pytest.mark.slow
def test_a_killed_command_continues_and_an_interrupted_one_leaves_its_stage(checkpoint, tmp_path):
    stages = ["--sparsity", ".9", "--stages", "6"]
    whole = tmp_path / "whole.safetensors"
    assert main(arguments(checkpoint, whole, *FISHER, *stages, "-q")) == 0
    out = tmp_path / "out.safetensors"
    after = int(np.random.default_rng(time.time_ns()).integers(1, 6))  # another one every time
    code, _, log = run_until(checkpoint, out, f"stage {after}:", signal.SIGKILL, stages)
    assert code == -signal.SIGKILL and not out.exists()
    assert (tmp_path / "out.safetensors.state").exists()
    assert main(arguments(checkpoint, out, *FISHER, *stages, "-q")) == 0
    assert not (tmp_path / "out.safetensors.state").exists()
    one, other = load_file(whole), load_file(out)
    assert all(torch.equal(one[name], other[name]) for name in NAMES), after

    stopped = tmp_path / "stopped.safetensors"
    code, text, log = run_until(checkpoint, stopped, "stage 2:", signal.SIGINT, stages)
    assert code == 0, log
    done = log.count("pruned, held-out loss")
    assert f"interrupted after stage {done} of 6" in text
    assert 0 < zeros(stopped) < 3204


@pytest.mark.parametrize("output", [".", ""])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_folder_as_output(checkpoint, output, stages, capsys):
    code = main(arguments(checkpoint, output, *FISHER, "--stages", stages))
    assert code == 3 and "cannot be written: it is a directory" in capsys.readouterr().err


def test_one_shot_names_the_state_of_a_run_in_stages(checkpoint, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    (tmp_path / "out.safetensors.state").write_bytes(b"of another run")
    assert main(arguments(checkpoint, out, *FISHER)) == 0
    assert "out.safetensors.state: the state of a run in stages" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors.state").read_bytes() == b"of another run"


@pytest.mark.parametrize(("name", "example"), [("nets", "nets:make"), ("nets.py", "./nets.py:make")])
def test_a_module_without_a_factory(name, example, tmp_path, capsys):
    code = main([name, "--checkpoint", "x.pt", "-o", str(tmp_path / "out.pt")])
    error = capsys.readouterr().err
    assert code == 2 and f"'{name}' is not a known network" in error and example in error
