"""Whether a replica gets a drafter, and how the queueing model and the search see a replica that has one."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_speeds import RooflineSpeed, machine, roofline

from spotserve.core.hardware import InstanceType
from spotserve.core.plan import Parallel
from spotserve.planner.cost import replica_cost
from spotserve.planner.drafting import Draft, DraftingSpeed, drafting
from spotserve.planner.fleets import Pool
from spotserve.planner.models import named_model
from spotserve.planner.queueing import capacity_rps, latency
from spotserve.planner.search import search
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Lengths, Objective, Workload
from spotserve.speculation.advisor import Load, expected_tokens

MEMORY_BOUND = RooflineSpeed(
    max_batch=256, kv_tokens=100_000, weights_s=20e-3, sequence_s=0.1e-3, context_s=1e-8, prompt_token_s=0.1e-3, stages=1, hop_s=0.0
)
KV_BYTES = 131_072
"""Of the target, per token."""
DRAFT = Draft((0.7,) * 8, 0.05, weight_bytes=2_000_000_000, kv_bytes_per_token=16_384)


def verdict_at(sequences: float, **changes: int) -> bool:
    found = drafting(replace(MEMORY_BOUND, **changes), DRAFT, load=Load(sequences, 256), kv_bytes_per_token=KV_BYTES)
    assert found.verdict.is_loaded == isinstance(found.speed, DraftingSpeed)
    return found.verdict.is_loaded


def test_a_drafter_is_loaded_where_few_sequences_run() -> None:
    assert verdict_at(1) and verdict_at(8)


def test_a_drafter_is_not_loaded_where_many_sequences_run() -> None:
    crowded = replace(MEMORY_BOUND, kv_tokens=1_000_000, sequence_s=1e-3)
    found = drafting(crowded, DRAFT, load=Load(200, 256), kv_bytes_per_token=KV_BYTES)
    assert not found.verdict.is_loaded and found.speed is crowded
    assert "less than" in found.verdict.reason


def test_a_drafter_is_not_loaded_where_the_load_takes_the_memory() -> None:
    assert not verdict_at(1, kv_tokens=15_000), "2 GB are 15,259 tokens"
    assert verdict_at(1, kv_tokens=16_000)
    found = drafting(
        replace(MEMORY_BOUND, kv_tokens=15_000),
        DRAFT,
        load=Load(1, 256),
        kv_bytes_per_token=KV_BYTES,
        free_bytes=2_000_000_000,
    )
    assert found.verdict.is_loaded, "there is room beside the cache"
    assert found.speed.kv_tokens <= 15_000


def test_what_the_drafter_takes_is_missing_in_the_cache() -> None:
    found = drafting(MEMORY_BOUND, DRAFT, load=Load(4, 256), kv_bytes_per_token=KV_BYTES)
    left = found.speed.kv_tokens
    taken = left * (KV_BYTES + DRAFT.kv_bytes_per_token) + DRAFT.weight_bytes
    assert taken <= MEMORY_BOUND.kv_tokens * KV_BYTES < taken + KV_BYTES + DRAFT.kv_bytes_per_token


def test_a_token_takes_its_share_of_the_steps_that_bring_several() -> None:
    free = Draft((0.8,) * 4, 0.0)
    idle = replace(MEMORY_BOUND, sequence_s=0.0)
    assert DraftingSpeed(idle, free, idle.kv_tokens).token_s(1, 0) == pytest.approx(
        idle.token_s(1, 0) / expected_tokens(free.acceptance, 4)
    )


@given(
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.integers(1, 256),
    st.floats(0, 1e5),
    st.sampled_from([0.0, 1e-4, 1e-2]),
)
def test_a_replica_that_may_draft_is_never_slower_between_tokens(
    chance: float, share: float, sequences: int, context: float, sequence_s: float
) -> None:
    plain = replace(MEMORY_BOUND, sequence_s=sequence_s)
    drafts = DraftingSpeed(plain, Draft((chance,) * 6, share), plain.kv_tokens)
    assert drafts.token_s(sequences, context) <= plain.token_s(sequences, context) * (1 + 1e-9)


@given(st.integers(1, 255), st.integers(0, 4096))
def test_more_sequences_never_take_less_time_per_token(sequences: int, context: int) -> None:
    drafts = DraftingSpeed(MEMORY_BOUND, DRAFT, MEMORY_BOUND.kv_tokens)
    times = [drafts.token_s(count, count * context) for count in (sequences, sequences + 1)]
    assert times[0] <= times[1] * (1 + 1e-9)


def test_prompts_take_longer_as_the_drafter_reads_them_too() -> None:
    drafts = DraftingSpeed(MEMORY_BOUND, DRAFT, MEMORY_BOUND.kv_tokens)
    assert drafts.prompt_s(1000) == pytest.approx(1.05 * MEMORY_BOUND.prompt_s(1000))
    assert drafts.first_token_s(1000) > MEMORY_BOUND.first_token_s(1000)


def test_queueing_sees_shorter_answers_and_more_capacity() -> None:
    workload = Workload(rate_rps=0.2, prompt=Lengths.fixed(128), output=Lengths.fixed(256))
    plain: ReplicaSpeed = replace(MEMORY_BOUND, max_batch=8)
    drafts = DraftingSpeed(plain, DRAFT, plain.kv_tokens)
    assert latency([drafts], workload).tpot_mean_s < 0.6 * latency([plain], workload).tpot_mean_s
    assert capacity_rps(drafts, workload) > 1.3 * capacity_rps(plain, workload)


def test_the_search_keeps_limits_with_fewer_dollars_where_replicas_draft() -> None:
    model, kind = named_model("llama-3-8b"), machine("quick", num_devices=1, memory_bytes=40_000_000_000)
    workload = Workload(rate_rps=1.0, prompt=Lengths.fixed(128), output=Lengths.fixed(128))
    limits = Objective(tpot_s=0.06)

    def plain(parallel: Parallel, hardware: InstanceType) -> ReplicaSpeed | str:
        return roofline(model, parallel, hardware)

    def with_draft(parallel: Parallel, hardware: InstanceType) -> ReplicaSpeed | str:
        speed = roofline(model, parallel, hardware)
        return speed if isinstance(speed, str) else DraftingSpeed(speed, Draft((0.7,) * 8, 0.05), speed.kv_tokens)

    without, drafts = (
        search(model, [Pool(kind, 8, 1.0)], workload, limits, speed_of=each, max_batch=32).candidates[0]
        for each in (plain, with_draft)
    )
    assert drafts.meets and (not without.meets or drafts.usd_per_hour <= without.usd_per_hour)
    assert drafts.latency.tpot_mean_s < without.latency.tpot_mean_s


def test_a_real_model_on_real_machines_gains_less_the_more_it_has_to_do() -> None:
    model = named_model("llama-3-8b")
    speed = replica_cost(
        model, Parallel(pipeline=1, tensor=1, max_batch=256), machine("gpu", memory_bytes=80_000_000_000, speed=4.0)
    )
    assert not isinstance(speed, str)
    drafts = DraftingSpeed(speed, Draft((0.7,) * 8, 0.1), speed.kv_tokens)
    gains = [speed.token_s(count, count * 512) / drafts.token_s(count, count * 512) for count in (1, 16, 64, 256)]
    assert gains == sorted(gains, reverse=True) and gains[0] > 1.8 and gains[-1] < 1.3
