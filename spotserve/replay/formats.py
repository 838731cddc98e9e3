"""Trace files, read into two shapes: a fleet's history and a list of requests.

A format is a function in one of the two tables at the end; which one a file is in shows in its first line that is not a
comment, so no flag names it. Every bad row is a `TraceError` that names the file, the line and what was expected there. Knows
files; does not know clocks, scaling or what becomes of the rows.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Generic, TypeVar

from spotserve.core.errors import TraceError
from spotserve.replay.trace import CapacityChange, CapacityEvent, CapacityTrace, RequestTrace, TraceRequest

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file, with what an error message needs."""

    source: str
    line: int
    fields: tuple[str, ...]

    def error(self, expected: str) -> TraceError:
        """The row is not what it should be."""
        return TraceError(f"{self.source}:{self.line}: expected {expected}, got {','.join(self.fields)!r}")

    def number(self, index: int, name: str) -> float:
        """Field `index` as a finite number that is not negative."""
        try:
            value = float(self.fields[index])
        except (ValueError, IndexError):
            raise self.error(f"a number as {name}") from None
        if not isfinite(value) or value < 0:
            raise self.error(f"a finite {name} that is not negative")
        return value

    def count(self, index: int, name: str, *, largest: int = 2**31) -> int:
        """Field `index` as a whole number that is not negative."""
        text = self.fields[index] if index < len(self.fields) else ""
        if not (text.isascii() and text.isdecimal()) or int(text) > largest:
            raise self.error(f"a whole number from 0 to {largest} as {name}")
        return int(text)


Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Format(Generic[Parsed]):
    """How one format is recognised and read."""

    first_line: re.Pattern[str]
    read: Callable[[list[Row]], Parsed]


# --------------------------------------------------------------------------- capacity


def checked_history(located: Iterable[tuple[Row, CapacityEvent]]) -> tuple[CapacityEvent, ...]:
    """The events, once time never goes back, no instance comes twice and none goes that is not there.

    Raises:
        TraceError: the first row that breaks one of these.
    """
    present: set[str] = set()
    events: list[CapacityEvent] = []
    for row, event in located:
        if events and event.time_s < events[-1].time_s:
            raise row.error(f"a time not before {events[-1].time_s:g} s, that of the row above")
        if (event.change == "add") is (event.instance in present):
            raise row.error("the add of an absent instance or the remove of a present one")
        (present.add if event.change == "add" else present.remove)(event.instance)
        events.append(event)
    return tuple(events)


def _change(row: Row) -> CapacityChange:
    match row.fields[1:2]:
        case ("add",):
            return "add"
        case ("remove",):
            return "remove"
        case _:
            raise row.error("add or remove in column 2")


def _instance(row: Row) -> str:
    if len(row.fields) < 3 or not row.fields[2]:
        raise row.error("an instance in column 3")
    return row.fields[2]


def _read_own_capacity(rows: list[Row]) -> CapacityTrace:
    width = len(rows[0].fields)

    def event(row: Row) -> CapacityEvent:
        if len(row.fields) != width:
            raise row.error(f"{width} columns")
        return CapacityEvent(row.number(0, "time_s"), _change(row), _instance(row), row.fields[3] if width > 3 else "")

    return CapacityTrace(checked_history((row, event(row)) for row in rows[1:]), "spotserve-capacity")


def _read_bamboo(rows: list[Row]) -> CapacityTrace:
    """Bamboo's `milliseconds,add|remove,node`, without a header. Its clock starts at the first event."""
    origin_ms = rows[0].number(0, "milliseconds")

    def event(row: Row) -> CapacityEvent:
        if len(row.fields) != 3:
            raise row.error("3 columns")
        if (time_ms := row.number(0, "milliseconds")) < origin_ms:
            raise row.error(f"a time not before {origin_ms:g} ms, that of the first row")
        return CapacityEvent((time_ms - origin_ms) / 1000, _change(row), _instance(row))

    return CapacityTrace(checked_history((row, event(row)) for row in rows), "bamboo")


CAPACITY_FORMATS: dict[str, Format[CapacityTrace]] = {
    "spotserve-capacity: time_s,event,instance[,zone]": Format(re.compile(r"time_s,event,instance(,zone)?"), _read_own_capacity),
    "bamboo: milliseconds,add|remove,node": Format(re.compile(r"\d+(\.\d+)?,(add|remove),.*"), _read_bamboo),
}

