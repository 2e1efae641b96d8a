"""The mutation check itself: it says when a patch does not fit, and tells noticed from not noticed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
TABLES = """
[files]
budget = "cbs_opt/budget.py"
gone = "cbs_opt/gone.py"

[tests]
met = ["tests/cbs_opt/test_budget.py::test_cheapest_against_enumeration"]

[[patch]]
name = "the patch"
file = "FILE"
old = "OLD"
new = "NEW"
tests = ["met"]
"""


def patches(folder, file, old, new):
    path = folder / "patches.toml"
    path.write_text(TABLES.replace("FILE", file).replace("OLD", old).replace("NEW", new))
    return path


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(RUN), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("file", "old", "sentence"),
    [
        ("budget", "text that is nowhere", "the old text occurs 0 times in cbs_opt/budget.py, not once"),
        ("budget", "import", "times in cbs_opt/budget.py, not once"),
        ("gone", "anything", "cbs_opt/gone.py is not there"),
        ("budget", "something else", "occurs 0 times"),
    ],
)
def test_a_patch_that_does_not_fit_is_an_error(file, old, sentence, tmp_path):
    for more in ((), ("--list",), ("the patch",)):
        code, _, err = run("--patches", patches(tmp_path, file, old, "x"), *more)
        assert code == 1
        assert err.startswith("mutations: the patch: ")
        assert sentence in err


def test_noticed_or_not(tmp_path):
    """A wrong line that a test notices, then a change that none can notice."""
    wrong = patches(tmp_path, "budget", "position < self.per_group", "position <= self.per_group")
    code, out, err = run("--patches", wrong, "--workers", 1)
    assert (code, err) == (0, "")
    assert "1 patches, 0 not noticed" in out
    harmless = patches(tmp_path, "budget", "How many weights to prune: one", "How many weights to prune : one")
    code, out, err = run("--patches", harmless, "--workers", 1)
    assert code == 1
    assert "NOT NOTICED" in out
    assert err == "mutations: the patch: no test fails (cbs_opt/budget.py)\n"


def test_the_tables_are_read():
    spec = importlib.util.spec_from_file_location("mutations_run", RUN)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = module.read_patches(RUN.with_name("patches.toml"))
    assert len(found) > 100
    assert all(patch.tests and patch.old != patch.new for patch in found)
    assert {patch.extra for patch in found} == {False, True}
    assert {patch.path.split("/")[0] for patch in found} <= set(module.COPIED)
