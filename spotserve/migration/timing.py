"""Flows of one independent part played through in time: when both its ports are free a flow may begin, the most important first.

Invariants: a port carries one flow at a time; nothing begins that would end after its deadline; nothing arrives for which
there is no room. A flow that is not sent is in exactly one of the lists that say why.

Does not know where flows come from, or that there are other parts (`schedule`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import TypeAlias

from spotserve.core.cluster import DeviceId
from spotserve.migration.flows import Flow, Port
from spotserve.migration.room import Leaving, Memory, Room

_Lane: TypeAlias = tuple[Port, Port, DeviceId]
"""Flows with the same ports to the same device: of equal importance they go one after the other."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One flow and when it is sent; seconds on the clock of the caller."""

    flow: Flow
    start_s: float
    end_s: float


class Run:
    """One independent part, played through from now to its end.

    Args (of the constructor):
        flows: all different, in an order that does not depend on chance.
        seconds: how long each takes.
        ends: its deadline.
        now_s: nothing begins before.
        memory: the bound, of the devices that flows go to.
        fixed: flows that begin at a time of their own, whatever else there is.
    """

    def __init__(
        self,
        flows: Sequence[Flow],
        seconds: Mapping[Flow, float],
        ends: Mapping[Flow, float],
        now_s: float,
        memory: Memory,
        fixed: Mapping[Flow, float],
    ) -> None:
        self.timed: list[Timed] = []
        self.late: list[Flow] = []
        self.from_files: list[Flow] = []
        self.without_room: list[Flow] = []
        self.evicted: list[Leaving] = []
        self._seconds, self._ends, self._now_s = seconds, ends, now_s
        self._room = Room(memory, flows)
        self._lanes: dict[_Lane, list[Flow]] = {}
        """What has not begun, the most important last."""
        self._at: dict[Port, list[_Lane]] = {}
        self._into: dict[DeviceId, set[Port]] = {device: set() for device in memory.free_bytes}
        """The ports through which bytes get to a device."""
        self._left_s: dict[Port, float] = {}
        self._busy: set[Port] = set()
        self._kept: dict[Port, list[float]] = {}
        """When flows with fixed times begin, the next one last."""
        self._tie = count()
        self._events: list[tuple[float, int, Flow | None]] = []
        """Ends of flows; None: something else may have changed."""
        self._may_pass = False
        self._fill([flow for flow in flows if flow not in fixed])
        self._fix(fixed)
        self._play()

    # ------------------------------------------------------------------ before

    def _fill(self, flows: Sequence[Flow]) -> None:
        for flow in sorted(flows, key=self._importance, reverse=True):
            lane = (*flow.ports, flow.destination)
            if lane not in self._lanes:
                self._lanes[lane] = []
                self._into.setdefault(flow.destination, set()).add(lane[1])
                for port in flow.ports:
                    self._at.setdefault(port, []).append(lane)
            self._lanes[lane].append(flow)
            for port in flow.ports:
                self._left_s[port] = self._left_s.get(port, 0.0) + self._seconds[flow]

    def _importance(self, flow: Flow) -> tuple[bool, tuple[int, int], float, str, int]:
        return not flow.is_last_copy, flow.rank, -self._seconds[flow], flow.what, flow.num_bytes

    def _fix(self, fixed: Mapping[Flow, float]) -> None:
        """Flows with times of their own: ports and memory are kept for them."""
        for flow, start_s in sorted(fixed.items(), key=lambda item: -item[1]):
            self._room.take(flow)
            for port in flow.ports:
                self._kept.setdefault(port, []).append(start_s)
            heappush(self._events, (start_s, next(self._tie), None))
        self._fixed = dict(fixed)

    # ------------------------------------------------------------------ playing

    def _play(self) -> None:
        changed: set[Port] = set(self._at)
        while True:
            for device in self._room.release(self._now_s):
                changed |= self._into[device]
            self._begin_fixed()
            self._begin(changed)
            due_s = [each for each in (self._events[0][0] if self._events else None, self._room.next_s()) if each is not None]
            if due_s:
                changed = self._advance(min(due_s))
            elif any(self._lanes.values()):
                self._make_room()
                changed = set(self._at)
            else:
                return

    def _advance(self, to_s: float) -> set[Port]:
        """Time passes; ports that have become free."""
        self._now_s = max(self._now_s, to_s)
        freed: set[Port] = set()
        while self._events and self._events[0][0] <= self._now_s:
            _, _, flow = heappop(self._events)
            if flow is not None:
                self._room.ended(flow)
                self._busy.difference_update(flow.ports)
                freed.update(flow.ports)
        return freed

    def _begin_fixed(self) -> None:
        for flow in [flow for flow, start_s in self._fixed.items() if start_s <= self._now_s]:
            del self._fixed[flow]
            for port in flow.ports:
                self._kept[port].pop()
            self._send(flow)

    def _begin(self, changed: Iterable[Port]) -> None:
        """Sends what can be sent through ports that have changed, the most important first."""
        lanes = {lane for port in changed for lane in self._at.get(port, ()) if self._is_free(lane)}
        for lane in lanes:
            self._drop_late(lane)
        blocked: set[DeviceId] = set()
        for lane in sorted((lane for lane in lanes if self._lanes[lane]), key=self._urgency):
            if not self._is_free(lane):
                continue
            flow = self._next_of(lane, blocked)
            if not self._room.fits(self._lanes[lane][-1]):
                blocked.add(lane[2])
            if flow is None:
                continue
            self._lanes[lane].remove(flow)
            self._room.take(flow)
            self._forget(flow)
            self._send(flow)
            self._may_pass = False

    def _urgency(self, lane: _Lane) -> tuple[bool, tuple[int, int], float, float, str, _Lane]:
        flow = self._lanes[lane][-1]
        most_left_s = max(self._left_s[port] for port in lane[:2])
        return not flow.is_last_copy, flow.rank, -most_left_s, -self._seconds[flow], flow.what, lane

    def _next_of(self, lane: _Lane, blocked: set[DeviceId]) -> Flow | None:
        """The flow of a lane that may begin; None: it has to wait."""
        if lane[2] in blocked and not self._may_pass:
            return None
        kept_s = min((self._kept[port][-1] for port in lane[:2] if self._kept.get(port)), default=inf)
        waiting = self._lanes[lane]
        for flow in reversed(waiting if self._may_pass or kept_s < inf else waiting[-1:]):
            if self._room.fits(flow) and self._now_s + self._seconds[flow] <= kept_s:
                return flow
        return None

    def _is_free(self, lane: _Lane) -> bool:
        return lane[0] not in self._busy and lane[1] not in self._busy

    def _send(self, flow: Flow) -> None:
        end_s = self._now_s + self._seconds[flow]
        assert end_s <= self._ends[flow] and self._busy.isdisjoint(flow.ports)
        self._busy.update(flow.ports)
        self.timed.append(Timed(flow, self._now_s, end_s))
        heappush(self._events, (end_s, next(self._tie), flow))

    # ------------------------------------------------------------------ what is not sent

    def _drop_late(self, lane: _Lane) -> None:
        """All flows of a lane have one deadline; what would end after it if it began now does so later as well."""
        waiting = self._lanes[lane]
        late = [flow for flow in waiting if self._now_s + self._seconds[flow] > self._ends[flow]]
        for flow in late:
            waiting.remove(flow)
            self._give_up(flow)
        self.late += late

    def _give_up(self, flow: Flow) -> None:
        self._forget(flow)
        self._room.ended(flow)

    def _forget(self, flow: Flow) -> None:
        for port in flow.ports:
            self._left_s[port] -= self._seconds[flow]

    def _make_room(self) -> None:
        """Nothing is on its way and nothing fits: pass, evict, or give up."""
        if not self._may_pass:
            self._may_pass = True
            return
        self._may_pass = False
        evicted = self._room.evict((lane[2] for lane, waiting in self._lanes.items() if waiting), self._now_s)
        if evicted is not None:
            leaving, readers = evicted
            self.evicted.append(leaving)
            for flow in sorted(readers, key=self._importance):
                self._lanes[(*flow.ports, flow.destination)].remove(flow)
                self._give_up(flow)
                self.from_files.append(flow)
            return
        lane = min((lane for lane, waiting in self._lanes.items() if waiting), key=self._urgency)
        flow = self._lanes[lane].pop()
        self._give_up(flow)
        self.without_room.append(flow)
