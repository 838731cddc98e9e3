"""Replicas by a published profile: alone as fast as the published formula says, together by lines between its points, and only
where the memory holds them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_profiles import published_profile

from spotserve.core.cut import stage_cuts
from spotserve.core.plan import Parallel
from spotserve.planner.profile_speed import ProfileSpeed, profile_speed, published_model
from spotserve.planner.profiles import LayerTime, Profile
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.spotserve_2024 import latency_ms

SMALL = Profile(
    name="small",
    num_layers=5,
    padded_layers=6,
    hidden_size=8,
    max_tensor=2,
    fix_factor=1.1,
    init_hop_ms=2.0,
    incr_hop_ms=0.5,
    embed_ms=(0.25, 0.5, 0.75),
    layer_ms={
        (1, 1): LayerTime(10.0, 1.0),
        (1, 2): LayerTime(18.0, 0.75),
        (1, 4): LayerTime(30.0, 1.25),
        (2, 1): LayerTime(6.0, 0.5),
        (2, 2): LayerTime(11.0, 0.75),
        (2, 4): LayerTime(21.0, 0.5),
    },
)
MODEL = published_model(SMALL, vocabulary_size=10, context_tokens=20, head_size=4)
PLENTY = 10**9


def speed(pipeline: int, tensor: int, *, device_memory_bytes: int = PLENTY, max_batch: int = 100, **different) -> ProfileSpeed:
    parallel = Parallel(pipeline=pipeline, tensor=tensor, max_batch=max_batch, **different)
    made = profile_speed(SMALL, parallel, model=MODEL, device_memory_bytes=device_memory_bytes)
    assert isinstance(made, ProfileSpeed), made
    return made


@pytest.mark.parametrize(
    ("model", "pipeline", "tensor", "expected_ms"), [("6.7B", 1, 4, 5447.3), ("20B", 3, 4, 14372.8), ("30B", 2, 8, 17539.9)]
)
def test_a_request_alone_takes_what_table_1_says(model: str, pipeline: int, tensor: int, expected_ms: float) -> None:
    profile = published_profile(model)
    made = profile_speed(
        profile,
        Parallel(pipeline=pipeline, tensor=tensor, max_batch=4),
        model=published_model(profile, vocabulary_size=51200, context_tokens=640),
        device_memory_bytes=15_000_000_000,
    )
    assert isinstance(made, ProfileSpeed)
    assert round((made.first_token_s(512) + 128 * made.token_s(1, 512)) * 1000, 1) == expected_ms


@pytest.mark.parametrize("pipeline", [1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_request_alone_takes_the_published_time(pipeline: int, tensor: int) -> None:
    made: ReplicaSpeed = speed(pipeline, tensor)
    alone_ms = (made.first_token_s(512) + 7 * made.token_s(1, 512)) * 1000
    assert alone_ms == pytest.approx(latency_ms(SMALL, pipeline=pipeline, tensor=tensor, output_tokens=7))


def test_groups_fill_the_stages_and_times_are_linear_between_batches() -> None:
    made = speed(2, 1)
    cycle = {n: made.token_s(n, 0) * 1000 / 1.1 - 0.5 for n in (1, 2, 3, 4, 6, 8, 16)}
    per_layer = {n: ms / (2 * 3) for n, ms in cycle.items()}
    assert per_layer == pytest.approx({1: 1.0, 2: 1.0, 3: 0.875, 4: 0.75, 6: 1.0, 8: 1.25, 16: 2.25})


def test_beyond_what_was_measured_times_do_not_fall() -> None:
    made = speed(1, 2)
    assert made.token_s(4, 0) < made.token_s(2, 0)
    assert made.token_s(100, 0) == made.token_s(4, 0)


def test_prompts_cost_in_proportion() -> None:
    made = speed(2, 1)
    assert made.prompt_s(512) * 1000 == pytest.approx(1.1 * 3 * 10.0)
    assert made.prompt_s(128) == pytest.approx(made.prompt_s(512) / 4)
    assert made.first_token_s(256) * 1000 == pytest.approx(1.1 * (2 * 3 * 10.0 / 2 + 2.0 / 2 + 2 * 0.25))


def test_a_cut_of_ones_own_is_as_slow_as_its_longest_stage() -> None:
    assert speed(2, 1, stage_layers=(4, 1)).prompt_s(512) == pytest.approx(speed(2, 1).prompt_s(512) * 4 / 3)


def test_why_there_is_no_such_replica() -> None:
    def refusal(memory: int = PLENTY, min_devices: int = 1, **shape) -> str:
        why = profile_speed(SMALL, Parallel(**shape), model=MODEL, device_memory_bytes=memory, min_devices=min_devices)
        assert isinstance(why, str)
        return why

    assert "5 layers" in refusal(pipeline=6)
    assert "no times for 4 shards" in refusal(tensor=4)
    assert "8 devices at least" in refusal(pipeline=2, tensor=2, min_devices=8)
    assert "weights do not fit" in refusal(memory=1000)
    enough = MODEL.weight_bytes + 20 * MODEL.kv_bytes_per_token
    assert "19 tokens of KV fit, a request may have 20" in refusal(memory=enough - 1)
    assert speed(1, 1, device_memory_bytes=enough).kv_tokens == 20


def test_as_many_sequences_as_the_memory_holds() -> None:
    memory = MODEL.weight_bytes + 75 * MODEL.kv_bytes_per_token
    made = speed(1, 1, device_memory_bytes=memory)
    assert (made.kv_tokens, made.max_batch) == (75, 3)
    assert speed(1, 1, device_memory_bytes=memory, max_batch=2).max_batch == 2


@given(st.integers(1, 5), st.sampled_from([1, 2]), st.integers(1, 60))
def test_weights_and_kv_of_every_device_fit_its_memory_and_no_token_more(pipeline: int, tensor: int, megabits: int) -> None:
    memory = megabits * 200
    made = profile_speed(SMALL, Parallel(pipeline=pipeline, tensor=tensor), model=MODEL, device_memory_bytes=memory)

    def fullest(tokens: int) -> int:
        cuts = stage_cuts(MODEL, pipeline)
        layer = MODEL.layer[0].num_bytes // tensor + MODEL.layer[1].num_bytes
        kv = 2 * 8 // tensor * 4 * tokens
        ends = [MODEL.embedding_bytes * (stage == 0) + MODEL.head_bytes * (stage == pipeline - 1) for stage in range(pipeline)]
        return max(len(cut) * (layer + kv) + end for cut, end in zip(cuts, ends, strict=True))

    if isinstance(made, ProfileSpeed):
        assert fullest(made.kv_tokens) <= memory < fullest(made.kv_tokens + 1)
    else:
        assert fullest(20) > memory


@pytest.mark.parametrize(("model", "gigabytes"), [("6.7B", 30.7), ("20B", 89.5), ("30B", 121.3)])
def test_the_artifacts_models_weigh_what_its_experiments_moved(model: str, gigabytes: float) -> None:
    """All weights with empty layers; KV of a request of 640 tokens without."""
    profile = published_profile(model)
    vocabulary = 50304 if model == "30B" else 51200
    padded = published_model(profile, vocabulary_size=vocabulary, context_tokens=640, padded=True)
    assert padded.weight_bytes / 1e9 == pytest.approx(gigabytes, abs=0.06)
    kv = published_model(profile, vocabulary_size=vocabulary, context_tokens=640).kv_bytes_per_token * 640 / 1e9
    assert kv == pytest.approx({"6.7B": 0.671, "20B": 1.384, "30B": 1.762}[model], abs=0.001)


@given(st.lists(st.integers(1, 64), min_size=2, max_size=6, unique=True))
def test_more_sequences_never_make_a_token_rarer_than_proportion(counts: list[int]) -> None:
    """Throughput of a replica does not fall with its batch."""
    made = speed(2, 1)
    rates = [count / made.token_s(count, 0) for count in sorted(counts)]
    assert all(fewer <= more for fewer, more in pairwise(rates))
