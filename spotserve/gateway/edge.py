"""The outermost layer: a request id on every response, the key, and an OpenAI body for whatever nobody else caught.

Plain ASGI, because a layer that wraps each chunk of a stream in a task of its own costs more than the chunk. Knows no routes
besides those that are open to everyone.
"""

import hmac
import logging
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spotserve.gateway.chunks import DONE, error_event
from spotserve.gateway.problems import INTERNAL, Problem, problem_response

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/version", "/metrics", "/status", "/decisions"})
"""Served without a key: probes, scrapers and operators have none."""
ADMIN_PREFIX = "/admin/"
"""Guarded by the system's own secret, which clients of the API do not have."""
MAX_REQUEST_ID_CHARACTERS = 128

_log = logging.getLogger(__name__)


class Edge:
    """Wraps the application. `api_key` None: everyone is served."""

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = _valid_request_id(headers.get("x-request-id"))
        started: list[Message] = []

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
                named = MutableHeaders(scope=message)
                if given_id is not None or "x-request-id" not in named:
                    named["x-request-id"] = given_id or f"req-{secrets.token_hex(16)}"
            await send(message)

        if not self._admits(scope["path"], headers.get("authorization", "")):
            problem = Problem("Incorrect API key provided.", "authentication_error", code="invalid_api_key")
            await problem_response(401, problem, {"www-authenticate": "Bearer"})(scope, receive, send_named)
            return
        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            _log.debug("client left while sending %s %s", scope["method"], scope["path"])
        except Exception:  # noqa: BLE001  (the loop top: whatever went wrong is ours, and the client gets a body all the same)
            _log.exception("%s %s failed", scope["method"], scope["path"])
            await _tell_failure(scope, receive, send_named, started[0] if started else None)

    def _admits(self, path: str, authorization: str) -> bool:
        if self._api_key is None or path in OPEN_PATHS or path.startswith(ADMIN_PREFIX):
            return True
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._api_key)


async def _tell_failure(scope: Scope, receive: Receive, send: Send, start: Message | None) -> None:
    if start is None:
        await problem_response(500, INTERNAL)(scope, receive, send)
    elif MutableHeaders(scope=start).get("content-type", "").startswith("text/event-stream"):
        await send({"type": "http.response.body", "body": error_event(INTERNAL) + DONE, "more_body": False})


def _valid_request_id(text: str | None) -> str | None:
    if text and len(text) <= MAX_REQUEST_ID_CHARACTERS and text.isascii() and text.isprintable():
        return text
    return None
