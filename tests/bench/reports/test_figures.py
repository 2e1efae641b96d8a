"""The pictures of a report: the right numbers in them, one look a solver, nothing over anything else."""

import numpy as np
import pytest

from cbs_opt.bench.reports import figures
from cbs_opt.bench.reports.analysis import Problem, Run, Section
from cbs_opt.bench.reports.canvas import as_svg, percent, styles
from cbs_opt.bench.reports.document import INK
from cbs_opt.bench.runs.store import Row, StoredInstance

SOLVERS = ["fast", "slow", "never"]


def run(name, exact, gap=0.0, *, certified=None, proof=np.inf, number=0):
    row = Row(
        "x", name, "{}", "selection", 5, 0, 10.0, name, 0.5, "ok", objective=1.0 + gap, build_s=0.0, id=number
    )
    return Run(row, gap, certified, exact, exact, proof, max(exact, 1.0) if np.isfinite(exact) else 1.0)


@pytest.fixture
def section():
    """Two problems: fast is twice and four times as fast as slow, never reaches neither."""
    problems = []
    for k, (n, factor) in enumerate(((10, 2.0), (40, 4.0))):
        problem = Problem(
            StoredInstance(str(k), f"problem {k}", n, 1, "hessian", {}), "selection", n // 2, 0.5 + 0.3 * k
        )
        problem.best, problem.scale, problem.proven, problem.lower = 1.0, 2.0, k == 0, 0.5
        problem.runs = {
            "fast": [
                run(
                    "fast",
                    0.1,
                    certified=0.0 if k == 0 else 0.5,
                    proof=0.2 if k == 0 else np.inf,
                    number=10 * k + 1,
                )
            ],
            "slow": [run("slow", 0.1 * factor, number=10 * k + 2)],
            "never": [run("never", np.inf, 0.25, number=10 * k + 3)],
        }
        problems.append(problem)
    return Section("selection", problems, SOLVERS)


@pytest.fixture
def looks():
    return styles(SOLVERS)


def lines(axes):
    return {line.get_label(): np.array(line.get_data()) for line in axes.lines}


def test_profiles_show_the_shares(section, looks):
    (axes,) = figures.profiles([section], looks, ["exact_s"]).axes
    drawn = lines(axes)
    assert drawn["fast"][1].tolist() == [1, 1]
    assert np.interp([1.5, 3, 5], *drawn["slow"])[[0, 2]].tolist() == pytest.approx([0.25, 1.0], abs=0.26)
    assert drawn["slow"][0][1:-1].tolist() == pytest.approx([2, 4])
    assert drawn["slow"][1].tolist() == [0, 0.5, 1, 1]
    assert drawn["never"][1].tolist() == [0, 0]
    assert axes.get_xscale() == "log"


def test_a_profile_of_proofs_has_no_lines_of_those_who_prove_nothing(section, looks):
    (axes,) = figures.profiles([section], looks, ["proof_s"]).axes
    assert set(lines(axes)) == {"fast"}


def test_gaps_have_a_panel_for_optima_best_known_and_bounds(section, looks):
    optimum, best, own = figures.gaps(section, looks).axes
    assert "1 proven" in optimum.get_title(loc="left") and "all 2" in best.get_title(loc="left")
    assert lines(best)["never"][0][1] == 0.25
    assert set(lines(own)) == {"fast"}
    assert lines(own)["fast"][1][0] == 0.5  # closed on one of two


def test_lines_over_sparsity_and_size(section, looks):
    known, own = figures.over_sparsity(section, looks).axes
    assert [label.get_text() for label in known.get_xticklabels()] == ["50 %", "80 %"]
    assert lines(known)["never"][1].tolist() == [0.25, 0.25]
    assert lines(own)["fast"][1].tolist() == [1e-6, 0.5]
    exact, proof = figures.over_n(section, looks).axes
    assert lines(exact)["slow"].tolist() == [[10, 40], pytest.approx([0.2, 0.4])]
    assert np.isnan(lines(proof)["fast"][1][1])  # a cross instead


def test_objective_and_bound_are_distances_from_the_best_known(section, looks):
    problem = section.problems[0]
    traces = {1: [(0.01, 3.0, None), (0.1, 1.0, 0.5)], 3: [(0.5, 1.25, None)]}
    (axes,) = figures.over_time(section, looks, [problem], traces).axes
    drawn = [line.get_ydata() for line in axes.lines if line.get_label() == "fast"]
    assert drawn[0][0] == 2.0 and drawn[0][-1] == 0.0
    assert min(line.get_ydata()[-1] for line in axes.lines) == -0.5
    low, high = axes.get_ylim()
    assert low <= -0.5 and high >= 2.0
    assert figures.over_time(section, looks, [problem], {}) is None


def test_targets_count_every_run(section, looks):
    exact, near = figures.targets(section, looks, figures.choose(section)).axes
    assert lines(exact)["slow"][1].tolist() == [0, 0.5, 1, 1]
    assert lines(near)["never"][1].max() == 0


def test_nothing_to_draw_is_none(looks):
    empty = Section(
        "selection", [Problem(StoredInstance("x", "x", 4, 1, "hessian", {}), "selection", 2, 0.5)], SOLVERS
    )
    for figure in (
        figures.profiles([empty], looks, ["exact_s"]),
        figures.gaps(empty, looks),
        figures.targets(empty, looks, []),
        figures.over_sparsity(empty, looks),
        figures.over_n(empty, looks),
        figures.over_time(empty, looks, [], {}),
    ):
        assert figure is None
    assert figures.choose(empty) == []


def test_many_solvers_have_looks_of_their_own():
    looks = styles([str(k) for k in range(30)])
    assert len({(look.colour, look.dashes) for look in looks.values()}) == 30
    assert all(1 < look.width < 3 for look in looks.values())


def test_the_legend_is_apart_from_the_panels(section):
    names = [f"a solver with a long name {k}" for k in range(14)]
    for problem in section.problems:
        problem.runs = {name: [run(name, 0.1 * (k + 1))] for k, name in enumerate(names)}
    section.solvers = names
    figure = figures.profiles([section], styles(names), ["exact_s", "near_s"])
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert all(axes.get_window_extent().width > 300 for axes in figure.axes)
    width, height = figure.canvas.get_width_height()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_names_are_shown_as_they_stand(section):
    section.solvers = ["_hidden", "$a^", "plain"]
    for problem in section.problems:
        problem.runs = {name: [run(name, 0.1)] for name in section.solvers}
    figure = figures.profiles([section], styles(section.solvers), ["exact_s"])
    figure.canvas.draw()
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_hidden", r"\$a^", "plain"]


def test_svg_is_the_same_each_time_and_takes_the_ink_of_the_page(section, looks):
    texts = [as_svg(figures.profiles([section], looks, ["exact_s"]), "name") for _ in range(2)]
    assert texts[0] == texts[1]
    assert INK in texts[0]
    assert "#000000" not in texts[0] and "<image" not in texts[0]


def test_sparsities_near_a_level_are_counted_with_it():
    assert figures.levels([0.5, 29 / 36, 0.9167, 0.85]) == {0.5: 0.5, 29 / 36: 0.8, 0.9167: 0.9, 0.85: 0.85}
    many = [0.5 + k / 40 for k in range(20)]
    assert set(figures.levels(many).values()) <= set(figures.LEVELS)


def test_ticks_of_gaps():
    assert [percent(x) for x in (0, 1e-6, 1e-4, 0.01, 1, 10, 1e4, -0.01)] == [
        "0", "1e-6", "0.01 %", "1 %", "100 %", "1000 %", "1e4", "−1 %",
    ]  # fmt: skip
