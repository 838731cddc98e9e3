"""One answer as it comes from a server: asked for, read, and asked for again from where it was cut.

Lives on the event loop of its engine. What it reads goes out through `deliver`, in order, and is never taken back; its positions
continue those of the request, whoever made the tokens before. Does not know who listens.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic, perf_counter

from spotserve.core.errors import InvalidRequest, ModelError, Overloaded, PeerLost, WireError
from spotserve.core.request import FinishReason, Request, TokenLogprob
from spotserve.engine.remote.dialect import Ask, Piece
from spotserve.engine.remote.discovery import Server
from spotserve.engine.remote.upstream import Patience, Upstream
from spotserve.engine.remote.vocabulary import REPLACEMENT, RunningTokens, Vocabulary

_MIX = 0x9E3779B97F4A7C15
"""Odd, far from powers of two: Knuth's multiplicative hash for 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Tokens of an answer, and perhaps its end."""

    at_s: float
    """By `perf_counter`."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where answers come from: what all streams of an engine share."""

    upstream: Upstream
    server: Server
    vocabulary: Vocabulary
    context_tokens: int
    patience: Patience
    room: asyncio.Semaphore
    """As many streams as may run at once."""


class AnswerStream:
    """The tokens of one request."""

    def __init__(
        self, source: Source, request: Request, emitted_token_ids: tuple[int, ...], deliver: Callable[[Arrival], None]
    ) -> None:
        self._source = source
        self._request = request
        self._token_ids = [*request.prompt_token_ids, *emitted_token_ids]
        self._recomputed_tokens = len(self._token_ids) if emitted_token_ids else 0
        self._max_tokens = min(request.sampling.max_tokens, source.context_tokens - len(request.prompt_token_ids))
        self._deliver = deliver
        self.is_running = False
        """Whether the server has been asked; until then it waits for room."""

    async def run(self) -> None:
        """Delivers everything up to the end of the answer.

        Raises:
            ModelError: the server serves nobody like this any more.
            PeerLost: it is gone.
        """
        async with self._source.room:
            self.is_running = True
            try:
                await self._insist()
            except InvalidRequest as error:
                self._give(finish_reason=FinishReason.FAILED, error=str(error))
            except ModelError as error:
                raise ModelError(f"{self._source.upstream.name}: {error}") from error

    async def _insist(self) -> None:
        """Asks again, from the last token, as often as patience allows."""
        patience = self._source.patience
        failures, busy_since_s = 0, monotonic()
        while True:
            known = len(self._token_ids)
            pause_s = patience.pause_s * 2**failures
            try:
                await self._read()
            except Overloaded as error:
                if monotonic() - busy_since_s > patience.busy_s:
                    raise InvalidRequest(f"{self._source.upstream.name} stays overloaded: {error}") from error
                pause_s = max(pause_s, min(error.retry_after_s, patience.answer_s))
            except WireError as error:
                failures = 1 if len(self._token_ids) > known else failures + 1
                if failures > patience.retries:
                    await self._give_up(error)
            else:
                return
            if len(self._token_ids) > known:
                busy_since_s, self._recomputed_tokens = monotonic(), len(self._token_ids)
            await asyncio.sleep(pause_s)

    async def _give_up(self, error: WireError) -> None:
        """A server that is well fails at this request, which would fail everywhere; one that is not has left them all."""
        upstream = self._source.upstream
        if await upstream.is_well(self._source.server.dialect.health_path):
            raise InvalidRequest(f"{upstream.name} broke this answer off again and again: {error}") from error
        raise PeerLost(f"{upstream.name} is gone: {error}") from error

    async def _read(self) -> None:
        """One attempt.

        Raises:
            WireError: the stream ended before the answer did.
        """
        dialect = self._source.server.dialect
        running = RunningTokens(self._source.vocabulary, self._token_ids)
        async with aclosing(self._source.upstream.events(dialect.path, dialect.body(self._ask()))) as events:
            async for data in events:
                piece = dialect.read(data)
                if self._take(self._tokens_of(piece, running), piece):
                    return
        raise WireError("the stream ended in the middle of an answer")

    def _ask(self) -> Ask:
        sampling, dialect = self._request.sampling, self._source.server.dialect
        position = self._position
        max_tokens = self._max_tokens - position
        return Ask(
            model=self._source.server.model,
            token_ids=tuple(self._token_ids),
            text="" if dialect.takes_token_ids else self._source.vocabulary.prompt_text(self._token_ids),
            max_tokens=max_tokens,
            min_tokens=min(max(0, sampling.min_tokens - position), max_tokens),
            # a server draws from the start of a seed's noise whatever the prompt: going on must not draw the same again
            seed=(sampling.seed + position * _MIX) % 2**64,
            sampling=sampling,
        )

    @property
    def _position(self) -> int:
        return len(self._token_ids) - len(self._request.prompt_token_ids)

    def _tokens_of(self, piece: Piece, running: RunningTokens) -> tuple[int, ...]:
        """Ids that this piece makes final: its own, or those of its text."""
        token_ids = piece.token_ids
        if token_ids is not None and piece.text and self._source.server.dialect.omits_split_characters:
            said = self._source.vocabulary.decode(token_ids)
            token_ids = None if REPLACEMENT in said and REPLACEMENT not in piece.text else token_ids
        if token_ids is None:
            final = running.push(piece.text)
            return final + running.flush() if piece.finish_reason is not None else final
        final = running.flush() + token_ids
        running.note(token_ids)
        return final

    def _take(self, token_ids: tuple[int, ...], piece: Piece) -> bool:
        """Hands on what is new, up to the end; True when that is reached.

        Raises:
            WireError: these are no tokens of the model, or their log-probabilities are missing.
        """
        sampling, finish_reason = self._request.sampling, piece.finish_reason
        if any(not 0 <= token_id < self._source.vocabulary.size for token_id in token_ids):
            raise WireError(f"a token that is not in the vocabulary of {self._source.vocabulary.size}: another model's tokenizer?")
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = tuple(TokenLogprob(each.logprob, each.top[: sampling.logprobs]) for each in piece.logprobs or ())
            if len(logprobs) != len(token_ids):
                raise WireError(f"{len(logprobs)} log-probabilities for {len(token_ids)} tokens")
        for place, token_id in enumerate(token_ids):
            position = self._position + place
            if token_id in sampling.stop_token_ids and position >= sampling.min_tokens:
                token_ids, finish_reason = token_ids[: place + 1], FinishReason.STOP
                break
            if position + 1 >= self._max_tokens:
                is_last = place + 1 == len(token_ids)
                token_ids, finish_reason = token_ids[: place + 1], (is_last and finish_reason) or FinishReason.LENGTH
                break
        if token_ids or finish_reason is not None:
            self._token_ids += token_ids
            self._give(token_ids, logprobs[: len(token_ids)] if logprobs is not None else None, finish_reason)
        return finish_reason is not None

    def _give(
        self,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> None:
        recomputed, self._recomputed_tokens = self._recomputed_tokens, 0
        self._deliver(
            Arrival(
                at_s=perf_counter(),
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=finish_reason,
                error=error,
                recomputed_tokens=recomputed,
            )
        )
