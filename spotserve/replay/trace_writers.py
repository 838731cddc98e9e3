"""Traces as text in the formats of others: for tools that read those, and for telling that nothing is lost on the way.

A format holds what it holds: files of counts forget names, most forget zones, temperatures and prefixes. Times go out exactly where
the format's unit allows.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import groupby

from spotserve.core.errors import ConfigError
from spotserve.replay.trace import CapacityTrace, RequestTrace, capacity_csv, requests_csv

_DAY = datetime(2024, 1, 1, tzinfo=UTC)
"""What stamps count from where a trace has none."""


def _own_capacity(trace: CapacityTrace) -> str:
    return capacity_csv(trace.events)


def _bamboo(trace: CapacityTrace) -> str:
    return _text(f"{_ms(event.time_s)},{event.change},{event.instance}" for event in trace.events)


def _lines(trace: CapacityTrace) -> str:
    lines: list[tuple[float, str, dict[str, object]]] = []
    for (time_s, change), events in groupby(trace.events, key=lambda event: (event.time_s, event.change)):
        lines.append((time_s, change, {"nodes": [event.instance for event in events]}))
    for time_s, required in trace.required_rps:
        lines.append((time_s, "other", {"nodes": [], "required_tpt": required}))
    lines.sort(key=lambda line: line[0])
    if trace.is_ended and trace.end_s is not None:
        lines.append((trace.end_s, "DONE", {"nodes": []}))
    return _text(json.dumps([_ms_number(time_s), verb, details]) for time_s, verb, details in lines)


def counts_of(trace: CapacityTrace) -> list[tuple[float, int]]:
    """How many instances there are from each time of a change on."""
    points: list[tuple[float, int]] = []
    count = 0
    for time_s, events in groupby(trace.events, key=lambda event: event.time_s):
        count += sum(1 if event.change == "add" else -1 for event in events)
        points.append((time_s, count))
    return points


def _counts(trace: CapacityTrace) -> str:
    return _text(f"{time_s:.0f},{count}" for time_s, count in counts_of(trace))


def _stamped(trace: CapacityTrace) -> str:
    return _text(f"{_DAY + timedelta(seconds=round(time_s)):%Y-%m-%d, %H:%M:%S}, {count}" for time_s, count in counts_of(trace))


def _series(trace: CapacityTrace) -> str:
    """At ticks of a minute."""
    points, tick_s = counts_of(trace), 60.0
    last_s = points[-1][0] if points else 0.0
    data, place, count = [], 0, 0
    for tick in range(int(last_s // tick_s) + 1):
        while place < len(points) and points[place][0] <= tick * tick_s:
            count = points[place][1]
            place += 1
        data.append(count)
    return json.dumps({"metadata": {"gap_seconds": tick_s}, "data": data}) + "\n"


def _own_requests(trace: RequestTrace) -> str:
    return requests_csv(trace.requests, prefix_block_tokens=trace.prefix_block_tokens)


def _azure(trace: RequestTrace) -> str:
    stamps = ((_DAY + timedelta(seconds=each.arrival_s)).strftime("%Y-%m-%d %H:%M:%S.%f") for each in trace.requests)
    rows = (f"{stamp}0,{each.prompt_tokens},{each.output_tokens}" for stamp, each in zip(stamps, trace.requests, strict=True))
    return _text(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows])


def _mooncake(trace: RequestTrace) -> str:
    return _text(
        json.dumps(
            {
                "timestamp": _ms_number(each.arrival_s),
                "input_length": each.prompt_tokens,
                "output_length": each.output_tokens,
                "hash_ids": list(each.prefix),
            }
        )
        for each in trace.requests
    )


def _burstgpt(trace: RequestTrace) -> str:
    rows = (
        f"{each.arrival_s!r},ChatGPT,{each.prompt_tokens},{each.output_tokens},{each.prompt_tokens + each.output_tokens},API log"
        for each in trace.requests
    )
    return _text(["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *rows])


def _queries(trace: RequestTrace) -> str:
    return _text(f"{index},{each.arrival_s!r},{each.prompt_tokens},0" for index, each in enumerate(trace.requests))


def _vidur(trace: RequestTrace) -> str:
    rows = (f"{each.arrival_s!r},{each.prompt_tokens},{each.output_tokens}" for each in trace.requests)
    return _text(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows])


CAPACITY_WRITERS: Mapping[str, Callable[[CapacityTrace], str]] = {
    "spotserve-capacity": _own_capacity,
    "bamboo": _bamboo,
    "bamboo-gcp": _stamped,
    "spotserve-lines": _lines,
    "skypilot-spot-traces": _series,
    "counts": _counts,
}
REQUEST_WRITERS: Mapping[str, Callable[[RequestTrace], str]] = {
    "spotserve-requests": _own_requests,
    "azure": _azure,
    "mooncake": _mooncake,
    "burstgpt": _burstgpt,
    "spotserve-queries": _queries,
    "vidur": _vidur,
}


def write_trace(trace: CapacityTrace | RequestTrace, format_name: str) -> str:
    """The trace in another format.

    Raises:
        ConfigError: there is no such format for traces of this kind; the message lists those that there are.
    """
    if isinstance(trace, CapacityTrace):
        if (write := CAPACITY_WRITERS.get(format_name)) is not None:
            return write(trace)
        known: Iterable[str] = CAPACITY_WRITERS
    else:
        if (write_requests := REQUEST_WRITERS.get(format_name)) is not None:
            return write_requests(trace)
        known = REQUEST_WRITERS
    raise ConfigError(f"--format {format_name}: expected one of {', '.join(known)}")


def _ms(time_s: float) -> str:
    return repr(_ms_number(time_s))


def _ms_number(time_s: float) -> float | int:
    """Milliseconds, whole where they are."""
    time_ms = time_s * 1000
    return round(time_ms) if abs(time_ms - round(time_ms)) < 1e-6 else time_ms


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
