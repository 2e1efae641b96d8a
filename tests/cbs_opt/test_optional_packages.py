"""What runs with which packages missing, each in a process of its own that cannot import them."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATE = ("torch", "pyomo", "highspy", "matplotlib", "networkx", "joblib", "PIL", "safetensors", "sklearn", "ray")
"""Packages of the default install, and beyond, that `import cbs_opt` and the main job do without."""

_BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def without(process_environment):
    """`without(packages, code)` runs Python code where the packages cannot be imported."""

    def run(packages, code):
        return subprocess.run(
            [sys.executable, "-c", _BLOCK.format(blocked=tuple(packages)) + code],
            capture_output=True,
            text=True,
            env=process_environment,
            timeout=120,
        )

    return run


def command(name, *arguments):
    return f"from cbs_opt.cli.{name} import main\nsys.exit(main({[str(a) for a in arguments]!r}))"


@pytest.mark.parametrize(("solver", "status"), [("joint", "optimal"), ("cbs", "converged")])
def test_solvers_need_few_packages(without, solver, status):
    done = without(LATE, command("solve", "library:mlp-output-20", "--solver", solver, "-q"))
    assert (done.returncode, done.stderr) == (0, "")
    assert status in done.stdout


def test_default_of_the_main_command_needs_few_packages(without):
    done = without(LATE, command("solve", "library:mlp-output-12"))
    assert done.returncode == 0, done.stderr
    assert "best known" in done.stdout


def test_nothing_imports_them_before_they_are_needed(without):
    code = (
        "import cbs_opt, cbs_opt.testing\n"
        "from cbs_opt.cli.solve import main\n"
        "assert main(['library:mlp-output-12', '-q']) == 0\n"
        f"print({LATE!r}, [name for name in {LATE!r} if name in sys.modules], file=sys.stderr)"
    )
    done = without((), code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("[]")


@pytest.mark.parametrize(
    ("package", "code", "subject"),
    [
        ("highspy", command("solve", "library:mlp-output-12", "--solver", "highs", "-q"), "solver 'highs'"),
        ("pyomo", command("solve", "library:mlp-output-12", "--solver", "pyomo", "-q"), "solver 'pyomo'"),
        ("highspy", command("info", "library:mlp-output-12", "--export", "x.mps"), "the export to .mps"),
        ("matplotlib", command("info", "library:mlp-output-12", "--picture", "x.png"), "a picture"),
        ("networkx", command("info", "library:mlp-output-12", "--picture", "x.png"), "a picture of an instance"),
        (
            "torch",
            command("export", "digits-mlp", "--data", "digits", "--checkpoint", "x.pt", "-o", "x.npz"),
            "this",
        ),
    ],
)
def test_missing_package_is_one_sentence(without, package, code, subject, tmp_path):
    done = without([package], f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert done.returncode in (3, 4), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert subject in done.stderr
    assert package in done.stderr
    assert "report it" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_package_in_python(without):
    code = (
        "import cbs_opt\n"
        "result = cbs_opt.solve('library:mlp-output-12', 'obd')\n"
        "for ask in (result.plot, cbs_opt.library('mlp-output-12').interaction_graph):\n"
        "    try:\n        ask()\n"
        "    except cbs_opt.RequirementError as error:\n        print(error)\n"
    )
    done = without(["matplotlib", "networkx"], code)
    assert done.stdout.splitlines() == [
        "a picture needs the package 'matplotlib', which is not installed: pip install matplotlib",
        "an interaction graph needs the package 'networkx', which is not installed: pip install networkx",
    ]
