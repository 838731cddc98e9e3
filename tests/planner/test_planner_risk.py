"""Risk: numbers of instances taken against the sum over numbers of instants, and against drawing by hand."""

from itertools import combinations
from math import comb, exp, factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.planner.risk import Cell, Risk, Sizes, mean_size, mixed, taken

SIZES: Sizes = ((1, 0.65), (2, 0.25), (3, 0.04), (4, 0.04), (5, 0.02))


@st.composite
def any_sizes(draw: st.DrawFn, largest: int = 6) -> Sizes:
    weights = draw(st.dictionaries(st.integers(1, largest), st.floats(0.1, 1.0), min_size=1, max_size=4))
    total = sum(weights.values())
    return tuple((size, weight / total) for size, weight in sorted(weights.items()))


def taken_naively(expected: float, sizes: Sizes, most: int) -> list[float]:
    """Sum over the number of instants of the convolution power of their sizes."""
    one = np.zeros(max(size for size, _ in sizes) + 1)
    for size, share in sizes:
        one[size] = share
    total = np.zeros(2000)
    power = np.array([1.0])
    for instants in range(60):
        total[: len(power)] += exp(-expected) * expected**instants / factorial(instants) * power
        power = np.convolve(power, one)
    return [*total[:most], total[most:].sum()]


@given(st.floats(0, 6), any_sizes(), st.integers(1, 20))
def test_taken_is_the_sum_over_numbers_of_instants(expected: float, sizes: Sizes, most: int) -> None:
    assert taken(expected, sizes, most) == pytest.approx(taken_naively(expected, sizes, most), abs=1e-9)


def test_taken_holds_where_exponentials_underflow() -> None:
    shares = taken(2000.0, SIZES, 5000)
    numbers = np.arange(5001)
    mean = 2000 * mean_size(SIZES, 5)
    assert shares.sum() == pytest.approx(1)
    assert shares @ numbers == pytest.approx(mean, rel=1e-6)
    assert shares @ (numbers - mean) ** 2 == pytest.approx(2000 * sum(size**2 * share for size, share in SIZES), rel=1e-4)


def test_nobody_is_there_to_be_taken() -> None:
    assert list(taken(3.0, SIZES, 0)) == [1.0]
    assert list(taken(0.0, SIZES, 3)) == [1.0, 0.0, 0.0, 0.0]


@given(st.lists(st.tuples(st.floats(0.01, 2), any_sizes()), min_size=1, max_size=3))
def test_mixed_streams_take_what_they_take_apart(parts: list[tuple[float, Sizes]]) -> None:
    rate, sizes = mixed(parts)
    together = np.array([1.0])
    for each_rate, each_sizes in parts:
        together = np.convolve(together, taken(each_rate, each_sizes, 120))
    assert taken(rate, sizes, 120)[:60] == pytest.approx(together[:60], abs=1e-9)


@given(st.integers(1, 7), st.integers(1, 7), any_sizes(9))
def test_hits_are_counted_as_by_listing_the_groups(total: int, given_ones: int, sizes: Sizes) -> None:
    given_ones = min(given_ones, total)
    cell = Cell("c", tuple(f"i{index}" for index in range(total)), 3.0, sizes)
    hit = 0.0
    for size, share in sizes:
        size = min(size, total)
        groups = list(combinations(range(total), size))
        hit += share * sum(min(group) < given_ones for group in groups) / comb(total, size)
    assert cell.hits_per_hour(given_ones) == pytest.approx(3.0 * hit)
    assert cell.hits_per_hour(1) == pytest.approx(cell.instance_rate_per_hour)


def test_an_instance_is_in_one_cell_at_most() -> None:
    cell = Cell("a", ("i1", "i2"), 1.0, SIZES)
    with pytest.raises(AssertionError, match="two cells"):
        Risk((cell, Cell("b", ("i2",), 1.0, SIZES)))
    assert Risk((cell,)).rates_per_hour == {"i1": pytest.approx(0.675), "i2": pytest.approx(0.675)}
