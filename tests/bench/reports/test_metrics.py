"""Gaps, means and profiles against values worked out by hand, and what must hold of any data."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt.bench.reports import metrics

times = st.one_of(st.floats(1e-4, 1e4), st.just(math.inf))
tables = st.integers(1, 4).flatmap(
    lambda solvers: st.lists(st.lists(times, min_size=solvers, max_size=solvers), min_size=1, max_size=12)
)


def test_profiles_by_hand():
    first, second, third = metrics.performance_profiles(
        [[1, 2, math.inf], [4, 1, math.inf], [3, math.inf, math.inf], [math.inf, math.inf, math.inf]]
    )
    assert first.x.tolist() == [1, 4]
    assert first.y.tolist() == [0.5, 0.75]  # fastest on two of four problems, four times slower on one
    assert second.x.tolist() == [1, 2]
    assert second.y.tolist() == [0.25, 0.5]
    assert third.x.size == 0
    assert [first.at(x) for x in (0.5, 1, 3.9, 4, 100)] == [0, 0.5, 0.5, 0.75, 0.75]


def test_times_below_the_clock_are_equal():
    both = metrics.performance_profiles([[1e-6, 5e-4]], least=1e-3)
    assert [steps.at(1.0) for steps in both] == [1, 1]


def test_a_time_of_zero_is_the_fastest():
    zero, other = metrics.performance_profiles([[0.0, 2.0]])
    assert zero.at(1.0) == 1
    assert other.x.size == 0


@given(tables)
def test_profiles_rise_in_steps_to_the_share_solved(table):
    clock = np.array(table)
    profiles = metrics.performance_profiles(clock)
    solved = np.isfinite(clock).mean(axis=0)
    best = np.isfinite(clock).any(axis=1).mean()
    for steps, share in zip(profiles, solved, strict=True):
        assert (np.diff(steps.x) > 0).all()
        assert (np.diff(steps.y) > 0).all()
        assert steps.at(math.inf) == pytest.approx(share)
        assert steps.at(0.999) == 0
    assert sum(steps.at(1.0) for steps in profiles) >= best - 1e-12  # ties count for each


@given(tables, st.floats(0.01, 100))
def test_profiles_do_not_depend_on_the_unit_of_time(table, factor):
    clock = np.array(table)
    for a, b in zip(
        metrics.performance_profiles(clock), metrics.performance_profiles(clock * factor), strict=True
    ):
        assert a.at(1e9) == b.at(1e9)
        assert a.at(1 + 1e-9) == b.at(1 + 1e-9)


@given(st.lists(times, max_size=20), st.integers(1, 5))
def test_shares_with_weights_are_shares_of_repeated_values(values, weight):
    plain = metrics.shares(np.repeat(values, weight))
    weighted = metrics.shares(values, np.full(len(values), float(weight)))
    assert plain.x.tolist() == weighted.x.tolist()
    assert plain.y == pytest.approx(weighted.y)


def test_shifted_geometric_mean_by_hand():
    assert metrics.shifted_geometric_mean([0, 3]) == pytest.approx(1.0)  # sqrt(1 · 4) − 1
    assert metrics.shifted_geometric_mean([1, 4], shift=0) == pytest.approx(2.0)
    assert metrics.shifted_geometric_mean([0, 90], shift=10) == pytest.approx(math.sqrt(1000) - 10)
    assert math.isnan(metrics.shifted_geometric_mean([]))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.1, 10))
def test_the_shifted_geometric_mean_lies_between_extremes_and_below_the_mean(values, shift):
    mean = metrics.shifted_geometric_mean(values, shift)
    slack = 1e-9 * (max(values) + shift)
    assert min(values) - slack <= mean <= np.mean(values) + slack


def test_medians_count_what_failed():
    assert metrics.median([1, math.inf, 2]) == 2
    assert metrics.median([1, math.inf]) == math.inf
    assert metrics.median([math.inf, math.inf]) == math.inf
    assert metrics.median([1, 2, 3, 4]) == 2.5
    assert math.isnan(metrics.median([]))


def test_the_mean_gap_leaves_out_failures_only():
    assert metrics.mean_ratio_gap([0.0, 3.0, math.inf]) == pytest.approx(1.0)
    assert math.isnan(metrics.mean_ratio_gap([math.inf]))


@pytest.mark.parametrize(
    ("value", "reference", "scale", "gap"),
    [
        (1.5, 1.0, 2.0, 0.5),
        (-0.5, -1.0, 1.0, 0.5),  # negative losses
        (1.0, -1.0, 1.0, 2.0),
        (2e-13, 0.0, 1.0, 0.0),  # 0 up to the rounding of the problem's losses
        (1.0, 0.0, 1.0, 1e12),  # finite: against the rounding
        (0.0, 0.0, 0.0, 0.0),
        (None, 1.0, 1.0, math.inf),
    ],
)
def test_gaps_by_hand(value, reference, scale, gap):
    assert metrics.relative_gap(value, reference, scale) == pytest.approx(gap)


@given(st.integers(-1000, 1000), st.integers(0, 1000), st.integers(-60, 60))
def test_gaps_do_not_depend_on_the_unit_of_the_loss(reference, above, exponent):
    scale, unit = abs(reference) + above, 2.0**exponent
    gap = metrics.relative_gap(reference + above, reference, scale)
    assert gap >= 0
    scaled = metrics.relative_gap((reference + above) * unit, reference * unit, scale * unit)
    assert scaled == gap


def test_a_bound_closes_to_the_tolerance_only():
    assert metrics.is_closed(1.0, 1.0 - 9e-7, 1.0)
    assert not metrics.is_closed(1.0, 1.0 - 2e-6, 1.0)
    assert metrics.is_closed(0.0, -1e-13, 1.0)
    assert not metrics.is_closed(1.0, None, 1.0)
    assert metrics.certified_gap(2.0, 1.0, 2.0) == 0.5
    assert metrics.certified_gap(1.0, 2.0, 2.0) == 0.0


def test_first_times():
    events = [(0.1, None, 0.0), (0.2, 5.0, None), (0.5, 3.0, 2.0), (0.9, 3.0, 3.0)]
    assert metrics.first_times(events, (5.0, 3.0, 4.0, 1.0)) == [0.2, 0.5, 0.5, math.inf]
    assert metrics.first_closed(events, 5.0) == 0.9
    assert metrics.first_closed(events[:3], 5.0) == math.inf


def test_a_run_on_a_grid_of_times():
    events = [(1.0, 5.0, None), (2.0, None, 1.0), (3.0, 4.0, 2.0)]
    grid = np.array([0.5, 1.0, 2.5, 3.0, 9.0])
    assert metrics.on_grid(events, grid).tolist()[1:] == [5, 5, 4, 4]
    assert np.isnan(metrics.on_grid(events, grid)[0])
    assert metrics.on_grid(events, grid, 2).tolist()[2:] == [1, 2, 2]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=300, unique=True), st.integers(3, 40))
def test_thinning_keeps_the_function_at_its_points_and_its_ends(values, count):
    steps = metrics.shares(values)
    thin = metrics.thinned(steps, count)
    assert thin.x.size <= max(count, 1) or steps.x.size <= count
    assert thin.x[0] == steps.x[0]
    assert thin.y[-1] == steps.y[-1]
    assert [steps.at(x) for x in thin.x] == thin.y.tolist()
