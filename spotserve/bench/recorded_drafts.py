"""What drafters would have drafted at every place of real answers, and how much of it was right: any controller can be replayed.

An answer does not depend on speculation. So what is drafted at a place of it, and how far the target says the same, are facts
that no decision changes, and a machine of known cost can be played over them (`tests/speculation/recorded.py`). Knows no torch.
"""

import zlib
from itertools import accumulate
from typing import Final

import msgspec

from spotserve.speculation.cost import PassCost, StepCost

SURE: Final = 255
"""The byte of a confidence of 1."""


class RecordedGuesses(msgspec.Struct, frozen=True, kw_only=True):
    """Of one drafter, at every place of one answer; chains."""

    lengths: bytes
    """Per place, tokens of the draft."""
    accepted: bytes
    """Per place, how many of them the target says, too."""
    confidences: bytes
    """Per token of all drafts, of `SURE`."""

    def starts(self) -> list[int]:
        """Per place where its confidences begin."""
        return [0, *accumulate(self.lengths)][:-1]


class RecordedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Its first token came with the prompt, so the first place is that of the second."""

    kind: str
    prompt_tokens: int
    guesses: dict[str, RecordedGuesses]
    """By drafter."""

    @property
    def places(self) -> int:
        """Tokens that are said after the first."""
        return min(len(guesses.lengths) for guesses in self.guesses.values())


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """Answers of one target, with what its steps and its drafters took on the machine of the recording."""

    target: str
    model: str
    """Name of the drafter that computes."""
    step: StepCost
    drafting: dict[str, PassCost]
    """By drafter."""
    answers: list[RecordedAnswer]

    def encode(self) -> bytes:
        """As a file holds it."""
        return zlib.compress(msgspec.msgpack.encode(self), level=9)

    @classmethod
    def decode(cls, data: bytes) -> "Recording":
        """What `encode` made."""
        return msgspec.msgpack.decode(zlib.decompress(data), type=cls)
