"""A `TokenSource` that says what a script says: it stands for the relay, replicas and models at the gateway's border."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from model_specs import small_spec

from spotserve.core.errors import Overloaded
from spotserve.core.model import ModelSpec, Portion
from spotserve.core.request import FinishReason, Request, TokenDelta, TokenLogprob
from spotserve.gateway.calls import Call


def model_spec(vocabulary_size: int, context_tokens: int = 256) -> ModelSpec:
    return small_spec(
        name="scripted",
        num_layers=1,
        num_kv_heads=1,
        head_size=1,
        vocabulary_size=vocabulary_size,
        context_tokens=context_tokens,
        layer=(Portion(1, 1),),
        embedding=(Portion(1, 1),),
        head=(Portion(1, 1),),
        value_bytes=1,
    )


@dataclass(frozen=True)
class Reply:
    """What one request gets."""

    token_ids: tuple[int, ...]
    finish: FinishReason = FinishReason.STOP
    error: str | None = None
    raises: Exception | None = None
    """Raised by the stream in place of its end."""
    group: int = 1
    """Tokens per delta."""
    end_apart: bool = False
    """The finish reason comes in an empty delta of its own."""
    draft_tokens: int = 0
    """Drafted for every delta, which accepts all of its tokens but the last; 0: nothing was drafted."""
    drafter: str = "ngram"
    hold_at: int | None = None
    """Wait before this position until `ScriptedSource.go` is set, or the request is cancelled."""


@dataclass
class ScriptedStream:
    """One choice's deltas, fresh from position 0."""

    source: "ScriptedSource"
    request: Request
    reply: Reply
    position: int = 0
    ended: bool = False

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self

    async def __anext__(self) -> TokenDelta:
        if self.ended:
            raise StopAsyncIteration
        reply = self.reply
        end = min(self.position + reply.group, len(reply.token_ids))
        if reply.hold_at is not None and self.position <= reply.hold_at < max(end, self.position + 1):
            await self.source.wait(self.request.request_id)
        if self.request.request_id in self.source.cancelled:
            return self._delta((), FinishReason.CANCELLED)
        if self.position == len(reply.token_ids):
            if reply.raises is not None:
                raise reply.raises
            return self._delta((), reply.finish)
        await asyncio.sleep(0)
        tokens = reply.token_ids[self.position : end]
        is_last = end == len(reply.token_ids) and not reply.end_apart and reply.raises is None
        return self._delta(tokens, reply.finish if is_last else None)

    def _delta(self, token_ids: tuple[int, ...], finish: FinishReason | None) -> TokenDelta:
        sampling, start = self.request.sampling, self.position
        self.position += len(token_ids)
        self.ended = finish is not None
        logprobs = gaps = None
        if sampling.logprobs is not None:
            logprobs = tuple(fake_logprob(start + i, token_id, sampling.logprobs) for i, token_id in enumerate(token_ids))
        if sampling.gaps:
            gaps = tuple(float(start + i) / 4 for i in range(len(token_ids)))
        return TokenDelta(
            request_id=self.request.request_id,
            epoch=0,
            position=start,
            token_ids=token_ids,
            logprobs=logprobs,
            gaps=gaps,
            finish_reason=finish,
            error=self.reply.error if finish is FinishReason.FAILED else None,
            draft_tokens=self.reply.draft_tokens if token_ids else 0,
            accepted_tokens=min(self.reply.draft_tokens, len(token_ids) - 1) if token_ids else 0,
            drafter=self.reply.drafter if token_ids and self.reply.draft_tokens else "",
        )


def fake_logprob(position: int, token_id: int, top: int) -> TokenLogprob:
    """The fourth best is impossible: minus infinity, which JSON does not know."""
    values = [-0.5 * position - i if i < 3 else -math.inf for i in range(top)]
    return TokenLogprob(-0.5 * position, tuple((token_id + i, value) for i, value in enumerate(values)))


@dataclass
class ScriptedSource:
    """Answers each request with `respond(request)`. `overloads`: how many submissions are refused first."""

    respond: Callable[[Request], Reply]
    model: ModelSpec | None
    ready: bool = True
    overloads: int = 0
    crashes: int = 0
    retry_after_s: float = 0.01
    calls: dict[str, Call] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    attached: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    _waiting: dict[str, asyncio.Event] = field(default_factory=dict)

    async def submit(self, call: Call) -> tuple[ScriptedStream, ...]:
        if self.crashes:
            self.crashes -= 1
            raise RuntimeError("secret detail of the inside")
        if self.overloads:
            self.overloads -= 1
            raise Overloaded("Too many requests wait for a replica.", retry_after_s=self.retry_after_s)
        self.calls[call.call_id] = call
        return self._streams(call)

    async def reattach(self, call_id: str) -> tuple[Call, tuple[ScriptedStream, ...]] | None:
        call = self.calls.get(call_id)
        return None if call is None else (call, self._streams(call))

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)
        self._waiting.setdefault(request_id, asyncio.Event()).set()
        self.changed.set()

    def withdraw(self, call_id: str) -> None:
        for one in self.calls[call_id].requests:
            self.cancel(one.request_id)

    def detach(self, call_id: str) -> None:
        self.detached.append(call_id)
        self.changed.set()

    def release(self, call_id: str) -> None:
        self.released.append(call_id)
        self.changed.set()

    async def wait(self, request_id: str) -> None:
        """Until the script may go on."""
        cancelled = self._waiting.setdefault(request_id, asyncio.Event())
        waits = [asyncio.create_task(self.go.wait()), asyncio.create_task(cancelled.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _streams(self, call: Call) -> tuple[ScriptedStream, ...]:
        self.attached.append(call.call_id)
        return tuple(ScriptedStream(self, request, self.respond(request)) for request in call.requests)
