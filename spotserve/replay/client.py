"""Sends one completion request and notes when each token came.

It shares its machine with the system under test, so it is lean: asyncio streams, HTTP/1.1 by hand, one typed JSON decoder. It
never retries a request; when a stream breaks off it takes the same stream up again at the position it has (`Last-Event-ID`),
a bounded number of times. Each output position is kept once. Knows nothing of timelines or fleets.
"""

import asyncio
import re
import ssl
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

import msgspec

from spotserve.core.clock import Clock
from spotserve.core.errors import ConfigError
from spotserve.replay.event_stream import ServerSentEvent, read_body, read_events, read_head
from spotserve.replay.record import RequestRecord
from spotserve.replay.timeline import Arrive

REATTACH_TRIES = 8
"""Times a broken stream is taken up again before its request counts as lost."""
REATTACH_PAUSE_S = 0.25
"""Pause before the second and later tries in a row without news."""


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    gaps: list[float] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Problem(msgspec.Struct):
    message: str = ""


class _Chunk(msgspec.Struct):
    """The parts of a completion chunk, or of an error body, that a replay reads."""

    id: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Problem | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class StreamBroken(Exception):
    """The connection ended before the stream did."""


class Refused(Exception):
    """The system answered with an error status."""


class Answer:
    """What has come of one request so far; the mutable half of a `RequestRecord`."""

    def __init__(self) -> None:
        self.request_id = ""
        self.prompt_tokens = 0
        self.token_ids: list[int] = []
        self.gaps: list[float] = []
        self.event_times_s: list[float] = []
        self.event_tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.last_event_id: str | None = None
        self.done = False
        self.reattached = 0
        self.duplicate_tokens = 0
        self.contradicted_tokens = 0

    def take(self, event: ServerSentEvent, now_s: float) -> None:
        """Adds what an event brings."""
        if event.data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = _decode_chunk(event.data)
        except msgspec.DecodeError as problem:
            self.error = f"an event that is no completion chunk: {problem}"
            return
        self.request_id = self.request_id or chunk.id
        if chunk.error is not None:
            self.error = chunk.error.message or "an error without a message"
        for choice in chunk.choices:
            if choice.token_ids:
                end = _end_position(event.event_id, is_final=choice.finish_reason is not None)
                first = len(self.token_ids) if end is None else end - len(choice.token_ids)
                self._take_tokens(choice.token_ids, choice.gaps or [], first, now_s)
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.last_event_id = event.event_id or self.last_event_id
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            if self.error is None and chunk.usage.completion_tokens != len(self.token_ids):
                self.error = f"{len(self.token_ids)} tokens came, the system says {chunk.usage.completion_tokens}"

    def _take_tokens(self, token_ids: list[int], gaps: list[float], first: int, now_s: float) -> None:
        """Keeps what extends the prefix; `first` is the output position of the first token."""
        have = len(self.token_ids)
        if first > have:
            self.error = f"positions {have} to {first - 1} never came"
            return
        known = min(have - first, len(token_ids))
        self.duplicate_tokens += known
        self.contradicted_tokens += sum(self.token_ids[first + i] != token_ids[i] for i in range(known))
        if known == len(token_ids):
            return
        self.token_ids += token_ids[known:]
        self.gaps += gaps[known:]
        self.event_times_s.append(now_s)
        self.event_tokens.append(len(token_ids) - known)

    def record(self, arrival: Arrive, *, scheduled_s: float, sent_s: float, ended_s: float) -> RequestRecord:
        """The frozen whole."""
        error = self.error or (None if self.finish_reason else "the stream ended without a finish reason")
        return RequestRecord(
            arrival=arrival,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            ended_s=ended_s,
            request_id=self.request_id,
            prompt_tokens=self.prompt_tokens,
            token_ids=tuple(self.token_ids),
            gaps=tuple(self.gaps),
            event_times_s=tuple(self.event_times_s),
            event_tokens=tuple(self.event_tokens),
            finish_reason=self.finish_reason,
            error=error,
            reattached=self.reattached,
            duplicate_tokens=self.duplicate_tokens,
            contradicted_tokens=self.contradicted_tokens,
        )


