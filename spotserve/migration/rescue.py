"""Exact times for a few flows that must all keep their deadlines, when sending whatever can be sent has not managed.

To leave a port idle for a while can be right when a flow cannot be interrupted. Every schedule in which no flow could begin
earlier comes from some order of the flows, each put as early as its two ports allow (Giffler and Thompson, 1960). So trying
all orders finds a schedule if there is one. The number of orders bounds what can be tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spotserve.migration.flows import Port

MOST_FLOWS = 7
"""All orders of so many are tried: 5,040."""


@dataclass(frozen=True, slots=True)
class Job:
    """A flow, as far as its times matter."""

    ports: tuple[Port, Port]
    seconds: float
    deadline_s: float


def rescue(jobs: Sequence[Job], now_s: float) -> list[float] | None:
    """When each job starts so that all keep their deadlines; None: no schedule can, or there are too many to try."""
    if len(jobs) > MOST_FLOWS:
        return None
    starts: dict[int, float] = {}
    order = sorted(range(len(jobs)), key=lambda index: (jobs[index].deadline_s - jobs[index].seconds, index))
    found = _search(jobs, order, {}, starts, now_s)
    return [starts[index] for index in range(len(jobs))] if found else None


def _search(
    jobs: Sequence[Job],
    left: Sequence[int],
    busy: Mapping[Port, tuple[tuple[float, float], ...]],
    starts: dict[int, float],
    now_s: float,
) -> bool:
    """Extends `starts` to the jobs that are left, one order after the other."""
    if not left:
        return True
    at_s = {index: _earliest_s(jobs[index], busy, now_s) for index in left}
    if any(at_s[index] + jobs[index].seconds > jobs[index].deadline_s for index in left):
        return False  # what comes too late already does not come earlier with others before it
    for index in left:
        job = jobs[index]
        starts[index] = at_s[index]
        span = ((at_s[index], at_s[index] + job.seconds),)
        now_busy = {**busy, **{port: busy.get(port, ()) + span for port in job.ports}}
        if _search(jobs, [each for each in left if each != index], now_busy, starts, now_s):
            return True
        del starts[index]
    return False


def _earliest_s(job: Job, busy: Mapping[Port, tuple[tuple[float, float], ...]], now_s: float) -> float:
    """The earliest time from which both ports are free for as long as the job takes."""
    start_s = now_s
    for begin_s, end_s in sorted(span for port in job.ports for span in busy.get(port, ())):
        if start_s + job.seconds <= begin_s:
            break
        start_s = max(start_s, end_s)
    return start_s
