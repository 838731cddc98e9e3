"""Filling devices with replicas: the largest sum of values on a number of devices, and the cheapest way to a wanted sum.

Two programs, both exact.

`Filling`: replicas of any size, any number of each, on up to n devices of one pool (the unbounded knapsack). Beyond some number
of devices nothing new happens: let the densest size (most value per device) be d. Of any d other replicas some have a sum of
sizes that d divides, and as many devices of the densest size are worth no less; so fewer than d others are ever needed, and
with the largest size m the devices beyond (d - 1) * m are all of the densest (Gilmore and Gomory's turnpike theorem, 1966).
The table ends there, however many devices there are.

`cheapest`: how many machines to take of each pool, machines billed whole, so that the values reach what is wanted. The fractional
program (every pool's curve replaced by its concave hull) bounds the cost from below, its rounding from above. A number of
machines that alone costs more than the gap between the two, against the dual price, is in no optimum. What remains is merged
pool by pool, points that are dearer and worth no more dropped; the pool with most points comes last, by binary search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

CLOSE = 1e-9
"""Sums that differ relatively by less are equal: the order of adding makes such differences."""

_FEW = 2**14
"""So many combinations are merged sooner than bounds are found."""


class Filling:
    """The most value that replicas of `sizes` devices, worth `values` each, have together on any number of devices."""

    def __init__(self, sizes: Sequence[int], values: Sequence[float], num_devices: int) -> None:
        """Sizes are at least 1, values above 0. O(sizes x min(num_devices, size of the densest x largest size))."""
        assert len(sizes) == len(values) and min(sizes, default=1) >= 1 and min(values, default=1.0) > 0
        self._sizes, self._values = list(sizes), list(values)
        self._densest = max(range(len(sizes)), key=lambda item: (values[item] / sizes[item], -sizes[item]), default=None)
        self._turnpike = 0 if self._densest is None else (sizes[self._densest] - 1) * max(sizes)
        table = num_devices if self._densest is None else min(num_devices, self._turnpike + sizes[self._densest])
        self._tables: list[Counts] = []
        values_so_far = np.zeros(table + 1)
        for size, value in zip(sizes, values, strict=True):
            values_so_far, counts = _with_item(values_so_far, size, value)
            self._tables.append(counts)
        self._table = values_so_far

    def values(self, devices: Counts) -> Floats:
        """The most value on each number of `devices`."""
        if self._densest is None:
            return np.zeros(len(devices))
        of_densest, rest = self._divided(devices)
        most: Floats = of_densest * self._values[self._densest] + self._table[rest]
        return most

    def counts(self, devices: int) -> list[int]:
        """How many replicas of each size have that value on so many devices."""
        found = [0] * len(self._sizes)
        if self._densest is None:
            return found
        of_densest, rests = self._divided(np.array([devices]))
        rest = int(rests[0])
        for item in reversed(range(len(self._sizes))):
            found[item] = int(self._tables[item][rest])
            rest -= found[item] * self._sizes[item]
        found[self._densest] += int(of_densest[0])
        return found

    def _divided(self, devices: Counts) -> tuple[Counts, Counts]:
        """How many of the densest the turnpike puts on so many devices, and the devices that remain for the table."""
        assert self._densest is not None
        size = self._sizes[self._densest]
        of_densest = np.maximum(0, devices - self._turnpike) // size
        return of_densest, devices - of_densest * size


def _with_item(values: Floats, size: int, value: float) -> tuple[Floats, Counts]:
    """Most value per number of devices when replicas of one more size may be used, and how many of them are."""
    devices = len(values)
    rows = -(-devices // size)
    padded = np.full(rows * size, -inf)
    padded[:devices] = values
    worth = np.arange(rows)[:, None] * value
    relative = padded.reshape(rows, size) - worth
    best = np.maximum.accumulate(relative, axis=0)
    row = np.arange(rows)[:, None]
    since = np.maximum.accumulate(np.where(relative >= best, row, 0), axis=0)  # of equal ones as few of this size as can be
    counts = (row - since).ravel()[:devices]
    most = padded[np.arange(devices) - counts * size] + counts * value
    return most, counts


@dataclass(frozen=True, slots=True)
class Offer:
    """What one pool gives for each number of machines."""

    cost: int
    """Of one more machine, at least 1: whole numbers, so that equal costs are equal."""
    values: Floats
    """values[k]: the most value on k machines; grows with k, and values[0] may be above 0."""

    @property
    def costs(self) -> Counts:
        """Of each number of machines."""
        return np.arange(len(self.values)) * self.cost


def cheapest(offers: Sequence[Offer], wanted: float) -> tuple[int, ...] | None:
    """Machines of each pool whose values reach `wanted` at the lowest cost; None when all of them do not reach it.

    Of equal costs the combination with the largest sum of values. Grows with the points that can be in an optimum (see above).
    """
    wanted -= abs(wanted) * CLOSE
    if sum(float(offer.values[-1]) for offer in offers) < wanted:
        return None
    points = _worth_trying(offers, wanted)
    *others, last = sorted(range(len(offers)), key=lambda pool: len(points[pool]))
    front = _Front.of(offers, points, others)
    values = offers[last].values[points[last]]
    index = np.searchsorted(values, wanted - front.values)
    reaching = np.flatnonzero(index < len(values))
    machines = points[last][index[reaching]]
    costs = front.costs[reaching] + machines * offers[last].cost
    sums = front.values[reaching] + offers[last].values[machines]
    chosen = np.lexsort((-sums, costs))[0]
    found = dict(zip(others, front.taken[reaching[chosen]], strict=True)) | {last: machines[chosen]}
    return tuple(int(found[pool]) for pool in range(len(offers)))


def _worth_trying(offers: Sequence[Offer], wanted: float) -> list[Counts]:
    """Of each pool the numbers of machines that can be in an optimum.

    At any dual price m of one unit of value, sum(min_k(cost * k - m * values[k])) + m * wanted bounds the cost of every
    combination from below, and one with k machines costs more by as much as k is above its pool's minimum.
    """
    steps = [np.concatenate(([True], offer.values[1:] > offer.values[:-1])) for offer in offers]
    if len(offers) == 1 or prod(len(each) for each in steps) <= _FEW:
        return [np.flatnonzero(each) for each in steps]
    price, ceiling = _dual_price(offers, wanted)
    reduced = [offer.costs - price * offer.values for offer in offers]
    floor = sum(float(each.min()) for each in reduced) + price * wanted
    spare = ceiling - floor + CLOSE * (abs(ceiling) + price * sum(float(offer.values[-1]) for offer in offers))
    return [np.flatnonzero((each - each.min() <= spare) & is_step) for each, is_step in zip(reduced, steps, strict=True)]


def _dual_price(offers: Sequence[Offer], wanted: float) -> tuple[float, int]:
    """The price of a unit of value at which what is worth its price just reaches `wanted`, and the cost of a combination."""
    costs = [offer.costs for offer in offers]

    def at_price(price: float) -> list[int]:
        """Of each pool the machines that are worth most above their cost."""
        return [int((cost - price * offer.values).argmin()) for cost, offer in zip(costs, offers, strict=True)]

    everything = sum(float(offer.values[-1]) for offer in offers)
    low, high = 0.0, (1.0 + sum(float(cost[-1]) for cost in costs)) / max(everything, 1e-9)
    while not _reaches(offers, at_price(high), wanted):
        low, high = high, high * 4
    while high - low > 1e-4 * high:  # any price bounds; this one is near the best
        middle = (low + high) / 2
        low, high = (low, middle) if _reaches(offers, at_price(middle), wanted) else (middle, high)
    machines = at_price(high)
    for pool in sorted(range(len(offers)), key=lambda pool: -offers[pool].cost):
        spared = sum(float(offer.values[count]) for offer, count in zip(offers, machines, strict=True)) - wanted
        values = offers[pool].values
        machines[pool] = min(machines[pool], int(np.searchsorted(values, values[machines[pool]] - spared)))
    return high, sum(offer.cost * count for offer, count in zip(offers, machines, strict=True))


def _reaches(offers: Sequence[Offer], machines: Sequence[int], wanted: float) -> bool:
    return sum(float(offer.values[count]) for offer, count in zip(offers, machines, strict=True)) >= wanted


@dataclass(frozen=True, slots=True)
class _Front:
    """Combinations of some pools, none of which another one beats in cost and value at once, by rising cost."""

    costs: Counts
    values: Floats
    taken: Counts
    """[combination, pool]"""

    @classmethod
    def of(cls, offers: Sequence[Offer], points: Sequence[Counts], pools: Sequence[int]) -> "_Front":
        """Every combination of `points` of `pools` that may matter."""
        front = cls(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros((1, 0), dtype=np.int64))
        for pool in pools:
            front = front._with(offers[pool], points[pool])
        return front

    def _with(self, offer: Offer, points: Counts) -> "_Front":
        costs = (self.costs[:, None] + points * offer.cost).ravel()
        values = (self.values[:, None] + offer.values[points]).ravel()
        order = np.lexsort((-values, costs))
        ahead = np.maximum.accumulate(values[order])
        kept = order[np.concatenate(([True], ahead[1:] > ahead[:-1]))]
        rows, columns = np.divmod(kept, len(points))
        return _Front(costs[kept], values[kept], np.column_stack([self.taken[rows], points[columns]]))
