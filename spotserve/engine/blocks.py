"""Who holds which block of the paged KV cache.

Invariant: every block is free or has one holder; free and held make up the pool. Knows numbers, not tensors.
"""

from collections.abc import Iterable


class BlockPool:
    """Hands out block numbers from `first_block_id` on."""

    def __init__(self, *, num_blocks: int, block_tokens: int, first_block_id: int = 0) -> None:
        assert num_blocks >= 1 and block_tokens >= 1
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._all = frozenset(range(first_block_id, first_block_id + num_blocks))
        self._free = sorted(self._all, reverse=True)

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_tokens)

    def grow(self, block_ids: list[int], *, num_tokens: int) -> bool:
        """Appends blocks until `num_tokens` fit; False, and nothing taken, when the pool has too few."""
        missing = self.blocks_for(num_tokens) - len(block_ids)
        if missing > len(self._free):
            return False
        block_ids.extend(self._free.pop() for _ in range(missing))
        return True

    def shrink(self, block_ids: list[int], *, num_tokens: int) -> None:
        """Gives back what lies beyond `num_tokens`."""
        keep = self.blocks_for(num_tokens)
        while len(block_ids) > keep:
            self._free.append(block_ids.pop())

    def check_integrity(self, holders: Iterable[list[int]]) -> None:
        """Asserts the invariant for these holders: a leak or a block with two holders is a bug of ours."""
        held = [block_id for block_ids in holders for block_id in block_ids]
        assert len(held) + len(self._free) == self.num_blocks, "a block leaked or has two holders"
        assert set(held) | set(self._free) == self._all, "a block has two holders"
