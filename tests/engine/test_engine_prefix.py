"""The prefix cache: what may be shared, what may not, and what it saves."""

from hashlib import blake2b

import pytest
from drafts import chains_of
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.request import Request, SamplingParams
from spotserve.engine import prefix
from spotserve.engine.blocks import BlockPool
from spotserve.engine.prefix import PrefixChain
from spotserve.engine.scheduler import Schedule, Scheduler
from spotserve.engine.sequence import Sequence, new_sequence, seniority_of

token_lists = st.lists(st.integers(5, 6), min_size=0, max_size=14)


def sequence_of(prompt: list[int], *, number: int = 0, output: int = 20, salt: str = "") -> Sequence:
    request = Request(request_id=str(number), prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=output))
    return new_sequence(request, seniority=seniority_of(request, number), end_token_ids=(), emitted_token_ids=(), cache_salt=salt)


def make(*, num_blocks: int = 20, block_tokens: int = 4, max_step_tokens: int = 64, prefix_cache: bool = True):
    blocks = BlockPool(num_blocks=num_blocks, block_tokens=block_tokens)
    scheduler = Scheduler(
        blocks=blocks,
        max_batch=8,
        max_step_tokens=max_step_tokens,
        context_tokens=num_blocks * block_tokens,
        prefix_cache=prefix_cache,
    )
    return scheduler, blocks


def step(scheduler: Scheduler, *, token_id: int = 7) -> Schedule:
    schedule = scheduler.schedule()
    for entry in schedule.entries:
        entry.sequence.advance(entry.num_tokens)
        if entry.samples:
            entry.sequence.token_ids.append(token_id)
            scheduler.settle(entry.sequence)
    scheduler.landed(schedule)
    scheduler.check_integrity()
    return schedule


def published(pool: BlockPool, chain: PrefixChain, num_blocks: int) -> list[int]:
    block_ids: list[int] = []
    assert pool.grow(block_ids, num_tokens=num_blocks * pool.block_tokens)
    for index, block_id in enumerate(block_ids):
        chain.put(index, pool.publish(block_id, chain.at(index)))
    return block_ids


