"""Closed streams, pipes, removed folders, control characters, absurd numbers: a sentence, or nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from cbs_opt import HessianBlocks, Instance, write_instance
from cbs_opt.cli import common, info, solve
from cbs_opt.files import atomic, library_file

posix = pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: needs POSIX")


def instance(**changes):
    factor = np.random.default_rng(0).standard_normal((20, 12))
    parts = {"weights": np.arange(1.0, 13.0), "budget": 6, "metadata": {}}
    scale = changes.pop("scale", 1.0)
    return Instance(curvature=HessianBlocks.from_blocks([scale * factor.T @ factor]), **parts | changes)


@posix
def test_a_closed_stdout_loses_no_file(instance_file, tmp_path, process_environment):
    command = [sys.executable, "-m", "cbs_opt.cli.solve", str(instance_file), "--solver", "obd"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command, "--json", "r.json"],
        cwd=tmp_path, env=process_environment, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert json.loads((tmp_path / "r.json").read_text())["pruned_count"] == 6


@posix
def test_a_removed_working_directory_is_a_sentence(instance_file, tmp_path, process_environment):
    (tmp_path / "gone").mkdir()
    command = [sys.executable, "-m", "cbs_opt.cli.solve", str(instance_file), "--solution", "s.npz"]
    done = subprocess.run(
        ["sh", "-c", 'rmdir ../gone; exec "$@"', "sh", *command],
        cwd=tmp_path / "gone", env=process_environment, check=False, timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.endswith("the working directory has been removed: change to one that exists\n")


@posix
def test_pipes_with_and_without_a_reader(instance_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(atomic, "_READER_SECONDS", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = [str(instance_file), "--solver", "obd", "--quiet", "--json", str(pipe)]
    assert solve.main(arguments) == 3
    assert "pipe: cannot be written: no process reads this pipe" in capsys.readouterr().err
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    monkeypatch.setattr(atomic, "_READER_SECONDS", 30.0)
    reader.start()
    assert solve.main(arguments) == 0
    reader.join()
    assert json.loads(found[0])["pruned_count"] == 6
    assert info.main([str(pipe)]) == 3


def test_control_characters_of_files_are_shown_and_not_obeyed(tmp_path, capsys):
    tensors = [{"name": "t\x1b[2J", "shape": [12], "offset": 0}]
    write_instance(tmp_path / "x.npz", instance(metadata={"network": "a\x1b[31m\x07", "tensors": tensors}))
    assert info.main([str(tmp_path / "x.npz")]) == 0
    assert info.main([str(tmp_path / "no\x1b]0;title\x07.npz")]) == 3
    out, err = capsys.readouterr()
    assert not set(out + err) & {"\x1b", "\x07"}
    assert r"t\x1b[2J" in out
    assert r"no\x1b]0;title\x07.npz" in err
    assert common.visible("a\tb\nc ᵀ") == "a\tb\nc ᵀ"


@pytest.mark.parametrize("solver", ["search", "exact", "highs", "cbs"])
def test_losses_out_of_range_are_a_sentence(solver, tmp_path, capsys):
    write_instance(tmp_path / "huge.npz", instance(weights=1e160 * np.arange(1.0, 13.0)))
    assert solve.main([str(tmp_path / "huge.npz"), "--solver", solver, "--quiet"]) == 4
    assert "exceeds the range of float64: rescale" in capsys.readouterr().err


def test_tiny_losses_keep_the_incumbent_and_say_why(tmp_path, capsys):
    write_instance(tmp_path / "tiny.npz", instance(scale=1e-310))
    assert solve.main([str(tmp_path / "tiny.npz"), "--solver", "exact", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["pruned_count"] == 6
    assert "unexpected" not in err


def test_absurd_options_and_files_are_refused(instance_file, tmp_path, capsys):
    assert solve.main([str(instance_file), "--threads", "100000"]) == 2
    assert "--threads: must be a whole number from 1 to 1024, got '100000'" in capsys.readouterr().err
    for option in ("--max-iterations", "--no-improvement", "--seed", "--batch-size", "--budget", "--keep"):
        assert solve.main([str(instance_file), "--solver", "search", option, "9" * 400]) == 2
        assert f"{option}: must be a whole number from" in capsys.readouterr().err
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000 + "]" * 5000)
    assert solve.main([str(instance_file), "--config", str(tmp_path / "deep.toml")]) == 3
    assert "deep.toml: is not valid TOML: it is nested too deeply" in capsys.readouterr().err
    deep, parts = tmp_path / "deep.toml", ".".join("a" * 30_000)
    for text in (f"[{parts}]\n", f"{parts} = 1\n", f"set = {{{parts} = 1}}\n"):
        deep.write_text(text)
        assert solve.main([str(instance_file), "--config", str(deep)]) == 3
        assert "deep.toml: is not valid TOML: a key is nested too deeply" in capsys.readouterr().err
    deep.write_text(f"sparsity = [{', '.join(['0.5'] * 300)}]\nsolver = 'obd'\n")
    assert solve.main([str(instance_file), "--config", str(deep), "-q"]) == 0
    deep.write_text("x" * (1 << 24) + "y")
    assert solve.main([str(instance_file), "--config", str(deep)]) == 3
    assert "is longer than 16 MB" in capsys.readouterr().err


def test_messages_are_short_and_leave_the_terminal_alone(instance_file, capsys):
    assert solve.main([str(instance_file), "--solver", "x" * 100_000]) == 4
    assert len(capsys.readouterr().err) < 2200
    assert solve.main(["\x1b[31m\x9b\u202eabc\u2028def.npz"]) == 3
    shown = capsys.readouterr().err
    assert r"\x1b[31m\x9b\u202eabc\u2028def.npz" in shown


@pytest.mark.parametrize("text", ["{broken", '{"format": "cbs-library", "version": 1}', "[]", ""])
def test_a_damaged_index_of_the_library_stops_nothing(text, tmp_path, monkeypatch, capsys):
    shutil.copy(library_file.library_path("mlp-output-12"), tmp_path)
    (tmp_path / library_file.INDEX).write_text(text)
    monkeypatch.setattr(library_file, "_folder", lambda: tmp_path)
    library_file.library_entries.cache_clear()
    try:
        assert solve.main(["library:mlp-output-12", "--solver", "obd"]) == 0
        assert solve.main(["library:other", "--solver", "obd"]) == 3
    finally:
        monkeypatch.undo()
        library_file.library_entries.cache_clear()
    out, err = capsys.readouterr()
    assert "objective" in out
    assert "best known values are not available" in err


def test_an_output_that_is_a_loop_of_links_is_written(instance_file, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert solve.main([str(instance_file), "--solver", "obd", "-q", "--json", str(loop)]) == 0
    assert loop.is_file()
