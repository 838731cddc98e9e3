"""Simulated time: what is to happen, by time, and in the order in which it was planned where times are equal.

One owner. Knows nothing of what happens; no clock but its own.
"""

import heapq
from collections.abc import Callable
from math import inf
from typing import TypeAlias

Act: TypeAlias = Callable[[], None]


class Appointment:
    """Something that is to happen once, unless it is called off."""

    __slots__ = ("act", "time_s")

    def __init__(self, time_s: float, act: Act) -> None:
        self.time_s = time_s
        self.act: Act | None = act

    def call_off(self) -> None:
        """It will not happen; harmless when it has."""
        self.act = None


class Agenda:
    """A heap of (time, sequence number, what to do)."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self._heap: list[tuple[float, int, Appointment]] = []
        self._number = 0

    def at(self, time_s: float, act: Act) -> Appointment:
        """Plans something; what lies in the past happens next."""
        appointment = Appointment(time_s, act)
        self._number += 1
        heapq.heappush(self._heap, (time_s, self._number, appointment))
        return appointment

    @property
    def next_s(self) -> float:
        """When the next thing happens; inf: nothing is planned."""
        heap = self._heap
        while heap and heap[0][2].act is None:
            heapq.heappop(heap)
        return heap[0][0] if heap else inf

    def run_until(self, until_s: float) -> None:
        """Lets everything happen that is due by then, in order; it is `until_s` afterwards."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            time_s, _, appointment = pop(heap)
            act = appointment.act
            if act is not None:
                if time_s > self.now_s:
                    self.now_s = time_s
                act()
        self.now_s = max(self.now_s, until_s)

    def step(self) -> None:
        """Lets the next thing happen; there must be one."""
        self.run_until(self.next_s)
