"""A replay in numbers, simulated or live: one flat dictionary, units in the names, every formula in the docstring beside it.

Percentiles are nearest rank (`summary.percentile`). None: there is nothing to compute the value from. Goes over columns, so that
half a million requests take seconds. Pure.
"""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import TypeAlias

from spotserve.replay.outcome import Gaps, Outcomes, Replayed
from spotserve.replay.recovery import Windows, availability, loss_times_s, losses_by_notice, recovery_times_s
from spotserve.replay.summary import Objectives, Summary, nearest_rank, percentile

Measures: TypeAlias = Summary
"""Of a replay; see `measure`."""

PERCENTS: Mapping[str, float] = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
"""By the name that they have in keys."""
OBJECTIVES = Objectives()
AFTER_LOSS_S = 60.0
"""How long after a loss its effects are looked for, unless told otherwise."""


def measure(replayed: Replayed, objectives: Objectives = OBJECTIVES, *, after_loss_s: float = AFTER_LOSS_S) -> Measures:
    """All numbers of one replay."""
    length_s = max(replayed.duration_s, replayed.ended_s)
    return {
        "duration_s": length_s,
        "trace_duration_s": replayed.duration_s,
        **_requests(replayed.outcomes),
        **_work(replayed),
        **_latencies(replayed.outcomes, replayed.gaps),
        **_rates(replayed.outcomes, objectives, length_s, replayed.duration_s),
        **_losses(replayed),
        **_after_losses(replayed, after_loss_s),
        **_cost(replayed),
    }


def metric_names() -> list[str]:
    """Keys of every summary."""
    nothing = Replayed(
        policy="",
        seed=0,
        duration_s=0.0,
        ended_s=0.0,
        outcomes=Outcomes(),
        gaps=Gaps(),
        fleet_events=(),
        leases=(),
        on_demand_usd_per_hour=0.0,
    )
    return list(measure(nothing))


def _requests(outcomes: Outcomes) -> Measures:
    """Counts of attempts. *Lost*: the client has no whole answer. *Interrupted*: it changed its replica on the way; *moved*:
    with its KV; *resumed*: from its tokens; *restarted*: anew. A request may be several of these."""
    whole = sum(map(int, outcomes.column("is_whole")))
    ways = {name: outcomes.column(name) for name in ("moved", "resumed", "restarted")}
    return {
        "requests_total": len(outcomes),
        "requests_finished": whole,
        "requests_lost": len(outcomes) - whole,
        "requests_interrupted": sum(any(times) for times in zip(*ways.values(), strict=True)),
        **{f"requests_{name}": sum(times > 0 for times in column) for name, column in ways.items()},
    }


def _work(replayed: Replayed) -> Measures:
    """`tokens_total`: output tokens that clients have. `tokens_recomputed`: tokens of prompts and outputs that were computed more
    than once because of a move, a loss or an eviction. Bytes: weights and KV between machines, weights from files."""
    outcomes = replayed.outcomes
    return {
        "tokens_total": sum(map(int, outcomes.column("tokens"))),
        "prompt_tokens_total": sum(map(int, outcomes.column("prompt_tokens"))),
        "tokens_recomputed": sum(map(int, outcomes.column("recomputed_tokens"))),
        "weights_moved_bytes": replayed.weights_moved_bytes,
        "weights_read_bytes": replayed.weights_read_bytes,
        "kv_moved_bytes": replayed.kv_moved_bytes,
    }


def _latencies(outcomes: Outcomes, gaps: Gaps) -> Measures:
    """TTFT = first token - arrival, of all that got a token. E2E = last token - arrival and TPOT = (E2E - TTFT) / (tokens - 1),
    of whole answers. ITL: time between two tokens that follow each other, pooled over all requests, to within half a percent.
    `longest_gap`: the longest ITL of each request that has two tokens; `longest_gap_s`: of them all."""
    ttft_s: list[float] = []
    tpot_s: list[float] = []
    e2e_s: list[float] = []
    for arrival_s, first_s, end_s, whole, tokens in _columns(outcomes, "arrival_s", "first_token_s", "end_s", "is_whole", "tokens"):
        has_token = not isnan(first_s)
        if has_token:
            ttft_s.append(first_s - arrival_s)
        if whole:
            e2e_s.append(end_s - arrival_s)
        if whole and has_token and tokens > 1:
            tpot_s.append((end_s - first_s) / (tokens - 1))
    longest_s = [gap_s for tokens, gap_s in _columns(outcomes, "tokens", "longest_gap_s") if tokens > 1]
    found: Measures = {}
    for name, values_s in (("ttft", ttft_s), ("tpot", tpot_s), ("e2e", e2e_s), ("longest_gap", longest_s)):
        found |= _spread(name, values_s)
    found |= {"itl_mean_s": gaps.mean_s, **{f"itl_{name}_s": gaps.percentile_s(percent) for name, percent in PERCENTS.items()}}
    return {**found, "itl_max_s": gaps.percentile_s(100), "longest_gap_s": max(longest_s, default=None)}


def _spread(name: str, values_s: Sequence[float]) -> Measures:
    """Mean, percentiles, largest."""
    ordered = sorted(values_s)
    return {
        f"{name}_mean_s": sum(ordered) / len(ordered) if ordered else None,
        **{f"{name}_{short}_s": nearest_rank(ordered, percent) for short, percent in PERCENTS.items()},
        f"{name}_max_s": ordered[-1] if ordered else None,
    }


