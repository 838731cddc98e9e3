"""Stages cut by time: never slower, never with less KV, and left alone where it matters little."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.plan import Parallel
from spotserve.planner.cost import ReplicaCost, replica_cost
from spotserve.planner.cutting import WORTH_SHARE, cut_by_time
from spotserve.planner.devices import instance_type
from spotserve.planner.models import named_model

LLAMA = named_model("llama-3-8b")
T4 = instance_type("g4dn.12xlarge")


def cost(parallel: Parallel) -> ReplicaCost:
    found = replica_cost(LLAMA, parallel, T4)
    assert isinstance(found, ReplicaCost)
    return found


def slowest_s(parallel: Parallel, sequences: float, context: float) -> float:
    its = cost(parallel)
    kv = sequences * context
    return max(
        its.stage_s(stage, tokens=sequences, pairs=kv, kv_tokens=kv, outputs=sequences) for stage in range(parallel.pipeline)
    )


@given(st.integers(2, 8), st.sampled_from([1, 2, 4]), st.sampled_from([16, 64, 256]), st.floats(100, 6000))
def test_a_cut_by_time_is_faster_and_holds_as_much(pipeline: int, tensor: int, max_batch: int, context: float) -> None:
    usual = Parallel(pipeline=pipeline, tensor=tensor, max_batch=max_batch)
    if isinstance(replica_cost(LLAMA, usual, T4), str):
        return
    cut = cut_by_time(LLAMA, usual, T4, context_tokens=context)
    assert (cut.pipeline, cut.tensor, cut.max_batch) == (pipeline, tensor, max_batch)
    if cut != usual:
        sequences = max(1.0, min(max_batch, cost(usual).kv_tokens / context) / pipeline)
        assert slowest_s(cut, sequences, context) <= (1 - WORTH_SHARE) * slowest_s(usual, sequences, context) * (1 + 1e-9)
        assert cost(cut).kv_tokens >= cost(usual).kv_tokens


def test_layers_with_long_contexts_weigh_more_than_their_bytes() -> None:
    """A head of 128k words weighs 2.4 layers in bytes, and less than that beside layers that read much KV: 12, 12, 8 by bytes."""
    usual = Parallel(pipeline=3, tensor=1, max_batch=64)
    cut = cut_by_time(LLAMA, usual, T4, context_tokens=4000.0)
    assert sum(cut.stage_layers) == LLAMA.num_layers
    sequences = max(1.0, min(64, cost(usual).kv_tokens / 4000.0) / 3)
    others = (Parallel(pipeline=3, tensor=1, max_batch=64, stage_layers=sizes) for sizes in compositions(LLAMA.num_layers, 3))
    times = [
        slowest_s(other, sequences, 4000.0)
        for other in others
        if not isinstance(found := replica_cost(LLAMA, other, T4), str) and found.kv_tokens >= cost(usual).kv_tokens
    ]
    assert slowest_s(cut, sequences, 4000.0) == pytest.approx(min(times), rel=1e-9)


def compositions(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Ways to divide so many layers that are near each other: the others are slower."""
    found = []
    for ends in combinations(range(1, layers), stages - 1):
        sizes = tuple(after - before for before, after in zip((0, *ends), (*ends, layers), strict=True))
        if min(sizes) >= 4 and max(sizes) <= 11:
            found.append(sizes)
    return found


def test_one_stage_is_left_alone() -> None:
    usual = Parallel(pipeline=1, tensor=4, max_batch=16)
    assert cut_by_time(LLAMA, usual, T4, context_tokens=500.0) is usual
