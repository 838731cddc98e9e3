"""One policy at one load, as often as it was repeated: a column of a report. Values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from spotserve.replay.intervals import Interval
from spotserve.replay.sketch import Sketch
from spotserve.replay.summary import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a report says in one column."""

    name: str
    """The policy; where several loads are swept, with the load, such as `spotserve@2x`."""
    policy: str
    rate_scale: float
    summaries: tuple[Summary, ...]
    """By repeat."""
    summary: Summary
    """Means over repeats."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Of means, at 95 %; empty where nothing was repeated."""
    sketch: Sketch
    """Of the first repeat."""


def case_name(policy: str, rate_scale: float, *, is_swept: bool) -> str:
    """How a case is called."""
    return f"{policy}@{rate_scale:g}x" if is_swept else policy
