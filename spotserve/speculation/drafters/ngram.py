"""Prompt lookup: text that repeats goes on as it did before.

The longest suffix (4 to 2 tokens) that occurred earlier in prompt or output proposes what followed its latest earlier
occurrence (Saxena, "Prompt Lookup Decoding", 2023). Each new token enters an index once; a proposal is a few dictionary
look-ups, however long the sequence is. A continuation that reaches the end of the sequence goes on into itself, so that
a loop is proposed as a loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from spotserve.speculation.tree import EMPTY_TREE, DraftTree


@dataclass(slots=True)
class _Index:
    """Where each n-gram was last followed by something."""

    followers: dict[tuple[int, ...], int] = field(default_factory=dict)
    """n-gram -> position of the token after its latest occurrence."""
    indexed_tokens: int = 0
    """N-grams that end before this position are in."""


class NgramDrafter:
    """A `Drafter` that needs no model."""

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        assert 1 <= shortest <= longest
        self._sizes = range(longest, shortest - 1, -1)
        self._indices: dict[str, _Index] = {}

    def propose(self, sequence_id: str, token_ids: Sequence[int], *, max_tokens: int) -> DraftTree:
        """A chain, or nothing when no suffix has occurred before."""
        index = self._indices.setdefault(sequence_id, _Index())
        self._extend(index, token_ids)
        for size in self._sizes:
            start = index.followers.get(tuple(token_ids[-size:])) if size < len(token_ids) else None
            if start is not None:
                return DraftTree.chain(_continuation(token_ids, start, max_tokens))
        return EMPTY_TREE

    def forget(self, sequence_id: str) -> None:
        """Drops the sequence's index."""
        self._indices.pop(sequence_id, None)

    def _extend(self, index: _Index, token_ids: Sequence[int]) -> None:
        for follower in range(max(index.indexed_tokens, 1), len(token_ids)):
            for size in self._sizes:
                if size <= follower:
                    index.followers[tuple(token_ids[follower - size : follower])] = follower
        index.indexed_tokens = len(token_ids)


def _continuation(token_ids: Sequence[int], start: int, max_tokens: int) -> list[int]:
    period = len(token_ids) - start
    return [token_ids[start + offset % period] for offset in range(max_tokens)]
