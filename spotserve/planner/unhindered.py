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


@dataclass(frozen=True, slots=True)
class Unhindered:
    """One replica under one mix of requests. Made by `of`, which asks about prompts once."""

    speed: ReplicaSpeed
    output_mean: float
    output_p99: float
    context_mean: float
    """Tokens of a request that is half through its output."""
    most: float
    """Requests at once, by B and the KV cache."""
    prompt_s: float
    first_token_p50_s: float
    first_token_p99_s: float

    @classmethod
    def of(cls, speed: ReplicaSpeed, workload: Workload) -> "Unhindered":
        """The rate of the workload does not matter."""
        prompt, output = workload.prompt, workload.output
        return cls(
            speed=speed,
            output_mean=output.mean,
            output_p99=output.quantile(0.99),
            context_mean=prompt.mean + output.mean / 2,
            most=max(1.0, min(float(speed.max_batch), speed.kv_tokens / (prompt.mean + output.mean))),
            prompt_s=speed.prompt_s(prompt.mean),
            first_token_p50_s=speed.first_token_s(prompt.quantile(0.5)),
            first_token_p99_s=speed.first_token_s(prompt.quantile(0.99)),
        )

    def met(self, running: float) -> Met:
        """What requests at the 99th percentile meet while `running` run, each held up by the prompts of those that come.

        Of the end-to-end time the output makes the percentile; the prompt is a median one, since few have both long.
        """
        tpot_s = self._step_s(running) + (running - 1) * self.prompt_s / self.output_mean
        e2e_s = self.first_token_p50_s + max(0.0, self.output_p99 - 1) * tpot_s
        return Met(self.first_token_p99_s, tpot_s, e2e_s)

    def most_running(self, limits: Objective) -> float:
        """How many requests can run at once within B, the KV cache and the limits; 0 when one alone is too slow."""
        if not self.met(1.0).keeps(limits):
            return 0.0
        if self.met(self.most).keeps(limits):
            return self.most
        low, high = 1.0, self.most
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.met(middle).keeps(limits) else (low, middle)
        return low

    def rps(self, limits: Objective) -> float:
        """Requests per second with `most_running` at all times; 0 when one alone is too slow.

        A request keeps the replica busy for its prompt and for its share of every step: prompt_s + output * token_s(n) / n.
        """
        running = self.most_running(limits)
        if running == 0:
            return 0.0
        busy_s = self.prompt_s + self.output_mean * self._step_s(running) / running
        return 1 / busy_s if busy_s > 0 else inf

    def _step_s(self, running: float) -> float:
        """Between two tokens when requests are on average half through their outputs."""
        return self.speed.token_s(running, running * self.context_mean)
