"""`cbs-export` as a user runs it: a script of their own, and networks of the package."""

import json
import os
import signal

import numpy as np
import pytest

import cbs_opt

torch = pytest.importorskip("torch")

from cbs_opt.cli import export as export_cli  # noqa: E402
from cbs_opt.cli import info as info_cli  # noqa: E402
from cbs_opt.cli import solve as solve_cli  # noqa: E402

SCRIPT = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))

def make():
    torch.manual_seed(0)
    x = torch.randn(200, 1, 8, 8)
    y = (x.mean((1, 2, 3)) * 20).round().long().clamp(0, 2)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a user's script, `mynet_export.py`, and their checkpoint."""
    (tmp_path / "mynet_export.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    weights = {"0.weight": (4, 1, 3, 3), "0.bias": (4,), "4.weight": (3, 36), "4.bias": (3,)}
    torch.save({name: torch.randn(shape) for name, shape in weights.items()}, tmp_path / "mine.pt")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8), rng.integers(0, 3, 30)
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return tmp_path


MINE = ["mynet_export:make", "-o", "instance.npz"]


def test_a_script_of_ones_own(folder, capsys):
    assert export_cli.main([*MINE, "--samples", "50", "--sparsity", "0.5"]) == 0
    printed = capsys.readouterr()
    assert "144 weights, gradients in 1 block, 72 to prune" in printed.out and "accuracy" in printed.out
    assert "50 samples" in printed.err
    instance = cbs_opt.read_instance(folder / "instance.npz")
    assert instance.curvature.m == 50 and instance.budget.total == 72
    metadata = instance.metadata
    assert metadata["network"] == "mynet_export:make"
    assert [t["name"] for t in metadata["tensors"]] == ["0.weight", "4.weight"]
    assert (metadata["seed"], metadata["split"], metadata["damping"]) == (0, "train", 1e-5)
    assert str(folder) not in json.dumps(dict(metadata))
    assert solve_cli.main(["instance.npz", "--solver", "magnitude", "--update", "-q"]) == 0


def test_the_draw_follows_the_seed(folder):
    def gradients(*options):
        assert export_cli.main([*MINE, "--samples", "20", "-q", *options]) == 0
        return np.array(cbs_opt.read_instance(folder / "instance.npz").curvature.gradients)

    first = gradients()
    np.testing.assert_array_equal(first, gradients("--seed", "0"))
    assert not np.array_equal(first, gradients("--seed", "1"))


def test_every_option_arrives(folder):
    options = "--checkpoint mine.pt --data images.npz --mean 0.5 --std 0.25 --samples 30 --batch 2 --split test"
    options += (
        " --blocks 20 --curvature hessian --relative-damping 0.1 --dtype float32 --per-layer --sparsity 0.25"
    )
    options += " --first-order --device cpu --memory 1 --seed 3 --tensors 4.w*"
    assert export_cli.main([*MINE, *options.split(), "-q"]) == 0
    instance = cbs_opt.read_instance(folder / "instance.npz")
    curvature = instance.curvature
    assert (curvature.kind, curvature.flat.dtype) == ("hessian", np.float32)
    assert curvature.block_sizes.tolist() == [20] * 5 + [8]
    assert instance.budget.group_budgets.tolist() == [27] and instance.linear is not None
    metadata = instance.metadata
    assert (metadata["batch"], metadata["samples"], metadata["seed"], metadata["split"]) == (2, 30, 3, "test")
    assert metadata["checkpoint"]["file"] == "mine.pt" and len(metadata["checkpoint"]["sha256"]) == 64
    assert metadata["normalisation"] == {"mean": [0.5], "std": [0.25]} and metadata["data"] == "images.npz"
    assert metadata["relative_damping"] == 0.1
    saved = torch.load("mine.pt", weights_only=True)
    np.testing.assert_allclose(instance.weights, saved["4.weight"].flatten().numpy())


def test_reconstruction_and_a_pattern(folder):
    assert export_cli.main([*MINE, "--source", "reconstruction", "--nm", "2:4", "-q"]) == 0
    instance = cbs_opt.read_instance(folder / "instance.npz")
    assert instance.curvature.block_sizes.tolist() == [9] * 4 + [36] * 3
    assert instance.metadata["source"] == "reconstruction" and instance.metadata["nm"] == "2:4"
    assert instance.budget.total == 54  # 2 of every 4 of 3 · 36; the convolution has one channel


