"""Fleets by the values of their shapes: the programs against trying everything, machines billed whole."""

import itertools
from math import ceil

from hypothesis import given, settings
from hypothesis import strategies as st
from planner_speeds import RooflineSpeed, machine

from spotserve.core.plan import Parallel
from spotserve.planner.fleets import Choice, Fleet, Pool, Program, Yard, all_fleets
from spotserve.planner.shapes import Shape
from spotserve.planner.workload import Lengths, Workload

SMALL, LARGE = machine("small.2", num_devices=2), machine("large.3", num_devices=3)
SPEED = RooflineSpeed(8, 100_000, 0.01, 1e-4, 0.0, 1e-5, 1, 0.0)
WORKLOAD = Workload(1.0, Lengths.fixed(100), Lengths.fixed(100))
SHAPES = [
    Shape.of(Parallel(pipeline=size), kind, SPEED, WORKLOAD)
    for kind, sizes in ((SMALL, (1, 2, 4)), (LARGE, (2, 3)))
    for size in sizes
]


def every_fleet(pools: list[Pool]) -> list[dict[tuple[int, int], int]]:
    """(pool, shape) -> how many, of every fleet that fits."""
    kinds = [(p, s) for p, pool in enumerate(pools) for s, shape in enumerate(SHAPES) if shape.instance_type == pool.instance_type]
    found = []
    for counts in itertools.product(*[range(pools[p].num_devices // SHAPES[s].size + 1) for p, s in kinds]):
        fleet = dict(zip(kinds, counts, strict=True))
        if all(devices_of(fleet, p) <= pool.num_devices for p, pool in enumerate(pools)):
            found.append(fleet)
    return found


def devices_of(fleet: dict[tuple[int, int], int], pool: int) -> int:
    return sum(count * SHAPES[shape].size for (where, shape), count in fleet.items() if where == pool)


def as_dict(fleet: Fleet) -> dict[tuple[int, int], int]:
    return {(pool, shape): count for pool, shape, count in fleet}


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, 3),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.7, 1.0, 2.1]),
    st.integers(0, 40),
)
def test_the_programs_find_what_trying_everything_finds(
    small: int, large: int, kept: int, values: list[int], usd: float, wanted: int
) -> None:
    """Free devices on machines that are paid for anyway cost nothing."""
    pools = [Pool(SMALL, small, usd), Pool(LARGE, large, 1.0)]
    fixed = [Choice(Parallel(), pools[1], SPEED)] * kept
    yard = Yard(pools, fixed)
    program = Program(yard, SHAPES, [float(value) for value in values])

    def value(fleet: dict[tuple[int, int], int]) -> int:
        return sum(count * values[shape] for (_, shape), count in fleet.items())

    def cost(fleet: dict[tuple[int, int], int]) -> tuple[float, int]:
        machines = ceil(devices_of(fleet, 0) / 2), max(0, ceil((devices_of(fleet, 1) - (-kept % 3)) / 3))
        return round(machines[0] * usd + machines[1], 9), sum(machines)

    fleets = every_fleet(pools)
    most = as_dict(program.most())
    assert value(most) == max(map(value, fleets)) == program.most_value
    assert all(devices_of(most, p) <= pool.num_devices for p, pool in enumerate(pools))
    enough = [fleet for fleet in fleets if value(fleet) >= wanted]
    found = program.cheapest(float(wanted))
    assert (found is None) == (not enough)
    if found is not None:
        assert value(as_dict(found)) >= wanted
        assert cost(as_dict(found)) == min(map(cost, enough))


def test_all_fleets_are_all_and_too_many_are_none() -> None:
    pools = [Pool(SMALL, 5, 1.0), Pool(LARGE, 5, 1.0)]
    yard = Yard(pools, [])
    found = all_fleets(yard, SHAPES, 1000)
    assert found is not None
    wanted = [{key: count for key, count in fleet.items() if count} for fleet in every_fleet(pools)]
    assert len(found) == len(wanted)
    assert all(as_dict(fleet) in wanted for fleet in found)
    assert all_fleets(yard, SHAPES, len(found) - 1) is None
