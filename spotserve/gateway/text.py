"""Token ids to text, one token at a time: detokenisation across token borders and stop strings across both.

Invariant: what has been said after k tokens is a function of the first k tokens alone, however they were grouped into deltas.
So a stream replayed from position 0 says the same text, and can go on from any position. The work per token is constant,
amortised; nothing is decoded twice. Does not know JSON, HTTP or where tokens come from.
"""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

REPLACEMENT = "\ufffd"
MAX_PENDING_TOKENS = 8
"""A character of UTF-8 has at most 4 bytes, so at most 4 tokens: a longer tail of broken text will never mend."""


class Detokenizer(Protocol):
    """Turns a sequence of ids into text, incrementally."""

    def push(self, token_id: int) -> str:
        """Text that became final with this token; nothing while a character is incomplete."""

    def flush(self) -> str:
        """Text of what is still incomplete: replacement characters. Ends the sequence."""


class ByteDetokenizer:
    """For tokenizers whose tokens are byte strings: a table and an incremental UTF-8 decoder. Exact."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._token_bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._token_bytes.get(token_id, b""))

    def flush(self) -> str:
        return self._decode(b"", final=True)


class WindowDetokenizer:
    """For all other tokenizers: text of a token is what it adds to the decoding of the few tokens before it.

    The window starts at the last token whose text was final, so that a decoder which treats the start of a text in its own way
    (a stripped leading space) sees the same start both times.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], silent_token_ids: frozenset[int]) -> None:
        self._decode = decode
        self._silent = silent_token_ids
        self._window: list[int] = []
        self._context_tokens = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        if token_id in self._silent:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        incomplete = len(text) <= len(self._context_text) or text.endswith(REPLACEMENT)
        if incomplete and len(self._window) - self._context_tokens < MAX_PENDING_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        added = text[len(self._context_text) :]
        self._window = self._window[self._context_tokens :]
        self._context_tokens = len(self._window)
        self._context_text = self._decode(self._window)
        return added


class _StopString:
    """Knuth, Morris and Pratt's automaton: how much of one stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallback = _prefix_function(stop)

    def step(self, character: str) -> bool:
        """Read one character; True when it completes the stop string."""
        if self.matched == len(self.stop):
            self.matched = self._fallback[-1]
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self.stop[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.stop)

    @property
    def open_length(self) -> int:
        """Characters that this stop string may still claim; one that was complete and did not count claims its own overlap."""
        return self._fallback[-1] if self.matched == len(self.stop) else self.matched


def _prefix_function(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = lengths[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        lengths[index] = length
    return lengths


class StopScanner:
    """Lets text through up to the first stop string, and holds back only what may be the beginning of one.

    The first stop string is the one that is complete first; of two that end together, the longer.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._automata = [_StopString(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text; None: none yet."""

    def push(self, text: str, *, armed: bool) -> str:
        """What may be said now. While not `armed`, complete stop strings are text like any other."""
        assert self.matched is None
        if not self._automata:
            return text
        start = len(self._held)
        buffer = self._held + text
        for index, character in enumerate(text, start + 1):
            complete = [automaton for automaton in self._automata if automaton.step(character)]
            if complete and armed:
                self.matched = complete[0].stop
                self._held = ""
                return buffer[:index] if self._include else buffer[: index - len(self.matched)]
        hold = max(automaton.open_length for automaton in self._automata)
        self._held = buffer[len(buffer) - hold :]
        return buffer[: len(buffer) - hold]

    def flush(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


class TextRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a choice's text leaves out and where it ends."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    """No stop string counts before this many tokens."""
    silent_token_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence and say nothing."""


class ChoiceText:
    """The text of one choice, token by token."""

    def __init__(self, detokenizer: Detokenizer, rules: TextRules) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(rules.stop, include=rules.include_stop)
        self._silent = rules.silent_token_ids
        self._min_tokens = rules.min_tokens
        self.tokens = 0
        """Tokens read; those after a stop string are not."""
        self.characters = 0
        """Characters of text made so far, held back or not: where the next token's text starts."""

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._scanner.matched

    def push(self, token_id: int) -> str:
        """Text that can be said now that this token is known."""
        self.tokens += 1
        if token_id in self._silent:
            return ""
        text = self._detokenizer.push(token_id)
        self.characters += len(text)
        return self._scanner.push(text, armed=self.tokens >= self._min_tokens) if text else ""

    def finish(self) -> str:
        """The rest, once no more tokens will come: incomplete characters and text held back. May itself hit a stop string."""
        if self.stopped is not None:
            return ""
        text = self._scanner.push(self._detokenizer.flush(), armed=self.tokens >= self._min_tokens)
        return text if self.stopped is not None else text + self._scanner.flush()
