"""What a fleet is worth, by the queueing model: all its replicas, those that stay included, share one queue.

Each fleet is judged once. What that costs depends on how many shapes a fleet has, not on how many replicas.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from spotserve.planner.fleets import Choice, Fleet, Yard, alike
from spotserve.planner.queueing import capacity_rps, latency
from spotserve.planner.shapes import Shape
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Latency, Objective, Workload

_MOST_JUDGED = 256
"""Replicas that the queueing model is asked about at once."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a fleet is worth, the replicas that stay included."""

    fleet: Fleet
    latency: Latency
    throughput_rps: float
    """What it serves for ever."""
    usd_per_hour: float
    num_instances: int
    meets: bool
    """Whether it serves the workload within the objective."""


class Judge:
    """Says what fleets are worth, each once. `shapes` may grow behind it, but not change."""

    def __init__(
        self, yard: Yard, shapes: Sequence[Shape], fixed: Sequence[Choice], workload: Workload, objective: Objective
    ) -> None:
        self._yard, self._shapes, self._workload, self._objective = yard, shapes, workload, objective
        self._fixed = [(capacity_rps(speed, workload), speed, count) for speed, count in alike(fixed)]
        self._capacities_rps: dict[int, float] = {}
        self._verdicts: dict[Fleet, Verdict] = {}

    def verdict(self, fleet: Fleet) -> Verdict:
        """What it is worth under the workload."""
        if fleet not in self._verdicts:
            self._verdicts[fleet] = self._judged(fleet)
        return self._verdicts[fleet]

    def _judged(self, fleet: Fleet) -> Verdict:
        used: Counter[int] = Counter()
        for pool, shape, count in fleet:
            used[pool] += count * self._shapes[shape].size
        machines = {pool: self._yard.machines(pool, devices) for pool, devices in sorted(used.items())}
        met = self._latency(fleet, self._workload.rate_rps)
        return Verdict(
            fleet=fleet,
            latency=met,
            throughput_rps=sum(capacity * count for capacity, _, count in self._parts(fleet)),
            usd_per_hour=self._yard.fixed_usd_per_hour
            + sum(count * self._yard.pools[pool].usd_per_hour for pool, count in machines.items()),
            num_instances=self._yard.fixed_machines + sum(machines.values()),
            meets=met.meets(self._objective),
        )

    def goodput_rps(self, fleet: Fleet, *, above: float = 0.0) -> float:
        """The largest rate at which it keeps the limits, to 1 %; 0 when it is not above `above`. Without limits: throughput."""
        low, high = above, self.verdict(fleet).throughput_rps
        if not self._objective.is_set or high <= low:
            return high if high > low else 0.0
        if not self._latency(fleet, low * 1.001).meets(self._objective):
            return 0.0
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self._latency(fleet, middle).meets(self._objective) else (low, middle)
        return low

    def _parts(self, fleet: Fleet) -> list[tuple[float, ReplicaSpeed, int]]:
        """Capacity, speed and number of the replicas that are alike, those that stay first."""
        return self._fixed + [(self._capacity_rps(shape), self._shapes[shape].speed, count) for _, shape, count in fleet]

    def _capacity_rps(self, shape: int) -> float:
        if shape not in self._capacities_rps:
            self._capacities_rps[shape] = capacity_rps(self._shapes[shape].speed, self._workload)
        return self._capacities_rps[shape]

    def _latency(self, fleet: Fleet, rate_rps: float) -> Latency:
        """Of a large fleet that of a smaller one of the same mix, loaded as much: it waits a little longer, if at all."""
        parts = self._parts(fleet)
        if not parts:
            return Latency(inf, inf, inf, inf, inf, inf, inf)
        total = sum(count for _, _, count in parts)
        judged = [(max(1, round(count * min(1.0, _MOST_JUDGED / total))), count) for _, _, count in parts]
        whole_rps = sum(capacity * count for capacity, _, count in parts)
        share = sum(capacity * few for (capacity, _, _), (few, _) in zip(parts, judged, strict=True)) / whole_rps
        speeds: Counter[ReplicaSpeed] = Counter()
        for (_, speed, _), (few, _) in zip(parts, judged, strict=True):
            speeds[speed] += few
        return latency(speeds, replace(self._workload, rate_rps=rate_rps * share))
