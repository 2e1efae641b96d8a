"""The instances of the digits network: repeatable, as shipped, readable, worth solving."""

import numpy as np
import pytest

import cbs_opt
from cbs_opt.cli import info
from cbs_opt.cli import solve as solve_cli

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from cbs_opt.instances import digits, training  # noqa: E402

NAMES = ["digits-mlp.npz", "digits-mlp-gradients.npz"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert [path.name for path in digits.write_library(folder)] == NAMES
    return folder


def test_a_second_run_gives_the_same_bytes(made, tmp_path):
    assert digits.main(["-o", str(tmp_path)]) == 0
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_come_from_the_script(name, made):
    # Another processor or another BLAS rounds differently, so that only the same machine gives equal bytes.
    shipped, fresh = cbs_opt.read_instance(digits.LIBRARY / name), cbs_opt.read_instance(made / name)
    np.testing.assert_allclose(shipped.weights, fresh.weights, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(shipped.curvature.diagonal(), fresh.curvature.diagonal(), rtol=1e-4, atol=1e-9)
    assert {**shipped.metadata, "writer": None} == {**fresh.metadata, "writer": None}  # of any version
    assert shipped.budget.total == fresh.budget.total == np.ceil(0.9 * shipped.n)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_are_small_and_complete(name, capsys):
    path = digits.LIBRARY / name
    assert path.stat().st_size <= 2_000_000
    metadata = cbs_opt.read_instance(path).metadata
    assert {"network", "tensors", "data", "samples", "damping", "seed", "test_accuracy", "writer"} <= {*metadata}
    sizes = [int(np.prod(tensor["shape"])) for tensor in metadata["tensors"]]
    assert [tensor["offset"] for tensor in metadata["tensors"]] == [0, *np.cumsum(sizes)[:-1]]
    assert sum(sizes) == cbs_opt.read_instance(path).n
    assert info.main([str(path)]) == 0
    assert "1,437" in capsys.readouterr().out  # its samples


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_ls_and_cbs_differ_clearly(name):
    instance = cbs_opt.read_instance(digits.LIBRARY / name)
    magnitude, ls, cbs = (
        cbs_opt.solve(instance, solver, update=True, device="cpu") for solver in ("magnitude", "ls", "cbs")
    )
    assert magnitude.objective > 2 * ls.objective
    assert ls.objective > 1.1 * cbs.objective
    assert cbs.joint_loss < cbs.selection_loss
    assert not cbs.weights[cbs.pruned].any()


def test_the_command_line_solves_the_main_example(tmp_path, capsys):
    solution = tmp_path / "solution.npz"
    path = str(digits.LIBRARY / "digits-mlp.npz")
    assert solve_cli.main([path, "--solver", "magnitude", "--solution", str(solution), "-q"]) == 0
    assert solve_cli.main([path, "--check", str(solution)]) == 0
    assert "selection loss" in capsys.readouterr().out


def test_a_pruned_network_still_reads_digits():
    instance = cbs_opt.read_instance(digits.LIBRARY / "digits-mlp.npz")
    data = digits.read_digits()
    model = training.multilayer_perceptron(digits.SIZES, torch.Generator().manual_seed(0))

    def test_accuracy(weights):
        with torch.no_grad():
            for (_, parameter), tensor in zip(model.named_parameters(), instance.metadata["tensors"], strict=True):
                flat = weights[tensor["offset"] : tensor["offset"] + parameter.numel()]
                parameter.copy_(torch.from_numpy(flat.copy()).reshape(parameter.shape))
        return training.accuracy(model, data.x_test, data.y_test)

    result = cbs_opt.solve(instance.with_sparsity(0.5), "ls", update=True)
    assert test_accuracy(instance.weights) == pytest.approx(instance.metadata["test_accuracy"], abs=1e-4)
    assert test_accuracy(result.weights) > 0.9


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(digits.TRAINING, "epochs", 1)
    assert digits.main(["-o", str(tmp_path / "nowhere")]) == 3
    assert "cannot be written" in capsys.readouterr().err
