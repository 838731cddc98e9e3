"""Fleets that fill the free devices of some pools, beside replicas that stay: which of them there can be.

A fleet is how many replicas of which shape go to which pool. `Program` finds fleets by the values of their shapes, which add up,
exactly; what a fleet is really worth `judge` says.
Machines are billed whole. A pool's free devices are believed to be whole machines but for one, and those beside a replica that
stays cost nothing more.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import TypeAlias

import numpy as np

from spotserve.core.hardware import InstanceType
from spotserve.core.plan import Parallel
from spotserve.planner.knapsack import CLOSE, Filling, Offer, cheapest
from spotserve.planner.shapes import Shape
from spotserve.planner.speed import ReplicaSpeed

_COST_UNITS_PER_USD = 10**5
_MOST_MACHINES = 2**20
"""Costs are compared in these units, and equal ones by the number of machines: one whole number says both."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Machines that are alike: one type, zone and market."""

    instance_type: InstanceType
    num_devices: int
    """Free ones, in all."""
    usd_per_hour: float
    """Of one whole instance."""
    zone: str = ""
    spot: bool = True

    def __post_init__(self) -> None:
        assert self.num_devices >= 0 and self.usd_per_hour >= 0

    @property
    def kind(self) -> tuple[str, str, bool]:
        """What its machines have in common."""
        return self.instance_type.name, self.zone, self.spot


@dataclass(frozen=True, slots=True)
class Choice:
    """One replica of a candidate."""

    parallel: Parallel
    pool: Pool
    speed: ReplicaSpeed


def alike(choices: Sequence[Choice]) -> list[tuple[ReplicaSpeed, int]]:
    """Their speeds, each once, with how many there are of it: equal shapes on machines of one type are equally fast."""
    counts = Counter((choice.parallel, choice.pool.instance_type.name) for choice in choices)
    speeds = {(choice.parallel, choice.pool.instance_type.name): choice.speed for choice in choices}
    return [(speeds[kind], count) for kind, count in counts.items()]


Fleet: TypeAlias = tuple[tuple[int, int, int], ...]
"""(pool, shape, how many), in order, none of them 0."""


class Yard:
    """The free machines of every pool, beside those that run already and stay."""

    def __init__(self, pools: Sequence[Pool], fixed: Sequence[Choice]) -> None:
        assert len({pool.kind for pool in pools}) == len(pools), "pools of one kind are one pool"
        self.pools = pools
        taken: dict[tuple[str, str, bool], int] = {}
        running = {choice.pool.kind: choice.pool for choice in fixed}
        for choice in fixed:
            taken[choice.pool.kind] = taken.get(choice.pool.kind, 0) + choice.parallel.num_slots
        self._beside = [-taken.get(pool.kind, 0) % pool.instance_type.num_devices for pool in pools]
        machines = {kind: -(-taken[kind] // pool.instance_type.num_devices) for kind, pool in running.items()}
        self.fixed_machines = sum(machines.values())
        self.fixed_usd_per_hour = sum(machines[kind] * pool.usd_per_hour for kind, pool in sorted(running.items()))

    def most_machines(self, pool: int) -> int:
        """Further machines that the pool has."""
        free, each = self.pools[pool].num_devices, self.pools[pool].instance_type.num_devices
        return max(0, ceil((free - self._beside[pool]) / each))

    def devices(self, pool: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Free devices that 0, 1, 2 .. further machines have."""
        each = self.pools[pool].instance_type.num_devices
        return np.minimum(self.pools[pool].num_devices, self._beside[pool] + np.arange(self.most_machines(pool) + 1) * each)

    def machines(self, pool: int, devices: int) -> int:
        """Further machines that so many devices take."""
        return max(0, ceil((devices - self._beside[pool]) / self.pools[pool].instance_type.num_devices))


class Program:
    """Fleets by the sum of their shapes' values, exactly."""

    def __init__(self, yard: Yard, shapes: Sequence[Shape], values: Sequence[float]) -> None:
        """`values` are those of the shapes; shapes worth nothing are left out."""
        self._yard = yard
        worth = [index for index, value in enumerate(values) if value > 0]
        self._items: dict[str, list[int]] = {}
        for name in sorted({pool.instance_type.name for pool in yard.pools}):
            best: dict[int, int] = {}
            for index in worth:
                size = shapes[index].size
                if shapes[index].instance_type.name == name and (size not in best or values[index] > values[best[size]]):
                    best[size] = index
            self._items[name] = [best[size] for size in sorted(best)]
        most = {name: max(pool.num_devices for pool in yard.pools if pool.instance_type.name == name) for name in self._items}
        self._fillings = {
            name: Filling([shapes[index].size for index in items], [values[index] for index in items], most[name])
            for name, items in self._items.items()
        }
        self._devices = [yard.devices(pool) for pool in range(len(yard.pools))]
        self._offers = [
            Offer(_cost(pool), self._fillings[pool.instance_type.name].values(devices))
            for pool, devices in zip(yard.pools, self._devices, strict=True)
        ]

    @property
    def most_value(self) -> float:
        """Of all devices."""
        return sum(float(offer.values[-1]) for offer in self._offers)

    def most(self) -> Fleet:
        """The fleet of the most value; of those one with the fewest machines of each pool."""
        return self._fleet([int(np.searchsorted(offer.values, offer.values[-1] * (1 - CLOSE))) for offer in self._offers])

    def cheapest(self, value: float) -> Fleet | None:
        """The cheapest fleet of at least `value`, of those the one with the fewest machines, then the one of the most value."""
        machines = cheapest(self._offers, value)
        return None if machines is None else self._fleet(machines)

    def _fleet(self, machines: Sequence[int]) -> Fleet:
        found = []
        for pool, count in enumerate(machines):
            name = self._yard.pools[pool].instance_type.name
            counts = self._fillings[name].counts(int(self._devices[pool][count]))
            found += [(pool, item, number) for item, number in zip(self._items[name], counts, strict=True) if number]
        return tuple(sorted(found))


def _cost(pool: Pool) -> int:
    return round(pool.usd_per_hour * _COST_UNITS_PER_USD) * _MOST_MACHINES + 1


def all_fleets(yard: Yard, shapes: Sequence[Shape], limit: int) -> list[Fleet] | None:
    """Every fleet there can be; None when there are more than `limit`."""
    per_pool = []
    total = 1
    for number, pool in enumerate(yard.pools):
        items = [(index, shape.size) for index, shape in enumerate(shapes) if shape.instance_type.name == pool.instance_type.name]
        found: list[tuple[Fleet, int]] = [((), pool.num_devices)]
        for index, size in items:
            found = [
                ((*fleet, (number, index, count)) if count else fleet, left - count * size)
                for fleet, left in found
                for count in range(left // size + 1)
            ]
            if total * len(found) > limit:
                return None
        total *= len(found)
        per_pool.append([fleet for fleet, _ in found])
    return [tuple(part for fleet in fleets for part in fleet) for fleets in product(*per_pool)]
