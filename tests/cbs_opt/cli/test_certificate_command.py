"""`cbs-solve --set certificate=FILE` and `cbs-solve --check FILE`, as a user runs them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cbs_opt import Budget, GradientFactor, Instance, read_instance, write_instance
from cbs_opt.cli.solve import main
from cbs_opt.files.certificate_file import read_certificate, write_certificate


@pytest.fixture
def file(tmp_path):
    """An instance file: 30 weights in one block, with a damping."""
    rng = np.random.default_rng(3)
    G = np.maximum(rng.normal(size=(60, 30)) + 0.5, 0) * rng.normal(size=(60, 1))
    path = tmp_path / "instance.npz"
    write_instance(path, Instance(rng.normal(size=30), GradientFactor(G, 1e-3, [30]), Budget(15)))
    return path


@pytest.fixture
def call(capsys):
    """`call(...)`: exit code, stdout, and stderr without the log."""

    def run(*arguments):
        code = main(["-q", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_write_and_check(objective, file, call, tmp_path):
    path = tmp_path / "proof.npz"
    setting = f"certificate={path}"
    code, out, _ = call(file, "--solver", "exact", "--objective", objective, "--set", setting, "--json", "-")
    solved = json.loads(out)
    assert code == 0
    assert solved["extras"]["certificate"]["optimal"] is True
    code, out, err = call(file, "--check", path, "--json", "-")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["valid"]
    assert found["optimal"]
    assert found["objective"] == solved["objective"]
    assert found["objective_kind"] == objective
    code, out, _ = call(file, "--check", path)
    assert "the selection is optimal" in out


def test_other_problems_are_refused(file, call, tmp_path):
    path, other = tmp_path / "proof.npz", tmp_path / "other.npz"
    assert call(file, "--solver", "exact", "--budget", 10, "--set", f"certificate={path}")[0] == 0
    instance = read_instance(file)
    write_instance(other, replace(instance, weights=2 * instance.weights, sha256=None, path=None))
    for arguments, sentence in (
        ((file, "--check", path), "`--budget 10` gives that problem"),
        ((file, "--budget", 10, "--damping", 1e-2, "--check", path), "`--damping 0.001` gives that problem"),
        ((other, "--budget", 10, "--check", path), "belongs to another instance"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (3, "")
        assert sentence in err
        assert err.count("\n") == 1
        assert err.startswith(f"cbs-solve: {path}: ")
    assert call(file, "--budget", 10, "--check", path)[0] == 0


def test_a_false_claim_is_refused(file, call, tmp_path):
    path = tmp_path / "proof.npz"
    assert call(file, "--solver", "exact", "--max-iterations", 1, "--set", f"certificate={path}")[0] == 0
    assert call(file, "--check", path)[0] == 0
    certificate = read_certificate(path)
    assert certificate.bound < certificate.objective * (1 - 1e-6)
    write_certificate(path, replace(certificate, bound=certificate.objective * (1 - 1e-9)))
    code, out, err = call(file, "--check", path)
    assert (code, out) == (3, "")
    assert "prove a bound of" in err


def test_outputs_that_cannot_be(file, call, tmp_path):
    before = file.read_bytes()
    (tmp_path / "link.npz").symlink_to(file)
    start, taken = tmp_path / "start.npz", tmp_path / "taken.npz"
    assert call(file, "--solver", "magnitude", "--solution", start)[0] == 0
    kept = start.read_bytes()
    for target, more, expected, sentence in (
        (file, (), 2, "is an input"),
        (tmp_path / "link.npz", (), 2, "is an input"),
        (start, ("--warm-start", start), 2, "is an input"),
        (taken, ("--solution", taken), 2, "two outputs"),
        (taken, ("--json", taken), 2, "two outputs"),
        (taken, ("--sparsity", 0.2, 0.4), 2, "several budgets"),
        (tmp_path / "no" / "c.npz", (), 3, "there is no directory"),
    ):
        code, out, err = call(file, "--solver", "exact", "--set", f"certificate={target}", *more)
        assert (code, out) == (expected, "")
        assert sentence in err
    assert file.read_bytes() == before
    assert start.read_bytes() == kept
    assert not taken.exists()