# --------------------------------------------------------------------------- requests


def _arrivals(located: Iterable[tuple[Row, TraceRequest]], name: str) -> RequestTrace:
    """The requests in order, those without tokens clamped to one token and counted."""
    requests: list[TraceRequest] = []
    clamped_rows = 0
    for row, request in located:
        if requests and request.arrival_s < requests[-1].arrival_s:
            raise row.error(f"an arrival not before {requests[-1].arrival_s:g} s, that of the row above")
        clamped_rows += 0 in (request.prompt_tokens, request.output_tokens)
        requests.append(
            TraceRequest(
                request.arrival_s,
                max(1, request.prompt_tokens),
                max(1, request.output_tokens),
                request.temperature,
                request.seed,
            )
        )
    return RequestTrace(tuple(requests), name, clamped_rows)


def _read_own_requests(rows: list[Row]) -> RequestTrace:
    columns = {name: index for index, name in enumerate(rows[0].fields)}

    def optional(row: Row, name: str) -> int | None:
        index = columns.get(name)
        return None if index is None or not row.fields[index] else index

    def request(row: Row) -> TraceRequest:
        if len(row.fields) != len(columns):
            raise row.error(f"{len(columns)} columns")
        temperature, seed = optional(row, "temperature"), optional(row, "seed")
        return TraceRequest(
            row.number(0, "arrival_s"),
            row.count(1, "prompt_tokens"),
            row.count(2, "output_tokens"),
            None if temperature is None else row.number(temperature, "temperature"),
            None if seed is None else row.count(seed, "seed", largest=MAX_SEED),
        )

    return _arrivals(((row, request(row)) for row in rows[1:]), "spotserve-requests")


def _read_azure(rows: list[Row]) -> RequestTrace:
    """Azure's LLM inference traces; the clock starts at the first request. Seven decimals of a second, perhaps a UTC offset."""

    def stamp_s(row: Row) -> float:
        text = re.sub(r"(\.\d{6})\d+", r"\1", row.fields[0])  # datetime knows microseconds, the trace tenths of them
        try:
            stamp = datetime.fromisoformat(text)
        except ValueError:
            raise row.error("a time stamp such as 2023-11-16 18:15:46.6805900 in column 1") from None
        return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()

    def request(row: Row) -> TraceRequest:
        if len(row.fields) != 3:
            raise row.error("3 columns")
        after_s = stamp_s(row) - origin_s
        return TraceRequest(round(after_s, 6), row.count(1, "ContextTokens"), row.count(2, "GeneratedTokens"))

    origin_s = stamp_s(rows[1]) if len(rows) > 1 else 0.0
    return _arrivals(((row, request(row)) for row in rows[1:]), "azure")


REQUEST_FORMATS: dict[str, Format[RequestTrace]] = {
    "spotserve-requests: arrival_s,prompt_tokens,output_tokens[,temperature][,seed]": Format(
        re.compile(r"arrival_s,prompt_tokens,output_tokens(,temperature)?(,seed)?"), _read_own_requests
    ),
    "azure: TIMESTAMP,ContextTokens,GeneratedTokens": Format(re.compile(r"TIMESTAMP,ContextTokens,GeneratedTokens"), _read_azure),
}

# --------------------------------------------------------------------------- files


def parse_capacity(text: str, source: str) -> CapacityTrace:
    """A capacity trace from its text; `source` names it in errors."""
    return _parse(text, source, CAPACITY_FORMATS)


def parse_requests(text: str, source: str) -> RequestTrace:
    """A request trace from its text; `source` names it in errors."""
    return _parse(text, source, REQUEST_FORMATS)


def read_trace_text(path: Path) -> str:
    """The text of a trace file.

    Raises:
        TraceError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: expected a readable UTF-8 file: {error}") from error


def _rows(text: str, source: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield Row(source, number, tuple(field.strip() for field in stripped.split(",")))


def _parse(text: str, source: str, formats: dict[str, Format[Parsed]]) -> Parsed:
    rows = list(_rows(text, source))
    expected = " or ".join(formats)
    if not rows:
        raise TraceError(f"{source}: expected {expected}, found no rows")
    for known in formats.values():
        if known.first_line.fullmatch(",".join(rows[0].fields)):
            return known.read(rows)
    raise rows[0].error(expected)
