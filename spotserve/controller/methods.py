"""By what the controller decides: each step of a change is a function, and another can stand in its place.

A running system always has those that are set here. What each is worth is measured by taking it away (`benchmarks/ablation.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from spotserve.core.messages import SequenceOrder, SequenceReport
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Placement
from spotserve.migration import matching, verdicts
from spotserve.migration import schedule as scheduling
from spotserve.migration.flows import Flow, InstanceLinks
from spotserve.migration.schedule import Schedule
from spotserve.migration.scores import Scores
from spotserve.migration.verdicts import Destination, InstanceSpeed


class ScheduleFlows(Protocol):
    """When each flow is sent; see `migration.schedule.schedule`."""

    def __call__(
        self, flows: Sequence[Flow], *, links: Mapping[str, InstanceLinks], now_s: float, deadlines_s: Mapping[str, float]
    ) -> Schedule: ...


class DecideSequences(Protocol):
    """What becomes of each sequence of a replica that goes; see `migration.verdicts.decide`."""

    def __call__(
        self,
        sequences: Sequence[SequenceReport],
        *,
        now_s: float,
        deadline_s: float,
        source: InstanceSpeed,
        destinations: Sequence[Destination],
        model: ModelSpec,
    ) -> tuple[SequenceOrder, ...]: ...


@dataclass(frozen=True, slots=True)
class Methods:
    """One function for each step."""

    place: Callable[[Scores], Placement] = matching.place
    """Which device takes which slot."""
    schedule: ScheduleFlows = scheduling.schedule
    decide: DecideSequences = verdicts.decide
    looks_ahead: bool = True
    """Whether plans are weighed by what they serve over the time that they will last, the change to them included."""


PRODUCTION = Methods()
"""What a running system decides by."""
