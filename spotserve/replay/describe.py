"""A trace in numbers, before anything is replayed: how long, how much, how bursty, what is lost. Pure.

Burstiness is told twice. The coefficient of variation of the gaps sees what happens from one request to the next; the index of
dispersion of counts, their variance over their mean, sees swings as slow as its window: 1 for Poisson arrivals at any window.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from math import ceil
from statistics import fmean, median, pvariance
from typing import Any

from spotserve.replay.generate import lives_s, loss_sizes, variation
from spotserve.replay.trace import CapacityTrace, RequestTrace
from spotserve.replay.trace_writers import counts_of

WINDOWS_S = (1, 10, 60, 600)
"""Over which arrivals are counted."""

SHORT_LIFE_S = 600.0


def describe_capacity(trace: CapacityTrace) -> dict[str, Any]:
    """What a capacity trace holds; None: it has nothing to compute the value from."""
    events = trace.events
    start_s = events[0].time_s if events else 0.0
    end_s = trace.end_s if trace.end_s is not None else (events[-1].time_s if events else 0.0)
    lives, sizes = lives_s(events), loss_sizes(events)
    held: dict[int, float] = {}
    for (at_s, count), (after_s, _) in pairwise([*counts_of(trace), (end_s, 0)]):
        held[count] = held.get(count, 0.0) + max(0.0, after_s - at_s)
    length_s = end_s - start_s
    instance_hours = sum(count * seconds for count, seconds in held.items()) / 3600
    gains = [sum(1 for _ in group) for _, group in groupby((e for e in events if e.change == "add"), key=lambda e: e.time_s)]
    return {
        "kind": "capacity",
        "format": trace.format,
        "length_s": length_s,
        "instances_min": min((count for count, seconds in held.items() if seconds), default=0),
        "instances_mean": instance_hours * 3600 / length_s if length_s else None,
        "instances_max": max(held, default=0),
        "instance_hours": instance_hours,
        "zones": len({event.zone for event in events if event.zone}),
        "loss_moments": len(sizes),
        "losses": sum(sizes),
        "bulk_share": sum(size > 1 for size in sizes) / len(sizes) if sizes else None,
        "largest_loss": max(sizes, default=0),
        "loss_sizes": dict(sorted(Counter(sizes).items())),
        "losses_per_instance_hour": sum(sizes) / instance_hours if instance_hours else None,
        "gain_moments": len(gains),
        "gains": sum(gains),
        "life_median_s": median(lives) if lives else None,
        "life_mean_s": fmean(lives) if lives else None,
        "life_cv": variation(lives) if len(lives) > 1 else None,
        "life_short_share": sum(life < SHORT_LIFE_S for life in lives) / len(lives) if lives else None,
        "time_by_instances_s": {count: round(seconds, 3) for count, seconds in sorted(held.items()) if seconds},
        "dropped_rows": trace.dropped_rows,
        "assumed": list(trace.assumed),
    }


def describe_requests(trace: RequestTrace) -> dict[str, Any]:
    """What a request trace holds; None: it has nothing to compute the value from."""
    requests = trace.requests
    arrivals = [request.arrival_s for request in requests]
    gaps = [after - before for before, after in pairwise(arrivals)]
    length_s = arrivals[-1] - arrivals[0] if arrivals else 0.0
    found: dict[str, Any] = {
        "kind": "requests",
        "format": trace.format,
        "requests": len(requests),
        "length_s": length_s,
        "rate_rps": (len(requests) - 1) / length_s if length_s else None,
        "gap_cv": variation(gaps) if len(gaps) > 1 else None,
        "longest_gap_s": max(gaps, default=None),
    }
    for window_s in WINDOWS_S:
        found[f"dispersion_{window_s}_s"] = dispersion(arrivals, window_s)
    for name, lengths in (("prompt", [r.prompt_tokens for r in requests]), ("output", [r.output_tokens for r in requests])):
        ordered = sorted(lengths)
        found[f"{name}_tokens_mean"] = fmean(ordered) if ordered else None
        for percent in (50, 90, 99):
            found[f"{name}_tokens_p{percent}"] = ordered[max(0, ceil(percent / 100 * len(ordered)) - 1)] if ordered else None
    found["prefix_block_tokens"] = trace.prefix_block_tokens or None
    found["prefix_seen_share"] = shared_blocks(trace)
    found["clamped_rows"] = trace.clamped_rows
    found["assumed"] = list(trace.assumed)
    return found


def dispersion(arrivals_s: Sequence[float], window_s: float) -> float | None:
    """Variance over mean of the numbers of arrivals in whole windows; None: there are fewer than two."""
    if not arrivals_s:
        return None
    start_s = arrivals_s[0]
    windows = int((arrivals_s[-1] - start_s) // window_s)
    if windows < 2:
        return None
    counts = Counter(int((at_s - start_s) // window_s) for at_s in arrivals_s)
    values = [counts.get(window, 0) for window in range(windows)]
    mean = fmean(values)
    return pvariance(values) / mean if mean else None


def shared_blocks(trace: RequestTrace) -> float | None:
    """Share of the blocks of prefixes that an earlier request had; None: there are none."""
    seen: set[int] = set()
    blocks = known = 0
    for request in trace.requests:
        blocks += len(request.prefix)
        known += sum(block in seen for block in request.prefix)
        seen.update(request.prefix)
    return known / blocks if blocks else None
