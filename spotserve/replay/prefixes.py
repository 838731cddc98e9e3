"""The prefix cache of a simulated replica: blocks that prompts begin with, by name, as long as the KV cache has room for them.

After `engine.prefix`: what was computed rests where nobody needs the room, and the longest unused goes first. Blocks that running
calls hold are theirs; a call that begins like one that runs finds those as well. Knows names and counts.
"""

from collections import OrderedDict
from collections.abc import Sequence


class Prefixes:
    """Blocks by name, the longest unused first."""

    def __init__(self, block_tokens: int) -> None:
        """`block_tokens`: of one block; 0: there are none."""
        self._block_tokens = block_tokens
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def find(self, prefix: Sequence[int], tokens: int, *, room_tokens: int) -> int:
        """Tokens of a prompt of so many that are there already; one token at least has to be computed. All of its blocks are
        there from now on, as far as there is room."""
        if not self._block_tokens:
            return 0
        found = 0
        for block in prefix:
            if block not in self._blocks:
                break
            found += self._block_tokens
        for block in prefix[: tokens // self._block_tokens]:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) * self._block_tokens > room_tokens:
            self._blocks.popitem(last=False)
        return max(0, min(found, tokens - 1))
