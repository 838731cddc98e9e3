"""Prompt lookup: text that repeats goes on as it did before.

The longest suffix (4 to 2 tokens) that occurred earlier in prompt or output proposes what followed its latest earlier
occurrence (Saxena, "Prompt Lookup Decoding", 2023). Each new token enters an index once; a proposal is a few dictionary
look-ups, however long the sequence is. A continuation that reaches the end of the sequence goes on into itself, so that
a loop is proposed as a loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from spotserve.speculation.drafter import EMPTY_DRAFT, Draft, DraftTask
from spotserve.speculation.tree import DraftTree

_TOKEN_BITS: Final = 32
"""An n-gram is one integer, this many bits per token: cheaper to build and to hash than a tuple."""
_NO_TOKENS: Final = -1
"""Before the first token. N-grams that reach back here stay negative, and so equal none of real tokens."""


@dataclass(slots=True)
class _Index:
    """Where each n-gram was last followed by something: n-gram -> position of the token after its latest occurrence."""

    after_pair: dict[int, int] = field(default_factory=dict)
    after_triple: dict[int, int] = field(default_factory=dict)
    after_quad: dict[int, int] = field(default_factory=dict)
    last: int = _NO_TOKENS
    """The text's last token; below, its last 2, 3 and 4 tokens. Nothing has followed them yet."""
    pair: int = _NO_TOKENS
    triple: int = _NO_TOKENS
    quad: int = _NO_TOKENS
    num_tokens: int = 0
    """So many tokens have been read."""

    def read(self, token_ids: Sequence[int]) -> None:
        """Takes in what is new since the last call."""
        after_pair, after_triple, after_quad = self.after_pair, self.after_triple, self.after_quad
        last, pair, triple, quad = self.last, self.pair, self.triple, self.quad
        for position in range(self.num_tokens, len(token_ids)):
            after_pair[pair] = after_triple[triple] = after_quad[quad] = position
            token = token_ids[position]
            quad = triple << _TOKEN_BITS | token
            triple = pair << _TOKEN_BITS | token
            pair = last << _TOKEN_BITS | token
            last = token
        self.last, self.pair, self.triple, self.quad = last, pair, triple, quad
        self.num_tokens = len(token_ids)

    def look_up(self, drafted: Sequence[int]) -> tuple[int | None, int]:
        """What followed the end of the text with `drafted` behind it: position and length of the match; None: it never occurred."""
        last, pair, triple, quad = self.last, self.pair, self.triple, self.quad
        for token in drafted:
            quad = triple << _TOKEN_BITS | token
            triple = pair << _TOKEN_BITS | token
            pair = last << _TOKEN_BITS | token
            last = token
        if (start := self.after_quad.get(quad)) is not None:
            return start, 4
        if (start := self.after_triple.get(triple)) is not None:
            return start, 3
        return self.after_pair.get(pair), 2


class NgramDrafter:
    """A `Drafter` that needs no model. Token ids are 0 to 2^32 - 1."""

    name: Final = "ngram"

    def __init__(self) -> None:
        self._indices: dict[str, _Index] = {}

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        """Chains of exactly `max_depth` tokens, or nothing where no suffix has occurred before."""
        return [self._draft(task) for task in tasks]

    def guess(self, task: DraftTask, drafted: Sequence[int], max_tokens: int) -> Sequence[int]:
        """How the sequence would go on after `drafted`, which may never be its text and is not read into its index."""
        index = self._read(task)
        start, _ = index.look_up(drafted)
        if start is None:
            return ()
        ahead = list(task.token_ids[start : start + max_tokens])
        return _continuation(ahead if len(ahead) == max_tokens else [*ahead, *drafted], 0, max_tokens)

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:  # noqa: ARG002 - other drafters learn from them
        """Drops the sequence's index."""
        self._indices.pop(sequence_id, None)

    def _draft(self, task: DraftTask) -> Draft:
        start, size = self._read(task).look_up(())
        if start is None:
            return EMPTY_DRAFT
        depth = task.max_depth
        return Draft(DraftTree.chain(_continuation(task.token_ids, start, depth)), _confidences(size, depth))

    def _read(self, task: DraftTask) -> _Index:
        index = self._indices.get(task.sequence_id)
        if index is None:
            index = self._indices[task.sequence_id] = _Index()
        index.read(task.token_ids)
        return index


def _continuation(token_ids: Sequence[int], start: int, num_tokens: int) -> Sequence[int]:
    continuation = token_ids[start : start + num_tokens]
    if len(continuation) == num_tokens:
        return continuation
    period = len(continuation)
    return [continuation[offset % period] for offset in range(num_tokens)]


@cache
def _confidences(size: int, num_tokens: int) -> tuple[float, ...]:
    """Per token of a chain that a match of `size` tokens began.

    1 - 1/s, where s is the size grown by a part of the tokens before this one: they are right where this one counts, so the
    match is longer by then. Of this project's own files as token ids, 48, 53 and 67 % of the first tokens after matches of 2, 3
    and 4 were right, and, their parents being right, 63, 68 and 78 % of the fourth. In steps of 0.45 no two sizes share a value.
    """
    return tuple(1 - 1 / (size + 0.45 * depth) for depth in range(num_tokens))
