"""A model server for tests: five dialects' streams as the real ones write them, on a real socket, with faults on order.

Its model knows one story and goes on from wherever the prompt ends, so an answer is the same however often it was cut.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from spotserve.config import DEMO_MODEL
from spotserve.engine.remote.vocabulary import Vocabulary, load_vocabulary

MODEL = "the-model"
KEY = "sk-only-for-this-test"
STORY = (
    "Once upon a time, in a land of rivers, there lived a smith who could mend anything. "
    "One day a stranger came with a broken clock and said: nobody has heard it strike for 40 years.\n\n"
    "The smith -- naïve as he was -- opened it and found 🙂 a note: «do not wake me». "
    "He closed it, set it on the shelf, and went on with his work until the evening came and the lamps were lit."
)
PROMPT = "Once upon a time,"
CONTEXT_TOKENS = 256
EOS = 1


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request, after so many tokens (None: before the response begins)."""

    kind: str
    """`cut`, `end`, `garbage`, `error`, `hang`, or `status`."""
    after: int | None = None
    status: int = 500
    message: str = "out of order"


@dataclass
class ModelServer:
    """State of one server; `faults` are used up one per request, in order."""

    dialect: str
    key: str | None = None
    faults: list[Fault] = field(default_factory=list)
    is_well: bool = True
    token_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    id_shift: int = 0
    """Other than 0: the tokenizer of some other model."""
    active: int = 0
    most_active: int = 0
    hung_up: int = 0
    """Clients that left in the middle."""
    vocabulary: Vocabulary = field(default_factory=lambda: load_vocabulary(str(DEMO_MODEL)))
    url: str = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application."""
        assert scope["type"] == "http"
        headers = dict(scope["headers"])
        if self.key is not None and headers.get(b"authorization") != f"Bearer {self.key}".encode():
            return await self._json(send, {"error": {"message": "Unauthorized", "code": 401}}, 401)
        path = scope["path"]
        if path in ("/health", "/v1/models") and not self.is_well:
            return await self._json(send, {"error": {"message": "not now", "code": 503}}, 503)
        if path == "/health":
            return await self._json(send, {"status": "ok"})
        if path == "/v1/models":
            return await self._json(send, {"object": "list", "data": [self._card()]})
        if path == "/info" and self.dialect == "tgi":
            return await self._json(send, {"model_id": MODEL, "max_total_tokens": CONTEXT_TOKENS, "router": "x"})
        if path == "/props" and self.dialect == "llamacpp":
            return await self._json(send, {"default_generation_settings": {"n_ctx": CONTEXT_TOKENS}, "total_slots": 4})
        if path == "/tokenize" and self.dialect in ("vllm", "sglang", "llamacpp"):
            body = json.loads(await _whole(receive))
            text = body["content" if self.dialect == "llamacpp" else "prompt"]
            return await self._json(send, {"tokens": [i + self.id_shift for i in self.vocabulary.encode(text)]})
        paths = {"llamacpp": "/completion", "tgi": "/generate_stream"}
        if path == paths.get(self.dialect, "/v1/completions"):
            body = json.loads(await _whole(receive))
            self.bodies.append(body)
            return await self._answer(body, receive, send)
        return await self._json(send, {"error": {"message": f"no {path} here", "code": 404}}, 404)

    def _card(self) -> dict[str, Any]:
        owner = {"plain": "somebody", "tgi": MODEL}.get(self.dialect, self.dialect)
        card = {"id": MODEL, "object": "model", "created": 1, "owned_by": owner}
        return card if self.dialect == "llamacpp" else {**card, "max_model_len": CONTEXT_TOKENS}

    async def _answer(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        fault = self.faults.pop(0) if self.faults else Fault("none")
        if fault.kind == "status":
            headers = [(b"retry-after", b"0")] if fault.status == 429 else []
            return await self._json(send, {"error": {"message": fault.message, "code": fault.status}}, fault.status, headers)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            async for event in self._events(body, fault):
                if gone.done():
                    self.hung_up += 1
                    return None
                await send({"type": "http.response.body", "body": event, "more_body": True})
            if fault.kind == "cut":
                raise ConnectionError("cut")
            if fault.kind == "hang":
                await gone
                self.hung_up += 1
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.active -= 1
            gone.cancel()

    async def _events(self, body: dict[str, Any], fault: Fault) -> AsyncIterator[bytes]:
        parameters = body.get("parameters", body)
        limit = parameters.get("max_tokens", parameters.get("n_predict", parameters.get("max_new_tokens")))
        rest = [*self.continuation(body.get("prompt", body.get("inputs"))), EOS]
        yield b": hello\n\n"
        held = ""
        for made, token_id in enumerate(rest[:limit]):
            if made == fault.after:
                if fault.kind == "garbage":
                    yield b"data: {this is no json\n\n"
                elif fault.kind == "error":
                    yield _event({"error": {"message": fault.message, "code": fault.status}})
                return
            if self.token_s:
                await asyncio.sleep(self.token_s)
            held += "" if token_id == EOS else self._text(rest[: made + 1])[len(self._text(rest[:made])) :]
            finish = "stop" if token_id == EOS else "length" if made + 1 == limit else None
            for event in self._token_events(token_id, held, finish, made, body):
                yield event
            held = ""
        if self.dialect not in ("llamacpp", "tgi"):
            yield b"data: [DONE]\n\n"

    def _text(self, token_ids: list[int]) -> str:
        """Text that is complete: servers hold back the beginning of a character."""
        return self.vocabulary.decode([i for i in token_ids if i != EOS]).rstrip("\ufffd")

    def _token_events(self, token_id: int, text: str, finish: str | None, made: int, body: dict[str, Any]) -> Iterator[bytes]:
        if self.dialect == "llamacpp":
            splits_character = not text and token_id != EOS
            if not splits_character:
                yield _event({"index": 0, "content": text, "tokens": [token_id], "stop": False, "id_slot": -1})
            if finish is not None:
                kind = "eos" if finish == "stop" else "limit"
                yield _event({"index": 0, "content": "", "tokens": [], "stop": True, "stop_type": kind, "truncated": False})
        elif self.dialect == "tgi":
            details = {"finish_reason": "eos_token" if finish == "stop" else finish, "generated_tokens": made + 1, "seed": None}
            token = {"id": token_id, "text": text, "logprob": -0.5, "special": token_id == EOS}
            document = {"index": made + 1, "token": token, "generated_text": "x" if finish else None}
            yield b"data:" + json.dumps({**document, "details": details if finish else None}).encode() + b"\n\n"
        else:
            choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
            if self.dialect != "plain" and body.get("return_token_ids"):
                choice["token_ids"] = [token_id]
            if body.get("logprobs") is not None:
                top = {f"token_id:{token_id + k}": -0.5 - k for k in range(body["logprobs"] + 1)}
                choice["logprobs"] = {"tokens": [f"token_id:{token_id}"], "token_logprobs": [-0.5], "top_logprobs": [top]}
            yield _event({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]})

    def continuation(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Ids of the rest of the story."""
        if isinstance(prompt, str):
            said = prompt
        else:
            whole = self.vocabulary.encode(STORY)
            if tuple(prompt) == whole[: len(prompt)]:
                return whole[len(prompt) :]
            said = self.vocabulary.decode(prompt)
        assert STORY.startswith(said), said
        return self.vocabulary.continue_from(self.vocabulary.encode(said), STORY[len(said) :])

    async def _json(self, send: Any, document: object, status: int = 200, headers: Any = ()) -> None:
        content = [(b"content-type", b"application/json"), *headers]
        await send({"type": "http.response.start", "status": status, "headers": content})
        await send({"type": "http.response.body", "body": json.dumps(document).encode()})


def _event(document: object) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


async def _whole(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Stand:
    """A port on which one server after another is at home: starting a web server takes longer than most tests."""

    def __init__(self) -> None:
        self.server: ModelServer | None = None
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        web = uvicorn.Server(uvicorn.Config(self, log_level="critical", lifespan="off"))
        threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True).start()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Whoever is at home answers; a request goes on with the server that it came to."""
        assert self.server is not None, "nobody is at home"
        await self.server(scope, receive, send)


_free: list[_Stand] = []


@contextmanager
def at_home(server: ModelServer) -> Iterator[ModelServer]:
    """The server on some port, until the block ends; the port answers on."""
    stand = _free.pop() if _free else _Stand()
    stand.server, server.url = server, stand.url
    try:
        yield server
    finally:
        _free.append(stand)


@contextmanager
def serving(server: ModelServer, port: int = 0) -> Iterator[ModelServer]:
    """The server on a port of its own, which is closed when the block ends, streams and all."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(server, log_level="critical", lifespan="off", timeout_graceful_shutdown=0)
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        yield server
    finally:
        web.should_exit = web.force_exit = True
        thread.join()
        listener.close()
