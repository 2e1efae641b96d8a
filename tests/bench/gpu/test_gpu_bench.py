"""The measurements of a card: rows, tables, and parts that fail. `.ci/run` runs all parts, emulated."""

from __future__ import annotations

import csv
import io
import subprocess
import sys

import pytest
import torch

from cbs_opt.bench.gpu import run, table
from cbs_opt.bench.gpu.measure import Bench, Row, read_rows


@pytest.fixture
def bench(tmp_path):
    return Bench("part", "cpu", False, tmp_path, tmp_path / "rows.jsonl")


def test_rows_are_written_at_once_and_know_their_targets(bench, tmp_path):
    bench.row("fast", 3.0, "s", at_most=4.0)
    bench.row("slow", 3.0, "swaps/s", at_least=4.0, note="a | b")
    bench.row("absent", None, at_least=1.0)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"part": "part", "what": "unfin')  # the process was ended here
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row.what, row.target, row.met) for row in rows] == [
        ("fast", "≤ 4", True),
        ("slow", "≥ 4", False),
        ("absent", "≥ 1", None),
    ]
    assert read_rows(tmp_path / "none.jsonl") == []
    page = table.markdown(rows, "a card; today")
    assert "| fast | 3 | s | ≤ 4 | yes |  |" in page and "| slow | 3 | swaps/s | ≥ 4 | no | a / b |" in page
    assert "—" in table.lines(rows)[2] and "NO" in table.lines(rows)[1]
    read = list(csv.DictReader(io.StringIO(table.csv_text(rows))))
    assert [row["value"] for row in read] == ["3.0", "3.0", ""] and read[1]["note"] == "a | b"


def test_tiny_sizes_have_no_targets(tmp_path):
    tiny = Bench("part", "cpu", True, tmp_path, tmp_path / "rows.jsonl")
    tiny.row("fast", 3.0, "s", at_most=1.0)
    assert read_rows(tmp_path / "rows.jsonl")[0].met is None


def test_the_card_is_compared_with_one_core():
    rows = [
        Row("core-mlpnet", "cbs on mlpnet, one core, 60 s: loss", 2.0),
        Row("mlpnet", "cbs on MLPNet, card: loss", 1.5),
        Row("search", "search on resnet20, card, 10 s: loss", 4.0),
        Row("core-resnet20", "search on resnet20, one core, 60 s: loss", 2.0),
        Row("core-mlpnet", "search on mlpnet, one core, 60 s: loss", None),
    ]
    found = table.comparisons(rows)
    assert [(row.what, row.value, row.met) for row in found] == [
        ("cbs on MLPNet, loss: card over one core", 0.75, True),
        ("ResNet20, loss: card over one core", 2.0, False),
    ]


def test_history_stands_apart():
    rows = [Row("search", "search", 1.0), Row("search", "history: search", 5.0, note="0.10 s")]
    assert table.lines(rows) == table.lines(rows[:1])
    assert table.markdown(rows, "").endswith("| search | 0.10 s | 5 |\n")


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.PARTS, "broken", ("solver_parts:mlpnet", 5.0))
    monkeypatch.setitem(run.PARTS, "absent", ("parts:nothing", 5.0))
    rows = tmp_path / "rows.jsonl"
    code = run._run_parts(["broken", "absent"], "cpu", True, tmp_path, rows)
    found = read_rows(rows)
    assert code == 1 and [row.what for row in found] == ["broken: failed", "absent: failed"]
    assert "mlpnet.npz: no such file" in found[0].note and "AttributeError" in found[1].note
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "cards"], "there is no part 'cards'; known: make, card"),
        (["--minutes", "0"], "above 0, got 0"),
    ],
)
def test_bad_options(arguments, words, capsys):
    assert run.main([*arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
def test_without_a_card_nothing_is_written(repository, capsys):
    page = repository / "bench" / "results" / "gpu.md"
    before = page.read_bytes()
    assert run.main([]) == 2 and "no CUDA card answers here" in capsys.readouterr().err
    assert page.read_bytes() == before


def test_the_page_says_whether_it_was_run(repository):
    page = (repository / "bench" / "results" / "gpu.md").read_text(encoding="utf-8")
    assert page == table.NOT_RUN or "Command: `python -m cbs_opt.bench.gpu`" in page


def test_a_process_that_ends_without_a_row_leaves_one(tmp_path, monkeypatch):
    """Where torch cannot be imported, no part can say what was wrong."""
    (tmp_path / "torch.py").write_text("raise ImportError('a library is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = run._Part(["card"], "cuda", True, tmp_path)
    wrong = part.wait(60.0)
    assert wrong.startswith("exit code") and "a library is missing" in wrong


@pytest.mark.parametrize("minutes", [7.5, 3.0])
def test_every_part_has_its_share_whatever_the_others_take(minutes):
    names, left, found = list(run.PARTS), 60.0 * minutes - 12.0, []
    for number, name in enumerate(names):
        found.append(run.seconds_of([name], names[number + 1 :], left))
        left -= found[-1]
    assert left >= -1e-9
    shares = [seconds / run.PARTS[name][1] for name, seconds in zip(names, found, strict=True)]
    assert max(shares) <= 1 and (minutes < 7 or min(shares) >= 0.4 - 1e-9)


BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "pyomo", "highspy", "threadpoolctl", "joblib", "matplotlib", "rich", "safetensors", "PIL", "sklearn",
        }:
            raise ModuleNotFoundError(f"no module {name}", name=name)

sys.meta_path.insert(0, Missing())
import numpy as np
from cbs_opt import Stop, solve
from cbs_opt.bench.gpu import parts, problems, solver_parts
from cbs_opt.instances.export import export
from cbs_opt.instances.networks import load_network
from cbs_opt.update import best_update

instance = problems.mlpnet(True)
for solver in ("rmp", "cbs", "search"):
    found = solve(instance, solver, stop=Stop(max_iterations=2), threads=1)
best_update(instance, found.pruned)
images, labels = problems.images(3, (1, 28, 28), 0)
made = export(load_network("mlpnet").model, images, labels, blocks="layer", curvature="gradients", sparsity=0.9)
print(made.n)
"""


def test_a_machine_with_torch_numba_numpy_and_scipy_is_enough(process_environment):
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        capture_output=True,
        text=True,
        env=process_environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "32360"
