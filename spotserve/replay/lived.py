"""A live run in the form of a replay, so that one report serves both, and both can be compared.

What a client cannot see is left out: which replicas served, and so availability and recovery. Pure.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from spotserve.config import LocalCloudSettings
from spotserve.replay.outcome import Gaps, Lease, Outcome, Outcomes, Replayed
from spotserve.replay.preemptions import preemptions
from spotserve.replay.record import FleetEvent, RequestRecord, RunRecord


def lived(run: RunRecord, prices: LocalCloudSettings, *, duration_s: float | None = None, seed: int = 0) -> Replayed:
    """The run, on a clock that begins with it; `duration_s`: of its traces, until when machines are paid for, or its own."""
    paid_s = run.duration_s if duration_s is None else duration_s
    outcomes, gaps = Outcomes(), Gaps()
    moves = {kind: [str(each.details.get("request_id")) for each in run.fleet_events if each.kind == kind] for kind in _MOVES}
    for record in sorted(run.requests, key=lambda record: (record.ended_s, record.arrival.index)):
        outcomes.append(_outcome(record, run.started_s, {kind: _count(moves[kind], record.request_id) for kind in _MOVES}))
        for (before_s, after_s), count in zip(record.silences, record.event_tokens[1:], strict=True):
            gaps.add(after_s - before_s)
            gaps.add(0.0, count - 1)
        gaps.add(0.0, max(0, record.event_tokens[0] - 1) if record.event_tokens else 0)
    noticed = {each.instance for each in preemptions(run.fleet_events) if each.notice_s is not None}
    return Replayed(
        policy="spotserve",
        seed=seed,
        duration_s=paid_s,
        ended_s=run.duration_s,
        outcomes=outcomes,
        gaps=gaps,
        fleet_events=tuple(_event(event, run.started_s, noticed) for event in _once(run.fleet_events)),
        leases=_leases(run, prices, paid_s),
        on_demand_usd_per_hour=prices.on_demand_usd_per_hour,
        kv_moved_bytes=sum(int(str(each.details.get("kv_bytes", 0))) for each in run.fleet_events if each.kind == "moved"),
    )


_MOVES = ("moved", "resumed")


def _count(sequences: Sequence[str], request_id: str) -> int:
    """A system names the sequences of a request after it, with a number behind."""
    if not request_id:
        return 0
    return sum(name.startswith(request_id) and not name[len(request_id) :][:1].isalnum() for name in sequences)


def _outcome(record: RequestRecord, started_s: float, moves: dict[str, int]) -> Outcome:
    """As its client saw it; arrival is when it was sent."""
    gap_s, gap_end_s = max(
        ((after - before, after - started_s) for before, after in pairwise(record.event_times_s)), default=(0, 0)
    )
    last_s = record.event_times_s[-1] if record.complete and record.event_times_s else record.ended_s
    return Outcome(
        index=record.arrival.index,
        arrival_s=record.sent_s - started_s,
        prompt_tokens=record.prompt_tokens or record.arrival.prompt_tokens,
        output_tokens=record.arrival.output_tokens,
        first_token_s=record.event_times_s[0] - started_s if record.event_times_s else None,
        end_s=last_s - started_s,
        is_whole=record.complete,
        tokens=len(record.token_ids),
        longest_gap_s=gap_s,
        longest_gap_end_s=gap_end_s,
        **moves,
    )


def _once(events: tuple[FleetEvent, ...]) -> list[FleetEvent]:
    """Without the second report of one loss."""
    lost: set[str | None] = set()
    kept = []
    for event in sorted(events, key=lambda event: event.time_s):
        if event.kind != "lost" or event.instance not in lost:
            kept.append(event)
        if event.kind == "lost":
            lost.add(event.instance)
    return kept


def _event(event: FleetEvent, started_s: float, noticed: set[str]) -> FleetEvent:
    details = dict(event.details)
    if event.kind == "lost":
        details["notice"] = event.instance in noticed
    deadline_s = details.get("deadline_s")
    if isinstance(deadline_s, int | float):
        details["deadline_s"] = deadline_s - started_s
    return replace(event, time_s=event.time_s - started_s, details=details)


def _leases(run: RunRecord, prices: LocalCloudSettings, paid_s: float) -> tuple[Lease, ...]:
    """One for each instance from its launch, or the start of the run, to its loss, or the end of the time; all of them spot."""
    since_s = dict.fromkeys(run.initial_instances, 0.0)
    leases = []

    def end(instance: str, at_s: float) -> None:
        leases.append(Lease(instance, True, since_s.pop(instance), at_s, prices.spot_usd_per_hour))

    for event in run.fleet_events:
        at_s = min(max(0.0, event.time_s - run.started_s), paid_s)
        if event.instance is not None and event.kind == "launched":
            since_s.setdefault(event.instance, at_s)
        elif event.instance in since_s and event.kind in ("lost", "terminated"):
            end(event.instance, at_s)
    for instance in tuple(since_s):
        end(instance, paid_s)
    return tuple(leases)
