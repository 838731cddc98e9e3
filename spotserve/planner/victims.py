"""Sets of instances that may be lost in a short while, and what capacity is left after each: expectations over victims.

Parcae (NSDI'24) calls the expected throughput over preemption scenarios *liveput* and samples evenly drawn victims. Here up to
two victims are summed exactly and shared by all plans that are compared; so is everything where there are few instances. Only
three or more among many are sampled, by one fixed set of scenarios for all plans, so that plans differ by what they are and not
by luck.

Two facts keep it fast. The loss of one victim depends on its replicas alone, so victims with equal loss are counted, not listed;
and the loss of two is the sum of both, but for those few pairs that share a replica.

Pure. Knows capacities, not requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import comb, prod

import numpy as np
import numpy.typing as npt

from spotserve.planner.risk import Cell, Floats, taken

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_ENUMERATED = 10
"""Up to so many instances every set of victims is listed."""
_SAMPLES = 256
"""Scenarios of three victims and more, beyond that."""
_RARE = 0.01
"""Where up to two victims are rarer than this, they are sampled like all others."""


@dataclass(frozen=True, slots=True)
class Scenarios:
    """Listed sets of victims. The weights and the exact part of `Victims` sum to 1."""

    weights: Floats
    """[S]"""
    packed: npt.NDArray[np.uint8]
    """In which of them an instance is a victim, eight to a byte. [instances, ceil(S / 8)]"""

    @classmethod
    def of(cls, weights: Floats, masks: Bools) -> "Scenarios":
        """From who is a victim in which. [S, instances]"""
        return cls(weights, np.packbits(masks.T, axis=1))


class Victims:
    """Whom `cells` lose while `seconds` pass: each cell on its own, the victims of a cell drawn evenly among its instances."""

    def __init__(self, cells: Sequence[Cell], seconds: float) -> None:
        self.cells = cells
        self.index = {each: at for at, each in enumerate(each for cell in cells for each in cell.instance_ids)}
        self.cell_of: Ints = np.repeat(np.arange(len(cells)), [len(cell.instance_ids) for cell in cells])
        self._sizes: Ints = np.array([len(cell.instance_ids) for cell in cells], dtype=np.int64)
        hours = seconds / 3600
        self._taken = [taken(cell.instants_per_hour * hours, cell.sizes, len(cell.instance_ids)) for cell in cells]
        self.none = 0.0
        """Probability that nobody is lost; this and the next two are 0 where such sets are among `scenarios`."""
        self.single: Floats = np.zeros(len(cells))
        """Probability that a given instance is the only victim, by cell."""
        self.pair: Floats = np.zeros((len(cells), len(cells)))
        """Probability that two given instances are the only victims, by their cells."""
        if len(self.index) <= _ENUMERATED:
            self.scenarios = self._all()
        else:
            none, many = prod(float(shares[0]) for shares in self._taken), _at_least(self._taken)[0, 3]
            is_few_likely = none > 0 and many < 1 - _RARE
            if is_few_likely:
                self._weigh_few(none)
            self.scenarios = self._sampled(least=3 if is_few_likely else 0)

    def _weigh_few(self, none: float) -> None:
        self.none = none
        one = np.array([shares[1] / shares[0] for shares in self._taken])
        two = np.array([shares[2] / shares[0] if len(shares) > 2 else 0.0 for shares in self._taken])
        self.single = self.none * one / self._sizes
        self.pair = self.none * np.outer(one / self._sizes, one / self._sizes)
        np.fill_diagonal(self.pair, self.none * two / np.maximum(1, self._sizes * (self._sizes - 1) / 2))

    def _all(self) -> Scenarios:
        masks = np.array(list(product((False, True), repeat=len(self.index))), dtype=np.bool_)
        weights = np.ones(len(masks))
        for at, (shares, size) in enumerate(zip(self._taken, self._sizes, strict=True)):
            each = np.array([share / comb(int(size), count) for count, share in enumerate(shares)])
            weights *= each[masks[:, self.cell_of == at].sum(axis=1)]
        return Scenarios.of(weights, masks)

    def _sampled(self, least: int) -> Scenarios:
        """`least` victims and more: numbers by cell at even steps through their distribution, victims by fixed shuffles."""
        numbers, share = _numbers(self._taken, least)
        masks = [_drawn(int(size), numbers[:, at], at) for at, size in enumerate(self._sizes)]
        return Scenarios.of(np.full(_SAMPLES, share / _SAMPLES), np.concatenate(masks, axis=1))


class Exposure:
    """What one plan stands to lose: its capacity over the sets of `victims`.

    Args:
        replicas: (instances, capacity) of each replica; a replica serves while it has all of its instances, which differ.
            Instances that are in no cell are never lost.
        victims: shared by the plans that are compared.
    """

    def __init__(self, replicas: Sequence[tuple[Sequence[str], float]], victims: Victims) -> None:
        self._victims = victims
        every: Floats = np.array([capacity for _, capacity in replicas])
        self._capacity = float(every.sum())
        self._num_replicas = len(replicas)
        at = np.array([victims.index.get(each, -1) for ids, _ in replicas for each in ids], dtype=np.int64)
        owners = np.repeat(np.arange(len(replicas)), [len(ids) for ids, _ in replicas])[at >= 0]
        at = at[at >= 0]
        order = np.lexsort((at, owners))
        self._members: Ints = at[order]
        self._owners: Ints = owners[order]
        exposed, lengths = np.unique(self._owners, return_counts=True)
        self._lengths: Ints = lengths
        self._capacities: Floats = every[exposed]
        """Instances of each exposed replica in one row, of which replica each is, how many each has, and what goes with it."""
        self._losses: Floats = np.zeros(len(victims.index))
        np.add.at(self._losses, self._members, np.repeat(self._capacities, self._lengths))
        self._broken = self._scenario_losses()
        self._pairs = self._sharing() if victims.none > 0 else None

    def served(self, demand: float, missing: float = 0.0) -> float:
        """Expected min(demand, capacity that is left), when `missing` of the capacity is not there anyway."""
        capacity = self._capacity - missing

        def left(losses: Floats) -> Floats:
            return np.clip(capacity - losses, 0.0, demand)

        victims = self._victims
        value = float(left(self._broken) @ victims.scenarios.weights)
        if self._pairs is not None:
            value += victims.none * float(left(np.zeros(1))[0])
            cells, losses, counts = self._counted()
            of_one = left(losses)
            value += float((counts * victims.single[cells]) @ of_one)
            weights = victims.pair[np.ix_(cells, cells)]
            both = left(losses[:, None] + losses[None, :])
            value += float(counts @ (weights * both) @ counts) / 2
            value -= float((counts * np.diagonal(weights)) @ np.diagonal(both)) / 2  # nobody is lost twice
            first, second, shared = self._pairs
            added = self._losses[first] + self._losses[second]
            weight = victims.pair[victims.cell_of[first], victims.cell_of[second]]
            value += float(weight @ (left(added - shared) - left(added)))
        return value

    def hits_per_hour(self) -> Floats:
        """Expected loss instants per hour that hit each replica, in the order in which they were given."""
        victims = self._victims
        num_cells = max(1, len(victims.cells))
        keys, counts = np.unique(self._owners * num_cells + victims.cell_of[self._members], return_counts=True)
        pairs = list(zip((keys % num_cells).tolist(), counts.tolist(), strict=True))
        rates = {pair: victims.cells[pair[0]].hits_per_hour(pair[1]) for pair in set(pairs)}
        hits: Floats = np.zeros(self._num_replicas)
        np.add.at(hits, keys // num_cells, np.array([rates[pair] for pair in pairs]))
        return hits

    def _scenario_losses(self) -> Floats:
        """Capacity lost in each listed scenario. [S]"""
        packed = self._victims.scenarios.packed
        num_scenarios = len(self._victims.scenarios.weights)
        if not len(self._members) or not num_scenarios:
            return np.zeros(num_scenarios)
        starts = np.cumsum(self._lengths) - self._lengths
        hit = np.bitwise_or.reduceat(packed[self._members], starts, axis=0)
        lost: Floats = self._capacities @ np.unpackbits(hit, axis=1, count=num_scenarios)
        return lost

    def _counted(self) -> tuple[Ints, Floats, Floats]:
        """Cell, loss and number of the instances that are alike in both."""
        losses, which = np.unique(self._losses, return_inverse=True)
        alike, counts = np.unique(self._victims.cell_of * len(losses) + which, return_counts=True)
        return alike // len(losses), losses[alike % len(losses)], counts.astype(np.float64)

    def _sharing(self) -> tuple[Ints, Ints, Floats]:
        """Pairs of instances that share replicas, and the capacity that they share."""
        size = len(self._victims.index)
        starts = np.cumsum(self._lengths) - self._lengths
        keys, shared = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        for length in np.unique(self._lengths):
            alike = self._lengths == length
            members = self._members[starts[alike][:, None] + np.arange(length)]  # ascending in each row
            one, other = np.triu_indices(length, 1)
            keys.append((members[:, one] * size + members[:, other]).ravel())
            shared.append(np.repeat(self._capacities[alike], len(one)))
        pairs, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        capacities: Floats = np.bincount(inverse, np.concatenate(shared), minlength=len(pairs)).astype(np.float64)
        return pairs // size, pairs % size, capacities


def _at_least(shares: Sequence[Floats]) -> Floats:
    """[cell, n]: probability that this cell and those after it lose n or more together, n from 0 to 3."""
    found = np.zeros((len(shares) + 1, 4))
    found[:, 0] = 1.0
    for cell in range(len(shares) - 1, -1, -1):
        mine = shares[cell]
        for least in range(1, 4):
            fewer = sum(mine[count] * found[cell + 1, least - count] for count in range(min(least, len(mine))))
            found[cell, least] = fewer + mine[least:].sum()
    return found


def _numbers(shares: Sequence[Floats], least: int) -> tuple[Ints, float]:
    """Numbers of victims by cell, given that there are `least` or more in all, and how likely that is. [S, cells]"""
    at_least = _at_least(shares)
    numbers = np.zeros((_SAMPLES, len(shares)), dtype=np.int64)
    missing = np.full(_SAMPLES, least)
    steps = np.arange(_SAMPLES)
    for cell, mine in enumerate(shares):
        at = (0.5 + steps) / _SAMPLES if cell == 0 else np.modf(0.5 + steps * np.sqrt(_prime(cell)))[0]
        for left in range(least + 1):
            chosen = missing == left
            cumulative = np.cumsum(mine * at_least[cell + 1][np.maximum(0, left - np.arange(len(mine)))])
            if chosen.any() and cumulative[-1] > 0:
                found = np.searchsorted(cumulative, at[chosen] * cumulative[-1], side="right")
                numbers[chosen, cell] = np.minimum(found, len(mine) - 1)
        missing = np.maximum(0, missing - numbers[:, cell])
    return numbers, float(at_least[0, least])


def _prime(number: int) -> int:
    """The `number`-th odd prime: roots of different primes step through [0, 1) independently (Kronecker's sequence)."""
    found, candidate = 0, 1
    while found < number:
        candidate += 2
        found += all(candidate % divisor for divisor in range(3, int(candidate**0.5) + 1, 2))
    return candidate


def _drawn(size: int, numbers: Ints, cell: int) -> Bools:
    """For each scenario the first `numbers` of `size` instances in a fixed shuffle. [S, size]"""
    order = _shuffles(1 << (size - 1).bit_length(), cell)
    is_there = order < size
    mask = np.zeros(order.shape, dtype=np.bool_)
    np.put_along_axis(mask, order, is_there & (np.cumsum(is_there, axis=1) <= numbers[:, None]), axis=1)
    return mask[:, :size]


@lru_cache(maxsize=32)
def _shuffles(size: int, cell: int) -> npt.NDArray[np.int32]:
    """For each scenario the numbers below `size` in a fixed random order; another one for each cell. [S, size]"""
    keys = np.arange(_SAMPLES * size, dtype=np.uint64) + np.uint64((cell + 1) << 40)
    keys = (keys + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64 (Steele, Lea and Flood, OOPSLA'14)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort((keys ^ (keys >> np.uint64(31))).reshape(_SAMPLES, size), axis=1).astype(np.int32)
