"""What one replica serves within limits while nobody waits for a free place: its value to the programs that fill devices.

Waiting is a matter of the whole fleet, which shares one queue, and that of `queueing`: a replica judged alone would be charged for
bursts that its fleet takes. Values of replicas add up; how much of their sum a fleet reaches is found by judging the fleet.
"""

from dataclasses import dataclass
from math import inf

from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Objective, Workload


@dataclass(frozen=True, slots=True)
class Met:
    """Times at the 99th percentile of the requests, on a replica that nobody waits for."""

    ttft_s: float
    tpot_s: float
    e2e_s: float

    def keeps(self, limits: Objective) -> bool:
        """Whether it is within all limits."""
        return self.missed(limits) is None

    def missed(self, limits: Objective) -> str | None:
        """The first limit that it misses, in words; None: it keeps them all."""
        pairs = (
            ("the first token", self.ttft_s, limits.ttft_s),
            ("each token", self.tpot_s, limits.tpot_s),
            ("the answer", self.e2e_s, limits.e2e_s),
        )
        return next(
            (
                f"{name} takes {took:.3g} s, the limit is {limit:.3g} s"
                for name, took, limit in pairs
                if limit is not None and took > limit
            ),
            None,
        )


def met_by_most(speed: ReplicaSpeed, workload: Workload, running: float) -> Met:
    """What requests at the 99th percentile meet while `running` run, each held up by the prompts of those that come.

    Of the end-to-end time the output makes the percentile; the prompt is a median one, since few have both long.
    """
    stall_s = (running - 1) * speed.prompt_s(workload.prompt.mean) / workload.output.mean
    tpot_s = _step_s(speed, workload, running) + stall_s
    e2e_s = speed.first_token_s(workload.prompt.quantile(0.5)) + max(0.0, workload.output.quantile(0.99) - 1) * tpot_s
    return Met(speed.first_token_s(workload.prompt.quantile(0.99)), tpot_s, e2e_s)


def most_running(speed: ReplicaSpeed, workload: Workload, limits: Objective) -> float:
    """How many requests can run at once within B, the KV cache and the limits; 0 when one alone is too slow."""
    if not met_by_most(speed, workload, 1.0).keeps(limits):
        return 0.0
    most = max(1.0, min(float(speed.max_batch), speed.kv_tokens / (workload.prompt.mean + workload.output.mean)))
    if met_by_most(speed, workload, most).keeps(limits):
        return most
    low, high = 1.0, most
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if met_by_most(speed, workload, middle).keeps(limits) else (low, middle)
    return low


def unhindered_rps(speed: ReplicaSpeed, workload: Workload, limits: Objective) -> float:
    """Requests per second with `most_running` at all times; 0 when one alone is too slow.

    A request keeps the replica busy for its prompt and for its share of every step: prompt_s + output * token_s(n) / n.
    """
    running = most_running(speed, workload, limits)
    if running == 0:
        return 0.0
    shared_s = workload.output.mean * _step_s(speed, workload, running) / running
    busy_s = speed.prompt_s(workload.prompt.mean) + shared_s
    return 1 / busy_s if busy_s > 0 else inf


def _step_s(speed: ReplicaSpeed, workload: Workload, running: float) -> float:
    """Between two tokens when requests are on average half through their outputs."""
    return speed.token_s(running, running * (workload.prompt.mean + workload.output.mean / 2))
