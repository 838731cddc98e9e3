"""Intervals against published values, their definition, and how often they hold what they should."""

import random
from math import exp, inf, log, sqrt
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spotserve.replay.intervals import contrast, interval, means, over_repeats, ratio, runs_needed, student_t


@pytest.mark.parametrize("degrees", [1, 2, 5, 10, 29, 30, 31, 60, 120, 1000])
def test_factors_are_those_of_student(degrees: int) -> None:
    assert student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_interval_by_its_definition(values: list[float]) -> None:
    found = interval(values)
    half = student_t(len(values) - 1) * stdev(values) / sqrt(len(values))
    assert (found.mean, found.low, found.high) == pytest.approx((fmean(values), fmean(values) - half, fmean(values) + half))
    assert found.half_width == pytest.approx(half) and found.repeats == len(values)


def test_one_value_says_nothing_of_its_spread() -> None:
    assert (interval([3.0]).low, interval([3.0]).high) == (-inf, inf) and not interval([3.0]).excludes_zero


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    drawn = random.Random(5)
    held = 0
    for _ in range(400):
        found = interval([drawn.gauss(10, 2) for _ in range(8)])
        held += found.low <= 10 <= found.high
    assert 368 <= held <= 392, "of 400, 380 are expected"


def test_pairs_tell_apart_what_means_do_not() -> None:
    luck = [10.0, 50.0, 90.0, 200.0]
    found = contrast(luck, [1.1 * value for value in luck])
    assert found.ratio is not None and found.ratio.low == pytest.approx(1.1) == found.ratio.high
    assert interval(luck).high > fmean(luck) * 1.1
    assert contrast([1.0, 2.0, 3.0], [2.0, 3.0, 4.1]).difference.excludes_zero
    assert contrast([0.0, 1.0], [1.0, 1.0]).ratio is None


def test_ratio_run_by_run() -> None:
    found = ratio([2.0, 8.0], [1.0, 2.0])
    assert found is not None
    mean, low, high = found
    assert mean == pytest.approx(exp((log(2) + log(4)) / 2)) and low < 2 and high > 4
    assert ratio([2.0, 0.0], [1.0, 1.0]) == pytest.approx((2.0, 2.0, 2.0)) and ratio([0.0], [1.0]) is None


def test_runs_needed_as_the_analysis_of_dawnbench_has_it() -> None:
    five_percent, ten_percent = [95.0, 100.0, 105.0], [90.0, 100.0, 110.0]
    assert runs_needed(five_percent, half_width_share=0.02) == 25 and runs_needed(ten_percent, half_width_share=0.05) == 16
    assert runs_needed([1.0, 1.0], half_width_share=0.01) == runs_needed([4.0], half_width_share=0.01) == 2


def test_over_repeats_leaves_out_what_a_repeat_lacks() -> None:
    repeats = [{"a": 1.0, "b": None, "c": 2}, {"a": 3.0, "b": 1.0, "c": 2}]
    assert set(over_repeats(repeats)) == {"a", "c"} and over_repeats(repeats)["a"].mean == 2.0
    assert means(repeats) == {"a": 2.0, "b": 1.0, "c": 2.0} and means(repeats[:1]) == repeats[0]
