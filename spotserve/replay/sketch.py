"""What a page draws of one replay: the same few thousand numbers, however many requests there were. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isnan

from spotserve.replay.outcome import Outcomes, Replayed
from spotserve.replay.summary import nearest_rank

NUM_BINS = 360
"""Of a picture over time; where there are many pictures, fewer."""
MOST_DOTS = 3000
"""Requests that are drawn one by one; more of them are drawn as percentiles of bins."""
CDF_POINTS = 160
PAPER_PERCENTS = (90.0, 95.0, 96.0, 97.0, 98.0, 99.0)
"""As in Figure 6 of the SpotServe paper (ASPLOS'24)."""


@dataclass(frozen=True, slots=True)
class Dot:
    """One request: when it came, and how long it took or was waited for."""

    at_s: float
    seconds: float
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Bin:
    """A stretch of time; latencies are those of requests that came in it, queues are means over it."""

    from_s: float
    p50_s: float | None
    p99_s: float | None
    lost: int
    in_flight: float
    waiting: float
    """In flight without a token."""
    spot: float
    on_demand: float


@dataclass(frozen=True, slots=True)
class Band:
    """A plan, for as long as it was the newest."""

    from_s: float
    until_s: float
    shape: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Instances that were noticed or lost at one time."""

    at_s: float
    kind: str
    """`notice`, `lost` (with notice), `taken` (without)."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """One replay to be drawn."""

    length_s: float
    width_s: float
    """Of a bin."""
    bins: tuple[Bin, ...]
    dots: tuple[Dot, ...]
    """Empty: there were too many requests."""
    serving: tuple[tuple[float, int, int], ...]
    """From when: how many replicas served, and how many were planned."""
    bands: tuple[Band, ...]
    marks: tuple[Mark, ...]
    ttft_s: tuple[float, ...]
    """Quantiles at equal steps, from the smallest to the largest."""
    e2e_s: tuple[float, ...]
    begun_share: float
    """Of all attempts: those that got a token, and those that got their whole answer."""
    answered_share: float
    e2e_mean_s: float | None
    e2e_percentiles_s: tuple[float | None, ...]
    """At `PAPER_PERCENTS`."""


def sketch(replayed: Replayed, num_bins: int) -> Sketch:
    """A replay in so many bins."""
    length_s = max(replayed.duration_s, replayed.ended_s, 1e-9)
    outcomes = replayed.outcomes
    whole = outcomes.column("is_whole")
    arrivals_s, firsts_s, ends_s = (outcomes.column(name) for name in ("arrival_s", "first_token_s", "end_s"))
    ttft_s = sorted(first - arrival for arrival, first in zip(arrivals_s, firsts_s, strict=True) if not isnan(first))
    e2e_s = sorted(end - arrival for arrival, end, is_whole in zip(arrivals_s, ends_s, whole, strict=True) if is_whole)
    few = len(outcomes) <= MOST_DOTS
    dots = (Dot(a, e - a, bool(w)) for a, e, w in sorted(zip(arrivals_s, ends_s, whole, strict=True)))
    return Sketch(
        length_s=length_s,
        width_s=length_s / num_bins,
        bins=_bins(replayed, length_s, num_bins),
        dots=tuple(dots) if few else (),
        serving=_serving(replayed, num_bins, length_s),
        bands=_bands(replayed, length_s),
        marks=_marks(replayed),
        ttft_s=_quantiles(ttft_s),
        e2e_s=_quantiles(e2e_s),
        begun_share=len(ttft_s) / max(1, len(outcomes)),
        answered_share=len(e2e_s) / max(1, len(outcomes)),
        e2e_mean_s=sum(e2e_s) / len(e2e_s) if e2e_s else None,
        e2e_percentiles_s=tuple(nearest_rank(e2e_s, percent) for percent in PAPER_PERCENTS),
    )


def _bins(replayed: Replayed, length_s: float, num_bins: int) -> tuple[Bin, ...]:
    width_s = length_s / num_bins
    latencies_s: list[list[float]] = [[] for _ in range(num_bins)]
    lost = [0] * num_bins
    outcomes = replayed.outcomes
    columns = (outcomes.column(name) for name in ("arrival_s", "end_s", "is_whole"))
    for arrival_s, end_s, whole in zip(*columns, strict=True):
        place = min(num_bins - 1, max(0, int(arrival_s / width_s)))
        if whole:
            latencies_s[place].append(end_s - arrival_s)
        else:
            lost[place] += 1
    edges_s = [number * width_s for number in range(num_bins + 1)]
    in_flight = _means(outcomes.column("arrival_s"), outcomes.column("end_s"), edges_s)
    waiting = _means(outcomes.column("arrival_s"), _first_or_end_s(outcomes), edges_s)
    spot, on_demand = (
        _means([lease.from_s for lease in leases], [lease.until_s for lease in leases], edges_s)
        for leases in ([each for each in replayed.leases if each.spot], [each for each in replayed.leases if not each.spot])
    )
    return tuple(
        Bin(
            edges_s[place],
            nearest_rank(ordered := sorted(latencies_s[place]), 50),
            nearest_rank(ordered, 99),
            lost[place],
            in_flight[place],
            waiting[place],
            spot[place],
            on_demand[place],
        )
        for place in range(num_bins)
    )


def _first_or_end_s(outcomes: Outcomes) -> list[float]:
    columns = (outcomes.column("first_token_s"), outcomes.column("end_s"))
    return [end_s if isnan(first_s) else first_s for first_s, end_s in zip(*columns, strict=True)]


def _means(starts_s: Iterable[float], ends_s: Iterable[float], edges_s: Sequence[float]) -> list[float]:
    """Between each two edges: how many spans there were, on average over the time."""
    area = [begun - ended for begun, ended in zip(_areas(starts_s, edges_s), _areas(ends_s, edges_s), strict=True)]
    return [
        max(0.0, (after - before) / (until_s - from_s))
        for (before, after), (from_s, until_s) in zip(pairwise(area), pairwise(edges_s), strict=True)
    ]


def _areas(times_s: Iterable[float], edges_s: Sequence[float]) -> list[float]:
    """Up to each edge: time that has passed since each of the times, in sum."""
    ordered = sorted(times_s)
    areas, place, total_s = [], 0, 0.0
    for edge_s in edges_s:
        while place < len(ordered) and ordered[place] <= edge_s:
            total_s += ordered[place]
            place += 1
        areas.append(edge_s * place - total_s)
    return areas


def _serving(replayed: Replayed, num_bins: int, length_s: float) -> tuple[tuple[float, int, int], ...]:
    """Changes, thinned to twice as many as there are bins: of those that are too close together the last one."""
    found: list[tuple[float, int, int]] = []
    closest_s = length_s / num_bins / 2
    for event in replayed.fleet_events:
        if event.kind != "serving":
            continue
        each = (event.time_s, int(str(event.details.get("replicas", 0))), int(str(event.details.get("planned", 0))))
        if found and each[0] - found[-1][0] < closest_s:
            found[-1] = (found[-1][0], *each[1:])
        else:
            found.append(each)
    return tuple(found)


def _bands(replayed: Replayed, length_s: float) -> tuple[Band, ...]:
    """Plans that say the same one after another are one band."""
    starts: list[tuple[float, str]] = []
    for event in replayed.fleet_events:
        if event.kind == "plan":
            shape = str(event.details.get("shape", ""))
            if starts and starts[-1][0] == event.time_s:
                starts.pop()
            if not starts or starts[-1][1] != shape:
                starts.append((event.time_s, shape))
    ends_s = [*(from_s for from_s, _ in starts[1:]), length_s][: len(starts)]
    return tuple(Band(from_s, until_s, shape) for (from_s, shape), until_s in zip(starts, ends_s, strict=True))


def _marks(replayed: Replayed) -> tuple[Mark, ...]:
    counts: dict[tuple[float, str], int] = {}
    for event in replayed.fleet_events:
        if event.kind in ("notice", "lost"):
            kind = "notice" if event.kind == "notice" else "lost" if event.details.get("notice") else "taken"
            counts[event.time_s, kind] = counts.get((event.time_s, kind), 0) + 1
    return tuple(Mark(at_s, kind, count) for (at_s, kind), count in sorted(counts.items()))


def _quantiles(ordered: Sequence[float]) -> tuple[float, ...]:
    """At most `CDF_POINTS` + 1 of them; of few values, all."""
    if len(ordered) <= CDF_POINTS:
        return tuple(ordered)
    last = len(ordered) - 1
    return tuple(ordered[round(number / CDF_POINTS * last)] for number in range(CDF_POINTS + 1))
