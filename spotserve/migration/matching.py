"""Which device takes which slot: the assignment under which the most bytes stay where they are.

After SpotServe (Miao et al., ASPLOS'24, section 3.3): a complete bipartite graph of devices and slots, an edge weighs the
bytes that the device has and the slot needs, and Kuhn-Munkres finds the heaviest matching. Between equally heavy matchings
the one wins in which more slots stay on their device: a replica that need not move goes on serving.

The shards of a stage talk twice per layer, so they belong on one instance. Hence two levels, as in the paper's artifact: a
*block* (the shards of one stage) on a *cluster* (as many devices of one instance) weighs what Kuhn-Munkres finds inside, and
Kuhn-Munkres again assigns blocks to clusters. Then each instance deals its devices out anew among all that it was given. Larger
blocks choose first; a block that finds no cluster is halved, so that as many slots are placed as without this rule.

Bound. Let all blocks have b slots and clusters at most s devices, at most k of them on one instance. Let F be the heaviest
assignment of all, B the heaviest that keeps blocks on one instance. What is found weighs at least F / s and at least B / k.
(F: take its bytes v(x, c) of block x on cluster c, from m(x, c) slots. m / s has row and column sums of at most 1, so it is a
mixture of matchings (Birkhoff); one of those weighs at least the mean, the sum of m / s * v, and m >= 1 where v > 0. B: give the
blocks of an instance to its clusters in each of the k! ways; the mean weighs B / k.) Both are tight for what is found before
dealing out anew. With b = 1 it is F itself, with k = 1 it is B itself. With blocks of several sizes each size has
this bound against what the larger ones leave. (Of B, sparse random bytes and k of 2 and 3 leave 98 to 99 % on average and 73 % at
worst: room for an exchange of blocks between instances, which nobody has needed yet.)

Among assignments of nearly as many bytes the one is taken whose busiest network port has the least to receive (`place`).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from scipy.optimize import linear_sum_assignment

from spotserve.core.cluster import DeviceId
from spotserve.core.plan import Placement, Slot
from spotserve.migration.scores import Bools, Floats, Ints, Scores

_EXACT = 2**53
"""Integers below it are exact in the floating point of the solver."""

NEARLY = 0.01
"""Share of the reused bytes that may be given up for an earlier end."""

_Block: TypeAlias = tuple[int, ...]
"""Slots that belong on one instance, as places in `Scores.slots`."""
_Cluster: TypeAlias = tuple[int, ...]
"""Devices of one instance, as places in `Scores.devices`."""
_Chosen: TypeAlias = dict[int, int]
"""Device of each slot."""


def place(scores: Scores, *, current: Mapping[Slot, DeviceId] | None = None, nearly: float = NEARLY) -> Placement:
    """The heaviest assignment that keeps stages on one instance; as many slots as there are allowed devices for.

    Among those that reuse at least (1 - nearly) of its bytes, leave as many slots where they are and tear no more stages apart,
    one with a smaller busiest port is preferred: exactly the smallest where an instance has room for one block and nothing
    is in its place yet, else the smallest that a limit on every single block finds. `current` says where slots are now.
    Exact to the byte up to 2**53 / (n + 1)**2 bytes for n pairs, (n + 1)**3 when some pairs are not allowed; beyond that to
    some kilobytes.
    """
    if not scores.slots or not scores.devices:
        return Placement(devices={})
    matcher = _Matcher(scores, current or {})
    best = matcher.heaviest()
    return matcher.placement(matcher.sooner(best, nearly) if nearly > 0 else best)


def place_freely(scores: Scores, *, current: Mapping[Slot, DeviceId] | None = None) -> Placement:
    """The heaviest assignment of all, stages torn apart or not: what no other can surpass. Exactness as that of `place`."""
    if not scores.slots or not scores.devices:
        return Placement(devices={})
    matcher = _Matcher(scores, current or {})
    rows = tuple(range(len(scores.slots)))
    chosen = _heaviest(matcher.points(rows, tuple(range(len(scores.devices)))), scores.allowed[scores.kinds])
    return matcher.placement(_Found(dict(chosen), 0))


class _Found:
    """An assignment, and how many blocks had to be halved for it."""

    def __init__(self, chosen: _Chosen, torn: int) -> None:
        self.chosen = chosen
        self.torn = torn


class _Matcher:
    """One placement under way: the score of every pair, and the values of blocks on clusters that are known so far."""

    def __init__(self, scores: Scores, current: Mapping[Slot, DeviceId]) -> None:
        self._scores = scores
        scale = min(len(scores.slots), len(scores.devices)) + 1  # one byte outweighs every preference together
        room = scale**2 if scores.allowed.all() else scale**3
        unit_bytes = int(scores.found_bytes.max()) * room // _EXACT + 1
        self._scaled: Ints = scores.found_bytes // unit_bytes * scale
        column = {device: place for place, device in enumerate(scores.devices)}
        self._home = np.array([column.get(current.get(slot, _NOWHERE), -1) for slot in scores.slots], dtype=np.int64)
        _, self._alike = np.unique(self._scaled, axis=1, return_inverse=True)
        self._alike = self._alike.reshape(-1)
        self._inside: dict[tuple[_Block, _Cluster], int] = {}
        """By kinds of slots and devices, what a block finds on a cluster."""
        instances: dict[str, list[int]] = {}
        for place, device in enumerate(scores.devices):
            instances.setdefault(device.instance_id, []).append(place)
        self._instances = [tuple(places) for places in instances.values()]
        stages: dict[tuple[str, int], list[int]] = {}
        for place, slot in enumerate(scores.slots):
            stages.setdefault((slot.replica_id, slot.stage), []).append(place)
        self._blocks: list[_Block] = [tuple(places) for places in stages.values()]

    def points(self, block: _Block, cluster: _Cluster) -> Ints:
        """(slots, devices): bytes that stay, and below one byte, whether the slot stays."""
        devices = np.array(cluster)
        stays = self._home[list(block)][:, None] == devices[None, :]
        result: Ints = self._scaled[self._scores.kinds[list(block)]][:, devices] + stays
        return result

    def placement(self, found: _Found) -> Placement:
        """In the terms of the caller."""
        return Placement(
            devices={self._scores.slots[slot]: self._scores.devices[device] for slot, device in sorted(found.chosen.items())}
        )

    # ------------------------------------------------------------------ the most bytes

    def heaviest(self, limit_s: float = np.inf) -> _Found:
        """The better of two ways to divide instances into clusters: neighbours together, or one out of each group of them."""
        found = self._assign(_neighbours, limit_s)
        if all(len(places) == 1 for places in self._instances) or all(len(block) == 1 for block in self._blocks):
            return found
        return max(found, self._assign(_strided, limit_s), key=lambda each: (-each.torn, len(each.chosen), self._total(each)))

    def _assign(self, divide: Callable[[_Cluster, int], list[_Cluster]], limit_s: float) -> _Found:
        """Levels from the largest blocks down, then every instance anew. No block may keep a port busy for more than `limit_s`."""
        free = [set(places) for places in self._instances]
        where = {place: index for index, places in enumerate(self._instances) for place in places}
        pending, chosen, torn = list(self._blocks), {}, 0
        while pending:
            size = max(map(len, pending))
            blocks = [block for block in pending if len(block) == size]
            pending = [block for block in pending if len(block) < size]
            clusters = [cluster for places in free for cluster in divide(tuple(sorted(places)), size)]
            placed = self._level(blocks, clusters, limit_s)
            for block, cluster in placed.items():
                for row, column in _heaviest(self.points(block, cluster)):
                    chosen[block[row]] = cluster[column]
                    free[where[cluster[column]]].discard(cluster[column])
            homeless = [block for block in blocks if block not in placed and size > 1]
            torn += len(homeless)
            pending += [half for block in homeless for half in (block[: (size + 1) // 2], block[(size + 1) // 2 :])]
        return _Found(self._dealt_anew(chosen, where), torn)

    def _level(self, blocks: Sequence[_Block], clusters: Sequence[_Cluster], limit_s: float) -> dict[_Block, _Cluster]:
        """The heaviest matching of blocks and clusters."""
        if not clusters:
            return {}
        first = np.array([cluster[0] for cluster in clusters])
        allowed = self._scores.allowed[self._scores.kinds[[block[0] for block in blocks]]][:, first]
        if np.isfinite(limit_s):
            allowed = allowed & (self._fetch_s(blocks, first) <= limit_s)
        pairs = _heaviest(self._values(blocks, clusters), allowed)
        return {blocks[row]: clusters[column] for row, column in pairs}

    def _values(self, blocks: Sequence[_Block], clusters: Sequence[_Cluster]) -> Ints:
        """(blocks, clusters): what each block finds on each cluster when its slots are dealt out best."""
        if max(map(len, blocks)) == 1 and max(map(len, clusters)) == 1:
            return self.points(tuple(block[0] for block in blocks), tuple(cluster[0] for cluster in clusters))
        block_kinds, block_index = _alike(blocks, self._scores.kinds)
        cluster_kinds, cluster_index = _alike(clusters, self._alike)
        table = [[self._value(block, cluster) for cluster in cluster_kinds] for block in block_kinds]
        values: Ints = np.array(table, dtype=np.int64)[block_index][:, cluster_index]
        of_device = {device: index for index, cluster in enumerate(clusters) for device in cluster}
        for row, block in enumerate(blocks):
            for home in {of_device[each] for each in self._home[list(block)].tolist() if each in of_device}:
                points = self.points(block, clusters[home])
                values[row, home] = points[linear_sum_assignment(points, maximize=True)].sum()
        return values

    def _value(self, block: _Block, cluster: _Cluster) -> int:
        """What a block finds on a cluster, whether its slots stay or not."""
        key = tuple(self._scores.kinds[list(block)].tolist()), tuple(self._alike[list(cluster)].tolist())
        if key not in self._inside:
            scaled = self._scaled[list(key[0])][:, list(cluster)]
            self._inside[key] = int(scaled[linear_sum_assignment(scaled, maximize=True)].sum())
        return self._inside[key]

    def _dealt_anew(self, chosen: _Chosen, where: Mapping[int, int]) -> _Chosen:
        """The same instance for each slot, and of its devices the best for all slots there."""
        there: dict[int, list[int]] = {}
        for slot, device in chosen.items():
            there.setdefault(where[device], []).append(slot)
        anew: _Chosen = {}
        for instance, slots in there.items():
            devices = self._instances[instance]
            for row, column in _heaviest(self.points(tuple(sorted(slots)), devices)):
                anew[sorted(slots)[row]] = devices[column]
        return anew

    def _total(self, found: _Found) -> int:
        return int(sum(self.points((slot,), (device,))[0, 0] for slot, device in found.chosen.items()))

    # ------------------------------------------------------------------ the earliest end

    def sooner(self, best: _Found, nearly: float) -> _Found:
        """Of assignments that give up at most `nearly` of the bytes of `best`, one with the smallest busiest port.

        Halves the limits on what a block may have to receive: the fewer pairs are allowed, the fewer bytes are reused.
        """
        first = np.array([places[0] for places in self._instances])
        limits = np.unique(self._fetch_s(self._blocks, first))
        low, high = 0, int(np.searchsorted(limits, self._busiest_s(best)))
        bytes_needed = (1 - nearly) * self._bytes(best)
        while low < high:
            middle = (low + high) // 2
            found = self.heaviest(float(limits[middle]))
            if self._is_as_good(found, best) and self._bytes(found) >= bytes_needed:
                high = middle
                sooner = found
                if self._busiest_s(sooner) < self._busiest_s(best):
                    best = sooner
            else:
                low = middle + 1
        return best

    def _is_as_good(self, found: _Found, best: _Found) -> bool:
        return len(found.chosen) == len(best.chosen) and found.torn <= best.torn and self._stays(found) >= self._stays(best)

    def _fetch_s(self, blocks: Sequence[_Block], devices: Ints) -> Floats:
        """(blocks, devices): how long the port of the device's instance is busy with what a block lacks there."""
        kinds, index = _alike(blocks, self._scores.kinds)
        rows = [self._scores.fetch_s[self._scores.kinds[list(block)]][:, devices].sum(axis=0) for block in kinds]
        fetch_s: Floats = np.array(rows)[index]
        return fetch_s

    def _busiest_s(self, found: _Found) -> float:
        busy_s: dict[str, float] = {}
        for slot, device in found.chosen.items():
            instance_id = self._scores.devices[device].instance_id
            busy_s[instance_id] = busy_s.get(instance_id, 0.0) + float(self._scores.fetch_s[self._scores.kinds[slot], device])
        return max(busy_s.values(), default=0.0)

    def _bytes(self, found: _Found) -> int:
        slots, devices = list(found.chosen), list(found.chosen.values())
        return int(self._scores.found_bytes[self._scores.kinds[slots], devices].sum())

    def _stays(self, found: _Found) -> int:
        return sum(self._home[slot] == device for slot, device in found.chosen.items())


