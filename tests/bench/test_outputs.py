"""Modules that take long refuse an output that cannot be written before they do any work."""

from __future__ import annotations

import importlib

import pytest

MODULES = {
    "exact": ["missing.npz"],
    "exact_blocks": [],
    "layers": ["missing"],
    "losses": ["missing.npz"],
    "quality": ["missing.npz"],
    "trajectories": ["missing.npz"],
}


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_folder_is_refused_at_once(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"cbs_opt.bench.{name}")
    folder = tmp_path / "no-such-folder"
    output = folder if name == "exact_blocks" else folder / "out.png"
    assert module.main([*MODULES[name], "-o", str(output)]) == 3
    assert f"there is no directory {folder}" in capsys.readouterr().err
