"""The border between HTTP and tokens: what a call is, and what the gateway wants from whoever makes its tokens.

Invariant: a `Call` and its token streams determine every byte of its answer. The envelope holds all response settings, so a
gateway that has never seen the client can rebuild a stream that a dead one began. Does not know HTTP, text or replicas.
"""

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

from spotserve.core.model import ModelSpec
from spotserve.core.request import Request, TokenDelta


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a call's tokens are told to the client."""

    kind: Literal["chat", "completion"]
    model: str
    created_s: int
    """Seconds since the Unix epoch, the same on every event."""
    stream: bool = False
    include_usage: bool = False
    """A stream ends with an event that carries the usage."""
    choices_per_prompt: int = 1
    """Prompt tokens are counted once for this many choices."""
    stop: tuple[str, ...] = ()
    include_stop_text: bool = False
    """The stop string, or the text of the stop token, stays in the answer."""
    show_special_tokens: bool = False
    echo: tuple[str, ...] = ()
    """Text put before the choices of each prompt; empty: no echo."""
    top_logprobs: int | None = None
    """None: no logprobs in the answer; k: with the k most probable tokens."""
    return_token_ids: bool = False
    return_gaps: bool = False
    return_speculation: bool = False
    """The usage says what became of draft tokens."""


class Call(msgspec.Struct, frozen=True):
    """One HTTP request as tokens: a `Request` per choice, with ids `{call_id}-{index}`."""

    call_id: str
    envelope: bytes
    """An `Envelope`, packed; opaque below the gateway."""
    requests: tuple[Request, ...]


def pack_envelope(envelope: Envelope) -> bytes:
    """The bytes that travel with a call."""
    return msgspec.msgpack.encode(envelope)


def unpack_envelope(packed: bytes) -> Envelope:
    """The settings that `pack_envelope` was given."""
    return msgspec.msgpack.decode(packed, type=Envelope)


class TokenStream(Protocol):
    """The tokens of one choice."""

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        """Deltas in order, every position exactly once; only the last one may be empty, and it alone has a finish reason."""


class TokenSource(Protocol):
    """Whoever makes tokens. It answers for unbroken streams; the gateway answers for what the client reads.

    Every `submit` and every `reattach` that found its call is followed by exactly one `release` or `detach`. A client may come
    back before its old connection is known to be dead, so a source counts attachments.
    """

    @property
    def model(self) -> ModelSpec | None:
        """What is served; None until a replica has loaded it."""

    @property
    def ready(self) -> bool:
        """Some replica serves."""

    async def submit(self, call: Call) -> tuple[TokenStream, ...]:
        """Start a call; one stream per request.

        Raises:
            Overloaded: there is no room now.
        """

    async def reattach(self, call_id: str) -> tuple[Call, tuple[TokenStream, ...]] | None:
        """A call that is under way or kept, with whole streams from position 0; None: not known."""

    def cancel(self, request_id: str) -> None:
        """No more tokens of this request are wanted. Harmless when it has ended, or was cancelled before."""

    def withdraw(self, call_id: str) -> None:
        """The caller does not want this call (which it has just attached to) any more, nor its record."""

    def detach(self, call_id: str) -> None:
        """One reader left; if it was the last, the source cancels the call after its grace unless it is re-attached."""

    def release(self, call_id: str) -> None:
        """The answer was written in full. Its last bytes may still be lost on the way: a source does well to keep it a while."""
