from __future__ import annotations

import json

import pytest

from cbs_opt.cli.info import main


@pytest.fixture
def golden(repository):
    return repository / "tests" / "data" / "v1"


def test_instance(golden, capsys):
    assert main([str(golden / "inverse-hessian.npz"), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    expected = {
        "format": "cbs-instance",
        "weights": 4,
        "budget": 2,
        "sparsity": 0.5,
        "curvature": "inverse_hessian",
        "blocks": 2,
        "block_sizes": [2, 2],
        "groups": 2,
        "group_budgets": [1, 1],
        "linear": True,
        "fixed": 2,
    }
    assert expected.items() <= content.items()
    assert content["metadata"]["network"] == "golden"


def test_solution(golden, capsys):
    assert main([str(golden / "solution.npz"), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["pruned"] == 2
    assert content["weights"] == 4
    assert content["updated_weights"] is True
    assert content["selection_loss"] == 0.25


def test_text_in_a_process(run, golden):
    done = run("info", golden / "gradients.npz")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "gradients" in done.stdout
    assert "damping" in done.stdout


def test_bad_files(run, tmp_path, capsys):
    done = run("info", tmp_path / "none.npz")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"cbs-info: {tmp_path / 'none.npz'}: no such file\n"
    (tmp_path / "bad.npz").write_bytes(b"PK")
    assert main([str(tmp_path / "bad.npz")]) == 3
    assert main([]) == 2
    assert "Traceback" not in capsys.readouterr().err
