"""One server over HTTP: questions with one answer, streams of events, and what its silence or its errors mean.

Errors, wherever they come from, are told apart by who has to act: `InvalidRequest` the caller of one request, `ModelError` whoever
set this up, `Overloaded` nobody (try later), `WireError` nobody once (try again), somebody when it goes on. Asynchronous; belongs
to one event loop. Knows no dialects and no requests. The key is sent and never said.
"""

import json
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr

from spotserve.core.errors import ChannelClosed, ModelError, Overloaded, SpotServeError, WireError
from spotserve.engine.remote.reading import error_of
from spotserve.engine.remote.sse import EventReader


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for, in seconds."""

    start_s: float = 60.0
    """For it to come up, or to finish loading its model."""
    answer_s: float = 5.0
    """For a connection, and for an answer to a question."""
    check_s: float = 2.0
    """Silence after which it is asked whether it is well."""
    misses: int = 3
    """That many times in a row without an answer: it is gone."""
    retries: int = 5
    """Of one answer that is cut off without a token in between."""
    pause_s: float = 0.1
    """Before the first retry; every further one waits twice as long."""
    busy_s: float = 300.0
    """For a server that says it is overloaded to take a request."""


class Upstream:
    """A server, by its URL."""

    def __init__(self, url: str, api_key: SecretStr | None, patience: Patience) -> None:
        """`url` as clients of the OpenAI API write it: with `/v1` at its end, or without.

        Raises:
            ModelError: it is no URL.
        """
        self._root = url.rstrip("/").removesuffix("/v1")
        self.name = self._root
        """What messages call it."""
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request says nothing that a heartbeat does not
        _check_url(self._root)
        self._client = httpx.AsyncClient(
            headers={} if api_key is None else {"authorization": f"Bearer {api_key.get_secret_value()}"},
            timeout=httpx.Timeout(patience.answer_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def ask(self, path: str, body: object = None) -> Any:
        """The JSON at a path, or what it answers to `body`.

        Raises:
            InvalidRequest: it does not accept `body`.
            ModelError: it refuses the key, or has no such path.
            Overloaded: it is not ready.
            ChannelClosed: it cannot be reached.
            WireError: its answer is no JSON, or an error of its own.
        """
        try:
            response = await self._client.request("GET" if body is None else "POST", f"{self._root}{path}", json=body)
        except httpx.HTTPError as error:
            raise ChannelClosed(f"{self.name}: {_said(error)}") from error
        if not response.is_success:
            raise self._refusal(response.status_code, response.headers, response.content)
        try:
            return response.json()
        except ValueError as error:
            raise WireError(f"{self.name}{path}: not JSON: {response.text[:80]!r}") from error

    async def is_well(self, path: str) -> bool:
        """Whether it answers its health check."""
        try:
            return (await self._client.get(f"{self._root}{path}")).is_success
        except httpx.HTTPError:
            return False

    async def events(self, path: str, body: object) -> AsyncGenerator[bytes]:
        """Data of the events that it streams for `body`, without the `[DONE]` that ends them.

        Raises:
            InvalidRequest: it does not accept `body`.
            Overloaded: it has no room for it now.
            ModelError: it refuses the key, or has no such path.
            ChannelClosed: it cannot be reached, or hung up.
            WireError: it failed, or what it says is no event stream.
        """
        timeout = httpx.Timeout(self._client.timeout.connect, read=None)  # silence is somebody else's to judge
        try:
            async with self._client.stream("POST", f"{self._root}{path}", json=body, timeout=timeout) as response:
                if not response.is_success:
                    raise self._refusal(response.status_code, response.headers, await response.aread())
                reader = EventReader()
                async for chunk in response.aiter_bytes():
                    for data in reader.feed(chunk):
                        if data == b"[DONE]":
                            return
                        yield data
        except httpx.HTTPError as error:
            raise ChannelClosed(f"{self.name}: {_said(error)}") from error

    async def close(self) -> None:
        """Hangs up everywhere."""
        await self._client.aclose()

    def _refusal(self, status: int, headers: httpx.Headers, content: bytes) -> SpotServeError:
        """What a response that is no success means; its message is the server's own, cut short."""
        said: object = content[:400].decode(errors="replace").strip() or "no reason given"
        try:
            document = json.loads(content)
        except ValueError:
            document = None
        if isinstance(document, dict):
            said = document.get("error", document.get("message", document.get("detail", said)))
            said = {"message": said.get("message", said)} if isinstance(said, dict) else str(said)
        error = error_of(said, status)
        if isinstance(error, Overloaded):
            wanted = headers.get("retry-after", "")
            error.retry_after_s = float(wanted) if wanted.isdecimal() else 0.0
        return error


def _check_url(root: str) -> None:
    try:
        url = httpx.URL(root)
    except httpx.InvalidURL as error:
        raise ModelError(f"engine.url: {error}") from error
    if url.userinfo:  # the URL is said in messages
        raise ModelError("engine.url holds a password; give it in SPOTSERVE_ENGINE__API_KEY")
    if not url.host or url.scheme not in ("http", "https"):
        raise ModelError(f"engine.url {root!r}: expected a URL such as http://127.0.0.1:8001/v1")


def _said(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
