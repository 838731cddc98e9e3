"""Latency of a configuration under a workload, for continuous batching: an analytical model, fast enough to search with.

The parts: `sample` (the workload as a thousand requests), `pace` (what a replica makes of them), `occupancy` (how many a request
finds), `pool` (all of it together). Means are sums over the occupancy; percentiles come from the sample.

Not in the model: arrivals that follow the time of day (ask for the rate of the moment), priorities, prefixes that are shared,
speculation (a matter of `ReplicaSpeed`), and what is lost to preemption.

Pure: same arguments, same answer. About 1 ms; grows with the number of *different* replicas, not with replicas, slots or rate.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf, isclose

import numpy as np

from spotserve.planner.pace import pace
from spotserve.planner.pool import Member, Met, meet
from spotserve.planner.sample import Floats, quantile, sample
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Latency, Objective, Workload

_IDLE = 1e-9
"""Utilisation that stands for none."""
_PRECISION = 1e-4
"""Of `max_rate_rps`, relative to capacity."""


def latency(
    speeds: Sequence[ReplicaSpeed] | Mapping[ReplicaSpeed, int], workload: Workload, *, shares: Sequence[float] | None = None
) -> Latency:
    """What requests meet on these replicas; infinite where some replica gets more than it can serve.

    Args:
        speeds: one per replica, at least one; or, without `shares`, how many replicas there are of each. Equal ones are reckoned
            once.
        workload: what is asked of all of them together.
        shares: of the requests that each replica gets, at random, whatever it has to do already; they sum to 1. None: the router
            sends each to the replica with the most room (`spotserve.router`), so that they get as much as they can take.
    """
    assert speeds, "somebody must serve"
    requests = sample(workload.prompt, workload.output)
    if shares is None:
        alike = [Member(pace(speed, requests), count) for speed, count in Counter(speeds).items()]
        pools = [(1.0, 1.0, sorted(alike, key=lambda member: (member.pace.capacity_rps, member.pace.max_batch)))]
    else:
        assert (
            not isinstance(speeds, Mapping)
            and len(shares) == len(speeds)
            and min(shares) >= 0
            and isclose(sum(shares), 1.0, rel_tol=1e-6)
        ), "shares of the whole"
        apart = Counter(pair for pair in zip(speeds, shares, strict=True) if pair[1] > 0)
        pools = [(share, share * count, [Member(pace(speed, requests), 1)]) for (speed, share), count in apart.items()]
    utilisation = max(share * workload.rate_rps / sum(member.capacity_rps for member in members) for share, _, members in pools)
    if utilisation >= 1:
        return Latency(inf, inf, inf, inf, inf, inf, utilisation)
    met: list[tuple[float, Met]] = []
    for share, weight, members in pools:
        rate_rps = max(share * workload.rate_rps, _IDLE * sum(member.capacity_rps for member in members))
        gap_cv2 = 1 + share * (workload.gap_cv**2 - 1)  # a renewal process, thinned
        met += [(weight, each) for each in meet(members, requests, rate_rps=rate_rps, gap_cv2=gap_cv2)]
    return _summary(met, requests.decoded, utilisation)


def _summary(met: Sequence[tuple[float, Met]], decoded: Floats, utilisation: float) -> Latency:
    weights = np.concatenate([share * each.weights for share, each in met])
    ttft_s = np.concatenate([each.ttft_s for _, each in met])
    decode_s = np.concatenate([each.decode_s for _, each in met])
    tokens = np.tile(decoded, len(met))
    tpot_s = decode_s / np.maximum(tokens, 1.0)
    more = weights * (tokens > 0)
    return Latency(
        ttft_mean_s=sum(share * each.ttft_sum_s for share, each in met),
        ttft_p99_s=quantile(ttft_s, weights, 0.99),
        tpot_mean_s=sum(share * each.tpot_sum_s for share, each in met),
        tpot_p99_s=quantile(tpot_s, more, 0.99) if more.any() else 0.0,
        e2e_mean_s=sum(share * each.e2e_sum_s for share, each in met),
        e2e_p99_s=quantile(ttft_s + decode_s, weights, 0.99),
        utilisation=utilisation,
    )


def capacity_rps(speed: ReplicaSpeed, workload: Workload) -> float:
    """Requests per second that one replica can serve for ever; the rate of the workload is ignored."""
    return pace(speed, sample(workload.prompt, workload.output)).capacity_rps


def max_rate_rps(speed: ReplicaSpeed, workload: Workload, objective: Objective) -> float:
    """The largest rate at which one replica alone keeps every limit, to 1e-4 of its capacity; the rate of the workload is ignored.

    0 when an idle replica is too slow already; the capacity when there is no limit.
    """
    requests = sample(workload.prompt, workload.output)
    member = Member(pace(speed, requests), 1)

    def meets(utilisation: float) -> bool:
        met = meet([member], requests, rate_rps=utilisation * member.capacity_rps, gap_cv2=workload.gap_cv**2)
        return _summary([(1.0, each) for each in met], requests.decoded, utilisation).meets(objective)

    if not objective.is_set:
        return member.capacity_rps
    if not meets(_IDLE):
        return 0.0
    low, high = _IDLE, 1.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low * member.capacity_rps
