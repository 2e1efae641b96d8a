"""`cbs-bench paper`: rows, resumption, reports."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cbs_opt.bench.paper import rows
from cbs_opt.bench.paper.report import write_study_report
from cbs_opt.bench.paper.results import read_results
from cbs_opt.bench.runs.store import Store
from cbs_opt.cli.bench import main


def content(path):
    """What a table shows, by method, sparsity and seed: everything but times."""
    with Store(path) as store:
        stored = store.rows()
    times = {"select_s", "update_s"}
    return {
        (row.label, row.sparsity, row.seed): (
            row.kind,
            row.objective,
            {key: value for key, value in (row.scores or {}).items() if key not in times},
        )
        for row in stored
    }


@pytest.fixture
def finished(study_file):
    path = study_file.with_name("whole.sqlite")
    assert main(["paper", str(study_file), "-o", str(path), "-q"]) == 0
    return path


def test_rows_are_scored_and_say_what_they_saw(finished, capsys):
    found = content(finished)
    assert len(found) == 21
    assert all(kind == "ok" for kind, _, _ in found.values())
    seen = {label: scores["images"] for (label, _, _), (_, _, scores) in found.items()}
    assert seen == {"MP": 0, "CBS-S": 140, "CBS": 140, "WF": 80, "LS, scaled": 140, "kfac": 40, "two stages": 140}
    for (label, sparsity, seed), (_, predicted, scores) in found.items():
        assert math.isfinite(scores["training_loss"])
        assert scores["test_images"] == 60
        assert (scores.get("scale") is not None) == (label == "LS, scaled")
        if label == "CBS":  # the best update lowers what the model predicts for the same selection
            assert predicted <= found["CBS-S", sparsity, seed][1]
        if label == "CBS-S":  # the first draw is magnitude
            assert scores["training_loss"] <= found["MP", sparsity, seed][2]["training_loss"]
    # A seed shuffles the training images only: magnitude does not depend on it, what is measured does.
    first, second = (found["MP", 0.8, seed][2] for seed in (0, 1))
    assert first["accuracy"] == second["accuracy"]
    assert first["training_loss"] != second["training_loss"]
    assert main(["paper", "tiny.toml", "-o", str(finished), "-q"]) == 0
    assert "0 rows made" in capsys.readouterr().out


def test_the_same_command_resumes_what_was_killed(finished, study_file, process_environment):
    path = study_file.with_name("killed.sqlite")
    command = [sys.executable, "-m", "cbs_opt.cli.bench", "paper", str(study_file), "-o", str(path)]
    process = subprocess.Popen(command, env=process_environment, stderr=subprocess.DEVNULL, cwd=study_file.parent)
    for _ in range(600):
        time.sleep(0.1)
        if process.poll() is not None or (path.is_file() and _rows(path) >= 3):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = _rows(path)
    assert before >= 3
    assert main(["paper", str(study_file), "-o", str(path), "-q"]) == 0
    resumed, whole = content(path), content(finished)
    assert resumed.keys() == whole.keys()
    for key, row in resumed.items():
        assert alike(row, whole[key]), key


def alike(one, other):
    """Equal, except for what another process rounds in another order."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else one == other


def _rows(path):
    try:
        with Store(path) as store:
            return len(store.rows())
    except Exception:  # between its making and its first row
        return 0


def test_an_interrupt_keeps_the_rows(study_file, monkeypatch, capsys):
    path, made = study_file.with_name("interrupted.sqlite"), []

    def interrupted(task):
        if len(made) == 2:
            signal.raise_signal(signal.SIGINT)
        made.append(task)
        return rows.run_pruning_unpatched(task)

    monkeypatch.setattr(rows, "run_pruning_unpatched", rows.run_pruning, raising=False)
    monkeypatch.setattr(rows, "run_pruning", interrupted)
    assert main(["paper", str(study_file), "-o", str(path), "-q"]) == 0
    out = capsys.readouterr().out
    assert "2 rows made" in out
    assert "interrupted: 19 rows are left; the same command resumes" in out
    assert _rows(path) == 2
    assert main(["paper", str(study_file), "-o", str(path), "-q", "--dry-run"]) == 0
    assert "21 rows on 2 instances, 19 of them to be made" in capsys.readouterr().out


