"""The picture of objective over time: right numbers in it, readable, and refused where there is nothing."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import cbs_opt
from cbs_opt.bench import trajectories


@pytest.fixture
def results(problem):
    instance = problem(1, n=30, kind="gradients", budget=15).instance
    return trajectories.trajectories(instance, ["magnitude", "ls"], threads=1)


def texts(figure):
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts]


def test_a_line_for_each_solver_with_its_final_value(results):
    figure = trajectories.draw(results, "title")
    (axes,) = figure.axes
    assert [text.split()[0] for text in texts(figure)] == ["magnitude", "ls"]
    for result, text in zip(results.values(), texts(figure), strict=True):
        assert float(text.split()[1]) == pytest.approx(result.objective, rel=0.01)
    steps = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    for result, line in zip(results.values(), steps, strict=True):
        assert line.get_ydata()[0] == result.trace[0][1]
        assert line.get_ydata()[-1] == pytest.approx(result.objective)
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_labels_do_not_overlap(results):
    equal = {f"solver {k}": results["ls"] for k in range(6)}
    figure = trajectories.draw(equal, "title")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_bound_is_drawn_and_a_negative_loss_has_a_linear_axis(results):
    ls = results["ls"]
    lowered = [(seconds, objective - 100, None) for seconds, objective, _ in ls.trace]
    figure = trajectories.draw({"ls": replace(ls, trace=lowered, bound=-200.0)}, "title")
    assert texts(figure)[-1].startswith("bound  -2.00e+2")
    assert figure.axes[0].get_yscale() == "linear"


def test_nothing_to_draw_is_said(results):
    with pytest.raises(cbs_opt.CbsError, match="no run has a history"):
        trajectories.draw({"ls": replace(results["ls"], trace=[])}, "title")


def test_the_command_writes_a_small_picture(tmp_path, capsys, instance_file):
    picture = tmp_path / "picture.png"
    assert trajectories.main([str(instance_file), "--solvers", "magnitude", "ls", "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["magnitude", "ls"]


def test_an_unknown_solver_leaves_no_picture(tmp_path, capsys, instance_file):
    picture = tmp_path / "picture.png"
    assert trajectories.main([str(instance_file), "--solvers", "nobody", "-o", str(picture)]) == 4
    assert "nobody" in capsys.readouterr().err
    assert not picture.exists()


def test_time_never_runs_backwards(results):
    for result in results.values():
        times, values = trajectories._steps(result)
        assert (np.diff(times) >= 0).all()
        assert (np.diff(values) < 0).all()


def test_a_run_asked_for_less_time_counts_where_it_is_better():
    events = [(0.1, 3.0, None), (0.2, 4.0, None), (0.4, 2.0, None), (0.8, 2.0, None)]
    assert trajectories._falling(events) == [events[0], events[2]]


def test_samplers_are_drawn_over_time(problem):
    pytest.importorskip("dwave.samplers", reason="NOT TESTED: dwave-samplers is not installed")
    instance = problem(1, n=30, kind="gradients", budget=15).instance
    rows = trajectories.trajectories(instance, ["dwave-tabu", "dwave-annealing"], time_limit=0.1)
    for row in rows.values():
        assert row.trace[-1][1] == pytest.approx(row.objective)
        assert row.trace[-1][0] <= 0.11
    with pytest.raises(cbs_opt.SolverError, match="minimises the selection loss"):
        trajectories.trajectories(instance, ["dwave-tabu"], objective="joint", time_limit=0.1)
