"""The block pool against a model of plain lists: counts of holders, order of resting blocks, no writer beside a second holder."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spotserve.engine.blocks import BlockPool
from spotserve.engine.prefix import PrefixChain

BLOCK_TOKENS = 2
NUM_BLOCKS = 7
TOKENS = [[5] * 12, [5] * 4 + [6] * 8, [6] * 12]


class SharedPool(RuleBasedStateMachine):
    """Holders that begin, share, grow, publish and leave. The model keeps, for each block, the token ids it was published under."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS, first_block_id=1)
        self.holders: list[tuple[list[int], PrefixChain, list[int]]] = []
        self.published: dict[int, tuple[int, ...]] = {}
        self.resting: list[int] = []

    def holds(self, block_id: int) -> int:
        return sum(block_ids.count(block_id) for block_ids, _, _ in self.holders)

    @rule(token_ids=st.sampled_from(TOKENS))
    def begin(self, token_ids: list[int]) -> None:
        chain = PrefixChain(list(token_ids), BLOCK_TOKENS)
        shared = self.pool.match(chain, num_blocks=5)
        expected = []
        for end in range(BLOCK_TOKENS, 5 * BLOCK_TOKENS + 1, BLOCK_TOKENS):
            block = next((block for block, known in self.published.items() if known == tuple(token_ids[:end])), None)
            if block is None:
                break
            expected.append(block)
        assert shared == expected
        block_ids: list[int] = []
        self.pool.share(block_ids, shared)
        self.resting = [block for block in self.resting if block not in shared]
        self.holders.append((block_ids, chain, [len(shared)]))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), more=st.integers(1, 3))
    def grow(self, data: st.DataObject, more: int) -> None:
        block_ids = data.draw(st.sampled_from([block_ids for block_ids, _, _ in self.holders]))
        before = list(block_ids)
        wanted = min(6, len(block_ids) + more)
        free = NUM_BLOCKS - len({block for held, _, _ in self.holders for block in held})
        unpublished_free = free - len(self.resting)
        assert self.pool.lacking(num_tokens=wanted * BLOCK_TOKENS, shared=before) == wanted - len(before) - free
        grown = self.pool.grow(block_ids, num_tokens=wanted * BLOCK_TOKENS)
        assert grown == (wanted - len(before) <= free)
        assert block_ids[: len(before)] == before
        if not grown:
            assert block_ids == before
            return
        new = block_ids[len(before) :]
        for block in new[unpublished_free:]:
            assert block == self.resting.pop(0), "what has rested longest goes first"
            del self.published[block]
        assert not set(new) & self.published.keys(), "a published block was given away while others were free"

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block_ids, chain, count = data.draw(st.sampled_from(self.holders))
        if count[0] < len(block_ids):
            index = count[0]
            known = tuple(chain.token_ids[: (index + 1) * BLOCK_TOKENS])
            prefix = self.pool.publish(block_ids[index], chain.at(index))
            assert prefix.same(chain.at(index))
            chain.put(index, prefix)
            if known not in self.published.values():
                self.published[block_ids[index]] = known
            count[0] += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), keep=st.integers(0, 5))
    def shrink(self, data: st.DataObject, keep: int) -> None:
        position = data.draw(st.integers(0, len(self.holders) - 1))
        block_ids, _, count = self.holders[position]
        keep = 0 if keep < count[0] else min(keep, len(block_ids))
        given_back = block_ids[keep:][::-1]
        leaving = sum(self.holds(block) == 1 for block in given_back)
        assert self.pool.lacking(num_tokens=0, leaving=[given_back]) == -self.pool.free_blocks - leaving
        self.pool.shrink(block_ids, num_tokens=keep * BLOCK_TOKENS)
        if keep == 0:
            del self.holders[position]
        self.resting += [block for block in given_back if block in self.published and not self.holds(block)]

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        for block in self.resting:
            del self.published[block]
        self.resting.clear()

    @invariant()
    def is_as_modelled(self) -> None:
        held = {block for block_ids, _, _ in self.holders for block in block_ids}
        assert self.pool.used_blocks == len(held)
        assert self.pool.resting_blocks == len(self.resting)
        for block_ids, _, _ in self.holders:
            for block in block_ids:
                assert self.pool.writable([block]) == (self.holds(block) == 1 and block not in self.published)
        self.pool.check_integrity([block_ids for block_ids, _, _ in self.holders])


TestSharedPool = SharedPool.TestCase
TestSharedPool.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_a_pool_gives_all_or_nothing() -> None:
    pool = BlockPool(num_blocks=3, block_tokens=4)
    mine: list[int] = []
    assert pool.grow(mine, num_tokens=5)
    assert len(mine) == 2
    theirs: list[int] = []
    assert not pool.grow(theirs, num_tokens=8)
    assert theirs == []
    pool.check_integrity([mine, theirs])
    pool.shrink(mine, num_tokens=4)
    assert (len(mine), pool.free_blocks, pool.used_blocks) == (1, 2, 1)


def test_integrity_sees_leaks_and_wrong_counts() -> None:
    pool = BlockPool(num_blocks=3, block_tokens=4)
    mine: list[int] = []
    pool.grow(mine, num_tokens=5)
    with pytest.raises(AssertionError, match="leaked"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="leaked"):
        pool.check_integrity([mine, mine])
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity([mine + mine])
    chain = PrefixChain([1, 2, 3, 4], 4)
    pool.publish(mine[0], chain.at(0))
    theirs: list[int] = []
    pool.share(theirs, pool.match(chain, num_blocks=1))
    pool.check_integrity([mine, theirs])
    with pytest.raises(AssertionError, match="leaked"):
        pool.check_integrity([mine])
