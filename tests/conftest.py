"""Random problems, and runs of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
from hypothesis import Phase, settings

from cbs_opt import write_instance
from cbs_opt.testing import make_problem

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True)
# A failure is all that tests/mutations asks for: no search for the smallest example.
settings.register_profile(
    "mutations", parent=settings.get_profile("suite"), phases=(Phase.explicit, Phase.generate), database=None
)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def problem():
    """The factory of random problems."""
    return make_problem


@pytest.fixture(scope="session")
def with_instance():
    """`with_instance(problem, weights=...)`: the same problem with parts of the instance replaced."""

    def change(problem, **parts):
        return replace(problem, instance=replace(problem.instance, **parts))

    return change


@pytest.fixture(scope="session")
def run():
    """Run a command line in a process of its own: `run("solve", "file.npz", "--json", "-")`."""

    def call(command, *arguments, timeout=120, **options):
        return subprocess.run(
            [sys.executable, "-m", f"cbs_opt.cli.{command}", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(),
            **options,
        )

    return call


def environment():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def process_environment():
    """Environment variables with which a subprocess finds the package."""
    return environment()


@pytest.fixture(scope="session")
def repository():
    """The root of the repository."""
    return ROOT


@pytest.fixture
def instance_file(tmp_path):
    """A small instance file of one block, twelve weights, six to prune."""
    path = tmp_path / "instance.npz"
    write_instance(path, make_problem(3, n=12, kind="gradients").instance)
    return path


@pytest.fixture(scope="session")
def shared_instances():
    """The folder of instances beside the repository; tests that need it are marked `shared`."""
    folder = ROOT.parent / "shared" / "data" / "instances"
    if not folder.is_dir():
        pytest.skip(f"NOT TESTED: the shared data folder {folder.relative_to(ROOT.parent)} is absent")
    return folder
