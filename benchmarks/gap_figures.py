"""From what clients and the controller noted around preemptions to figures: gaps, whose they are, and their percentiles.

All times are on the one clock that every process of a machine shares. Pure.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster import percentile
from prometheus_client.parser import text_string_to_metric_families

from spotserve.replay.record import FleetEvent, RequestRecord

WITH_NOTICE, WITHOUT_NOTICE = "with notice", "without notice"
AROUND_S = 0.25
"""A gap belongs to an interruption when it overlaps its time, by the event log, by at most this much before or after: further
away it would be found as well had nothing been taken."""
NOTICE_HISTOGRAM = "spotserve_notice_to_published_seconds"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time on the system's clock."""

    start_s: float
    end_s: float

    def overlaps(self, start_s: float, end_s: float) -> bool:
        """Whether it has a moment in common with another stretch."""
        return start_s < self.end_s and end_s > self.start_s


@dataclass(frozen=True, slots=True)
class Preemption:
    """One instance taken; `disturbed` is from the lever to all replicas serving again."""

    kind: str
    instance: str
    disturbed: Span


@dataclass(frozen=True, slots=True)
class Gap:
    """A pause between two token events of one stream, or before the first."""

    call_id: str
    start_s: float
    end_s: float
    is_first: bool

    @property
    def length_s(self) -> float:
        """How long it was."""
        return self.end_s - self.start_s


def tokens_within(records: Sequence[RequestRecord], span: Span) -> int:
    """Output tokens that came within a stretch of time."""
    return sum(
        tokens
        for record in records
        for at_s, tokens in zip(record.event_times_s, record.event_tokens, strict=True)
        if span.start_s <= at_s < span.end_s
    )


def gaps_of(records: Sequence[RequestRecord]) -> list[Gap]:
    """Every pause of every stream, the wait for its first token included."""
    gaps = []
    for record in records:
        times_s = (record.sent_s, *record.event_times_s)
        gaps += [
            Gap(record.request_id, times_s[index], times_s[index + 1], is_first=index == 0) for index in range(len(times_s) - 1)
        ]
    return gaps


def steady_gaps_s(gaps: Sequence[Gap], preemptions: Sequence[Preemption], within: Span, margin_s: float) -> list[float]:
    """Lengths of gaps far from all disturbances; the wait for a first token is no gap here."""
    disturbed = [Span(p.disturbed.start_s - margin_s, p.disturbed.end_s + margin_s) for p in preemptions]
    return [
        gap.length_s
        for gap in gaps
        if not gap.is_first
        and gap.start_s >= within.start_s
        and gap.end_s <= within.end_s
        and not any(span.overlaps(gap.start_s, gap.end_s) for span in disturbed)
    ]


def around(preemption: Preemption, gaps: Sequence[Gap], events: Sequence[FleetEvent]) -> dict[str, Any]:
    """What clients saw of one preemption."""
    span = preemption.disturbed
    interruptions = [event for event in events if event.kind in ("moved", "resumed") and span.start_s <= event.time_s <= span.end_s]
    waits: defaultdict[str, list[Span]] = defaultdict(list)
    for event in interruptions:
        waits[_call_id(event)].append(_around_event(event))
    seen = [gap for gap in gaps if any(wait.overlaps(gap.start_s, gap.end_s) for wait in waits.get(gap.call_id, ()))]
    bystanders = [
        gap.length_s for gap in gaps if gap.call_id not in waits and not gap.is_first and span.overlaps(gap.start_s, gap.end_s)
    ]
    longest = max(seen, key=lambda gap: gap.length_s, default=None)
    cause = next((event for event in reversed(interruptions) if longest is not None and _call_id(event) == longest.call_id), None)
    return {
        "kind": preemption.kind,
        "instance": preemption.instance,
        "at_s": span.start_s,
        "interrupted": dict(Counter(event.kind for event in interruptions)),
        "longest_gap_s": None if longest is None else longest.length_s,
        "longest_gap_is_first": longest is not None and longest.is_first,
        "longest_gap_starts_s": None if longest is None else longest.start_s,
        "longest_gap_event": None if cause is None else {"kind": cause.kind, "time_s": cause.time_s, **cause.details},
        "bystanders_longest_gap_s": max(bystanders, default=None),
    }


def _around_event(event: FleetEvent) -> Span:
    """When a sequence was interrupted: a hand-over is logged at its end, with how long it took."""
    took_s = event.details.get("seconds", 0.0)
    assert isinstance(took_s, int | float)
    return Span(event.time_s - took_s - AROUND_S, event.time_s + AROUND_S)


def _call_id(event: FleetEvent) -> str:
    """A sequence is named after its call and its number in it."""
    return str(event.details["request_id"]).rpartition("-")[0]


def summary(kind: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All preemptions of one kind."""
    mine = [row for row in rows if row["kind"] == kind]
    longest_s = [row["longest_gap_s"] for row in mine if row["longest_gap_s"] is not None]
    bystanders_s = [row["bystanders_longest_gap_s"] for row in mine if row["bystanders_longest_gap_s"] is not None]
    interrupted: Counter[str] = Counter()
    for row in mine:
        interrupted.update(row["interrupted"])
    return {
        "preemptions": len(mine),
        "preemptions_that_interrupted": len(longest_s),
        "sequences": dict(interrupted),
        "longest_gap_p50_s": statistics.median(longest_s) if longest_s else None,
        "longest_gap_p99_s": percentile(longest_s, 0.99) if longest_s else None,
        "longest_gap_max_s": max(longest_s, default=None),
        "bystanders_longest_gap_p50_s": statistics.median(bystanders_s) if bystanders_s else None,
        "bystanders_longest_gap_max_s": max(bystanders_s, default=None),
    }


def notice_to_table(text: str) -> dict[str, Any]:
    """From the system's Prometheus text: how many notices, their mean, and the bucket bound that none exceeded."""
    samples = [
        sample for family in text_string_to_metric_families(text) if family.name == NOTICE_HISTOGRAM for sample in family.samples
    ]
    total = {sample.name.rpartition("_")[2]: sample.value for sample in samples if not sample.labels}
    count = total.get("count", 0.0)
    bounds = [float(sample.labels["le"]) for sample in samples if sample.labels and sample.value >= count > 0]
    return {
        "count": int(count),
        "mean_s": total["sum"] / count if count else None,
        "all_within_s": min(bounds, default=None),
    }
