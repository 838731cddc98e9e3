"""A run in numbers: one flat dictionary, units in the names. Pure; every formula is in the docstring beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TypeAlias

from spotserve.config import LocalCloudSettings
from spotserve.replay.compare import Comparison, Verdict
from spotserve.replay.preemptions import Preemption, in_flight, longest_silences, preemptions, steady_silences
from spotserve.replay.record import FleetEvent, RequestRecord, RunRecord

Summary: TypeAlias = dict[str, float | int | None]
"""None: the run has nothing to compute the value from."""

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Objectives:
    """What an answer must meet to count for goodput."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2
    e2e_s: float | None = None
    """None: an answer may take as long as it is long."""

    def met_by(self, record: RequestRecord) -> bool:
        """Whether the answer is whole and in time, by every objective that applies to it."""
        return record.complete and self.kept(record.ttft_s or 0.0, record.tpot_s or 0.0, record.e2e_s or 0.0)

    def kept(self, ttft_s: float, tpot_s: float, e2e_s: float) -> bool:
        """Whether a whole answer with these times is in time; 0 where one of them does not apply."""
        return ttft_s <= self.ttft_s and tpot_s <= self.tpot_s and (self.e2e_s is None or e2e_s <= self.e2e_s)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Nearest rank: the smallest value that at least `percent` % of all do not exceed; None: there are none."""
    return nearest_rank(sorted(values), percent)


def nearest_rank(ordered: Sequence[float], percent: float) -> float | None:
    """`percentile` of values that are in order."""
    rank = ceil(percent / 100 * len(ordered) * (1 - 1e-12))  # 99.9 % of 1000 is 999, and a little more in floats
    return ordered[max(0, rank - 1)] if ordered else None


def summarise(
    run: RunRecord,
    comparisons: Sequence[Comparison] = (),
    *,
    prices: LocalCloudSettings,
    objectives: Objectives = Objectives(),
) -> Summary:
    """The summary of one run; without comparisons `tokens_altered` and its kin are None."""
    found = preemptions(run.fleet_events)
    return {
        "duration_s": run.duration_s,
        **_outcomes(run, found),
        **_identity(comparisons),
        **_latencies(run.requests),
        **_silences(run, found),
        **_rates(run, objectives),
        **_cost(run, prices),
    }


def _outcomes(run: RunRecord, found: Sequence[Preemption]) -> Summary:
    """Counts. A request is *lost* when its client has no whole answer; *interrupted* when the system says that it was moved."""
    return {
        "requests_total": len(run.requests),
        "requests_finished": sum(record.complete for record in run.requests),
        "requests_lost": sum(not record.complete for record in run.requests),
        "requests_interrupted": len(
            {event.details.get("request_id") for event in run.fleet_events if event.kind in ("moved", "resumed")}
        ),
        "requests_in_flight_at_losses": len(in_flight(run.requests, found)),
        "requests_reattached": sum(record.reattached > 0 for record in run.requests),
        "tokens_total": sum(len(record.token_ids) for record in run.requests),
        "tokens_duplicate": sum(record.duplicate_tokens for record in run.requests),
        "tokens_contradicted": sum(record.contradicted_tokens for record in run.requests),
        "tokens_recomputed": run.tokens_recomputed,
        "preemptions_with_notice": sum(preemption.notice_s is not None for preemption in found),
        "preemptions_without_notice": sum(preemption.notice_s is None for preemption in found),
        "capacity_actions_failed": sum(deed.problem is not None for deed in run.deeds),
    }


def _identity(comparisons: Sequence[Comparison]) -> Summary:
    """Answers against those of the undisturbed run; see `compare`."""
    if not comparisons:
        return dict.fromkeys(("requests_equal", "requests_altered", "requests_without_reference", "tokens_altered", "tie_flips"))
    verdicts = [comparison.verdict for comparison in comparisons]
    return {
        "requests_equal": verdicts.count(Verdict.EQUAL),
        "requests_altered": verdicts.count(Verdict.ALTERED),
        "requests_without_reference": verdicts.count(Verdict.UNKNOWN),
        "tokens_altered": sum(comparison.tokens_altered for comparison in comparisons),
        "tie_flips": verdicts.count(Verdict.TIE_FLIP),
    }


def _latencies(requests: Sequence[RequestRecord]) -> Summary:
    """Percentiles over requests: TTFT = first token - sent; E2E = last token - sent; TPOT = (E2E - TTFT) / (tokens - 1).

    TTFT counts every request that got a token; TPOT and E2E count whole answers. The schedule delay is how late the client sent.
    """
    families: dict[str, list[float | None]] = {
        "ttft": [record.ttft_s for record in requests],
        "tpot": [record.tpot_s for record in requests],
        "e2e": [record.e2e_s for record in requests],
        "schedule_delay": [record.schedule_delay_s for record in requests],
    }
    result: Summary = {}
    for name, maybe in families.items():
        values = [value for value in maybe if value is not None]
        result |= {f"{name}_p{percent}_s": percentile(values, percent) for percent in (50, 90, 99)}
        result[f"{name}_mean_s"] = sum(values) / len(values) if values else None
    return result


def _silences(run: RunRecord, found: Sequence[Preemption]) -> Summary:
    """Silences between events with tokens.

    `longest_gap_s`: the longest of the run. `gap_steady_p99_s`: over requests, the longest gap of each outside every
    preemption's window. `gap_with_notice_p99_s`, `gap_without_notice_p99_s`: over preemptions of that kind and the requests
    that each affected, the longest gap overlapping its window.
    """
    every = [after - before for record in run.requests for before, after in record.silences]
    noticed = [gap for p in found if p.notice_s is not None for gap in longest_silences(run.requests, p)]
    sudden = [gap for p in found if p.notice_s is None for gap in longest_silences(run.requests, p)]
    families: dict[str, list[float]] = {
        "gap_steady": steady_silences(run),
        "gap_with_notice": noticed,
        "gap_without_notice": sudden,
    }
    result: Summary = {"longest_gap_s": max(every, default=None)}
    for name, values in families.items():
        result |= {f"{name}_p{percent}_s": percentile(values, percent) for percent in (50, 99)}
        result[f"{name}_max_s"] = max(values, default=None)
    return result


def _rates(run: RunRecord, objectives: Objectives) -> Summary:
    """Per second of the run. Goodput: whole answers that meet every objective; its share is of all attempts, lost ones too."""
    good = sum(objectives.met_by(record) for record in run.requests)
    attempts, duration_s = len(run.requests), run.duration_s
    return {
        "tokens_per_s": sum(len(record.token_ids) for record in run.requests) / duration_s if duration_s else None,
        "goodput_requests_per_s": good / duration_s if duration_s else None,
        "goodput_share": good / attempts if attempts else None,
        "objective_ttft_s": objectives.ttft_s,
        "objective_tpot_s": objectives.tpot_s,
        "objective_e2e_s": objectives.e2e_s,
    }


def _cost(run: RunRecord, prices: LocalCloudSettings) -> Summary:
    """`cost_usd`: instance-seconds of the run at the spot price; `cost_on_demand_usd`: the fleet of the start, held for the
    whole run at the on-demand price; `usd_per_million_output_tokens` = cost / tokens × 10⁶."""
    seconds = instance_seconds(run)
    tokens = sum(len(record.token_ids) for record in run.requests)
    cost_usd = seconds / SECONDS_PER_HOUR * prices.spot_usd_per_hour
    steady_s = len(run.initial_instances) * run.duration_s
    return {
        "instance_seconds": seconds,
        "cost_usd": cost_usd,
        "cost_on_demand_usd": steady_s / SECONDS_PER_HOUR * prices.on_demand_usd_per_hour,
        "usd_per_million_output_tokens": cost_usd / tokens * 1e6 if tokens else None,
    }


def fleet_steps(run: RunRecord) -> list[tuple[float, int]]:
    """Size of the fleet after each change, from the start of the run: (time, instances rented)."""
    present = set(run.initial_instances)
    steps = [(run.started_s, len(present))]
    for event in _changes(run):
        assert event.instance is not None
        (present.discard if event.kind in _LEAVING else present.add)(event.instance)
        steps.append((min(max(event.time_s, run.started_s), run.ended_s), len(present)))
    return steps


def instance_seconds(run: RunRecord) -> float:
    """Sum over instances of the time from launch (or the start of the run) to loss (or its end)."""
    steps = [*fleet_steps(run), (run.ended_s, 0)]
    return sum(count * (after_s - at_s) for (at_s, count), (after_s, _) in pairwise(steps))


_LEAVING = frozenset({"lost", "terminated"})


def _changes(run: RunRecord) -> list[FleetEvent]:
    return [event for event in run.fleet_events if event.instance is not None and event.kind in ("launched", *_LEAVING)]
