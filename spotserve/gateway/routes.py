"""The routes that clients call: completions, chat, models, re-attachment and health.

Each one reads, asks the source, and answers; what goes wrong is raised and turned into a body by `app`. Does not know events or
tokens.
"""

import asyncio
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from spotserve.config import GatewaySettings
from spotserve.core.clock import Clock
from spotserve.core.errors import InvalidRequest
from spotserve.core.model import ModelSpec
from spotserve.gateway.answer import Answer
from spotserve.gateway.calls import Call, TokenSource
from spotserve.gateway.chunks import EventWriter, read_cursor, whole_body
from spotserve.gateway.collect import ClientLeft, collect
from spotserve.gateway.intake import Intake
from spotserve.gateway.openai import read_chat, read_completion
from spotserve.gateway.problems import (
    BodyTooLarge,
    not_found_response,
    problem_response,
    unavailable_response,
)
from spotserve.gateway.sse import EventStream
from spotserve.gateway.tokenizer import Tokenizer

INLINE_BODY_BYTES = 16 * 1024
"""Encoding a prompt of this size takes about a millisecond; larger bodies go to a thread."""
CLIENT_LEFT_STATUS = 499
"""Never read by anyone; for logs."""


class NotReady(Exception):
    """No replica has loaded the model yet."""


class Routes:
    """Handlers of one model served by one source."""

    def __init__(self, source: TokenSource, settings: GatewaySettings, tokenizer: Tokenizer, model_name: str, clock: Clock) -> None:
        self._source = source
        self._settings = settings
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._clock = clock
        self._intake = Intake(tokenizer, model_name)
        self._started_s = int(clock.now_s())

    def router(self) -> APIRouter:
        """All routes."""
        router = APIRouter(default_response_class=Response)
        router.post("/v1/chat/completions")(self.chat)
        router.post("/v1/completions")(self.completions)
        router.get("/v1/models")(self.models)
        router.get("/v1/models/{model_id:path}")(self.model)
        router.get("/v1/requests/{call_id}/stream")(self.reattach)
        router.delete("/v1/requests/{call_id}")(self.withdraw)
        router.get("/health")(self.ready)
        router.get("/health/ready")(self.ready)
        router.get("/health/live")(self.live)
        router.get("/version")(self.version)
        return router

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body, model = await self._read_body(request), self._model()

        def build() -> Call:
            return self._intake.chat(read_chat(body), model, now_s=self._clock.now_s())

        return await self._serve(request, await asyncio.to_thread(build) if len(body) > INLINE_BODY_BYTES else build())

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body, model = await self._read_body(request), self._model()

        def build() -> Call:
            return self._intake.completion(read_completion(body), model, now_s=self._clock.now_s())

        return await self._serve(request, await asyncio.to_thread(build) if len(body) > INLINE_BODY_BYTES else build())

    async def models(self) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model_card(self._model())]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        model_id = request.path_params["model_id"]
        if model_id != self._model_name:
            return not_found_response(f"The model '{model_id[:256]}' does not exist.", code="model_not_found")
        return JSONResponse(self._model_card(self._model()))

    async def reattach(self, request: Request) -> Response:
        """GET /v1/requests/{id}/stream: the rest of a stream whose connection or gateway died."""
        call_id = request.path_params["call_id"]
        found = await self._source.reattach(call_id)
        if found is None:
            return _unknown_call(call_id)
        call, streams = found
        last_id = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
        try:
            cursor = read_cursor(last_id, choices=len(call.requests)) if last_id else None
        except InvalidRequest:
            self._source.detach(call_id)
            raise
        answer = Answer(call, self._tokenizer, cursor.positions if cursor is not None else None)
        return EventStream(
            self._source,
            answer,
            streams,
            EventWriter(answer, self._tokenizer),
            cursor=cursor,
            keep_alive_s=self._settings.keep_alive_s,
            headers={"x-request-id": call_id},
        )

    async def withdraw(self, request: Request) -> Response:
        """DELETE /v1/requests/{id}: no more tokens of this call are wanted."""
        call_id = request.path_params["call_id"]
        found = await self._source.reattach(call_id)
        if found is None:
            return _unknown_call(call_id)
        self._source.withdraw(call_id)
        self._source.detach(call_id)
        return JSONResponse({"id": call_id, "object": "request.deleted", "deleted": True})

    async def ready(self) -> Response:
        """GET /health/ready: 503 while no replica serves."""
        if not self._source.ready:
            return unavailable_response("No replica serves the model now.")
        return JSONResponse({"status": "ready"})

    async def live(self) -> Response:
        """GET /health/live: this process answers."""
        return JSONResponse({"status": "live"})

    async def version(self) -> Response:
        """GET /version."""
        return JSONResponse({"version": _version()})

    async def _serve(self, request: Request, call: Call) -> Response:
        answer = Answer(call, self._tokenizer)
        streams = await self._source.submit(call)
        headers = {"x-request-id": call.call_id}
        if answer.envelope.stream:
            writer = EventWriter(answer, self._tokenizer)
            keep_alive_s = self._settings.keep_alive_s
            return EventStream(self._source, answer, streams, writer, cursor=None, keep_alive_s=keep_alive_s, headers=headers)
        try:
            problem = await collect(self._source, answer, streams, request.receive)
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT_STATUS)
        if problem is not None:
            status = 500 if problem.type == "server_error" else 400
            return problem_response(status, problem, headers)
        return Response(whole_body(answer, self._tokenizer), 200, headers, media_type="application/json")

    async def _read_body(self, request: Request) -> bytes:
        """The body, never more of it than is allowed."""
        limit_bytes = self._settings.max_body_bytes
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit_bytes:
            raise _too_large(limit_bytes)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit_bytes:
                raise _too_large(limit_bytes)
        return bytes(body)

    def _model(self) -> ModelSpec:
        if self._source.model is None:
            raise NotReady
        return self._source.model

    def _model_card(self, model: ModelSpec) -> dict[str, object]:
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "spotserve",
            "root": self._model_name,
            "max_model_len": model.context_tokens,
        }


def _unknown_call(call_id: str) -> Response:
    return not_found_response(f"No request '{call_id[:256]}' is under way or kept.", code="request_not_found")


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit_bytes} bytes.", code="request_too_large")


def _version() -> str:
    try:
        return version("spotserve")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