class StreamClient:
    """Sends completion requests to one system."""

    def __init__(self, url: str, *, model: str, clock: Clock, patience_s: float, api_key: str | None = None) -> None:
        """`patience_s`: a request without a whole answer after this long is given up.

        Raises:
            ConfigError: `url` is not an http or https address.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url={url!r}: expected http://HOST:PORT")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/")
        self._model = model
        self._clock = clock
        self._patience_s = patience_s
        self._headers = {"Host": parts.netloc, "Connection": "close", "Accept": "text/event-stream"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def complete(self, arrival: Arrive, prompt: str, *, scheduled_s: float) -> RequestRecord:
        """Sends the request now and follows its stream to the end. Never raises for what the system does."""
        answer = Answer()
        body = self._body(arrival, prompt)
        sent_s = self._clock.now_s()
        try:
            async with asyncio.timeout(self._patience_s):
                await self._follow(answer, body)
        except TimeoutError:
            answer.error = f"no whole answer within {self._patience_s:g} s"
        except (Refused, StreamBroken) as problem:
            answer.error = str(problem)
        return answer.record(arrival, scheduled_s=scheduled_s, sent_s=sent_s, ended_s=self._clock.now_s())

    def _body(self, arrival: Arrive, prompt: str) -> bytes:
        return msgspec.json.encode(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": arrival.output_tokens,
                "temperature": arrival.temperature,
                "seed": arrival.seed,
                "ignore_eos": True,
                "return_token_ids": True,
                "return_gaps": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )

    async def _follow(self, answer: Answer, body: bytes) -> None:
        """The first stream, and the ones that take it up where it broke off."""
        try:
            await self._read_stream(answer, "POST", "/v1/completions", body, {"Content-Type": "application/json"})
            return
        except StreamBroken:
            if not answer.request_id:
                raise  # nothing to ask for: whether the system has the request cannot be known
        problem: StreamBroken | None = None
        for attempt in range(REATTACH_TRIES):
            tokens_before = len(answer.token_ids)
            answer.reattached += 1
            headers = {} if answer.last_event_id is None else {"Last-Event-ID": answer.last_event_id}
            try:
                await self._read_stream(answer, "GET", f"/v1/requests/{quote(answer.request_id, safe='')}/stream", b"", headers)
                return
            except StreamBroken as broken:
                problem = broken
            if len(answer.token_ids) == tokens_before:
                await asyncio.sleep(REATTACH_PAUSE_S * 2**attempt)
        raise StreamBroken(f"still broken after {REATTACH_TRIES} tries: {problem}")

    async def _read_stream(self, answer: Answer, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """One connection, until `[DONE]`.

        Raises:
            StreamBroken: the connection could not be made, or ended too early.
            Refused: the status is not 200.
        """
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except OSError as problem:
            raise StreamBroken(f"no connection: {problem}") from problem
        try:
            writer.write(self._head(method, path, headers, len(body)) + body)
            status, response_headers = await read_head(reader)
            pieces = read_body(reader, response_headers)
            if status != 200:
                raise Refused(f"status {status}: {_message(b''.join([piece async for piece in pieces]))}")
            # known before the first event, so that a stream can be taken up that broke before it said anything
            answer.request_id = answer.request_id or response_headers.get("x-request-id", "")
            async for event in read_events(pieces):
                answer.take(event, self._clock.now_s())
                if answer.done or answer.error is not None:
                    return
            raise StreamBroken("the stream ended without [DONE]")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as problem:
            raise StreamBroken(f"{type(problem).__name__}: {problem}") from problem
        finally:
            writer.close()

    def _head(self, method: str, path: str, headers: Mapping[str, str], length: int) -> bytes:
        lines = {**self._headers, **headers, "Content-Length": str(length)}
        return "".join(
            [f"{method} {self._path}{path} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in lines.items()), "\r\n"]
        ).encode("latin-1")


def _end_position(event_id: str | None, *, is_final: bool) -> int | None:
    """Output position after an event's last token; None: the event does not say.

    The id of an event counts the tokens so far, the end of the answer as one more; a further part after a dot is not ours.
    """
    if event_id is None or not re.fullmatch(r"[0-9]{1,10}(\.[0-9]+)?", event_id):
        return None
    return int(event_id.split(".")[0]) - is_final


def _message(body: bytes) -> str:
    """The message of an OpenAI error body, or the start of whatever came instead."""
    try:
        problem = _decode_chunk(body).error
    except msgspec.DecodeError:
        problem = None
    return problem.message if problem and problem.message else body[:200].decode("utf-8", "replace")
