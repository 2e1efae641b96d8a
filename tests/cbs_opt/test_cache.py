"""One place decides where caches lie, and it copes with places that cannot be written."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from cbs_opt import cache
from cbs_opt.early_signals import is_command


@pytest.fixture
def fresh(monkeypatch):
    """Forget what was decided in this process, now and at the end; no variable is set."""
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    cache.cache_folder.cache_clear()
    yield monkeypatch
    cache.cache_folder.cache_clear()


def test_the_variable_comes_first_and_the_folder_is_made(fresh, tmp_path):
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    fresh.setenv(cache.VARIABLE, str(tmp_path / "a" / "b"))
    assert cache.cache_folder() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "xdg").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: the folder of other systems")
def test_the_users_cache_is_the_default(fresh, tmp_path):
    fresh.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "cbs-opt"
    assert cache.is_lasting()
    cache.cache_folder.cache_clear()
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "cbs-opt"


def test_a_folder_that_cannot_be_made_gives_a_private_one_and_one_line(fresh, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    fresh.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.INFO, "cbs_opt"):
        found = cache.cache_folder()
        assert cache.cache_folder() == found
    assert found is not None and found.is_dir() and found != tmp_path / "file" / "cache"
    assert not cache.is_lasting()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/file/cache: cannot be written: kernels are kept for this process only; "
        "CBS_OPT_CACHE names another folder"
    ]


def test_a_private_folder_goes_with_its_process(tmp_path, process_environment):
    (tmp_path / "file").write_text("no folder")
    code = "from cbs_opt.cache import cache_folder\nprint(cache_folder())"
    environment = {**process_environment, cache.VARIABLE: str(tmp_path / "file" / "x"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path
    assert not folder.exists()


def test_nothing_that_can_be_written_is_none(fresh, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    fresh.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))

    def refuse(**_):
        raise OSError("no")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    with caplog.at_level(logging.INFO, "cbs_opt"):
        assert cache.cache_folder() is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("argv", "original", "ours"),
    [
        (["/usr/bin/cbs-solve", "x.npz"], ["python", "/usr/bin/cbs-solve", "x.npz"], True),
        (["-m", "x.npz"], ["python", "-m", "cbs_opt.cli.solve", "x.npz"], True),
        (["-m", "x.npz"], ["python", "-P", "-m", "cbs_opt.bench.startup"], True),
        (["-m"], ["python", "-m", "pytest", "cbs_opt.cli.solve"], False),
        (["-c"], ["python", "-c", "import cbs_opt"], False),
        (["script.py", "-m", "cbs_opt.cli.solve"], ["python", "script.py", "-m", "cbs_opt.cli.solve"], False),
        ([], [], False),
    ],
)
def test_only_our_commands_change_what_an_early_signal_does(argv, original, ours):
    assert is_command(argv, original) is ours
