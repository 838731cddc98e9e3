"""Flows of one independent part played through in time: when both its ports are free a flow may begin, the most important first.

Invariants: a port carries one flow at a time; nothing begins that would end after its deadline; nothing arrives for which
there is no room. A flow that is not sent is in exactly one of the lists that say why.

Does not know where flows come from, or that there are other parts (`schedule`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from typing import TypeAlias

from spotserve.core.cluster import DeviceId
from spotserve.migration.flows import Flow, Port
from spotserve.migration.room import Leaving, Memory, Room


@dataclass(frozen=True, slots=True)
class Timed:
    """One flow and when it is sent; seconds on the clock of the caller."""

    flow: Flow
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Evicted:
    """Bytes that went before all had read them, and when."""

    leaving: Leaving
    at_s: float


_Turn: TypeAlias = tuple[tuple[bool, tuple[int, int]], float, int]
"""Importance, seconds, lane."""


@dataclass(slots=True, eq=False)
class _Job:
    """A flow and what is asked of it at every turn."""

    flow: Flow
    seconds: float
    ports: tuple[Port, Port]
    importance: tuple[bool, tuple[int, int]]


@dataclass(slots=True, eq=False)
class _Lane:
    """Flows with the same ports to the same device: of equal importance they go one after the other."""

    number: int
    ports: tuple[Port, Port]
    device: DeviceId
    end_s: float
    """The deadline of all of them."""
    longest_s: float = 0.0
    waiting: list[_Job] = field(default_factory=list)
    """The most important last."""

    @property
    def turn(self) -> _Turn:
        """When its next flow has its turn among lanes whose ports have as much left to do, the smallest first."""
        job = self.waiting[-1]
        return job.importance, -job.seconds, self.number


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
        self.evicted: list[Evicted] = []
        self._now_s = now_s
        self._room = Room(memory, flows)
        self._jobs = {flow: _Job(flow, seconds[flow], flow.ports, (not flow.is_last_copy, flow.rank)) for flow in flows}
        self._lanes: dict[tuple[tuple[Port, Port], DeviceId], _Lane] = {}
        self._at: dict[Port, list[_Lane]] = {}
        self._into: dict[DeviceId, set[Port]] = {}
        """The ports through which bytes get to a device."""
        self._left_s: dict[Port, float] = {}
        """How long each port has to work for what has not begun."""
        self._num_waiting = 0
        self._busy: set[Port] = set()
        self._fixed: list[tuple[float, _Job]] = []
        """What begins at a time of its own, the next one last."""
        self._kept: dict[Port, list[float]] = {}
        """Its times, by port, the next one last."""
        self._tie = count()
        self._events: list[tuple[float, int, _Job | None]] = []
        """Ends of flows; None: something else may happen then."""
        self._may_pass = False
        """Whether what fits may begin before what is more important and does not."""
        self._is_plain = not fixed and not memory.free_bytes and all(ends[flow] == inf for flow in flows)
        """Whether whatever has free ports may begin, now as well as later."""
        self._turns: dict[Port, list[_Turn]] = {}
        """By port, heaps of the turns of its lanes; some are over."""
        self._most_across_s: dict[Port, float] = {}
        """How long the other port of some lane had to work when all began."""
        self._fill([job for flow, job in self._jobs.items() if flow not in fixed], ends)
        self._fix(fixed)
        self._play()

    # ------------------------------------------------------------------ before

    def _fill(self, jobs: Sequence[_Job], ends: Mapping[Flow, float]) -> None:
        for job in sorted(jobs, key=lambda job: (job.importance, -job.seconds), reverse=True):
            key = job.ports, job.flow.destination
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = _Lane(len(self._lanes), *key, ends[job.flow])
                self._into.setdefault(lane.device, set()).add(lane.ports[1])
                for port in lane.ports:
                    self._at.setdefault(port, []).append(lane)
            lane.waiting.append(job)
            lane.longest_s = max(lane.longest_s, job.seconds)
            for port in job.ports:
                self._left_s[port] = self._left_s.get(port, 0.0) + job.seconds
        self._num_waiting = len(jobs)
        self._numbered = list(self._lanes.values())
        for lane in self._numbered if self._is_plain else ():
            for port, across in (lane.ports, lane.ports[::-1]):
                self._turns.setdefault(port, []).append(lane.turn)
                self._most_across_s[port] = max(self._most_across_s.get(port, 0.0), self._left_s[across])
        for turns in self._turns.values():
            heapify(turns)

    def _fix(self, fixed: Mapping[Flow, float]) -> None:
        """Keeps ports and memory for flows with times of their own."""
        for flow, start_s in sorted(fixed.items(), key=lambda item: item[1], reverse=True):
            self._fixed.append((start_s, self._jobs[flow]))
            self._room.take(flow)
            for port in flow.ports:
                self._kept.setdefault(port, []).append(start_s)
            heappush(self._events, (start_s, next(self._tie), None))

    # ------------------------------------------------------------------ playing

    def _play(self) -> None:
        changed = dict.fromkeys(self._at)
        while True:
            for device in self._room.release(self._now_s):
                changed |= dict.fromkeys(sorted(self._into.get(device, ())))
            self._begin_fixed()
            self._begin(changed)
            due_s = [each for each in (self._events[0][0] if self._events else None, self._room.next_s()) if each is not None]
            if self._num_waiting == 0 and not self._events:
                return
            if due_s:
                changed = self._advance(min(due_s))
            else:
                self._make_room()
                changed = dict.fromkeys(self._at)

    def _advance(self, to_s: float) -> dict[Port, None]:
        """Time passes; ports that have become free."""
        self._now_s = max(self._now_s, to_s)
        freed: dict[Port, None] = {}
        while self._events and self._events[0][0] <= self._now_s:
            _, _, job = heappop(self._events)
            if job is not None:
                self._room.ended(job.flow)
                self._busy.difference_update(job.ports)
                freed |= dict.fromkeys(job.ports)
        return freed

    def _begin_fixed(self) -> None:
        while self._fixed and self._fixed[-1][0] <= self._now_s:
            _, job = self._fixed.pop()
            for port in job.ports:
                self._kept[port].pop()
            self._send(job)

    def _begin(self, changed: Iterable[Port]) -> None:
        """Sends what can be sent through ports that have changed, the most important first."""
        if self._is_plain:
            self._begin_plain(changed)
            return
        lanes = {lane.number: lane for port in changed for lane in self._at.get(port, ()) if lane.waiting and self._is_free(lane)}
        for lane in lanes.values():
            if self._now_s + lane.longest_s > lane.end_s:
                self._drop_late(lane)
        blocked: set[DeviceId] = set()
        for lane in sorted((lane for lane in lanes.values() if lane.waiting), key=self._urgency):
            if not self._is_free(lane):
                continue
            job = self._next_of(lane, blocked)
            if not self._room.fits(lane.waiting[-1].flow):
                blocked.add(lane.device)
            if job is None:
                continue
            self._take_from(lane, job)
            self._room.take(job.flow)
            self._send(job)
            self._may_pass = False

    def _begin_plain(self, changed: Iterable[Port]) -> None:
        """The same where only ports can be in the way: the first of each port is offered; when another takes it, the next."""
        offers: list[tuple[tuple[tuple[bool, tuple[int, int]], float, float, int], Port]] = []

        def offer(port: Port) -> None:
            lanes = self._foremost(port) if port not in self._busy else []
            if lanes:
                heappush(offers, (min(map(self._urgency, lanes)), port))

        for port in changed:
            offer(port)
        while offers:
            (*_, number), port = heappop(offers)
            lane = self._numbered[number]
            if not self._is_free(lane):
                offer(port)
                continue
            job = lane.waiting[-1]
            self._take_from(lane, job)
            for each in lane.ports if lane.waiting else ():
                heappush(self._turns[each], lane.turn)
            self._send(job)

    def _foremost(self, port: Port) -> list[_Lane]:
        """Of the lanes at a port that can send, some among which is the most urgent one. While no other port has more left to do
        than this one, that is whose turn it is, and nobody else has to be looked at."""
        if self._left_s[port] < self._most_across_s[port]:
            return [lane for lane in self._at[port] if lane.waiting and self._is_free(lane)]
        turns, waiting = self._turns[port], []
        found: list[_Lane] = []
        while turns and not found:
            turn = heappop(turns)
            lane = self._numbered[turn[-1]]
            if lane.waiting and lane.turn == turn:
                waiting.append(turn)
                found = [lane] if self._is_free(lane) else []
        for turn in waiting:
            heappush(turns, turn)
        return found

    def _urgency(self, lane: _Lane) -> tuple[tuple[bool, tuple[int, int]], float, float, int]:
        """The smallest first: importance, then the port with the most left to do, then the longest."""
        job = lane.waiting[-1]
        sending_s, receiving_s = self._left_s[lane.ports[0]], self._left_s[lane.ports[1]]
        return job.importance, -max(sending_s, receiving_s), -job.seconds, lane.number

    def _next_of(self, lane: _Lane, blocked: set[DeviceId]) -> _Job | None:
        """The flow of a lane that may begin; None: it has to wait."""
        if lane.device in blocked and not self._may_pass:
            return None
        until_s = min((self._kept[port][-1] for port in lane.ports if self._kept.get(port)), default=inf)
        for job in reversed(lane.waiting if self._may_pass or until_s < inf else lane.waiting[-1:]):
            if self._room.fits(job.flow) and self._now_s + job.seconds <= until_s:
                return job
        return None

    def _is_free(self, lane: _Lane) -> bool:
        return lane.ports[0] not in self._busy and lane.ports[1] not in self._busy

    def _send(self, job: _Job) -> None:
        assert self._busy.isdisjoint(job.ports), "a port has one flow at a time"
        end_s = self._now_s + job.seconds
        self._busy.update(job.ports)
        self.timed.append(Timed(job.flow, self._now_s, end_s))
        heappush(self._events, (end_s, next(self._tie), job))

    def _take_from(self, lane: _Lane, job: _Job) -> None:
        lane.waiting.remove(job)
        self._num_waiting -= 1
        for port in job.ports:
            self._left_s[port] -= job.seconds

    # ------------------------------------------------------------------ what is not sent

    def _drop_late(self, lane: _Lane) -> None:
        """What would end after the deadline if it began now does so later as well."""
        for job in [job for job in reversed(lane.waiting) if self._now_s + job.seconds > lane.end_s]:
            self._give_up(lane, job, self.late)

    def _give_up(self, lane: _Lane, job: _Job, why: list[Flow]) -> None:
        self._take_from(lane, job)
        self._room.ended(job.flow)
        why.append(job.flow)

    def _make_room(self) -> None:
        """Nothing is on its way and nothing fits: let what fits pass, else evict, else give up the most important."""
        if not self._may_pass:
            self._may_pass = True
            return
        self._may_pass = False
        stuck = [lane for lane in self._lanes.values() if lane.waiting]
        evicted = self._room.evict((lane.device for lane in stuck), self._now_s)
        if evicted is None:
            lane = min(stuck, key=self._urgency)
            self._give_up(lane, lane.waiting[-1], self.without_room)
            return
        leaving, readers = evicted
        self.evicted.append(Evicted(leaving, self._now_s))
        for job in [job for flow, job in self._jobs.items() if flow in readers]:
            self._give_up(self._lanes[job.ports, job.flow.destination], job, self.from_files)
