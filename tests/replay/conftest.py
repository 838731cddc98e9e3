"""A small system under test: real HTTP on a real port, scripted answers, a fleet that remembers what it was told."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

SECRET = "fleet-secret"
USUAL_GAP = 1.5


def scripted_tokens(seed: int, count: int) -> list[int]:
    """The fake model: a pure function of the seed."""
    return [(seed * 31 + position * position * 7) % 1009 for position in range(count)]


@dataclass
class Script:
    """What the fake system does wrong, and what it saw."""

    break_at: dict[int, list[int]] = field(default_factory=dict)
    """Seed -> output positions at which one connection each is cut."""
    replay_from_start: bool = False
    """After a break, send every position again."""
    wrong_token: dict[int, int] = field(default_factory=dict)
    """Seed -> output position whose token is another one than in the script, while `wrong` says so."""
    wrong_gap: float = USUAL_GAP
    wrong: bool = False
    fail: set[int] = field(default_factory=set)
    """Seeds whose stream ends with an error event."""
    refuse: set[int] = field(default_factory=set)
    """Seeds that get status 429."""
    hang: set[int] = field(default_factory=set)
    refuse_launch: bool = False
    token_pause_s: float = 0.0
    bodies: list[dict] = field(default_factory=list)
    admin_calls: list[tuple[str, dict]] = field(default_factory=list)
    instances: dict[str, str] = field(default_factory=lambda: {"a0": "ready", "a1": "ready"})
    events: list[dict] = field(default_factory=list)
    recomputed: int = 7

    def report(self, kind: str, instance: str, **details: object) -> None:
        self.events.append({"seq": len(self.events), "time_s": time.time(), "kind": kind, "instance": instance, **details})

    def calls(self, path: str) -> list[dict]:
        return [body for called, body in self.admin_calls if called == path]


def build_app(script: Script) -> FastAPI:
    app = FastAPI()
    app.state.by_id = {}

    def event(choices: list[dict], event_id: str, call_id: str, **rest: object) -> str:
        return f"id: {event_id}\ndata: {json.dumps({'id': call_id, 'choices': choices, **rest})}\n\n"

    async def stream(call_id: str, body: dict, start: int) -> AsyncIterator[str]:
        seed, count = body["seed"], body["max_tokens"]
        tokens, gaps = scripted_tokens(seed, count), [USUAL_GAP] * count
        if script.wrong and seed in script.wrong_token:
            tokens[script.wrong_token[seed]] += 1
            gaps[script.wrong_token[seed]] = script.wrong_gap
        yield ": hello\n\n"
        position = start
        while position < count - 1:
            if script.break_at.get(seed) and position >= script.break_at[seed][0]:
                script.break_at[seed].pop(0)
                raise ConnectionError("cut by the script")
            end = min(position + 1 + position % 3, count - 1)
            yield event(
                [{"index": 0, "text": "x", "token_ids": tokens[position:end], "gaps": gaps[position:end]}], f"{end}", call_id
            )
            position = end
            await asyncio.sleep(script.token_pause_s)
        if seed in script.hang:
            await asyncio.sleep(3600)
        if seed in script.fail:
            yield f"data: {json.dumps({'error': {'message': 'no replica took it'}})}\n\n"
            return
        # the last token comes with the end, whose id counts one more
        last = {"index": 0, "text": "", "token_ids": tokens[position:], "gaps": gaps[position:], "finish_reason": "length"}
        yield event([last], f"{count + 1}", call_id)
        yield event([], f"{count + 1}.1", call_id, usage={"prompt_tokens": 11, "completion_tokens": count})
        yield "data: [DONE]\n\n"

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> StreamingResponse | JSONResponse:
        body = await request.json()
        script.bodies.append(body)
        if body["seed"] in script.refuse:
            return JSONResponse({"error": {"message": "too many requests wait"}}, status_code=429)
        call_id = f"cmpl-{len(script.bodies)}"
        app.state.by_id[call_id] = body
        return StreamingResponse(stream(call_id, body, 0), media_type="text/event-stream", headers={"x-request-id": call_id})

    @app.get("/v1/requests/{call_id}/stream")
    async def again(call_id: str, request: Request) -> StreamingResponse:
        last = request.headers.get("last-event-id", "0")
        start = 0 if script.replay_from_start else int(last.split(".")[0])
        return StreamingResponse(stream(call_id, app.state.by_id[call_id], start), media_type="text/event-stream")

    @app.middleware("http")
    async def only_with_the_secret(request: Request, call_next):
        guarded = request.url.path.startswith(("/admin", "/status"))
        if guarded and request.headers.get("authorization") != f"Bearer {SECRET}":
            return JSONResponse({"error": {"message": "who are you"}}, status_code=401)
        return await call_next(request)

    @app.get("/status")
    async def status() -> dict:
        instances = [{"id": name, "state": state, "pid": 1} for name, state in script.instances.items()]
        replicas = [
            {"id": f"r-{name}", "state": "serving", "instances": [name]}
            for name, state in script.instances.items()
            if state == "ready"
        ]
        return {"epoch": 3, "model": {"name": "fake-model"}, "instances": instances, "replicas": replicas}

    @app.post("/admin/{verb}")
    async def admin(verb: str, request: Request):
        body = await request.json()
        script.admin_calls.append((verb, body))
        if verb == "launch":
            if script.refuse_launch:
                return JSONResponse({"error": {"message": "no capacity"}}, status_code=503)
            names = [f"n{len(script.instances) + i}" for i in range(body["count"])]
            for name in names:
                script.instances[name] = "ready"
                script.report("launched", name)
            return {"instances": names}
        if verb in ("preempt", "terminate"):
            name, grace_s = body["instance"], body.get("grace_s", 0.0)
            if grace_s:
                script.report("notice", name)
                script.report("moved", name, request_id="cmpl-1", kv_bytes=4096, seconds=0.01)
            script.instances[name] = "gone"
            script.report("lost", name)
            script.recomputed += 5
            return {"instance": name, "deadline_s": time.time() + grace_s}
        return {}

    @app.get("/admin/events")
    async def events(after: int = -1) -> dict:
        return {"events": [row for row in script.events if row["seq"] > after]}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        lines = ["# HELP spotserve_tokens_recomputed_total x", 'spotserve_tokens_recomputed_total{gateway="g"} 1', ""]
        return PlainTextResponse("\n".join([*lines, f"spotserve_tokens_recomputed_total {script.recomputed}"]))

    return app


@dataclass
class FakeSystem:
    url: str
    script: Script
    secret: str = SECRET


@pytest.fixture
def fake_system() -> Iterator[FakeSystem]:
    script = Script()
    server = uvicorn.Server(uvicorn.Config(build_app(script), port=0, log_level="critical", ws="none", lifespan="off"))
    server.force_exit = True  # a scripted hang must not hold up the end of a test
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the fake system did not start"
        time.sleep(0.005)
    yield FakeSystem(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", script)
    server.should_exit = True
    thread.join(10)
