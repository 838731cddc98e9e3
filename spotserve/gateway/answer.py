"""The progress of a call's choices: deltas of tokens in, pieces of text with their extras out, and the count of what was used.

Invariant: a piece depends on the tokens alone, not on how they were grouped, so skipping the first `skip` positions of a replayed
stream leaves exactly what a client that has read so far still lacks. A choice's positions are its tokens and, one further, its end.
Does not know JSON, events or HTTP.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from spotserve.core.request import FinishReason, Request, TokenDelta, TokenLogprob
from spotserve.gateway.acceptance import VerifiedDraft, completion_tokens_details
from spotserve.gateway.calls import Call, Envelope, unpack_envelope
from spotserve.gateway.problems import CANCELLED, Problem, failed_problem
from spotserve.gateway.text import ChoiceText, TextRules
from spotserve.gateway.tokenizer import Tokenizer


class ScoredToken(msgspec.Struct, frozen=True):
    """A token with its log-probability and where its text begins in the choice's text, in characters."""

    token_id: int
    logprob: TokenLogprob
    text_offset: int


class Piece(msgspec.Struct):
    """What a choice has to say and has not said yet."""

    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    scores: list[ScoredToken] = msgspec.field(default_factory=list)
    gaps: list[float] = msgspec.field(default_factory=list)


class Finish(msgspec.Struct, frozen=True):
    """How a choice ended."""

    reason: str
    """`stop` or `length`."""
    stop_reason: str | int | None = None
    """The stop string, or the stop token that the caller named."""
    problem: Problem | None = None
    """Why there is no proper end."""


class Choice:
    """One choice of an answer. Owned by the coroutine that reads its token stream."""

    def __init__(self, request: Request, envelope: Envelope, tokenizer: Tokenizer, *, index: int, skip: int = 0) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self.index = index
        self.echo = envelope.echo[index // envelope.choices_per_prompt] if envelope.echo else ""
        self.finish: Finish | None = None
        self.piece = Piece()
        self.said_position = skip
        """Positions that the client knows, once it has read all that was written."""
        self.drafts: Counter[VerifiedDraft] | None = Counter() if envelope.return_speculation else None
        """Drafts that were verified for it; None: nobody asked."""
        self._skip = skip
        self._stop_token_ids = sampling.stop_token_ids
        self._keeps_ids = envelope.return_token_ids
        self._scored = envelope.top_logprobs is not None
        self._keeps_gaps = envelope.return_gaps
        self._text = ChoiceText(
            tokenizer.detokenizer(show_special_tokens=envelope.show_special_tokens),
            TextRules(
                stop=envelope.stop,
                include_stop=envelope.include_stop_text,
                min_tokens=sampling.min_tokens,
                silent_token_ids=frozenset(() if envelope.include_stop_text else sampling.stop_token_ids),
            ),
        )

    @property
    def tokens(self) -> int:
        """Tokens that count: those up to a stop string."""
        return self._text.tokens

    @property
    def finish_is_known(self) -> bool:
        """The client has the end already."""
        return self._skip > self.tokens

    def take(self, delta: TokenDelta) -> None:
        """Read a delta. After it `piece` holds what can be said and `finish` whether this was the end."""
        assert self.finish is None and delta.position == self.tokens
        piece, text = self.piece, self._text
        for offset, token_id in enumerate(delta.token_ids):
            start = text.characters
            said = text.push(token_id)
            if text.tokens > self._skip:
                if said:
                    piece.text += said
                self._keep_extras(piece, delta, offset, start)
            if text.stopped is not None:
                self.finish = Finish("stop", text.stopped)
                break
        if delta.finish_reason is not None and self.finish is None:
            self._end(delta)
        if self.drafts is not None and delta.draft_tokens:
            accepted = min(delta.accepted_tokens, text.tokens - delta.position)  # none beyond a stop string
            self.drafts[VerifiedDraft(delta.drafter, delta.draft_tokens, accepted)] += 1

    def _keep_extras(self, piece: Piece, delta: TokenDelta, offset: int, start: int) -> None:
        token_id = delta.token_ids[offset]
        if self._keeps_ids:
            piece.token_ids.append(token_id)
        if self._scored and delta.logprobs is not None:
            piece.scores.append(ScoredToken(token_id, delta.logprobs[offset], start))
        if self._keeps_gaps and delta.gaps is not None:
            piece.gaps.append(delta.gaps[offset])

    def _end(self, delta: TokenDelta) -> None:
        match delta.finish_reason:
            case FinishReason.STOP:
                last = delta.token_ids[-1] if delta.token_ids else None
                self.finish = Finish("stop", last if last in self._stop_token_ids else None)
            case FinishReason.CANCELLED:
                self.finish = Finish("stop", problem=CANCELLED)
            case FinishReason.FAILED:
                self.finish = Finish("stop", problem=failed_problem(delta.error))
            case _:
                self.finish = Finish("length")

    def fail(self, problem: Problem) -> None:
        """The source gave up."""
        self.finish = Finish("stop", problem=problem)

    def last_text(self) -> str:
        """What the end sets free: text held back, incomplete characters. A stop string in it makes the reason `stop`."""
        assert self.finish is not None
        text = self._text.finish()
        if self._text.stopped is not None and self.finish.stop_reason is None:
            self.finish = Finish("stop", self._text.stopped)
        return text


class Answer:
    """All choices of a call."""

    def __init__(self, call: Call, tokenizer: Tokenizer, positions: Sequence[int] | None = None) -> None:
        """`positions` says for each choice how many of its positions the client has; None: nothing at all."""
        self.call_id = call.call_id
        self.envelope = unpack_envelope(call.envelope)
        skips = positions or [0] * len(call.requests)
        self.choices = tuple(
            Choice(request, self.envelope, tokenizer, index=index, skip=skip)
            for index, (request, skip) in enumerate(zip(call.requests, skips, strict=True))
        )
        prompts = call.requests[:: self.envelope.choices_per_prompt]
        self.prompt_tokens = sum(len(request.prompt_token_ids) for request in prompts)
        self.prompts = tuple(request.prompt_token_ids for request in prompts)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the call, each counted once, whatever was computed how often; and what became of drafts, if asked for."""
        completion_tokens = sum(choice.tokens for choice in self.choices)
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }
        if self.envelope.return_speculation:
            drafts = sum((choice.drafts for choice in self.choices if choice.drafts is not None), Counter[VerifiedDraft]())
            usage["completion_tokens_details"] = completion_tokens_details(drafts)
        return usage
