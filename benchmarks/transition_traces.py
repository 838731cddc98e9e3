"""Histories of spot fleets as lists of transitions: moments at which machines leave, come, or both.

Reads any capacity trace; made for those of SpotServe's artifact. All events of one moment are one transition; the artifact
merges an add with a remove that follows it within the grace period, and no trace has two moments that near to each other. A
machine comes when the file says so: the paper's segments hold two minutes of starting it, the whole trace does not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from spotserve.replay.formats import parse_capacity, read_trace_text
from spotserve.replay.trace import CapacityEvent


@dataclass(frozen=True, slots=True)
class Transition:
    """One moment of a trace."""

    time_s: float
    """When it is done: what leaves is gone, what comes is there. It is known `grace_s` before."""
    before: frozenset[str]
    """Machines, by name."""
    after: frozenset[str]

    @property
    def leaving(self) -> frozenset[str]:
        """Machines that are taken."""
        return self.before - self.after

    @property
    def joining(self) -> frozenset[str]:
        """Machines that are new."""
        return self.after - self.before


def read_transitions(path: Path) -> tuple[Transition, ...]:
    """Every transition of a trace file, oldest first; the first one starts from no machines.

    Raises:
        TraceError: the file cannot be read, or is in neither form.
    """
    return _transitions(parse_capacity(read_trace_text(path), str(path)).events)


def _transitions(events: Iterable[CapacityEvent]) -> tuple[Transition, ...]:
    there: frozenset[str] = frozenset()
    transitions = []
    for time_s, together in groupby(events, key=lambda event: event.time_s):
        before = there
        for event in together:
            there = there | {event.instance} if event.change == "add" else there - {event.instance}
        if there != before:
            transitions.append(Transition(time_s, before, there))
    return tuple(transitions)
