"""An answer as server-sent events, written straight to the ASGI server.

Readers of the choices append finished events to one buffer; one writer sends whatever has gathered. So a token costs one small
append, and tokens that are ready together cost one send. Invariant: the call ends in exactly one of three ways - released (its
end was written), or detached (the client left, or this process stops), never both.
"""

import asyncio
from collections.abc import Mapping, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from spotserve.gateway.answer import Answer, Choice
from spotserve.gateway.calls import TokenSource, TokenStream
from spotserve.gateway.chunks import DONE, PING, Cursor, EventWriter, error_event
from spotserve.gateway.problems import Problem
from spotserve.gateway.reading import client_left, read_choice

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(Response):
    """The response that streams one call. `cursor` is where the client stands; None: at the very beginning."""

    media_type = "text/event-stream"

    def __init__(
        self,
        source: TokenSource,
        answer: Answer,
        streams: Sequence[TokenStream],
        writer: EventWriter,
        *,
        cursor: Cursor | None,
        keep_alive_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers={**STREAM_HEADERS, **headers})
        del self.headers["content-length"]
        self._source = source
        self._answer = answer
        self._streams = streams
        self._writer = writer
        self._cursor = cursor
        self._keep_alive_s = keep_alive_s
        self._buffer = bytearray()
        self._wake = asyncio.Event()
        self._running = len(streams)
        self._problem: Problem | None = None
        self._client_left = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        delivered = False
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if self._cursor is None:
                self._buffer += self._writer.opening()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._watch(receive), name=f"watch {self._answer.call_id}")]
                for choice, stream in zip(self._answer.choices, self._streams, strict=True):
                    reader = read_choice(self._source, choice, stream, self._changed)
                    tasks.append(group.create_task(reader, name=f"read {choice.request_id}"))
                await self._write(send)
                for task in tasks:
                    task.cancel()
            if not self._client_left:
                await send({"type": "http.response.body", "body": self._ending(), "more_body": False})
                delivered = True
        finally:
            if delivered:
                self._source.release(self._answer.call_id)
            else:
                self._source.detach(self._answer.call_id)

    def _changed(self, choice: Choice) -> None:
        """A reader's choice has moved: append what it has to say."""
        finish = choice.finish
        self._buffer += self._writer.progress(choice)
        if finish is not None:
            self._running -= 1
            if finish.problem is not None:
                self._problem = self._problem or finish.problem
            elif not choice.finish_is_known:
                self._buffer += self._writer.end(choice)
        if self._buffer or self._problem is not None or not self._running:
            self._wake.set()

    async def _write(self, send: Send) -> None:
        """Send events as they gather, and a comment after a long silence, until all is said."""
        while not self._client_left:
            if self._buffer:
                events = bytes(self._buffer)
                self._buffer.clear()
                await send({"type": "http.response.body", "body": events, "more_body": True})
                continue
            if self._problem is not None or not self._running:
                return
            self._wake.clear()
            try:
                async with asyncio.timeout(self._keep_alive_s):
                    await self._wake.wait()
            except TimeoutError:
                await send({"type": "http.response.body", "body": PING, "more_body": True})

    async def _watch(self, receive: Receive) -> None:
        await client_left(receive)
        self._client_left = True
        self._wake.set()

    def _ending(self) -> bytes:
        """What comes after all choices: the problem if there was one, else the usage if it was asked for."""
        if self._problem is not None:
            for choice in self._answer.choices:
                if choice.finish is None:
                    self._source.cancel(choice.request_id)
            return error_event(self._problem) + DONE
        if self._answer.envelope.include_usage and not (self._cursor is not None and self._cursor.usage_sent):
            return self._writer.usage() + DONE
        return DONE