_NOWHERE = DeviceId("", -1)


def _neighbours(devices: _Cluster, size: int) -> list[_Cluster]:
    """Devices of one instance in clusters of at least `size` that follow each other; what is over goes with the last."""
    number = len(devices) // size
    edges = [index * size for index in range(number)] + [len(devices)]
    return [devices[start:stop] for start, stop in pairwise(edges)] if number else []


def _strided(devices: _Cluster, size: int) -> list[_Cluster]:
    """Devices of one instance in clusters of at least `size`, every so-manieth together."""
    number = len(devices) // size
    return [devices[start::number] for start in range(number)]


def _alike(groups: Sequence[tuple[int, ...]], kinds: Ints) -> tuple[list[tuple[int, ...]], Ints]:
    """One group for each sequence of kinds, and which of them stands for each group."""
    places: dict[tuple[int, ...], int] = {}
    examples: list[tuple[int, ...]] = []
    index = []
    for group in groups:
        key = tuple(kinds[list(group)].tolist())
        if key not in places:
            places[key] = len(places)
            examples.append(group)
        index.append(places[key])
    return examples, np.array(index, dtype=np.int64)


def _heaviest(points: Ints, allowed: Bools | None = None) -> list[tuple[int, int]]:
    """Pairs of row and column: as many allowed ones as can be, and among those the heaviest (Kuhn-Munkres)."""
    values = points.astype(np.float64)
    if allowed is not None and not allowed.all():
        above = (min(points.shape) + 1) * (int(points.max()) + 1)  # one pair more outweighs everything
        values = np.where(allowed, values + above, 0.0)
    rows, columns = _solved(values)
    pairs = sorted(zip(rows.tolist(), columns.tolist(), strict=True))
    return [(row, column) for row, column in pairs if allowed is None or allowed[row, column]]


def _solved(values: Floats) -> tuple[Ints, Ints]:
    """Rows and columns of the heaviest matching of values that are not negative.

    The solver extends a matching row by row. Slots of one kind are alike and devices are not, so that with slots as rows every
    row disputes what those before it have: some fifty times slower than the other way round, for which it wants no
    more rows than columns. Slots that nobody planned make up the number, unless that would be most of them.
    """
    slots, devices = values.shape
    if devices > 2 * slots:
        rows, columns = linear_sum_assignment(values, maximize=True)
        return rows, columns
    square = np.zeros((devices, max(slots, devices)))
    square[:, :slots] = values.T
    columns, rows = linear_sum_assignment(square, maximize=True)
    planned = rows < slots
    return rows[planned], columns[planned]
