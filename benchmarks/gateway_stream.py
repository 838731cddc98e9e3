"""What one streamed token costs the gateway: events per second of one core, without sockets and without a model.

A scripted source has every token ready; calls run through the whole ASGI application, and what it sends is counted and dropped.
`--pause` lets the loop turn between tokens, as when each comes from a replica on its own: one send per token.

    python benchmarks/gateway_stream.py --model spotserve/demo/models/target --tokens 1000 --streams 8 --json
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

from spotserve.config import DEMO_MODEL, GatewaySettings
from spotserve.core.model import ModelSpec, Portion
from spotserve.core.request import FinishReason, Request, TokenDelta
from spotserve.gateway.app import create_app
from spotserve.gateway.calls import Call
from spotserve.gateway.tokenizer import Tokenizer, load_tokenizer

TEXT = "Once upon a time there was a machine that could be taken away at any moment, and nobody noticed. "


class ReadySource:
    """Every token is there at once."""

    ready = True

    def __init__(self, tokenizer: Tokenizer, tokens: int, *, pause: bool) -> None:
        ids = tokenizer.encode(TEXT, add_special_tokens=False)
        self._token_ids = (ids * (tokens // len(ids) + 1))[:tokens]
        self._pause = pause
        self.model = ModelSpec(
            name="ready",
            num_layers=1,
            hidden_size=1,
            num_heads=1,
            num_kv_heads=1,
            head_size=1,
            vocabulary_size=tokenizer.vocabulary_size,
            context_tokens=2 * tokens + 1024,
            layer=(Portion(1, 1),),
            embedding=(Portion(1, 1),),
            head=(Portion(1, 1),),
            value_bytes=1,
            layer_flops_per_token=0,
            head_flops_per_token=0,
        )

    async def submit(self, call: Call) -> tuple[AsyncIterator[TokenDelta], ...]:
        return tuple(self._stream(request) for request in call.requests)

    async def reattach(self, _call_id: str) -> None:
        return None

    def cancel(self, _request_id: str) -> None: ...

    def detach(self, _call_id: str) -> None: ...

    def release(self, _call_id: str) -> None: ...

    async def _stream(self, request: Request) -> AsyncIterator[TokenDelta]:
        last = len(self._token_ids) - 1
        for position, token_id in enumerate(self._token_ids):
            if self._pause:
                await asyncio.sleep(0)
            finish = FinishReason.LENGTH if position == last else None
            yield TokenDelta(request_id=request.request_id, epoch=0, position=position, token_ids=(token_id,), finish_reason=finish)


async def run_stream(app: Any, body: bytes) -> dict[str, int]:
    """One call; how many sends and events it took."""
    counts = {"sends": 0, "events": 0}
    requests = [{"type": "http.request", "body": body, "more_body": False}]
    forever = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not requests:
            await forever.wait()
        return requests.pop()

    async def send(message: dict[str, Any]) -> None:
        counts["sends"] += 1
        counts["events"] += message.get("body", b"").count(b"\ndata:")

    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "scheme": "http"}
    await app({**scope, "http_version": "1.1"}, receive, send)
    return counts


async def measure(tokens: int, streams: int, model: str, *, pause: bool, stop: list[str]) -> dict[str, float]:
    """One round: `streams` calls of `tokens` tokens at once."""
    tokenizer = load_tokenizer(model)
    app = create_app(ReadySource(tokenizer, tokens, pause=pause), GatewaySettings(), tokenizer, "ready")
    messages = [{"role": "user", "content": "hello"}]
    body = json.dumps({"messages": messages, "stream": True, "max_tokens": tokens, "stop": stop or None}).encode()
    await run_stream(app, body)
    started_s = time.process_time()
    counts = await asyncio.gather(*(run_stream(app, body) for _ in range(streams)))
    took_s = time.process_time() - started_s
    events = sum(count["events"] for count in counts)
    return {
        "events": events,
        "sends": sum(count["sends"] for count in counts),
        "cpu_s": took_s,
        "us_per_event": 1e6 * took_s / events,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time per streamed token of the gateway")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a folder with a tokenizer, or a hub id")
    parser.add_argument("--tokens", type=int, default=1000, help="per stream")
    parser.add_argument("--streams", type=int, default=8, help="at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stop", action="append", default=[], help="a stop string that never comes; may be repeated")
    parser.add_argument("--pause", action="store_true", help="tokens come one by one, not all at once")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds = [
        asyncio.run(measure(options.tokens, options.streams, options.model, pause=options.pause, stop=options.stop))
        for _ in range(options.rounds)
    ]
    best = min(rounds, key=lambda one: one["us_per_event"])
    median_us = statistics.median(one["us_per_event"] for one in rounds)
    report = {**best, "median_us_per_event": median_us, "events_per_s_per_core": 1e6 / best["us_per_event"]}
    if options.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{name:>24}: {value:,.1f}" for name, value in report.items()))


if __name__ == "__main__":
    main()