def test_kfac_stores_a_block_a_layer_and_says_so(folder, capsys):
    arguments = [*MINE, "--source", "kfac", "--fisher", "exact", "--blocks", "20"]
    assert export_cli.main(arguments) == 0
    assert "hessian in 10 blocks (3 stored)" in capsys.readouterr().out
    assert info_cli.main(["instance.npz", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["blocks"], content["stored_blocks"]) == (10, 3)
    assert content["metadata"]["fisher"] == "exact" and content["metadata"]["relative_damping"] == 0.01
    assert info_cli.main(["instance.npz"]) == 0
    assert "3 blocks, each times a factor a block" in capsys.readouterr().out
    assert export_cli.main([*MINE, "--fisher", "exact"]) == 2
    assert "`fisher` chooses the labels of `source` kfac" in capsys.readouterr().err


def test_a_network_of_the_package_in_a_process_of_its_own(tmp_path, run):
    pytest.importorskip("sklearn")
    from safetensors.torch import save_file

    from cbs_opt.instances.networks import load_network

    torch.manual_seed(0)
    save_file(load_network("digits-mlp").model.state_dict(), tmp_path / "digits.safetensors")
    path = tmp_path / "instance.npz"
    done = run(
        "export", "digits-mlp", "--checkpoint", tmp_path / "digits.safetensors", "--data", "digits",
        "--samples", 100, "--blocks", "row", "-o", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3560 weights, inverse hessian in 70 blocks, 3204 to prune" in done.stdout
    assert cbs_opt.read_instance(path).curvature.block_sizes.tolist() == [64] * 40 + [40] * 20 + [20] * 10


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*MINE, "--samples", "0"], 2, "must be a whole number ≥ 1, got '0'"),
        ([*MINE, "--samples", "3", "--batch", "4"], 2, "`--samples` 3 is less than one `--batch` of 4"),
        ([*MINE, "--sparsity", "1.2"], 2, "must be a number between 0 and 1, got '1.2'"),
        ([*MINE, "--blocks", "-3"], 2, "must be full, layer, row or a size of at least 1"),
        ([*MINE, "--blocks=-3"], 2, "must be full, layer, row or a size of at least 1, got '-3'"),
        ([*MINE, "--nm", "2of4"], 2, "must be N:M, such as 2:4, got '2of4'"),
        ([*MINE, "--nm", "2:4", "--sparsity", "0.5"], 2, "goes without `sparsity`"),
        ([*MINE, "--damping", "0.1", "--relative-damping", "0.1"], 2, "exclude each other"),
        ([*MINE, "--source", "reconstruction", "--blocks", "layer"], 2, "a block for each output row"),
        ([*MINE, "--tensors", "nothing"], 2, "the network has no parameter 'nothing'; it has 0.weight, 4.weight"),
        ([*MINE, "--blocks", "full", "--curvature", "hessian", "--memory", "1e-5"], 2, "would do"),
        ([*MINE, "--blocks", "layer", "--damping", "0"], 3, "is singular to working precision"),
        ([*MINE, "--checkpoint", "nowhere.pt"], 3, "nowhere.pt: cannot be read"),
        ([*MINE, "--data", "nowhere.npz"], 3, "nowhere.npz: no such file"),
        ([*MINE, "-q", "-v"], 2, "exclude each other"),
        (["mynet_export:make", "-o", "no/folder/i.npz"], 3, "there is no directory no/folder"),
        (["mynet_export:make", "-o", "mine.pt", "--checkpoint", "mine.pt"], 2, "is an input"),
        (["mynet_export:make"], 2, "the following arguments are required: -o/--output"),
        (["mynet_export:network", "-o", "instance.npz"], 2, "provides no data"),
        (["mlpnet", "-o", "instance.npz", "--data", "images.npz"], 2, "`--checkpoint` is needed for 'mlpnet'"),
        (["mlpnet", "-o", "instance.npz", "--checkpoint", "mine.pt"], 2, "`--data` is needed for 'mlpnet'"),
        (["lenet", "-o", "i.npz", "--data", "images.npz", "--checkpoint", "mine.pt"], 2, "'lenet' is not a known"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, code, message, folder, capsys):
    before = {path.name for path in folder.iterdir()}
    assert export_cli.main(arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.strip().splitlines()[-1]) < 400
    assert "Traceback" not in printed.err and not printed.out
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
def test_where_there_is_no_cuda_the_cpu_works(folder, capsys):
    assert export_cli.main([*MINE, "--device", "cuda"]) == 0
    assert "on the CPU, not on a card: torch finds no CUDA device here" in capsys.readouterr().err


@pytest.fixture
def interrupted_at(monkeypatch):
    """Send SIGINT when the progress says so."""

    def arrange(what, times=1):
        def call(self, now, done, total):
            if now == what:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(export_cli.WorkProgress, "__call__", call)

    return arrange


def test_an_interrupt_keeps_the_gradients(folder, interrupted_at, capsys, monkeypatch):
    monkeypatch.setattr("cbs_opt.instances.export.CHUNK_BYTES", 100_000)
    interrupted_at("gradients")
    assert export_cli.main([*MINE, "--samples", "200"]) == 0
    instance = cbs_opt.read_instance(folder / "instance.npz")
    assert 1 <= instance.curvature.m < 200 and instance.metadata["samples"] == instance.curvature.m
    assert "of 200 gradients are used" in capsys.readouterr().err


@pytest.mark.parametrize(("what", "times"), [("checking", 1), ("blocks", 1), ("gradients", 2)])
def test_other_interrupts_leave_nothing(what, times, folder, interrupted_at, capsys):
    before = {path.name for path in folder.iterdir()}
    interrupted_at(what, times)
    assert export_cli.main([*MINE, "--blocks", "layer"]) == 130
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before
