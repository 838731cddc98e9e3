"""KV between ranks, re-sliced from any shape to any other: every value arrives, and nothing moves that was there already."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_specs import small_spec
from rank_scene import PATIENCE_S, SECRET, Seat, places, seats

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import stage_cuts, units_held
from spotserve.core.errors import PeerLost
from spotserve.core.messages import Activate, KvHolder, Member
from spotserve.core.model import Portion
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.attention import KvCache
from spotserve.engine.ranks.memory import HeldKv
from spotserve.engine.results import FrozenSequence
from spotserve.worker.replicas import Fetcher, KvHome

SPEC = small_spec(
    name="m",
    num_layers=5,
    num_kv_heads=2,
    head_size=3,
    vocabulary_size=7,
    context_tokens=64,
    layer=(Portion(4, 400),),
    embedding=(Portion(1, 10),),
    head=(Portion(1, 10),),
    value_bytes=4,
)
TOKENS, BLOCK = 9, 4
SHAPES = [(1, 1), (2, 1), (3, 1), (5, 1), (1, 2), (2, 2), (1, 4)]


def value(token: int, layer: int, kv: int, head: int) -> torch.Tensor:
    return torch.arange(3, dtype=torch.float32) + 10 * (token + 100 * (layer + 10 * (kv + 2 * head)))


def cache_of(parallel: tuple[int, int], stage: int, shard: int) -> tuple[KvCache, range]:
    heads = units_held(SPEC.num_kv_heads, parallel[1], shard)
    cache = KvCache(
        stage_cuts(SPEC, parallel[0])[stage],
        num_kv_heads=len(heads),
        head_size=SPEC.head_size,
        num_blocks=5,
        block_tokens=BLOCK,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return cache, heads


def hold(seat: Seat, parallel: tuple[int, int], stage: int, shard: int) -> None:
    """Fills one old rank's cache, in slots that are in no order, and holds it."""
    cache, heads = cache_of(parallel, stage, shard)
    slots = [4 + (7 * token) % 16 for token in range(TOKENS)]
    for layer, (index, head), token, kv in product(cache.layers, enumerate(heads), range(TOKENS), range(2)):
        cache.layer(layer)[slots[token], kv, index] = value(token, layer, kv, head)
    seat.memory.hold_kv("s", HeldKv(cache, slots, heads))


def frozen() -> FrozenSequence:
    request = Request(request_id="s", prompt_token_ids=(1,) * TOKENS, sampling=SamplingParams(max_tokens=3))
    return FrozenSequence(request=request, output_token_ids=(2,), computed_tokens=TOKENS)


def fetcher(made: list[Seat], parallel: tuple[int, int]) -> Fetcher:
    shape = Parallel(pipeline=parallel[0], tensor=parallel[1])
    replica = ReplicaPlan(replica_id="r-2", parallel=shape)
    members = tuple(
        Member(Slot("r-2", *place), DeviceId("i", index), made[index].server.address)
        for index, place in enumerate(places(*parallel))
    )
    activate = Activate(instance_id="i", device_index=0, replica=replica, slot=members[0].slot, plan_epoch=1, members=members)
    return Fetcher(activate, SPEC, dtype="float32", own=made[0].server.address, memory=made[0].memory, secret=SECRET)


def home(made: list[Seat], parallel: tuple[int, int], dtype: str = "float32") -> KvHome:
    holders = tuple(KvHolder(*place, made[index].server.address) for index, place in enumerate(places(*parallel)))
    return KvHome(Parallel(pipeline=parallel[0], tensor=parallel[1]), holders, dtype)


@settings(max_examples=25, deadline=None)
@given(old=st.sampled_from(SHAPES), new=st.sampled_from(SHAPES), shift=st.integers(0, 3))
def test_kv_is_resliced_between_all_shapes(old: tuple[int, int], new: tuple[int, int], shift: int) -> None:
    num_seats = max(old[0] * old[1], new[0] * new[1] + shift)
    with seats(num_seats) as made:
        for seat, place in zip(made, places(*old), strict=False):
            hold(seat, old, *place)
        new_seats = made[shift:]
        get = fetcher(new_seats, new)
        moved_bytes = get.fetch(frozen(), home(made, old)).result(PATIENCE_S)
        expected_bytes = 0
        for index, place in enumerate(places(*new)):
            cache, heads = cache_of(new, *place)
            layers = new_seats[index].memory.take_fetched("s")
            assert len(layers) == len(cache.layers)
            for layer, values in zip(cache.layers, layers, strict=True):
                for (at, head), token, kv in product(enumerate(heads), range(TOKENS), range(2)):
                    assert torch.equal(values[token, kv, at], value(token, layer, kv, head))
                expected_bytes += sum(not has(old, index + shift, layer, head) for head in heads) * TOKENS * 2 * 3 * 4
        get.close()
    assert moved_bytes == expected_bytes


def has(parallel: tuple[int, int], seat: int, layer: int, head: int) -> bool:
    """Whether a seat had this layer and head before."""
    if seat >= parallel[0] * parallel[1]:
        return False
    stage, shard = places(*parallel)[seat]
    return layer in stage_cuts(SPEC, parallel[0])[stage] and head in units_held(SPEC.num_kv_heads, parallel[1], shard)


def test_kv_of_another_dtype_is_not_fetched() -> None:
    with seats(1) as made:
        get = fetcher(made, (1, 1))
        with pytest.raises(PeerLost, match="float16"):
            get.fetch(frozen(), home(made, (1, 1), dtype="float16")).result(PATIENCE_S)
        get.close()


def test_a_source_that_is_gone_is_an_error_and_no_hang() -> None:
    with seats(2) as made:
        hold(made[0], (2, 1), 0, 0)
        gone = home(made, (2, 1))
        made[1].server.close()
        get = fetcher(made, (1, 1))
        with pytest.raises(PeerLost):
            get.fetch(frozen(), gone).result(PATIENCE_S)
        get.close()
