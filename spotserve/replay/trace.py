"""The two shapes that every trace file is read into, a fleet's history and a list of requests, and their text as CSV.

The project's own formats are CSV with a `#` comment header:

    time_s,event,instance[,zone]                                   event: add | remove; times in seconds, never decreasing
    arrival_s,prompt_tokens,output_tokens[,temperature][,seed][,prefix_512]
                                                                   empty temperature or seed: the replay chooses; the last column:
                                                                   names of blocks of 512 tokens that the prompt begins with
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    prefix: tuple[int, ...] = ()
    """Blocks that its prompt begins with, by name: prompts with equal ones begin alike."""


@dataclass(frozen=True, slots=True)
class CapacityTrace:
    """A fleet's history, oldest first; the fleet is empty before the first event."""

    events: tuple[CapacityEvent, ...]
    format: str
    end_s: float | None = None
    """Until when the file knows the fleet; None: until its last event."""
    is_ended: bool = False
    """Whether the file says that a replay ends there."""
    required_rps: tuple[tuple[float, float], ...] = ()
    """(time, requests per second that are to be served from then on), where a file says so."""
    dropped_rows: int = 0
    assumed: tuple[str, ...] = ()
    """What the file did not say, in a sentence each."""


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Requests, oldest first."""

    requests: tuple[TraceRequest, ...]
    format: str
    clamped_rows: int = 0
    """Rows that had 0 prompt or output tokens and were given 1."""
    prefix_block_tokens: int = 0
    """Tokens of a block of a prefix; 0: the trace has none."""
    assumed: tuple[str, ...] = ()
    """What the file did not say, in a sentence each."""


def capacity_csv(events: Sequence[CapacityEvent], comments: Sequence[str] = ()) -> str:
    """The project's own CSV of a fleet's history."""
    rows = (f"{event.time_s!r},{event.change},{event.instance},{event.zone}" for event in events)
    return _csv("time_s,event,instance,zone", rows, comments)


def requests_csv(requests: Sequence[TraceRequest], comments: Sequence[str] = (), *, prefix_block_tokens: int = 0) -> str:
    """The project's own CSV of requests; prefixes are in it when their blocks have a size."""

    def cell(value: float | None) -> str:
        return "" if value is None else repr(value)

    rows = (f"{r.arrival_s!r},{r.prompt_tokens},{r.output_tokens},{cell(r.temperature)},{cell(r.seed)}" for r in requests)
    header = "arrival_s,prompt_tokens,output_tokens,temperature,seed"
    if prefix_block_tokens:
        header += f",prefix_{prefix_block_tokens}"
        rows = (f"{row},{' '.join(map(str, r.prefix))}" for row, r in zip(rows, requests, strict=True))
    return _csv(header, rows, comments)


def merge_capacity(traces: Mapping[str, CapacityTrace]) -> CapacityTrace:
    """Several histories as one, by time: one for each zone, say. Names that more than one has get the trace's name in front; an
    instance without a zone is in one that is called as its trace."""
    if len(traces) == 1:
        return next(iter(traces.values()))
    names = Counter(name for trace in traces.values() for name in {event.instance for event in trace.events})
    events: list[CapacityEvent] = []
    for title, trace in traces.items():
        for event in trace.events:
            name = event.instance if names[event.instance] == 1 else f"{title}/{event.instance}"
            events.append(CapacityEvent(event.time_s, event.change, name, event.zone or title))
    ends_s = [trace.end_s for trace in traces.values() if trace.end_s is not None]
    return CapacityTrace(
        tuple(sorted(events, key=lambda event: event.time_s)),
        "+".join(sorted({trace.format for trace in traces.values()})),
        end_s=max(ends_s, default=None),
        dropped_rows=sum(trace.dropped_rows for trace in traces.values()),
        assumed=tuple(f"{title}: {told}" for title, trace in traces.items() for told in trace.assumed),
    )


def _csv(header: str, rows: Iterable[str], comments: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in (*(f"# {comment}" for comment in comments), header, *rows))
