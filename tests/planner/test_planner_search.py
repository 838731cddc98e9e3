"""The search: small fleets against trying everything, large ones against what must hold of any answer."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_specs import small_spec
from planner_speeds import RooflineSpeed, machine, roofline

from spotserve.core.hardware import InstanceType
from spotserve.core.model import Portion
from spotserve.core.plan import Parallel
from spotserve.planner.queueing import latency
from spotserve.planner.ranking import NEAR
from spotserve.planner.search import Candidate, Choice, Pool, search
from spotserve.planner.shapes import SpeedOf
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Latency, Lengths, Objective, Workload

PROMPT, OUTPUT = Lengths(((0.0, 100.0), (0.5, 400.0), (1.0, 2000.0))), Lengths(((0.0, 10.0), (0.5, 200.0), (1.0, 600.0)))
SMALL = machine("small.2", num_devices=2)
LARGE = machine("large.3", num_devices=3, speed=2.0)

LLAMA_70B = small_spec(
    name="llama-2-70b",
    num_layers=80,
    hidden_size=8192,
    num_heads=64,
    num_kv_heads=8,
    head_size=128,
    layer=(Portion(8, 2 * 855_638_016),),
    embedding=(Portion(32_000, 2 * 8192 * 32_000),),
    head=(Portion(32_000, 2 * 8192 * 32_000),),
    value_bytes=2,
    layer_flops_per_token=2 * 855_638_016,
    head_flops_per_token=2 * 8192 * 32_000,
)
G4DN, G5 = machine("g4dn.12xlarge"), machine("g5.12xlarge", speed=2.0, memory_bytes=24_000_000_000)


def workload(rate_rps: float) -> Workload:
    return Workload(rate_rps, PROMPT, OUTPUT)


def big(parallel: Parallel, kind: InstanceType) -> ReplicaSpeed | str:
    return roofline(LLAMA_70B, parallel, kind)


@dataclass(frozen=True)
class FewShapes:
    """A speed model that knows three shapes; all others it refuses."""

    known: tuple[tuple[Parallel, str, RooflineSpeed], ...]

    def __call__(self, parallel: Parallel, kind: InstanceType) -> ReplicaSpeed | str:
        found = (speed for known, name, speed in self.known if (known, name) == (parallel, kind.name))
        return next(found, "not one of the three")


@st.composite
def few_shapes(draw: st.DrawFn) -> FewShapes:
    cuts = draw(st.lists(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)]), min_size=1, max_size=3, unique=True))
    known = []
    for pipeline, tensor in cuts:
        kind = SMALL if tensor == 2 else LARGE if tensor == 3 else draw(st.sampled_from([SMALL, LARGE]))
        parallel = Parallel(pipeline=pipeline, tensor=tensor, max_batch=2 ** draw(st.integers(0, 5)))
        speed = RooflineSpeed(
            max_batch=parallel.max_batch,
            kv_tokens=100_000,
            weights_s=draw(st.sampled_from([0.01, 0.02, 0.03])) / tensor,
            sequence_s=draw(st.sampled_from([1e-4, 1e-3])),
            context_s=1e-8,
            prompt_token_s=draw(st.sampled_from([1e-5, 1e-4])),
            stages=pipeline,
            hop_s=1e-4,
        )
        known.append((parallel, kind.name, speed))
    return FewShapes(tuple(known))


pools_of_two = st.builds(
    lambda small, large, usd: [Pool(SMALL, small, usd), Pool(LARGE, large, 2.0)],
    st.integers(0, 6),
    st.integers(0, 6),
    st.sampled_from([0.5, 1.0, 3.0]),
)
objectives = st.sampled_from([Objective(), Objective(tpot_s=0.04), Objective(tpot_s=0.02, ttft_s=2.0), Objective(e2e_s=15.0)])


@dataclass(frozen=True)
class Tried:
    met: Latency
    usd_per_hour: float
    machines: int
    speeds: tuple[ReplicaSpeed, ...]


def everything(speed_of: FewShapes, pools: Sequence[Pool], wanted: Workload) -> Iterator[Tried]:
    """Every multiset of known shapes that fits the pools, with what it costs and what requests meet."""
    kinds = [
        (index, parallel, speed)
        for index, pool in enumerate(pools)
        for parallel, name, speed in speed_of.known
        if name == pool.instance_type.name
    ]
    for counts in itertools.product(range(7), repeat=len(kinds)):
        used = Counter[int]()
        for count, (pool, parallel, _) in zip(counts, kinds, strict=True):
            used[pool] += count * parallel.num_slots
        if not any(counts) or any(used[index] > pool.num_devices for index, pool in enumerate(pools)):
            continue
        machines = [ceil(used[index] / pool.instance_type.num_devices) for index, pool in enumerate(pools)]
        speeds = tuple(speed for count, (_, _, speed) in zip(counts, kinds, strict=True) for _ in range(count))
        usd = sum(count * pool.usd_per_hour for count, pool in zip(machines, pools, strict=True))
        yield Tried(latency(speeds, wanted), usd, sum(machines), speeds)


def most_rps(tried: Sequence[Tried], wanted: Workload, objective: Objective) -> float:
    """The largest rate at which any of them keeps the limits, to 1 %; 0 when it is below a thousandth."""
    best = 0.0
    for one in tried:
        low, high = max(1e-3, 1.005 * best), 1000.0

        def keeps(rate: float, speeds: Sequence[ReplicaSpeed] = one.speeds) -> bool:
            return latency(speeds, Workload(rate, wanted.prompt, wanted.output)).meets(objective)

        if keeps(low):
            while high - low > 0.005 * high:
                middle = (low * high) ** 0.5
                low, high = (middle, high) if keeps(middle) else (low, middle)
            best = low
    return best


def assert_is_best(found: Candidate, tried: Sequence[Tried], wanted: Workload, objective: Objective) -> None:
    """The stated objective, word for word."""
    meeting = [one for one in tried if one.met.meets(objective)]
    if objective.is_set and meeting:
        assert found.meets
        assert (found.usd_per_hour, found.num_instances) == min((one.usd_per_hour, one.machines) for one in meeting)
        return
    if objective.is_set:
        best_rps = most_rps(tried, wanted, objective)
        if best_rps > 0:
            assert not found.meets
            assert found.goodput_rps >= 0.98 * best_rps
            return
    fastest_s = min(one.met.e2e_p99_s for one in tried)
    if fastest_s < inf:
        near = [one for one in tried if one.met.e2e_p99_s <= NEAR * fastest_s]
        assert found.latency.e2e_p99_s <= NEAR * fastest_s
        assert (found.usd_per_hour, found.num_instances) == min((one.usd_per_hour, one.machines) for one in near)
        return
    assert found.throughput_rps >= 0.99 * most_rps(tried, wanted, Objective())


@settings(max_examples=40, deadline=None)
@given(few_shapes(), pools_of_two, st.sampled_from([0.1, 1.0, 5.0, 40.0]), objectives)
def test_a_small_search_finds_what_trying_everything_finds(
    speed_of: FewShapes, pools: list[Pool], rate_rps: float, objective: Objective
) -> None:
    wanted = workload(rate_rps)
    found = search(None, pools, wanted, objective, speed_of=speed_of, max_batch=32, most_judged=10_000)
    tried = list(everything(speed_of, pools, wanted))
    assert bool(found.candidates) == bool(tried)
    if tried:
        assert_is_best(found.candidates[0], tried, wanted, objective)


@settings(max_examples=15, deadline=None, derandomize=True)  # near is a fact of these, not a theorem
@given(few_shapes(), pools_of_two, st.sampled_from([0.1, 1.0, 5.0, 40.0]), objectives)
def test_the_programs_alone_stay_near_what_trying_everything_finds(
    speed_of: FewShapes, pools: list[Pool], rate_rps: float, objective: Objective
) -> None:
    """Where there are too many fleets to judge: never a worse kind of answer, and nearly as good a one."""
    wanted = workload(rate_rps)
    best, found = (
        search(None, pools, wanted, objective, speed_of=speed_of, max_batch=32, most_judged=limit).candidates
        for limit in (10_000, 0)
    )
    assert bool(best) == bool(found)
    if not best:
        return
    assert found[0].meets == best[0].meets
    if objective.is_set and best[0].meets:
        assert found[0].usd_per_hour <= best[0].usd_per_hour + max(pool.usd_per_hour for pool in pools)
    elif best[0].latency.utilisation < 1 and best[0].goodput_rps >= rate_rps:
        assert found[0].latency.e2e_p99_s <= 1.25 * best[0].latency.e2e_p99_s


def replicas(candidate: Candidate) -> Counter[tuple[str, int, int]]:
    return Counter((each.pool.instance_type.name, each.parallel.pipeline, each.parallel.tensor) for each in candidate.choices)


many_pools = st.builds(
    lambda a, b, c: [Pool(G4DN, a, 1.2, "a"), Pool(G4DN, b, 1.3, "b"), Pool(G5, c, 2.1, "a")],
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 30),
)
big_objectives = st.sampled_from([Objective(), Objective(tpot_s=0.3, ttft_s=6.0), Objective(e2e_s=120.0), Objective(tpot_s=0.01)])


@settings(max_examples=4, deadline=None)
@given(many_pools, st.sampled_from([0.0, 0.2, 1.0, 6.0]), big_objectives)
def test_what_holds_of_every_answer(pools: list[Pool], rate_rps: float, objective: Objective) -> None:
    wanted = workload(rate_rps)
    found = search(LLAMA_70B, pools, wanted, objective, speed_of=big)
    assert found == search(LLAMA_70B, pools[::-1], wanted, objective, speed_of=big), "the order of pools says nothing"
    assert len({each.choices for each in found.candidates}) == len(found.candidates)
    for candidate in found.candidates:
        for pool in pools:
            used = sum(each.parallel.num_slots for each in candidate.choices if each.pool == pool)
            assert used <= pool.num_devices
        assert all(each.speed == big(each.parallel, each.pool.instance_type) for each in candidate.choices)
        assert candidate.meets == candidate.latency.meets(objective)
        assert candidate.goodput_rps <= candidate.throughput_rps
        assert candidate.num_idle == sum(pool.num_devices for pool in pools) - sum(
            each.parallel.num_slots for each in candidate.choices
        )
        assert candidate.why
    meeting = [candidate.usd_per_hour for candidate in found.candidates if candidate.meets]
    if objective.is_set and meeting:
        assert found.candidates[0].usd_per_hour == min(meeting)
    assert all(loser.what and loser.why for loser in found.losers)


@pytest.mark.parametrize("objective", [Objective(), Objective(tpot_s=0.3, ttft_s=6.0)])
def test_more_devices_are_never_worse(objective: Objective) -> None:
    """By the objective that is stated: within 2 % where it is a time."""
    before: Candidate | None = None
    for devices in range(12, 61, 8):
        candidates = search(LLAMA_70B, [Pool(G4DN, devices, 1.2)], workload(0.7), objective, speed_of=big).candidates
        found = candidates[0]
        if before is not None:
            assert found.meets >= before.meets
            if before.meets and objective.is_set:
                assert found.usd_per_hour <= before.usd_per_hour
            elif objective.is_set:
                assert found.goodput_rps >= 0.98 * before.goodput_rps
            else:
                assert found.latency.e2e_p99_s <= NEAR**2 * before.latency.e2e_p99_s
        before = found
    assert before is not None
    assert before.meets


def test_no_device_idles_when_the_fleet_cannot_carry_the_rate() -> None:
    """From the first whole machines that hold the model on; one shape alone would leave some over at most counts."""
    for devices in range(12, 65, 8):
        (best, *_) = search(LLAMA_70B, [Pool(G4DN, devices, 1.2)], workload(1000.0), Objective(), speed_of=big).candidates
        assert best.num_idle == 0, (devices, replicas(best))
        assert best.latency.e2e_p99_s == inf


def test_replicas_that_stay_count_with_their_load_and_their_machines() -> None:
    kept_shape = Parallel(pipeline=3, tensor=4, max_batch=128)
    speed = big(kept_shape, G4DN)
    assert not isinstance(speed, str)
    pool = Pool(G4DN, 24, 1.2)
    kept = [Choice(kept_shape, pool, speed)] * 2
    limits = Objective(tpot_s=0.3, ttft_s=8.0)
    alone = search(LLAMA_70B, [Pool(G4DN, 0, 1.2)], workload(0.3), limits, speed_of=big, fixed=kept).candidates
    assert [each.choices for each in alone] == [tuple(kept)]
    assert alone[0].meets
    assert alone[0].usd_per_hour == pytest.approx(6 * 1.2)
    enough = search(LLAMA_70B, [pool], workload(0.3), limits, speed_of=big, fixed=kept).candidates[0]
    assert enough.choices == tuple(kept), "what runs is enough: nothing is added"
    more = search(LLAMA_70B, [pool], workload(1.2), limits, speed_of=big, fixed=kept).candidates[0]
    assert more.choices[:2] == tuple(kept)
    assert len(more.choices) > 2
    assert more.throughput_rps > alone[0].throughput_rps
    scratch = search(LLAMA_70B, [Pool(G4DN, 48, 1.2)], workload(1.2), limits, speed_of=big).candidates[0]
    assert scratch.usd_per_hour <= more.usd_per_hour + 1e-9, "nobody is bound to anything"


@pytest.mark.parametrize("objective", [Objective(), Objective(e2e_s=1000.0)])
def test_nothing_may_be_added_to_what_stays_however_many_devices_are_free(objective: Objective) -> None:
    kept_shape = Parallel(pipeline=3, tensor=4, max_batch=128)
    speed = big(kept_shape, G4DN)
    assert not isinstance(speed, str)
    pool = Pool(G4DN, 48, 1000.0)
    kept = tuple([Choice(kept_shape, pool, speed)] * 8)
    found = search(LLAMA_70B, [pool], workload(0.001), objective, speed_of=big, fixed=kept, most_judged=1).candidates[0]
    assert found.choices == kept


def test_devices_beside_a_replica_that_stays_cost_nothing_more() -> None:
    speeds = FewShapes(((Parallel(max_batch=8), "large.3", RooflineSpeed(8, 100_000, 0.02, 1e-4, 1e-8, 1e-5, 1, 1e-4)),))
    pool = Pool(LARGE, 5, 3.0)
    kept = [Choice(speeds.known[0][0], pool, speeds.known[0][2])]
    found = search(None, [pool], workload(3.0), Objective(tpot_s=0.1), speed_of=speeds, fixed=kept, max_batch=8).candidates[0]
    assert found.meets
    assert len(found.choices) == 3
    assert (found.usd_per_hour, found.num_instances) == (3.0, 1)


def test_losers_say_why() -> None:
    found = search(LLAMA_70B, [Pool(G4DN, 32, 1.2), Pool(G5, 16, 2.1)], workload(0.5), Objective(tpot_s=0.3), speed_of=big)
    told = {loser.what: loser.why for loser in found.losers}
    assert "weights take" in told["P=1..2, M=4 on g4dn.12xlarge"]
    assert len(found.losers) <= 10
    assert found.candidates[0].why == "the least dollars per hour that keep the limits"
    assert all("more" in each.why or "limit" in each.why or "p99" in each.why for each in found.candidates[1:])
    strict = search(LLAMA_70B, [Pool(G4DN, 32, 1.2)], workload(0.5), Objective(tpot_s=0.15), speed_of=big)
    assert any("even alone on it, each token takes" in loser.why for loser in strict.losers)
    hopeless = search(LLAMA_70B, [Pool(G4DN, 32, 1.2)], workload(0.5), Objective(tpot_s=0.001), speed_of=big)
    assert hopeless.candidates[0].why.startswith("nothing keeps the limits at any rate")
    assert not hopeless.candidates[0].meets
    nowhere = search(LLAMA_70B, [Pool(G4DN, 8, 1.2)], workload(0.5), Objective(), speed_of=big)
    assert nowhere.candidates == ()
    assert nowhere.losers


def test_a_finer_cut_is_taken_when_it_serves_no_less() -> None:
    """`refine` hands out a cut; a speed model that likes it, and one that does not."""

    def refine(parallel: Parallel, kind: InstanceType) -> Parallel:
        return msgspec.structs.replace(parallel, stage_layers=(81 - parallel.pipeline, *[1] * (parallel.pipeline - 1)))

    def liked(factor: float) -> SpeedOf:
        def speed_of(parallel: Parallel, kind: InstanceType) -> ReplicaSpeed | str:
            speed = roofline(LLAMA_70B, msgspec.structs.replace(parallel, stage_layers=()), kind)
            if isinstance(speed, str) or not parallel.stage_layers:
                return speed
            return replace(speed, weights_s=speed.weights_s * factor)

        return speed_of

    for factor, is_taken in ((0.9, True), (1.1, False)):
        pools = [Pool(G4DN, 16, 1.2)]
        found = search(LLAMA_70B, pools, workload(0.3), Objective(), speed_of=liked(factor), refine=refine).candidates[0]
        assert all(bool(each.parallel.stage_layers) == is_taken for each in found.choices)
