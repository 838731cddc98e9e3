"""Simulated waits against queueing theory, within 1 %: M/D/1 (Pollaczek-Khinchine), M/M/c (Erlang C), saturation, Little's law."""

import heapq
from dataclasses import dataclass
from itertools import pairwise
from math import factorial
from random import Random

import pytest

from spotserve.core.plan import Parallel
from spotserve.planner.cost import replica_cost
from spotserve.planner.devices import instance_type
from spotserve.planner.models import named_model
from spotserve.planner.queueing import capacity_rps
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Lengths, Workload
from spotserve.replay.batching import Batch
from spotserve.replay.call import Call
from spotserve.replay.outcome import Gaps
from spotserve.replay.token_times import TokenTimes


@dataclass(frozen=True)
class Flat:
    """A replica whose tokens take a constant time, however many sequences run."""

    max_batch: int
    token: float = 0.01
    prompt: float = 0.0
    kv_tokens: int = 10**9

    def token_s(self, sequences: float, context_tokens: float) -> float:
        return self.token

    def prompt_s(self, tokens: float) -> float:
        return self.prompt

    def first_token_s(self, tokens: float) -> float:
        return self.prompt


def played(speed: ReplicaSpeed, calls: list[Call], *, step_tokens: int = 2048) -> list[Call]:
    batch = Batch(TokenTimes(speed), Gaps(), now_s=0.0, step_tokens=step_tokens)
    done: list[Call] = []
    for call in calls:
        done += batch.advance(call.arrival_s)
        batch.add(call, call.arrival_s)
    while len(done) < len(calls):
        done += batch.advance(batch.next_s)
    return done


def poisson(rate_rps: float, count: int, seed: int) -> list[float]:
    """Arrivals whose mean rate is exactly this one, so that chance does not change the load."""
    random = Random(seed)
    times, now_s = [], 0.0
    for _ in range(count):
        now_s += random.expovariate(1.0)
        times.append(now_s)
    scale = count / rate_rps / now_s
    return [at_s * scale for at_s in times]


def test_one_server_waits_as_lindley_says_and_on_average_as_m_d_1() -> None:
    """Wait of M/D/1 = rho * service / (2 * (1 - rho))."""
    service_s, load = 0.8, 0.6
    arrivals = poisson(load / service_s, 120_000, seed=3)
    calls = played(
        Flat(max_batch=1, prompt=service_s), [Call(index, at_s, 1, 1) for index, at_s in enumerate(arrivals)], step_tokens=1
    )
    waits = [call.first_token_s - call.arrival_s - service_s for call in calls]
    expected = [0.0]
    for before, after in pairwise(arrivals):
        expected.append(max(0.0, expected[-1] + service_s - (after - before)))
    assert max(abs(a - b) for a, b in zip(waits, expected, strict=True)) < 1e-6
    assert sum(waits) / len(waits) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.01)


def test_several_servers_wait_as_erlang_c_says() -> None:
    """Wait of M/M/c = C(c, a) / (c * mu - lambda); a call has a slot for an exponential number of short steps. Call by call against
    the recursion of Kiefer and Wolfowitz, and on average over several runs against the formula."""
    servers, load, token_s, mean_tokens = 4, 0.7, 0.002, 600.0
    mu = 1 / (mean_tokens * token_s)
    means = []
    for seed in range(5, 9):
        random = Random(seed)
        outputs = [random.expovariate(1.0) for _ in range(50_000)]
        scale = mean_tokens * len(outputs) / sum(outputs)
        tokens = [1 + max(1, round(output * scale)) for output in outputs]
        arrivals = poisson(load * servers * mu, len(outputs), seed + 100)
        calls = [Call(index, at_s, 1, count) for index, (at_s, count) in enumerate(zip(arrivals, tokens, strict=True))]
        done = sorted(played(Flat(max_batch=servers, token=token_s), calls), key=lambda call: call.index)
        waits = [call.last_token_s - call.arrival_s - (call.output_tokens - 1) * token_s for call in done]
        free_s, expected = [0.0] * servers, []
        for at_s, count in zip(arrivals, tokens, strict=True):
            begun_s = max(at_s, heapq.heappop(free_s))
            heapq.heappush(free_s, begun_s + (count - 1) * token_s)
            expected.append(begun_s - at_s)
        assert sum(waits) / len(waits) - token_s / 2 == pytest.approx(sum(expected) / len(expected), rel=0.01)
        means.append(sum(expected) / len(expected))
    offered = load * servers
    last = offered**servers / factorial(servers) / (1 - load)
    erlang_c = last / (sum(offered**k / factorial(k) for k in range(servers)) + last)
    assert sum(means) / len(means) == pytest.approx(erlang_c / (servers * mu * (1 - load)), rel=0.01)


@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_a_saturated_pipeline_gives_a_token_per_sequence_and_round(sequences: int) -> None:
    speed = replica_cost(
        named_model("llama-3-8b"), Parallel(pipeline=2, tensor=2, max_batch=sequences), instance_type("g5.12xlarge")
    )
    assert not isinstance(speed, str)
    done = played(speed, [Call(index, 0.0, 16, 4000) for index in range(sequences)])
    ends_s = max(call.last_token_s for call in done)
    tokens = 3999
    mean_s = sum(speed.token_s(sequences, sequences * (17 + number)) for number in range(tokens)) / tokens
    assert ends_s == pytest.approx(tokens * mean_s, rel=0.01)


def test_a_saturated_replica_serves_what_the_planner_says() -> None:
    speed = replica_cost(named_model("llama-3-8b"), Parallel(pipeline=1, tensor=4, max_batch=16), instance_type("g5.12xlarge"))
    assert not isinstance(speed, str)
    workload = Workload(1.0, Lengths.fixed(300), Lengths.fixed(100))
    done = played(speed, [Call(index, 0.0, 300, 100) for index in range(1200)])
    assert len(done) / max(call.last_token_s for call in done) == pytest.approx(capacity_rps(speed, workload), rel=0.02)


def test_littles_law() -> None:
    """Mean number under way = rate x mean time under way, both counted on their own."""
    speed = replica_cost(named_model("llama-3-8b"), Parallel(pipeline=1, tensor=4, max_batch=32), instance_type("g5.12xlarge"))
    assert not isinstance(speed, str)
    arrivals = poisson(2.0, 3000, seed=2)
    done = played(speed, [Call(index, at_s, 200, 80) for index, at_s in enumerate(arrivals)])
    changes = sorted([(call.arrival_s, 1) for call in done] + [(call.last_token_s, -1) for call in done])
    area, count = 0.0, 0
    for (at_s, change), (after_s, _) in pairwise(changes):
        count += change
        area += count * (after_s - at_s)
    assert area == pytest.approx(sum(call.last_token_s - call.arrival_s for call in done), rel=1e-9)
