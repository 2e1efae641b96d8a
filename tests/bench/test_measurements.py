"""The measuring commands at a small size: what they print is a table of what they measured."""

import sys

import pytest

from cbs_opt import CbsError, UsageError
from cbs_opt.bench import accuracy, scale, startup
from cbs_opt.cli import export


def test_a_fresh_process_is_timed_and_its_output_kept():
    run = startup.fresh_process(["-c", "print(6 * 7)"])
    assert 0 < run.seconds < 60
    assert 0 < run.cpu < 60
    assert run.out == "42\n"


def test_a_process_that_fails_is_told_apart():
    with pytest.raises(CbsError, match="code 3: broken"):
        startup.fresh_process(["-c", "import sys; sys.exit(print('broken', file=sys.stderr) or 3)"])


def test_the_environment_reaches_the_process():
    run = startup.fresh_process(["-c", "import os; print(os.environ['MEASURED'])"], {"MEASURED": "yes"})
    assert run.out == "yes\n"


def test_the_table_has_a_row_for_each_measurement():
    three = [startup.Run(seconds, 2 * seconds) for seconds in (0.1, 0.3, 0.2)]
    text = startup.table([startup.Row("one", 0.5, three), startup.Row("two", None, [startup.Run(1.0, 0.5)])])
    lines = text.splitlines()
    assert lines[2] == "| one | ≤ 0.5 s | 0.200 s | 0.300 s | 0.400 s | 3 |"
    assert lines[3] == "| two |  | 1.000 s | 1.000 s | 0.500 s | 1 |"


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is of Unix")
def test_scale_measures_both_losses_and_rmp(capsys):
    assert scale.main(["--weights", "40", "--gradients", "8", "--draws", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("`selection_loss`") == out.count("`joint_loss`") == 3
    assert "`rmp`, 3 draws: solving" in out


def test_accuracies_stand_in_percent_by_way_and_sparsity():
    study = accuracy.study_of("net", ["obs", "joint"], [0.5])
    rows = [
        accuracy.Row("", "", "", "", 1, 0, None, way, 0.5, "ok", scores={"accuracy": value})
        for way, value in (("obs", 0.9), ("joint", 0.95))
    ]
    lines = accuracy.table(accuracy.results_of(study, rows), 0.96).splitlines()
    assert lines[2] == "| sparsity | obs | joint |"
    assert lines[4] == "| 0.5 | 90.00 | 95.00 |"
    assert lines[-1] == "Dense: 96.00 %."


def test_an_instance_at_hand_is_pruned_and_scored(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    x, y = torch.randn(40, 5), torch.arange(40) % 3\n"
        "    return torch.nn.Linear(5, 3), (x, y), (x, y)\n"
    )
    assert export.main(["./blobs.py:make", "-o", "blobs.npz", "--samples", "40", "-q"]) == 0
    capsys.readouterr()
    options = ["--network", "./blobs.py:make", "--ways", "magnitude", "obs + update", "--sparsities", ".4"]
    assert accuracy.main(["blobs.npz", *options, "-o", "blobs.png"]) == 0
    out = capsys.readouterr().out
    assert "| sparsity | magnitude | obs + update |" in out
    assert (tmp_path / "blobs.png").read_bytes()[:4] == b"\x89PNG"


def test_samples_without_classes_are_refused_in_a_sentence(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("cbs_opt.instances.scores.evaluate", lambda model, samples: None)
    with pytest.raises(UsageError, match="no labels of classes"):
        accuracy.score(None, None)
