"""Which zone is asked for the next instance.

Spot instances go where fewest of ours are, then where fewest are taken, then where they are cheapest: spread first, since a
loss takes its group within one zone. On-demand instances are not taken: price first.

Invariant: a zone whose breaker is open is asked only when no other can be and nothing may stand in; one that is half open has one
instance on trial at most.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from spotserve.planner.breaker import Breaker, BreakerState
from spotserve.planner.fleet_view import HedgePolicy, Held, LaunchWish, Zone


class Asking:
    """What is asked for in the making of one wish. One owner, mutable, short-lived.

    Args:
        zones: every zone.
        breakers: of each.
        in_vain: (zone, whether spot, when) of instances that did not come.
        staying: instances that are held and count.
        policy: for the delays and the maximum.
        now_s: now.
    """

    def __init__(
        self,
        zones: Sequence[Zone],
        breakers: Mapping[str, Breaker],
        in_vain: Sequence[tuple[str, bool, float]],
        staying: Sequence[Held],
        policy: HedgePolicy,
        now_s: float,
    ) -> None:
        self._policy = policy
        self._breakers = breakers
        self._answering = {spot: [zone for zone in zones if self._answers(zone, in_vain, spot, now_s)] for spot in (True, False)}
        self._ours = {spot: Counter(each.zone for each in staying if each.is_spot is spot) for spot in (True, False)}
        self._on_trial = {
            each.zone for each in staying if each.is_spot and each.zone in breakers and each.asked_s >= breakers[each.zone].until_s
        }
        self._room = policy.max_instances - len(staying)
        self._asked: Counter[tuple[str, bool, str]] = Counter()

    @property
    def num_spot(self) -> int:
        """Spot instances asked for so far."""
        return sum(count for (_, is_spot, _), count in self._asked.items() if is_spot)

    @property
    def wishes(self) -> tuple[LaunchWish, ...]:
        """Everything that was asked for, in this order."""
        return tuple(LaunchWish(count, is_spot, zone, reason) for (zone, is_spot, reason), count in self._asked.items())

    def spot(self, count: int, reason: str) -> None:
        """Asks for up to `count` spot instances: fewer when there is no room, or no zone to ask."""
        for _ in range(count):
            found = self._spot_zones()
            if not found or self._room <= 0:
                return
            chosen = min(
                found, key=lambda each: (self._ours[True][each.name], each.losses_per_hour, each.spot_usd_per_hour, each.name)
            )
            self._on_trial.add(chosen.name)
            self._ask(chosen, reason, is_spot=True)

    def on_demand(self, count: int, reason: str) -> None:
        """Asks for up to `count` on-demand instances: fewer when there is no room, or no zone to ask."""
        for _ in range(count):
            if not self._answering[False] or self._room <= 0:
                return
            chosen = min(
                self._answering[False], key=lambda each: (each.on_demand_usd_per_hour, self._ours[False][each.name], each.name)
            )
            self._ask(chosen, reason, is_spot=False)

    def _ask(self, zone: Zone, reason: str, *, is_spot: bool) -> None:
        self._ours[is_spot][zone.name] += 1
        self._asked[zone.name, is_spot, reason] += 1
        self._room -= 1

    def _answers(self, zone: Zone, in_vain: Sequence[tuple[str, bool, float]], is_spot: bool, now_s: float) -> bool:
        """Whether it has not let us down lately."""
        refused_s = zone.spot_refused_s if is_spot else zone.on_demand_refused_s
        times = [when_s for name, spot, when_s in in_vain if name == zone.name and spot is is_spot]
        times += [] if refused_s is None else [refused_s]
        return all(now_s - each >= self._policy.retry_s for each in times)

    def _spot_zones(self) -> list[Zone]:
        """Those that may be asked for one more spot instance."""
        found = [zone for zone in self._answering[True] if self._may_take(zone)]
        if found or self._policy.fall_back:
            return found
        is_open = [zone for zone in self._answering[True] if self._breakers[zone.name].state is BreakerState.OPEN]
        return sorted(is_open, key=lambda each: self._breakers[each.name].until_s)[:1]

    def _may_take(self, zone: Zone) -> bool:
        state = self._breakers[zone.name].state
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and zone.name not in self._on_trial)