@given(
    stored=st.lists(st.tuples(token_lists, st.sampled_from(["", "a"])), max_size=6),
    asked=token_lists,
    salt=st.sampled_from(["", "a"]),
)
def test_a_match_is_the_longest_that_comparing_tokens_finds(stored, asked, salt) -> None:
    pool = BlockPool(num_blocks=64, block_tokens=3)
    for token_ids, stored_salt in stored:
        published(pool, PrefixChain(token_ids, 3, stored_salt), len(token_ids) // 3)
    common = [
        next((i for i, (a, b) in enumerate(zip(token_ids, asked, strict=False)) if a != b), min(len(token_ids), len(asked)))
        for token_ids, stored_salt in stored
        if stored_salt == salt
    ]
    found = pool.match(PrefixChain(asked, 3, salt), num_blocks=len(asked) // 3)
    assert len(found) == max(common, default=0) // 3


@given(stored=st.lists(token_lists, max_size=6), asked=token_lists)
def test_a_collision_of_hashes_costs_a_hit_and_never_gives_wrong_keys(stored, asked) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefix, "blake2b", lambda data, *, digest_size, key=b"": blake2b(data[:1] + key, digest_size=1, key=b""))
        pool = BlockPool(num_blocks=64, block_tokens=3)
        held: dict[int, list[int]] = {}
        for token_ids in stored:
            for index, block_id in enumerate(published(pool, PrefixChain(token_ids, 3), len(token_ids) // 3)):
                held[block_id] = token_ids[: 3 * (index + 1)]
        for index, block_id in enumerate(pool.match(PrefixChain(asked, 3), num_blocks=len(asked) // 3)):
            assert held[block_id] == asked[: 3 * (index + 1)]


def test_an_end_whose_beginning_collided_is_not_found_under_another_beginning(monkeypatch) -> None:
    monkeypatch.setattr(prefix, "blake2b", lambda data, *, digest_size, key=b"": blake2b(b"", digest_size=1))
    pool = BlockPool(num_blocks=2, block_tokens=1)
    chain = PrefixChain([1, 9], 1)
    first = published(pool, chain, 1)
    pool.shrink(first, num_tokens=0)
    pool.forget()
    mine: list[int] = []
    pool.grow(mine, num_tokens=2)
    pool.publish(mine[1], chain.at(1))
    assert pool.match(PrefixChain([2, 9], 1), num_blocks=2) == []
    assert not PrefixChain([2, 9], 1).at(1).same(chain.at(1))
    assert PrefixChain([1, 9], 1).at(1).same(chain.at(1))


def test_a_second_request_computes_only_what_differs() -> None:
    scheduler, blocks = make()
    first = sequence_of([5] * 10)
    scheduler.add(first)
    step(scheduler)
    second = sequence_of([5] * 10, number=1)
    scheduler.add(second)
    entry = step(scheduler).entries[-1]
    assert (entry.sequence, entry.start, entry.num_tokens, second.cached_tokens) == (second, 8, 2, 8)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2], "the block that both write is shared"
    assert second.recomputed_tokens == 0
    assert blocks.used_blocks == 4
    scheduler.remove(first)
    scheduler.remove(second)
    assert (blocks.used_blocks, blocks.free_blocks, blocks.resting_blocks) == (0, 20, 2)
    scheduler.check_integrity()
    scheduler.forget_cache()
    assert blocks.resting_blocks == 0


def test_one_token_is_left_to_compute_when_the_whole_prompt_is_cached() -> None:
    scheduler, _ = make()
    scheduler.add(sequence_of([5] * 9))
    step(scheduler)
    second = sequence_of([5] * 8, number=1)
    scheduler.add(second)
    assert step(scheduler).entries[-1].num_tokens == 4
    assert second.cached_tokens == 4


def test_answers_are_published_and_tenants_are_kept_apart() -> None:
    scheduler, _ = make()
    first = sequence_of([5] * 3)
    scheduler.add(first)
    for _ in range(6):
        step(scheduler)
    assert (len(first.token_ids), first.computed_tokens) == (9, 8)
    scheduler.remove(first)
    turn = [5] * 3 + [7] * 6 + [5]
    other, same = sequence_of(turn, number=1, salt="other"), sequence_of(turn, number=2)
    scheduler.add(other)
    scheduler.add(same)
    step(scheduler)
    assert (other.cached_tokens, same.cached_tokens) == (0, 8)
    again = sequence_of(turn, number=3, salt="other")
    scheduler.add(again)
    step(scheduler)
    assert again.cached_tokens == 8


def test_nothing_is_published_when_it_is_off() -> None:
    scheduler, blocks = make(prefix_cache=False)
    first, second = sequence_of([5] * 10), sequence_of([5] * 10, number=1)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    step(scheduler)
    assert second.cached_tokens == 0
    scheduler.remove(first)
    scheduler.remove(second)
    assert blocks.resting_blocks == 0


def test_an_evicted_sequence_takes_its_own_blocks_up_again() -> None:
    scheduler, _ = make(num_blocks=6, max_step_tokens=12)
    old, young = sequence_of([5] * 8), sequence_of([6] * 9, number=1)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.num_running < 2:
        step(scheduler)
    while not (schedule := step(scheduler)).evicted:
        pass
    assert schedule.evicted == (young,)
    lost = young.recompute_until
    scheduler.remove(old)
    while young.pending_tokens > 1 or not young.block_ids:
        step(scheduler)
    assert (lost, young.cached_tokens) == (12, 8), "one of its three full blocks went to the senior"
    assert young.take_recomputed_tokens() == 4
    assert young.take_recomputed_tokens() == 0


def test_accepted_drafts_are_published_and_rejected_ones_are_not() -> None:
    scheduler, blocks = make()
    first = sequence_of([5] * 4)
    scheduler.add(first)
    step(scheduler)
    schedule = scheduler.schedule(chains_of(8, most=11))
    first.advance(1)
    first.token_ids.extend([8, 9])
    first.advance(1)
    scheduler.settle(first)
    scheduler.landed(schedule)
    scheduler.remove(first)
    assert blocks.resting_blocks == 1, "positions 4 to 6 are computed: the second block is not full"


def test_cached_blocks_give_way_when_nothing_else_is_free() -> None:
    scheduler, blocks = make(num_blocks=4)
    first = sequence_of([5] * 12, output=1)
    scheduler.add(first)
    step(scheduler)
    scheduler.remove(first)
    assert (blocks.free_blocks, blocks.resting_blocks) == (4, 3)
    second = sequence_of([6] * 9, number=1)
    scheduler.add(second)
    step(scheduler)
    assert second.computed_tokens == 9
    assert blocks.resting_blocks == 1, "the end of the first prompt went before its beginning"
    third = sequence_of([5] * 5, number=2)
    scheduler.remove(second)
    scheduler.add(third)
    step(scheduler)
    assert third.cached_tokens == 4
