"""The preemptions of a run, out of what the fleet reported, and the silences that requests saw around them.

A preemption's window opens with its notice (without one: with the loss) and closes `SETTLE_S` after the loss. A request is
affected when a silence of its stream, the time between two events with tokens, overlaps the window. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.replay.record import FleetEvent, RequestRecord, RunRecord

SETTLE_S = 2.0
"""How long after a loss its effects are looked for."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """One instance that the cloud took."""

    instance: str
    notice_s: float | None
    """When the notice came; None: none did."""
    lost_s: float

    @property
    def window(self) -> tuple[float, float]:
        """(start, end) of the time in which its effects are looked for."""
        return (self.lost_s if self.notice_s is None else self.notice_s, self.lost_s + SETTLE_S)


def preemptions(events: Sequence[FleetEvent]) -> tuple[Preemption, ...]:
    """One preemption per lost instance, oldest first; a loss reported twice counts once, a notice that was withdrawn not."""
    noticed: dict[str, float] = {}
    found: dict[str, Preemption] = {}
    for event in events:
        if event.instance is None:
            continue
        if event.kind == "notice":
            noticed.setdefault(event.instance, event.time_s)
        elif event.kind == "undrained":
            noticed.pop(event.instance, None)
        elif event.kind == "lost" and event.instance not in found:
            found[event.instance] = Preemption(event.instance, noticed.get(event.instance), event.time_s)
    return tuple(found.values())


def longest_silences(requests: Sequence[RequestRecord], preemption: Preemption) -> list[float]:
    """The longest silence of each affected request, in seconds."""
    start_s, end_s = preemption.window
    longest: list[float] = []
    for request in requests:
        overlapping = [after - before for before, after in request.silences if before < end_s and after > start_s]
        if overlapping:
            longest.append(max(overlapping))
    return longest


def steady_silences(run: RunRecord) -> list[float]:
    """The longest silence of each request outside every window, in seconds."""
    windows = [preemption.window for preemption in preemptions(run.fleet_events)]
    longest: list[float] = []
    for request in run.requests:
        outside = [
            after - before
            for before, after in request.silences
            if not any(before < end and after > start for start, end in windows)
        ]
        if outside:
            longest.append(max(outside))
    return longest


def in_flight(requests: Sequence[RequestRecord], found: Sequence[Preemption]) -> set[int]:
    """Indices of the requests that were under way when an instance was lost."""
    return {r.arrival.index for r in requests if any(r.sent_s <= preemption.lost_s <= r.ended_s for preemption in found)}