def _rates(outcomes: Outcomes, objectives: Objectives, length_s: float, trace_s: float) -> Measures:
    """Per second of the replay, from its start until the last request has ended; offered: attempts per second of the traces.

    Goodput: whole answers that meet every objective; its share is of all attempts, lost ones too.
    """
    good = 0
    for arrival_s, first_s, end_s, whole, tokens in _columns(outcomes, "arrival_s", "first_token_s", "end_s", "is_whole", "tokens"):
        if whole:
            ttft_s = 0.0 if isnan(first_s) else first_s - arrival_s
            tpot_s = (end_s - first_s) / (tokens - 1) if tokens > 1 and not isnan(first_s) else 0.0
            good += objectives.kept(ttft_s, tpot_s, end_s - arrival_s)
    counts = {
        "requests_per_s": sum(map(int, outcomes.column("is_whole"))),
        "tokens_per_s": sum(map(int, outcomes.column("tokens"))),
        "goodput_requests_per_s": good,
    }
    return {
        **{name: count / length_s if length_s > 0 else None for name, count in counts.items()},
        "offered_requests_per_s": len(outcomes) / trace_s if trace_s > 0 else None,
        "goodput_share": good / len(outcomes) if outcomes else None,
        "objective_ttft_s": objectives.ttft_s,
        "objective_tpot_s": objectives.tpot_s,
        "objective_e2e_s": objectives.e2e_s,
    }


def _losses(replayed: Replayed) -> Measures:
    """Instances lost; moments of loss; recovery: from each moment until all that is planned serves again, see `recovery`.

    Availability: shares of the traces' time in which any replica, or every planned one, served.
    """
    with_notice, without = losses_by_notice(replayed.fleet_events)
    recoveries = recovery_times_s(replayed) if any(event.kind == "serving" for event in replayed.fleet_events) else []
    times_s = [seconds for seconds, _ in recoveries]
    any_share, planned_share = availability(replayed)
    return {
        "losses": with_notice + without,
        "losses_with_notice": with_notice,
        "losses_without_notice": without,
        "loss_moments": len(loss_times_s(replayed.fleet_events)),
        "recovery_mean_s": sum(times_s) / len(times_s) if times_s else None,
        "recovery_p50_s": percentile(times_s, 50),
        "recovery_max_s": max(times_s, default=None),
        "recoveries_unfinished": sum(not settled for _, settled in recoveries) if recoveries else None,
        "available_share": any_share,
        "whole_plan_share": planned_share,
    }


def _after_losses(replayed: Replayed, after_loss_s: float) -> Measures:
    """The same latencies in the wake of losses: of requests that were in flight at some time from a moment of loss until so long
    after it. Gaps: the longest of each request, of those that overlap such a window."""
    windows = Windows(loss_times_s(replayed.fleet_events), after_loss_s)
    ttft_s: list[float] = []
    e2e_s: list[float] = []
    longest_s: list[float] = []
    touched = 0
    names = ("arrival_s", "first_token_s", "end_s", "is_whole", "longest_gap_s", "longest_gap_end_s")
    for arrival_s, first_s, end_s, whole, gap_s, gap_end_s in _columns(replayed.outcomes, *names):
        if not windows.meet(arrival_s, end_s):
            continue
        touched += 1
        if not isnan(first_s):
            ttft_s.append(first_s - arrival_s)
        if whole:
            e2e_s.append(end_s - arrival_s)
        if gap_s > 0 and windows.meet(gap_end_s - gap_s, gap_end_s):
            longest_s.append(gap_s)
    return {
        "after_loss_window_s": after_loss_s,
        "after_loss_requests": touched,
        "after_loss_ttft_p99_s": percentile(ttft_s, 99),
        "after_loss_e2e_p50_s": percentile(e2e_s, 50),
        "after_loss_e2e_p99_s": percentile(e2e_s, 99),
        "after_loss_longest_gap_p99_s": percentile(longest_s, 99),
        "after_loss_longest_gap_max_s": max(longest_s, default=None),
    }


def _cost(replayed: Replayed) -> Measures:
    """Leases: hours and dollars. `all_on_demand_usd`: the same hours at the on-demand price; `saved_share` = 1 - cost / that.
    Dollars per million output tokens: of those that clients have; per million tokens: of these and the prompts of whole answers."""
    spot = [lease for lease in replayed.leases if lease.spot]
    on_demand = [lease for lease in replayed.leases if not lease.spot]
    spot_hours, on_demand_hours = (sum(lease.hours for lease in leases) for leases in (spot, on_demand))
    spot_usd, on_demand_usd = (sum(lease.usd for lease in leases) for leases in (spot, on_demand))
    cost_usd = spot_usd + on_demand_usd
    dear_usd = (spot_hours + on_demand_hours) * replayed.on_demand_usd_per_hour
    tokens = sum(map(int, replayed.outcomes.column("tokens")))
    read = sum(int(prompt) for prompt, whole in _columns(replayed.outcomes, "prompt_tokens", "is_whole") if whole)
    return {
        "instance_hours": spot_hours + on_demand_hours,
        "instance_hours_spot": spot_hours,
        "instance_hours_on_demand": on_demand_hours,
        "instance_seconds": (spot_hours + on_demand_hours) * 3600,
        "spot_usd": spot_usd,
        "on_demand_usd": on_demand_usd,
        "cost_usd": cost_usd,
        "all_on_demand_usd": dear_usd,
        "saved_share": round(1 - cost_usd / dear_usd, 12) if dear_usd > 0 else None,
        "usd_per_million_output_tokens": cost_usd / tokens * 1e6 if tokens else None,
        "usd_per_million_tokens": cost_usd / (tokens + read) * 1e6 if tokens + read else None,
    }


def _columns(outcomes: Outcomes, *names: str) -> "zip[tuple[float, ...]]":
    return zip(*(outcomes.column(name) for name in names), strict=True)
