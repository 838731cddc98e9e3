"""What the engine asks of whoever guesses ahead."""

from collections.abc import Sequence
from typing import Protocol

from spotserve.speculation.tree import DraftTree


class Drafter(Protocol):
    """Guesses the next tokens of sequences. Any guess is safe: none can change an answer, only its speed."""

    def propose(self, sequence_id: str, token_ids: Sequence[int], *, max_tokens: int) -> DraftTree:
        """A tree of at most `max_tokens` nodes after `token_ids` (prompt and output; between calls it only grows)."""
        ...

    def forget(self, sequence_id: str) -> None:
        """The sequence is over, here at least. No-op when unknown."""
        ...
