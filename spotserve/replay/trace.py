"""The two shapes that every trace file is read into, a fleet's history and a list of requests, and their text as CSV.

The project's own formats are CSV with a `#` comment header:

    time_s,event,instance[,zone]                                   event: add | remove; times in seconds, never decreasing
    arrival_s,prompt_tokens,output_tokens[,temperature][,seed]     empty temperature or seed: the replay chooses
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

CapacityChange: TypeAlias = Literal["add", "remove"]


@dataclass(frozen=True, slots=True)
class CapacityEvent:
    """One instance came or went."""

    time_s: float
    change: CapacityChange
    instance: str
    zone: str = ""
    """Empty: the trace does not say."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    temperature: float | None = None
    """None: the trace does not say."""
    seed: int | None = None
    """None: the trace does not say."""


@dataclass(frozen=True, slots=True)
class CapacityTrace:
    """A fleet's history, oldest first; the fleet is empty before the first event."""

    events: tuple[CapacityEvent, ...]
    format: str


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Requests, oldest first."""

    requests: tuple[TraceRequest, ...]
    format: str
    clamped_rows: int = 0
    """Rows that had 0 prompt or output tokens and were given 1."""


def capacity_csv(events: Sequence[CapacityEvent], comments: Sequence[str] = ()) -> str:
    """The project's own CSV of a fleet's history."""
    rows = (f"{event.time_s!r},{event.change},{event.instance},{event.zone}" for event in events)
    return _csv("time_s,event,instance,zone", rows, comments)


def requests_csv(requests: Sequence[TraceRequest], comments: Sequence[str] = ()) -> str:
    """The project's own CSV of requests."""

    def cell(value: float | None) -> str:
        return "" if value is None else repr(value)

    rows = (f"{r.arrival_s!r},{r.prompt_tokens},{r.output_tokens},{cell(r.temperature)},{cell(r.seed)}" for r in requests)
    return _csv("arrival_s,prompt_tokens,output_tokens,temperature,seed", rows, comments)


def _csv(header: str, rows: Iterable[str], comments: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in (*(f"# {comment}" for comment in comments), header, *rows))
