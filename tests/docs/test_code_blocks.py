"""Every Python block of README.md and docs/ runs, and does what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

import cbs_opt
from cbs_opt import register, registry
from cbs_opt.curvature import registry as curvature_registry

EXECUTED = {
    "README.md",
    *(f"docs/{name}.md" for name in ("best-subset", "extending", "format", "guide", "index", "transformers")),
}
"""Pages with Python blocks; each has a test, below or in a file of its own."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory to import from; its modules, solvers and kinds are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {*sys.modules}
    yield tmp_path
    registry._registered.pop("greedy-for-a-test", None)
    curvature_registry._registered.pop("low_rank", None)
    for name in {*sys.modules} - before:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if path.startswith(str(tmp_path)):
            del sys.modules[name]


def test_every_page_with_python_is_executed(repository, markdown):
    pages = [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]
    found = {
        page.relative_to(repository).as_posix()
        for page in pages
        if any(block.language == "python" for block in markdown.blocks(page))
    }
    assert found == EXECUTED


def test_no_fence_is_left_open(repository):
    for page in [repository / "README.md", *(repository / "docs").glob("*.md")]:
        assert len(re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)) % 2 == 0, page


def test_best_subset_page(here, markdown, repository, capsys):
    pytest.importorskip("sklearn", reason="NOT TESTED: scikit-learn is not installed")
    names = markdown.run(repository / "docs" / "best-subset.md")
    shown = [line.split("# ")[-1] for block in markdown.blocks(repository / "docs" / "best-subset.md")
             for line in block.code.splitlines() if line.startswith("print(")]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == shown
    assert names["intercept"] == pytest.approx(5, abs=0.2) and names["chosen"].k_ >= 3


def test_helper_runs_blocks_and_writes_files(here, markdown):
    page = here / "page.md"
    page.write_text(
        '# A\n```python\nx = 2\n```\n```python title="m.py"\ny = 3\n```\n```python\nimport m\nz = m.y * x\n```\n'
    )
    assert markdown.run(page)["z"] == 6
    page.write_text("\n\n```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        markdown.run(page)
    assert error.traceback[-1].lineno + 1 == 4


def test_readme(repository, markdown, here):
    pytest.importorskip("sklearn", reason="NOT TESTED: scikit-learn, for the data of README.md, is not installed")
    network, usage = [block for block in markdown.blocks(repository / "README.md") if block.language == "python"]
    (here / "mynet.py").write_text(network.code)
    import mynet

    model, (x, y), (test_x, test_y) = mynet.make()
    assert sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1) == 1864
    assert (x.shape[0], y.shape[0], test_x.shape[0], test_y.shape[0]) == (1400, 1400, 397, 397)
    quick = usage.code.replace("time_limit=10", "max_iterations=50")
    assert quick != usage.code
    names = markdown.run(repository / "README.md", blocks=[usage.__class__("python", None, quick, usage.line)])
    assert names["keep"].sum() == names["instance"].n - names["instance"].budget.total
    assert (names["weights"][~names["keep"]] == 0).all()


def test_index_page(repository, markdown, here):
    assert markdown.run(repository / "docs" / "index.md")["result"].status == "optimal"


def test_format_page_writes_an_instance(repository, markdown, here):
    markdown.run(repository / "docs" / "format.md")
    instance = cbs_opt.read_instance(here / "small.npz")
    assert (instance.n, instance.budget.total, instance.metadata["network"]) == (6, 3, "an example")
    assert cbs_opt.solve(instance, "brute").status == "optimal"


def test_guide_page(repository, markdown, here):
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    names = {
        "model": model,
        "inputs": torch.randn(40, 6),
        "labels": torch.randint(0, 3, (40,)),
        "cbs_opt": cbs_opt,
    }
    names = markdown.run(repository / "docs" / "guide.md", names)
    pruned = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
    assert pruned == names["instance"].budget.total == 29


@pytest.fixture
def extending(repository, markdown, here):
    return markdown.run(repository / "docs" / "extending.md")


def test_extending_page(extending, here):
    assert extending["result"].solver == "greedy"
    assert extending["result"].parameters == {"check_every": 4}
    assert (here / "greedy.py").read_text().count("\n") <= 45
    names = [name for name in ("greedy.py", "low_rank.py") if (here / name).is_file()]
    assert names == ["greedy.py", "low_rank.py"]


def test_greedy_solver_is_greedy(extending, problem):
    """Against the definition: prune what adds least, by the textbook loss."""
    given = problem(3, n=9, blocks=2, linear=True, fixed=True)
    pruned = given.instance.fixed == 1
    while pruned.sum() < given.instance.budget.total:
        candidates = np.flatnonzero(~pruned & (given.instance.fixed == 0))
        losses = [given.selection_loss(pruned | (np.arange(9) == i)) for i in candidates]
        pruned[candidates[int(np.argmin(losses))]] = True
    found = cbs_opt.solve(given.instance, extending["Greedy"])
    assert np.array_equal(found.pruned, pruned)


def test_tests_of_the_extending_page_pass(extending, here, process_environment):
    path = os.pathsep.join([str(here), process_environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "test_greedy.py"],
        capture_output=True,
        text=True,
        cwd=here,
        env=process_environment | {"PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


def test_entry_points_of_the_extending_page(extending, here, process_environment):
    """The solver, installed as the page says, is found by name in a process of its own."""
    info = here / "cbs_greedy-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cbs-greedy\nVersion: 0.1.0\n")
    groups = tomllib.loads((here / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join([str(here), process_environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "cbs_opt.cli.solve", "library:mlp-output-20", "--solver", "greedy", "-q"],
        capture_output=True,
        text=True,
        env=process_environment | {"PYTHONPATH": path},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "converged" in done.stdout


def test_registration_in_one_process(extending):
    register("greedy-for-a-test")(type("Renamed", (extending["Greedy"],), {}))
    assert cbs_opt.solve("library:mlp-output-12", "greedy-for-a-test").solver == "greedy-for-a-test"
