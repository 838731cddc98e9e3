"""Filling devices: both programs against trying everything."""

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotserve.planner import knapsack
from spotserve.planner.knapsack import Filling, Offer, cheapest

items = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), max_size=4)


def most_value(items: list[tuple[int, int]], devices: int) -> int:
    @cache
    def most(left: int) -> int:
        return max([value + most(left - size) for size, value in items if size <= left], default=0)

    return most(devices)


@settings(max_examples=150, deadline=None)
@given(items, st.integers(0, 70))
def test_a_filling_has_the_most_value_on_every_number_of_devices(items: list[tuple[int, int]], num_devices: int) -> None:
    """Seventy devices are beyond where the table of most of these ends."""
    sizes, values = [size for size, _ in items], [float(value) for _, value in items]
    filling = Filling(sizes, values, num_devices)
    every = np.arange(num_devices + 1)
    assert filling.values(every).tolist() == [most_value(items, devices) for devices in range(num_devices + 1)]
    for devices in (num_devices, num_devices // 2):
        counts = filling.counts(devices)
        assert sum(count * size for count, size in zip(counts, sizes, strict=True)) <= devices
        assert sum(count * value for count, value in zip(counts, values, strict=True)) == most_value(items, devices)


def test_a_large_pool_costs_no_more_than_the_turnpike() -> None:
    filling = Filling([3, 5], [3.0, 5.5], 10**7)
    assert filling.values(np.array([10**7]))[0] == pytest.approx(5.5 * 2 * 10**6)
    assert filling.counts(10**7 - 2) == [1, 1_999_999]
    assert sum(len(table) for table in filling._tables) < 100


@st.composite
def offers(draw: st.DrawFn) -> list[Offer]:
    curves = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4))
    costs = draw(st.lists(st.integers(1, 5), min_size=len(curves), max_size=len(curves)))
    return [Offer(cost, np.cumsum(curve, dtype=np.float64)) for cost, curve in zip(costs, curves, strict=True)]


@pytest.mark.parametrize("few", [0, 2**14])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offers(), st.integers(0, 60))
def test_the_cheapest_combination_is_that_of_trying_everything(
    monkeypatch: pytest.MonkeyPatch, few: int, offers: list[Offer], wanted: int
) -> None:
    """With the bounds, and without them where there is little to bound."""
    monkeypatch.setattr(knapsack, "_FEW", few)

    def value(machines: tuple[int, ...]) -> float:
        return float(sum(offer.values[count] for offer, count in zip(offers, machines, strict=True)))

    def key(machines: tuple[int, ...]) -> tuple[int, float]:
        return sum(offer.cost * count for offer, count in zip(offers, machines, strict=True)), -value(machines)

    every = itertools.product(*[range(len(offer.values)) for offer in offers])
    best = min((key(machines) for machines in every if value(machines) >= wanted), default=None)
    found = cheapest(offers, float(wanted))
    assert (found and key(found)) == best
    assert found is None or value(found) >= wanted


def test_many_pools_of_many_machines_leave_few_combinations() -> None:
    """Eight pools of 1,250 machines, hardly different in price: a table of all combinations would have 10**24 entries."""
    random = np.random.default_rng(3)
    offers = [
        Offer(int(cost), np.floor(np.arange(1251) / 2) * 0.35 + np.arange(1251) * 0.2)
        for cost in random.integers(19_000, 21_000, 8)
    ]
    found = cheapest(offers, 1234.5)
    assert found is not None
    values = sum(float(offer.values[count]) for offer, count in zip(offers, found, strict=True))
    assert values >= 1234.5 * (1 - 1e-9)
    order = sorted(range(8), key=lambda pool: offers[pool].cost)
    assert [found[pool] for pool in order[:2]] == [1250, 1250], "the cheapest are taken whole"
    assert sum(found) == pytest.approx(1234.5 / 0.375, abs=2)


@pytest.mark.parametrize(("smallest", "losses"), [*itertools.product(range(1, 9), range(3))])
def test_enough_consecutive_sizes_cover_every_count(smallest: int, losses: int) -> None:
    """Sizes n .. n + p - 1 cover every count of at least (f + 1) n devices if and only if (f + 1)(p - 1) >= n - 1."""
    for num_sizes in range(1, smallest + 2):
        sizes = range(smallest, smallest + num_sizes)
        filling = Filling(list(sizes), [float(size) for size in sizes], 200)
        counts = np.arange((losses + 1) * smallest, 201)
        covered = bool((filling.values(counts) == counts).all())
        assert covered == ((losses + 1) * (num_sizes - 1) >= smallest - 1)
