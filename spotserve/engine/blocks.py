"""Who holds which block of the paged KV cache.

A block is *free*, *held* by one or more sequences, or *resting*: published under its prefix (`engine.prefix`), held by nobody,
kept as long as nothing else is free. Only published blocks have several holders, and those are full: nobody writes them again.
Invariant: free, held and resting blocks make up the pool, and every count of holders is that of the sequences. Knows numbers,
not tensors.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from spotserve.engine.prefix import Prefix, PrefixChain, PublishedBlocks


class BlockPool:
    """Hands out block numbers from `first_block_id` on."""

    def __init__(self, *, num_blocks: int, block_tokens: int, first_block_id: int = 0) -> None:
        assert num_blocks >= 1 and block_tokens >= 1
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._all = frozenset(range(first_block_id, first_block_id + num_blocks))
        self._free = sorted(self._all, reverse=True)
        self._holders: Counter[int] = Counter()
        self._published = PublishedBlocks()

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds: what `grow` can give. Resting ones are among them."""
        return len(self._free) + self._published.num_resting

    @property
    def used_blocks(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.free_blocks

    @property
    def resting_blocks(self) -> int:
        """Published blocks that nobody holds."""
        return self._published.num_resting

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_tokens)

    def grow(self, block_ids: list[int], *, num_tokens: int) -> bool:
        """Appends blocks until `num_tokens` fit; False, and nothing taken, when the pool has too few."""
        missing = self.blocks_for(num_tokens) - len(block_ids)
        if missing <= 0:
            return True
        if missing > self.free_blocks:
            return False
        for _ in range(missing):
            block_id = self._free.pop() if self._free else self._published.withdraw_oldest()
            self._holders[block_id] = 1
            block_ids.append(block_id)
        return True

    def shrink(self, block_ids: list[int], *, num_tokens: int) -> None:
        """Gives back what lies beyond `num_tokens`, the last block first: what rests loses its end before its beginning."""
        keep = self.blocks_for(num_tokens)
        while len(block_ids) > keep:
            block_id = block_ids.pop()
            self._holders[block_id] -= 1
            if self._holders[block_id]:
                continue
            del self._holders[block_id]
            if block_id in self._published:
                self._published.rest(block_id)
            else:
                self._free.append(block_id)

    def match(self, prefixes: PrefixChain, *, num_blocks: int) -> list[int]:
        """Published blocks that hold the beginning of a sequence, `num_blocks` of them at most. Takes nothing."""
        found: list[int] = []
        for index in range(num_blocks):
            published = self._published.find(prefixes.at(index))
            if published is None:
                break
            found.append(published[0])
            prefixes.put(index, published[1])
        return found

    def share(self, block_ids: list[int], shared: Iterable[int]) -> None:
        """Makes the holder of `block_ids` one of those who hold `shared`, which were just matched."""
        for block_id in shared:
            assert block_id in self._published
            self._published.wake(block_id)
            self._holders[block_id] += 1
            block_ids.append(block_id)

    def lacking(self, *, num_tokens: int, shared: Sequence[int] = (), leaving: Iterable[Sequence[int]] = ()) -> int:
        """Blocks that are missing to hold `num_tokens` with `shared` at their beginning; negative: so many would be left.

        `leaving` are the blocks of holders who would give theirs back first.
        """
        given_back = Counter(chain.from_iterable(leaving))
        freed = sum(self._holders[block_id] == count for block_id, count in given_back.items())
        still_held = sum(self._holders[block_id] > given_back[block_id] for block_id in shared)
        return self.blocks_for(num_tokens) - still_held - self.free_blocks - freed

    def publish(self, block_id: int, prefix: Prefix) -> Prefix:
        """Offers a full block, whose holder will not write it again, to sequences that begin alike.

        The first block of a prefix is the one that is shared; a later one stays its holder's alone. Returns the chain to go on
        from (see `PublishedBlocks.publish`).
        """
        assert self._holders[block_id] == 1 and len(prefix.token_ids) == self.block_tokens
        return self._published.publish(block_id, prefix)

    def forget(self) -> None:
        """Frees every resting block."""
        while self._published.num_resting:
            self._free.append(self._published.withdraw_oldest())

    def writable(self, block_ids: Iterable[int]) -> bool:
        """Whether each of these has one holder and was not published."""
        return all(self._holders[block_id] == 1 and block_id not in self._published for block_id in block_ids)

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Asserts the invariant for these holders: a leak or a wrong count is a bug of ours."""
        held: Counter[int] = Counter()
        for block_ids in holders:
            assert len(set(block_ids)) == len(block_ids), "a sequence holds a block twice"
            held.update(block_ids)
        resting = self._published.resting
        assert held == self._holders, "a block leaked, or is held by others than those it counts"
        assert len(held) + len(self._free) + len(resting) == self.num_blocks, "a block is lost or in two places"
        assert held.keys() | {*self._free, *resting} == self._all, "a block is in two places"
        assert not any(block_id in self._published for block_id in self._free), "a free block is published"
        assert all(count == 1 or block_id in self._published for block_id, count in held.items()), (
            "a block is shared, not published"
        )
        self._published.check_integrity()
