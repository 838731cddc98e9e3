"""Files that say how many machines of the spot market could be had: the formats that are read.

Some list machines that come and go, some only how many there are. Of the latter nobody knows which machine went: that is drawn by
seed, and what goes and comes within one row is not seen at all. No file says whether a loss was announced.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from spotserve.replay.draws import drawn_seed
from spotserve.replay.rows import Format, Options, Row, full_match
from spotserve.replay.trace import CapacityChange, CapacityEvent, CapacityTrace

_MOST_INSTANCES = 100_000
_HOURS_AT_MOST = 24.0 * 366
"""Counts whose times have fractions and end before that are in hours."""
_SECONDS_AT_MOST = 10_000_000
"""Whole times beyond that (four months of seconds) are milliseconds."""

VICTIMS_DRAWN = "which instance went is not in the file: drawn by seed"


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


def _change(row: Row, text: str) -> CapacityChange:
    match text:
        case "add":
            return "add"
        case "remove":
            return "remove"
        case _:
            raise row.error("add or remove in column 2")


def _instance(row: Row, name: str) -> str:
    if not name:
        raise row.error("an instance in column 3")
    return name


def _read_own(rows: Sequence[Row], options: Options) -> CapacityTrace:
    del options
    width = len(rows[0].fields)

    def event(row: Row) -> CapacityEvent:
        fields = row.columns(width)
        zone = fields[3] if width > 3 else ""
        return CapacityEvent(row.number(fields[0], "time_s"), _change(row, fields[1]), _instance(row, fields[2]), zone)

    return CapacityTrace(checked_history((row, event(row)) for row in rows[1:]), "spotserve-capacity")


def _read_bamboo(rows: Sequence[Row], options: Options) -> CapacityTrace:
    """Bamboo (NSDI'23), and copies of it in SpotServe and Parcae: its clock starts at the first event."""
    del options
    origin_ms = rows[0].number(rows[0].fields[0], "milliseconds")

    def event(row: Row) -> CapacityEvent:
        fields = row.columns(3)
        if (time_ms := row.number(fields[0], "milliseconds")) < origin_ms:
            raise row.error(f"a time not before {origin_ms:g} ms, that of the first row")
        return CapacityEvent((time_ms - origin_ms) / 1000, _change(row, fields[1]), _instance(row, fields[2]))

    assumed = (f"time 0 is the first event, at {origin_ms / 1000:g} s of the file",) if origin_ms else ()
    return CapacityTrace(checked_history((row, event(row)) for row in rows), "bamboo", assumed=assumed)


def _read_lines(rows: Sequence[Row], options: Options) -> CapacityTrace:
    """SpotServe's segments (ASPLOS'24), and Parcae's windows (NSDI'24): a JSON array a line."""
    del options
    located: list[tuple[Row, CapacityEvent]] = []
    required: list[tuple[float, float]] = []
    end_s: float | None = None
    is_parcae = False
    last_s = 0.0
    for row in rows:
        time_s, verb, details = _line(row)
        if time_s < last_s or end_s is not None:
            raise row.error("nothing after DONE" if end_s is not None else f"a time not before {last_s:g} s, that of the row above")
        last_s = time_s
        if verb in ("no-op", "migration"):
            is_parcae = True
        if "required_tpt" in details:
            required.append((time_s, row.number(details["required_tpt"], "required_tpt")))
        names = details.get("nodes", [])
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise row.error('a list of names as "nodes"')
        if verb == "DONE":
            end_s = time_s
        elif verb == "add" or verb == "remove":
            change: CapacityChange = "add" if verb == "add" else "remove"
            located += [(row, CapacityEvent(time_s, change, name)) for name in names]
    name = "parcae-lines" if is_parcae else "spotserve-lines"
    return CapacityTrace(checked_history(located), name, end_s=end_s, is_ended=end_s is not None, required_rps=tuple(required))


def _line(row: Row) -> tuple[float, str, dict[str, Any]]:
    expected = '[milliseconds, "add" | "remove" | "other" | "no-op" | "migration" | "DONE", {"nodes": [..]}]'
    try:
        found = json.loads(row.text)
    except (ValueError, RecursionError):
        raise row.error(expected) from None
    if not isinstance(found, list) or len(found) != 3 or not isinstance(found[1], str) or not isinstance(found[2], dict):
        raise row.error(expected)
    if found[1] not in ("add", "remove", "other", "no-op", "migration", "DONE"):
        raise row.error(expected)
    return row.number(found[0], "milliseconds") / 1000, found[1], found[2]


def _read_series(rows: Sequence[Row], options: Options) -> CapacityTrace:
    """SkyPilot's spot-traces (NSDI'24): one JSON object, counts at equal ticks."""
    first = rows[0]
    expected = '{"metadata": {"gap_seconds": seconds}, "data": [count, ..]}'
    try:
        found = json.loads("\n".join(row.text for row in rows))
    except (ValueError, RecursionError) as error:
        at = getattr(error, "lineno", 1)
        raise rows[min(at, len(rows)) - 1].error(f"{expected} in JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("data"), list) or not isinstance(found.get("metadata"), dict):
        raise first.error(expected)
    counts = [first.count(count, f"count {index}", largest=_MOST_INSTANCES) for index, count in enumerate(found["data"])]
    told_s = first.number(found["metadata"].get("gap_seconds", options.tick_s), "gap_seconds")
    tick_s = options.tick_s or told_s
    if tick_s <= 0:
        raise first.error("a gap_seconds above 0")
    events = counted([(index * tick_s, count) for index, count in enumerate(counts)], options.seed)
    ticks = f"ticks of {tick_s:g} s" + ("" if tick_s == told_s else f", not the {told_s:g} s of the file")
    return CapacityTrace(events, "skypilot-spot-traces", end_s=len(counts) * tick_s, assumed=(ticks, VICTIMS_DRAWN))


def _read_stamped(rows: Sequence[Row], options: Options) -> CapacityTrace:
    """Bamboo's text of Google Cloud: date, time, count. Rows may go back in time: a later row stands for what the file had said
    from its stamp on; sorting would invent losses."""
    kept: list[tuple[float, int]] = []
    origin: datetime | None = None
    overridden = 0
    for row in rows:
        date, time, count = row.columns(3)
        try:
            stamp = datetime.fromisoformat(f"{date}T{time}")
        except ValueError:
            raise row.error("YYYY-MM-DD, HH:MM:SS, count") from None
        if stamp.tzinfo is not None:
            raise row.error("a time without an offset")
        origin = origin or stamp
        at_s = (stamp - origin).total_seconds()
        if at_s < 0:
            raise row.error(f"a time not before {origin.isoformat(sep=' ')}, that of the first row")
        while kept and kept[-1][0] >= at_s:
            kept.pop()
            overridden += 1
        kept.append((at_s, row.count(count, "count", largest=_MOST_INSTANCES)))
    assumed = (VICTIMS_DRAWN, *((f"{overridden} rows that later rows go back behind do not count",) if overridden else ()))
    return CapacityTrace(counted(kept, options.seed), "bamboo-gcp", end_s=kept[-1][0], dropped_rows=overridden, assumed=assumed)


def _read_counts(rows: Sequence[Row], options: Options) -> CapacityTrace:
    """`time,count` without a header: Bamboo's documents (seconds, or hours), Parcae (milliseconds)."""
    points: list[tuple[float, int]] = []
    for row in rows:
        time, count = row.columns(2)
        at = row.number(time, "time")
        if points and at < points[-1][0]:
            raise row.error(f"a time not before {points[-1][0]:g}, that of the row above")
        points.append((at, row.count(count, "count", largest=_MOST_INSTANCES)))
    last, is_whole = points[-1][0], all("." not in row.fields[0] for row in rows)
    unit, seconds = ("milliseconds", 1e-3) if is_whole and last > _SECONDS_AT_MOST else ("seconds", 1.0)
    if not is_whole and last <= _HOURS_AT_MOST:
        unit, seconds = "hours", 3600.0
    why = {"milliseconds": "they end so late", "seconds": "they are whole", "hours": "they have fractions and end so early"}[unit]
    scaled = [(at * seconds, count) for at, count in points]
    return CapacityTrace(
        counted(scaled, options.seed), "counts", end_s=scaled[-1][0], assumed=(f"times are {unit}: {why}", VICTIMS_DRAWN)
    )


def counted(points: Iterable[tuple[float, int]], seed: int) -> tuple[CapacityEvent, ...]:
    """A history with these numbers of instances from these times on. Who goes is drawn: by seed, and by the row alone."""
    present: list[str] = []
    events: list[CapacityEvent] = []
    launched = 0
    for index, (at_s, count) in enumerate(points):
        while len(present) < count:
            present.append(f"i{launched:05d}")
            events.append(CapacityEvent(at_s, "add", present[-1]))
            launched += 1
        for turn in range(len(present) - count):
            victim = present.pop(drawn_seed(seed, "victim", index, turn) % len(present))
            events.append(CapacityEvent(at_s, "remove", victim))
    return tuple(events)


_NUMBER = r"\d+(\.\d+)?([eE][+-]?\d+)?"
CAPACITY_FORMATS: tuple[Format[CapacityTrace], ...] = (
    Format(
        "spotserve-capacity",
        "time_s,event,instance[,zone]",
        full_match(r"time_s\s*,\s*event\s*,\s*instance(\s*,\s*zone)?"),
        _read_own,
    ),
    Format("bamboo", "milliseconds,add|remove,node", full_match(rf"{_NUMBER}\s*,\s*(add|remove)\s*,.*"), _read_bamboo),
    Format("bamboo-gcp", "YYYY-MM-DD, HH:MM:SS, count", full_match(r"\d{4}-\d\d-\d\d\s*,.*"), _read_stamped),
    Format(
        "spotserve-lines", '[milliseconds, "add", {"nodes": [..]}] (also Parcae\'s)', lambda line: line.startswith("["), _read_lines
    ),
    Format(
        "skypilot-spot-traces",
        '{"metadata": {"gap_seconds": ..}, "data": [..]}',
        lambda line: line.startswith("{") and "timestamp" not in line,
        _read_series,
    ),
    Format("counts", "time,count (s, h or ms)", full_match(rf"{_NUMBER}\s*,\s*\d+"), _read_counts),
)
