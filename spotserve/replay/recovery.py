"""What losses did to a fleet: when they came, how long until all was well again, and how often there was anything to ask.

A *moment* of loss is a time at which instances were lost, however many. Pure.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import inf, isinf

from spotserve.replay.outcome import Replayed
from spotserve.replay.record import FleetEvent

HEARD_S = 15.0
"""What changes later than this after a loss was not changed by it: machines are missed within seconds of their silence."""


def loss_times_s(events: Iterable[FleetEvent]) -> list[float]:
    """The moments of loss, in order."""
    return sorted({event.time_s for event in events if event.kind == "lost"})


def losses_by_notice(events: Iterable[FleetEvent]) -> tuple[int, int]:
    """Instances that were lost with a notice, and without."""
    noticed = [bool(event.details.get("notice")) for event in events if event.kind == "lost"]
    return sum(noticed), len(noticed) - sum(noticed)


def recovery_times_s(replayed: Replayed) -> list[tuple[float, bool]]:
    """For each moment of loss: seconds until all that was planned served again, and whether it did before the replay ended.

    A loss after which all that was planned went on serving took 0 seconds: its notice had been acted upon in time, or nobody used
    the machine. So did one after which nothing lacked within `HEARD_S`. One that is never recovered from counts to the end.
    """
    lacking = _lacking(replayed.fleet_events)
    found: list[tuple[float, bool]] = []
    for lost_s in loss_times_s(replayed.fleet_events):
        until_s = next((until_s for from_s, until_s in lacking if from_s <= lost_s + HEARD_S and until_s > lost_s), lost_s)
        found.append((max(0.0, replayed.ended_s - lost_s), False) if isinf(until_s) else (until_s - lost_s, True))
    return found


def _lacking(events: Iterable[FleetEvent]) -> list[tuple[float, float]]:
    """Times in which less served than was planned, or nothing; the last one may have no end."""
    found: list[tuple[float, float]] = []
    since_s: float | None = 0.0
    for event in events:
        if event.kind != "serving":
            continue
        if _is_whole(event):
            if since_s is not None and event.time_s > since_s:
                found.append((since_s, event.time_s))
            since_s = None
        elif since_s is None:
            since_s = event.time_s
    return found if since_s is None else [*found, (since_s, inf)]


def _is_whole(event: FleetEvent) -> bool:
    return 0 < _count(event, "planned") <= _count(event, "replicas")


def _count(event: FleetEvent, name: str) -> int:
    return int(str(event.details.get(name, 0)))


def availability(replayed: Replayed) -> tuple[float | None, float | None]:
    """Shares of the traces' time in which any replica served, and in which all that were planned did (at least one).

    None: nobody said what served.
    """
    changes = [event for event in replayed.fleet_events if event.kind == "serving"]
    if not changes or replayed.duration_s <= 0:
        return None, None
    any_s = all_s = 0.0
    ends_s = [*(event.time_s for event in changes[1:]), replayed.duration_s]
    for event, until_s in zip(changes, ends_s, strict=True):
        seconds = max(0.0, min(until_s, replayed.duration_s) - event.time_s)
        any_s += seconds if _count(event, "replicas") > 0 else 0.0
        all_s += seconds if _is_whole(event) else 0.0
    return any_s / replayed.duration_s, all_s / replayed.duration_s


class Windows:
    """Time from each moment of loss on; moments that are close together share a window."""

    def __init__(self, times_s: Sequence[float], window_s: float) -> None:
        """`times_s`: in order."""
        self._starts_s: list[float] = []
        self._ends_s: list[float] = []
        for at_s in times_s:
            if self._ends_s and at_s <= self._ends_s[-1]:
                self._ends_s[-1] = at_s + window_s
            else:
                self._starts_s.append(at_s)
                self._ends_s.append(at_s + window_s)
        assert all(before < after for before, after in pairwise(self._starts_s))

    def meet(self, from_s: float, until_s: float) -> bool:
        """Whether a span of time has a moment in common with any window."""
        place = bisect_right(self._starts_s, until_s) - 1
        return place >= 0 and self._ends_s[place] >= from_s
