"""The cost model of layers: what it fits, predicts and prints."""

import numpy as np
import pytest

from cbs_opt import SolverError, UsageError, read_instance, solve, write_instance
from cbs_opt.bench import layer_scale
from cbs_opt.bench.large_layers import as_instance, generate, transformer_block
from cbs_opt.bench.layer_scale import Measured, fitted, makespan, measure, predictions


def of_law(rows, columns, sparsity):
    """A measurement that the model fits exactly."""
    factor = 1.0 if sparsity == 0.5 else 2.0
    seconds = factor * (3e-9 * rows * columns**2 + 5e-10 * columns**3)
    return Measured(rows, columns, sparsity, seconds, 40.0 * rows * columns + 30.0 * columns**2 + 2e8, 0.01)


def test_the_model_finds_the_law_behind_measurements():
    sizes = [(256, 1152), (768, 1152), (256, 1536), (768, 1536)]
    model = fitted([of_law(*size, sparsity) for size in sizes for sparsity in (0.5, 0.7)])
    for sparsity in (0.5, 0.7):
        there = of_law(4096, 11008, sparsity)
        assert model.seconds_of(4096, 11008, sparsity) == pytest.approx(there.seconds, rel=1e-6)
    assert model.bytes_of(4096, 11008) == pytest.approx(there.memory, rel=1e-6)
    rows = predictions(model)
    assert [row[0] for row in rows] == ["7B", "7B", "70B", "70B"]
    assert [row[2] for row in rows] == [224, 224, 560, 560]


def test_the_largest_tasks_go_first():
    assert makespan([1.0, 2.0, 3.0, 4.0], 1) == 10.0
    assert makespan([1.0, 2.0, 3.0, 4.0], 2) == 5.0
    assert makespan([5.0, 1.0], 8) == 5.0


def test_a_layer_is_measured_in_a_process_of_its_own():
    found = measure(6, 16, 0.5)
    assert (found.rows, found.columns, found.sparsity) == (6, 16, 0.5)
    assert found.seconds > 0 and 1e7 < found.memory < 1e10 and 0 < found.error < 1
    with pytest.raises(SolverError, match=r"the layer 6 × 0 could not be measured: .* a size is"):
        measure(6, 0, 0.5)


def test_the_command_reports_what_was_measured(monkeypatch, capsys, tmp_path):
    made = []

    def measure_of_law(*layer):
        made.append(layer)
        return of_law(*layer)

    monkeypatch.setattr(layer_scale, "measure", measure_of_law)
    rows = str(tmp_path / "rows.jsonl")
    given = ["--unseen", "512x2048", "--rows", rows, "--sizes", "256x1152", "768x1536"]
    assert layer_scale.main(given) == 0
    capsys.readouterr()
    assert layer_scale.main([*given, "512x1280"]) == 0
    assert len(made) == len(set(made)) == 8  # nothing twice
    out = capsys.readouterr().out
    there = of_law(512, 2048, 0.5)
    seconds, memory = f"{there.seconds:.1f}", f"{there.memory / 1e9:.2f}"
    assert f"| 512 × 2048 | 0.5 | {seconds} | {memory} | {seconds} (+0 %) | {memory} (+0 %) |" in out
    assert "Predictions, not measured" in out and out.count("| 70B |") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--sizes", "4096"], "a size is ROWSxCOLUMNS"), (["--sparsities", "2"], "must be between 0 and 1")],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    assert layer_scale.main(arguments) == UsageError.exit_code
    assert message in capsys.readouterr().err


def test_a_block_of_a_transformer_is_an_instance_of_seven_layers():
    instance = transformer_block(8, 12, 0.7)
    assert instance.n == 4 * 64 + 3 * 96 and instance.curvature.number_of_stored == 7
    assert instance.budget.total == 381
    assert instance.curvature.block_sizes.tolist() == [8] * 56 + [12] * 8
    assert not np.array_equal(instance.curvature.block(0), instance.curvature.block(8))


def test_a_generated_layer_is_an_instance_of_its_budget(tmp_path):
    W, S = generate(3, 8, 20)
    for sparsity, count in ((0.5, 12), ((1, 4), 6)):
        instance = as_instance(W, S, sparsity)
        write_instance(tmp_path / "layer.npz", instance)
        again = read_instance(tmp_path / "layer.npz")
        assert again.budget.total == count and again.n == 24
        assert np.allclose(again.curvature.block(2), S, rtol=1e-6)
        assert int(solve(again, "magnitude").pruned.sum()) == count
