"""How tests reach the application: httpx over ASGI, and reading of event streams."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from scripted_source import ScriptedSource

from spotserve.config import GatewaySettings
from spotserve.gateway.app import create_app
from spotserve.gateway.tokenizer import Tokenizer

MODEL = "scripted"


def build_app(source: ScriptedSource, tokenizer: Tokenizer, **settings: Any) -> FastAPI:
    return create_app(source, GatewaySettings(**settings), tokenizer, MODEL)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The base URL of a server of its own thread and port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def client_of(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway", **options)


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    raw: bytes
    id: str | None
    data: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.data)


def read_events(body: bytes) -> list[Event]:
    events = []
    for block in body.split(b"\n\n")[:-1]:
        if block.startswith(b":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.decode().split("\n"))
        events.append(Event(block + b"\n\n", fields.get("id"), fields["data"]))
    return events


def text_of(events: list[Event], index: int = 0) -> str:
    """The text of one choice, of either kind of call."""
    said = ""
    for event in events:
        if event.data == "[DONE]":
            continue
        for choice in event.json.get("choices", ()):
            if choice["index"] == index:
                said += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return said
