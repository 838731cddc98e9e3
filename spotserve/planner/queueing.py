"""A stand-in with the signatures of queueing: waiting as in a single queue, the slowest replica for the fleet's tail."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Latency, Objective, Workload


def latency(speeds: Sequence[ReplicaSpeed], workload: Workload, *, shares: Sequence[float] | None = None) -> Latency:
    """What requests meet when `shares` of them go to each replica (None: as capacities are)."""
    capacities = [capacity_rps(speed, workload) for speed in speeds]
    split = [each / sum(capacities) for each in capacities] if shares is None else list(shares)
    every = [
        (share, _one(speed, replace(workload, rate_rps=workload.rate_rps * share)))
        for speed, share in zip(speeds, split, strict=True)
        if share > 0
    ]
    if not every:
        return Latency(inf, inf, inf, inf, inf, inf, inf)
    return Latency(
        *(
            sum(share * getattr(one, name) for share, one in every)
            if name.endswith("mean_s")
            else max(getattr(one, name) for _, one in every)
            for name in Latency.__dataclass_fields__
        )
    )


def _running(speed: ReplicaSpeed, workload: Workload) -> float:
    return max(1.0, min(speed.max_batch, speed.kv_tokens / (workload.prompt.mean + workload.output.mean)))


def capacity_rps(speed: ReplicaSpeed, workload: Workload) -> float:
    """Requests per second that one replica serves for ever."""
    running, context = _running(speed, workload), workload.prompt.mean + workload.output.mean / 2
    step_s = speed.token_s(running, running * context)
    return 1 / (speed.prompt_s(workload.prompt.mean) + workload.output.mean * step_s / running)


def _one(speed: ReplicaSpeed, workload: Workload) -> Latency:
    utilisation = workload.rate_rps / capacity_rps(speed, workload)
    if utilisation >= 1:
        return Latency(inf, inf, inf, inf, inf, inf, utilisation)
    running, context = max(1.0, utilisation * _running(speed, workload)), workload.prompt.mean + workload.output.mean / 2
    token_s = speed.token_s(running, running * context) / (1 - utilisation * 0.3)
    wait_s = utilisation / (1 - utilisation) * (1 + workload.gap_cv**2) / 2 / capacity_rps(speed, workload)
    first_s, long = speed.first_token_s(workload.prompt.mean), workload.output.quantile(0.99) - 1
    tail_s = wait_s * 4.6 + speed.first_token_s(workload.prompt.quantile(0.99))
    means = (wait_s + first_s, token_s, wait_s + first_s + (workload.output.mean - 1) * token_s)
    return Latency(means[0], tail_s, means[1], token_s * 1.1, means[2], tail_s + long * token_s * 1.1, utilisation)


def max_rate_rps(speed: ReplicaSpeed, workload: Workload, objective: Objective) -> float:
    """The largest rate at which one replica keeps the limits; 0 when it cannot at any."""
    low, high = 0.0, capacity_rps(speed, workload)
    if not _one(speed, replace(workload, rate_rps=0.0)).meets(objective):
        return 0.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _one(speed, replace(workload, rate_rps=middle)).meets(objective) else (low, middle)
    return low