def test_the_report_shows_means_published_figures_and_gaps(study_file, capsys):
    path = study_file.with_name("part.sqlite")
    some = ["--methods", "MP", "WF", "CBS", "LS, scaled"]
    assert main(["paper", "tiny.toml", "-o", str(path), "-q", *some, "--seeds", "0", "1"]) == 0
    assert main(["paper", "tiny.toml", "-o", str(path), "-q", "--methods", "kfac", "--sparsities", ".4"]) == 0
    capsys.readouterr()
    assert main(["report", str(path), "-o", "out", "-q"]) == 0
    assert capsys.readouterr().out == "out.md\nout.html\n"
    text = study_file.with_name("out.md").read_text()
    lines = text.splitlines()
    mean, deviation = _expected(path, "WF", 0.8)
    header = next(line for line in lines if line.startswith("| sparsity | MP"))
    assert header == "| sparsity | MP | CBS | WF | LS, scaled |"
    row = next(line for line in lines if line.startswith("| 0.8 |"))
    assert f"| {mean:.2f} ± {deviation:.2f} |" in row
    assert "(0.00) |" in row
    assert "| 0.4 | 90.00 |" in text  # the best published figure before methods of ours
    assert re.search(r"^- Not run: .*CBS-S", text, re.MULTILINE)
    assert "- kfac was not run at 0.8." in text
    assert "MP at 0.8:" in text  # further than NEAR from the paper
    assert "- A note." in text
    page = study_file.with_name("out.html").read_text()
    assert page.count("<svg") == 2
    names = {file.name for file in study_file.with_name("out-pictures").iterdir()}
    assert names == {"accuracy.svg", "losses.svg"}


def test_a_report_without_predictions(study_file, capsys):
    path = study_file.with_name("stages.sqlite")
    assert main(["paper", "tiny.toml", "-o", str(path), "-q", "--methods", "two stages"]) == 0
    assert main(["report", str(path), "-o", "out", "-q"]) == 0
    text = study_file.with_name("out.md").read_text()
    assert "Accuracy, ours" in text and "Predicted and measured" not in text and "as published |" not in text


def _expected(path, label, sparsity):
    with Store(path) as store:
        found = [
            100 * row.scores["accuracy"] for row in store.rows() if (row.label, row.sparsity) == (label, sparsity)
        ]
    assert len(found) == 2
    return np.mean(found), np.std(found, ddof=1)


def test_rows_of_an_earlier_form_of_a_study_are_left_out(study_file):
    path = study_file.with_name("old.sqlite")
    some = ["-q", "--methods", "MP", "kfac", "-o", str(path)]
    assert main(["paper", "tiny.toml", *some]) == 0
    study_file.write_text(study_file.read_text().replace("images = 40", "images = 41"))
    assert main(["paper", "tiny.toml", *some, "--sparsities", ".4"]) == 0
    results = read_results(path)
    assert [len(results.rows.get(("kfac", s), [])) for s in (0.4, 0.8)] == [1, 0]
    assert len(write_study_report(path)) == 4
    with Store(path) as store:
        assert len(store.rows()) == 4 + 2 + 1
        assert json.loads(store.meta["study"])["choice_images"] == 60


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tiny.toml", "--methods", "SGD"], "there is no method 'SGD'; known: MP"),
        (["tiny.toml", "--sparsities", "2"], "must be a number between 0 and 1, got '2'"),
        (["tiny.toml", "--sparsities", ".3"], "no method is left for these seeds and sparsities"),
        (["resnet"], "is neither a file nor one of the configurations"),
        (["mlpnet"], "`--checkpoint` is needed for 'mlpnet'"),
    ],
)
def test_bad_arguments_get_one_sentence(study_file, capsys, arguments, sentence):
    assert main(["paper", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_stores_are_not_mixed_up(finished, tmp_path, capsys):
    assert main(["report", str(finished), "--proofs", str(tmp_path / "p.md")]) == 2
    assert "holds pruned networks: `--profile` and `--proofs` are of solvers" in capsys.readouterr().err
