"""The model of continuous batching against closed forms, against what must hold, and against its iteration-by-iteration twin."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import factorial, inf, log
from random import Random

import numpy as np
import pytest
from batching_twin import arrivals, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.planner.queueing import capacity_rps, latency, max_rate_rps
from spotserve.planner.workload import Latency, Lengths, Objective, Workload


@dataclass(frozen=True)
class Roofline:
    """A replica whose iterations take the longer of two times."""

    max_batch: int = 32
    kv_tokens: int = 10**9
    weights_s: float = 0.02
    sequence_s: float = 0.0
    context_s: float = 0.0
    prompt_token_s: float = 0.0
    stages: int = 1

    def token_s(self, sequences: float, context_tokens: float) -> float:
        return max(self.weights_s, sequences * self.sequence_s) + context_tokens * self.context_s

    def prompt_s(self, tokens: float) -> float:
        return tokens * self.prompt_token_s

    def first_token_s(self, tokens: float) -> float:
        return self.stages * self.prompt_s(tokens)


WEIGHTS_BOUND = Roofline(64, 400_000, 0.02, 0.3e-3, 4e-8, 8e-5)
COMPUTE_BOUND = Roofline(64, 400_000, 0.004, 0.8e-3, 4e-8, 8e-5)
SMALL_BATCH = Roofline(4, 400_000, 0.02, 0.3e-3, 4e-8, 8e-5)

EXPONENTIAL = Lengths(
    tuple((1 - 2.0**-power if power < 20 else 1.0, 1 + 500 * power * log(2)) for power in np.arange(0, 20.1, 0.25))
)
"""A token, and exponentially many with a mean of 500; cut off where one request in a million would be."""
FIXED = Workload(1.0, Lengths.fixed(512), Lengths.fixed(201))
VARIED = Workload(
    1.0,
    Lengths(((0.0, 30.0), (0.25, 300.0), (0.5, 800.0), (0.9, 2600.0), (1.0, 4200.0))),
    Lengths(((0.0, 2.0), (0.25, 60.0), (0.5, 130.0), (0.9, 450.0), (1.0, 1000.0))),
)


def at_load(load: float, workload: Workload, *speeds: Roofline) -> Workload:
    return replace(workload, rate_rps=load * sum(capacity_rps(speed, workload) for speed in speeds))


def seconds(met: Latency) -> np.ndarray:
    return np.array([met.ttft_mean_s, met.ttft_p99_s, met.tpot_mean_s, met.tpot_p99_s, met.e2e_mean_s, met.e2e_p99_s])


# --------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("load", [0.05, 0.3, 0.6, 0.9, 0.98])
def test_one_slot_and_fixed_work_wait_as_pollaczek_and_khinchine_say(load: float) -> None:
    speed = Roofline(max_batch=1, prompt_token_s=1e-3)
    work_s = 0.512 + 200 * 0.02
    met = latency([speed], at_load(load, FIXED, speed))
    wait_s = load * work_s / (2 * (1 - load))
    assert met.e2e_mean_s == pytest.approx(wait_s + work_s, rel=1e-9)
    assert met.ttft_mean_s == pytest.approx(wait_s + 0.512, rel=1e-9)
    assert (met.tpot_mean_s, met.tpot_p99_s) == pytest.approx((0.02, 0.02), rel=1e-9)


@pytest.mark.parametrize("load", [0.05, 0.5, 0.9])
def test_one_slot_and_work_of_any_length_wait_as_pollaczek_and_khinchine_say(load: float) -> None:
    speed = Roofline(max_batch=1)
    workload = at_load(load, replace(VARIED, prompt=Lengths.fixed(1)), speed)
    mean_s, square = 0.02 * (VARIED.output.mean - 1), 4e-4 * (VARIED.output.mean_square - 2 * VARIED.output.mean + 1)
    wait_s = workload.rate_rps * square / (2 * (1 - load))
    assert latency([speed], workload).ttft_mean_s == pytest.approx(wait_s, rel=1e-3)
    assert latency([speed], workload).e2e_mean_s == pytest.approx(wait_s + mean_s, rel=1e-3)


@pytest.mark.parametrize("servers", [1, 2, 10, 100])
@pytest.mark.parametrize("load", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("replicas", [1, 2])
def test_slots_that_do_not_disturb_each_other_are_servers(servers: int, load: float, replicas: int) -> None:
    """M/M/c: Erlang's formula; what is left over is half an iteration of a thousand (and, with a slot free, its wait)."""
    if servers % replicas:
        return
    speed = Roofline(max_batch=servers // replicas)
    workload = at_load(load, Workload(1.0, Lengths.fixed(1), EXPONENTIAL), *[speed] * replicas)
    offered = servers * load
    blocked = offered**servers / factorial(servers) / (1 - load)
    waits = blocked / (blocked + sum(offered**n / factorial(n) for n in range(servers)))
    work_s = 500 * 0.02
    wait_s = waits * work_s / (servers * (1 - load))
    met = latency([speed] * replicas, workload)
    assert met.ttft_mean_s == pytest.approx(wait_s, rel=0.01, abs=0.011)
    assert met.e2e_mean_s == pytest.approx(wait_s + work_s, rel=0.01)


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("output", [Lengths.fixed(501), EXPONENTIAL])
def test_an_iteration_that_grows_with_its_sequences_is_shared_like_a_processor(load: float, output: Lengths) -> None:
    """M/G/1 processor sharing: work / (1 - load) on average, whatever the lengths."""
    speed = Roofline(max_batch=400, weights_s=0.0, sequence_s=1e-3)
    met = latency([speed], at_load(load, Workload(1.0, Lengths.fixed(1), output), speed))
    assert met.e2e_mean_s == pytest.approx(0.5 / (1 - load), rel=0.01)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("gap_cv", [0.05, 0.5, 2.0, 4.0, 6.0])
def test_bursts_queue_as_the_exact_solution_has_it(load: float, gap_cv: float) -> None:
    """Gamma gaps, one exponential server: the mean wait is s / (1 - s) services, s = E[exp(-(1 - s) gap / service)]."""
    speed = Roofline(max_batch=1)
    workload = at_load(load, Workload(1.0, Lengths.fixed(1), EXPONENTIAL, gap_cv), speed)
    shape = 1 / gap_cv**2
    root = 0.0
    for _ in range(20_000):
        root = (1 + (1 - root) / (load * shape)) ** -shape
    assert latency([speed], workload).ttft_mean_s == pytest.approx(10 * root / (1 - root), rel=0.1, abs=0.1)


# --------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("gap_cv", [0.0, 1.0, 5.0])
def test_an_idle_replica_takes_what_its_parts_take(gap_cv: float) -> None:
    speed = Roofline(prompt_token_s=1e-3, stages=3)
    met = latency([speed], replace(FIXED, rate_rps=0.0, gap_cv=gap_cv))
    assert seconds(met) == pytest.approx([1.536, 1.536, 0.02, 0.02, 5.536, 5.536], rel=1e-5)
    assert met.utilisation == 0


def test_an_idle_replica_has_the_percentiles_of_its_lengths() -> None:
    met = latency([WEIGHTS_BOUND], replace(VARIED, rate_rps=0.0))
    longest_s = (VARIED.output.quantile(0.99) - 1) * WEIGHTS_BOUND.token_s(1, 2000)
    assert met.ttft_p99_s == pytest.approx(WEIGHTS_BOUND.prompt_s(VARIED.prompt.quantile(0.99)), rel=0.01)
    assert met.e2e_p99_s == pytest.approx(longest_s, rel=0.03)


@pytest.mark.parametrize("speed", [WEIGHTS_BOUND, COMPUTE_BOUND, SMALL_BATCH, replace(WEIGHTS_BOUND, kv_tokens=30_000)])
def test_capacity_is_where_latency_ceases_to_be_finite(speed: Roofline) -> None:
    below, above = (latency([speed], at_load(load, VARIED, speed)) for load in (0.999, 1.001))
    assert np.isfinite(seconds(below)).all()
    assert (seconds(above) == inf).all()
    assert (below.utilisation, above.utilisation) == pytest.approx((0.999, 1.001))
    assert not above.meets(Objective())


def test_capacity_is_that_of_slots_that_are_always_taken() -> None:
    speed = Roofline(max_batch=10, weights_s=0.02, prompt_token_s=1e-4)
    assert capacity_rps(speed, FIXED) == pytest.approx(10 / (200 * 0.02 + 10 * 0.0512))
    short = replace(speed, kv_tokens=512 + 5 * (512 + 1 + 200 // 2))
    prompts = 1 + 0.6 * 200 / 512  # some are computed again
    assert capacity_rps(short, FIXED) == pytest.approx(5 / (200 * 0.02 + 5 * 0.0512 * prompts), rel=1e-4)


def test_capacity_is_what_an_overloaded_twin_finishes_when_memory_is_short() -> None:
    for speed, workload in ((replace(WEIGHTS_BOUND, kv_tokens=16_000), FIXED), (replace(WEIGHTS_BOUND, kv_tokens=60_000), VARIED)):
        calls = arrivals(at_load(2.0, workload, speed), 1500, Random(4))
        ends_s = sorted(call.end_s for call in simulate([speed], calls))
        seen_rps = 600 / (ends_s[999] - ends_s[399])
        assert capacity_rps(speed, workload) == pytest.approx(seen_rps, rel=0.1)


speeds_drawn = st.builds(
    Roofline,
    st.sampled_from([1, 2, 7, 48]),
    st.sampled_from([8_000, 10**6]),
    st.sampled_from([0.004, 0.03]),
    st.sampled_from([0.0, 1e-3]),
    st.sampled_from([0.0, 1e-7]),
    st.sampled_from([0.0, 2e-5, 2e-4]),
    st.sampled_from([1, 4]),
)
workloads_drawn = st.builds(replace, st.sampled_from([FIXED, VARIED]), gap_cv=st.sampled_from([0.05, 1.0, 3.0]))


@settings(max_examples=60, deadline=None)
@given(speeds_drawn, workloads_drawn, st.sampled_from([1, 2, 8]), st.floats(0.05, 0.9), st.floats(1.02, 1.1))
def test_latency_grows_with_the_rate(speed: Roofline, workload: Workload, replicas: int, load: float, more: float) -> None:
    """All but the time between tokens: when all slots are taken, prompts come one by one and no longer in batches.

    An iteration can be saved: who has waited for a slot starts at its end.
    """
    workload = at_load(load, workload, *[speed] * replicas)
    low, high = (
        seconds(latency([speed] * replicas, each)) for each in (workload, replace(workload, rate_rps=more * workload.rate_rps))
    )
    assert (high >= low * (1 - 5e-3) - speed.weights_s)[[0, 1, 4, 5]].all(), (low, high)


@settings(max_examples=40, deadline=None)
@given(speeds_drawn, workloads_drawn, st.sampled_from([1, 2, 5]), st.floats(0.02, 0.95))
def test_more_replicas_and_faster_ones_are_better(speed: Roofline, workload: Workload, replicas: int, load: float) -> None:
    workload = at_load(load, workload, *[speed] * replicas)
    alone = seconds(latency([speed] * replicas, workload))
    faster = replace(
        speed, **{name: 0.8 * getattr(speed, name) for name in ("weights_s", "sequence_s", "context_s", "prompt_token_s")}
    )
    boundary_s = speed.token_s(
        speed.max_batch, 1e5
    )  # who waits for a slot does not wait for an iteration: at most that can be lost
    assert (seconds(latency([faster] * replicas, workload)) <= alone + boundary_s)[[0, 1, 4, 5]].all()
    assert (seconds(latency([speed] * (replicas + 1), workload)) <= alone * 1.005 + boundary_s)[[0, 1, 4, 5]].all()


@settings(max_examples=40, deadline=None)
@given(speeds_drawn, speeds_drawn, workloads_drawn, st.floats(0.02, 0.95))
def test_order_does_not_matter_and_percentiles_exceed_medians(a: Roofline, b: Roofline, workload: Workload, load: float) -> None:
    workload = at_load(load, workload, a, b)
    met = latency([a, b], workload)
    assert seconds(met) == pytest.approx(seconds(latency([b, a], workload)), rel=1e-6)
    assert np.isfinite(seconds(met)).all() and (seconds(met) >= 0).all()
    assert met.e2e_mean_s >= met.ttft_mean_s


@settings(max_examples=25, deadline=None)
@given(speeds_drawn, workloads_drawn, st.floats(0.05, 0.95), st.sampled_from(["ttft_s", "tpot_s", "e2e_s"]))
def test_the_largest_rate_is_the_boundary(speed: Roofline, workload: Workload, load: float, limit: str) -> None:
    reached = latency([speed], at_load(load, workload, speed))
    objective = Objective(**{limit: 1.001 * getattr(reached, limit.replace("_s", "_p99_s"))})
    rate_rps = max_rate_rps(speed, workload, objective)
    capacity = capacity_rps(speed, workload)
    assert latency([speed], replace(workload, rate_rps=rate_rps)).meets(objective)
    above = latency([speed], replace(workload, rate_rps=rate_rps + 2e-4 * capacity))
    assert not above.meets(objective)
    assert rate_rps >= (load - 2e-4) * capacity or limit != "e2e_s"


def test_the_largest_rate_without_limits_is_the_capacity_and_of_one_too_slow_none() -> None:
    assert max_rate_rps(SMALL_BATCH, VARIED, Objective()) == capacity_rps(SMALL_BATCH, VARIED)
    assert max_rate_rps(SMALL_BATCH, VARIED, Objective(tpot_s=0.019)) == 0.0


def test_shares_are_of_the_whole_and_apart() -> None:
    workload = at_load(0.5, VARIED, SMALL_BATCH, SMALL_BATCH)
    apart = latency([SMALL_BATCH] * 2, workload, shares=[0.5, 0.5])
    alone = latency([SMALL_BATCH], replace(workload, rate_rps=workload.rate_rps / 2))
    assert seconds(apart) == pytest.approx(seconds(alone), rel=1e-9)
    assert seconds(latency([SMALL_BATCH] * 2, workload))[0] < 0.8 * seconds(apart)[0], "a router that looks is better than chance"
    assert latency([SMALL_BATCH] * 2, workload, shares=[1.0, 0.0]).utilisation == pytest.approx(1.0)
    assert latency([SMALL_BATCH] * 2, workload, shares=[0.9, 0.1]).utilisation == pytest.approx(0.9)
    for wrong in ([0.5, 0.4], [1.0], [1.5, -0.5]):
        with pytest.raises(AssertionError):
            latency([SMALL_BATCH] * 2, workload, shares=wrong)


def test_answers_of_one_token_have_no_time_between_tokens() -> None:
    workload = Workload(1.0, Lengths.fixed(500), Lengths.fixed(1))
    speed = Roofline(prompt_token_s=1e-3)
    met = latency([speed], workload_at := at_load(0.5, workload, speed))
    assert (met.tpot_mean_s, met.tpot_p99_s) == (0, 0)
    assert met.ttft_mean_s == met.e2e_mean_s == pytest.approx(0.5 + workload_at.rate_rps * 0.25 / (2 * 0.5), rel=0.05)


# --------------------------------------------------------------------------- the twin


TWINS = {
    "weights-bound": ([WEIGHTS_BOUND], VARIED, 0.6, 1.0, 4000, 0.1, 0.25),
    "compute-bound": ([COMPUTE_BOUND], FIXED, 0.7, 1.0, 8000, 0.1, 0.25),
    "few slots": ([SMALL_BATCH], VARIED, 0.5, 1.0, 8000, 0.1, 0.25),
    "little memory": ([replace(WEIGHTS_BOUND, kv_tokens=16_000)], FIXED, 0.8, 1.0, 10000, 0.2, 0.3),
    "four replicas": ([COMPUTE_BOUND] * 4, VARIED, 0.7, 1.0, 6000, 0.1, 0.25),
    "unlike replicas": ([WEIGHTS_BOUND, SMALL_BATCH, COMPUTE_BOUND], VARIED, 0.6, 1.0, 6000, 0.1, 0.25),
    "near periodic": ([WEIGHTS_BOUND], VARIED, 0.8, 0.05, 2000, 0.15, 0.25),
    "bursts": ([WEIGHTS_BOUND], FIXED, 0.6, 3.0, 8000, 0.15, 0.4),
    "pipeline": ([replace(WEIGHTS_BOUND, stages=4)], VARIED, 0.5, 1.0, 3000, 0.1, 0.35),
}
"""Replicas, lengths, load, variation of gaps, requests; by how much the means and the 99th percentiles may differ."""


@pytest.mark.parametrize("name", TWINS)
def test_the_twin_meets_what_the_model_says(name: str) -> None:
    speeds, workload, load, gap_cv, count, off_mean, off_p99 = TWINS[name]
    workload = replace(at_load(load, workload, *speeds), gap_cv=gap_cv)
    calls = simulate(speeds, arrivals(workload, count, Random(1)))[count // 10 :]
    seen = []
    for values in (
        [call.ttft_s for call in calls],
        [call.tpot_s for call in calls if call.output > 1],
        [call.e2e_s for call in calls],
    ):
        seen += [np.mean(values), np.quantile(values, 0.99)]
    modelled = seconds(latency(speeds, workload))
    assert modelled[0::2] == pytest.approx(seen[0::2], rel=off_mean)
    assert modelled[1::2] == pytest.approx(seen[1::2], rel=off_p99)


def test_the_twin_serves_each_alone_as_its_parts_say() -> None:
    speed = Roofline(prompt_token_s=1e-3, stages=2)
    calls = arrivals(replace(FIXED, rate_rps=0.01, gap_cv=0.0), 5, Random(0))
    for call in simulate([speed, speed], calls):
        assert (call.ttft_s, call.e2e_s, call.tpot_s) == pytest.approx((1.024, 1.024 + 4.0, 0.02))


def test_the_twin_holds_little_law_and_so_does_the_model() -> None:
    """Sequences in the system on average are the rate times the time that each spends in it."""
    workload = at_load(0.6, VARIED, COMPUTE_BOUND)
    calls = simulate([COMPUTE_BOUND], arrivals(workload, 6000, Random(2)))
    events = sorted([(call.arrival_s, 1) for call in calls] + [(call.end_s, -1) for call in calls])
    area_s = present = 0.0
    for (at_s, change), (next_s, _) in pairwise(events):
        present += change
        area_s += present * (next_s - at_s)
    seen = area_s / (events[-1][0] - events[0][0])
    assert workload.rate_rps * latency([COMPUTE_BOUND], workload).e2e_mean_s == pytest.approx(seen, rel=0.1)


def test_the_twin_evicts_when_memory_is_short_and_loses_nothing() -> None:
    speed = replace(WEIGHTS_BOUND, kv_tokens=5_000)
    calls = simulate([speed], arrivals(at_load(0.9, VARIED, speed), 300, Random(3)))
    assert any(call.decoded for call in calls), "somebody was evicted"
    assert all(call.arrival_s < call.first_token_s <= call.end_s < inf for call in calls)
    assert [call for call in calls if call.output > 1 and call.end_s - call.first_token_s < (call.output - 1) * 0.0199] == []
