"""Clients for benchmarks: streams that send calls, follow their answers through whatever happens, and note when tokens came."""

import asyncio
import random
from contextlib import suppress

from spotserve.replay.client import StreamClient
from spotserve.replay.prompts import build_prompt
from spotserve.replay.record import RequestRecord
from spotserve.replay.timeline import Arrive
from spotserve.system_clock import SystemClock

PATIENCE_S = 300.0
PAUSE_AFTER_ERROR_S = 0.2
CLOCK = SystemClock()


class Load:
    """Clients that send calls until told to stop; keeps what came of each."""

    def __init__(self, url: str, model: str, *, streams: int, prompt_tokens: int, tokens: int, seed: int) -> None:
        self._client = StreamClient(url, model=model, clock=CLOCK, patience_s=PATIENCE_S)
        self._streams, self._prompt_tokens, self._tokens, self._seed = streams, prompt_tokens, tokens, seed
        self._choose = random.Random(seed)
        self._number = 0
        self._over = asyncio.Event()
        self.records: list[RequestRecord] = []

    async def run(self, cycle_s: float) -> None:
        """Each stream sends a call every `cycle_s`, or as soon as its last one has ended, until `stop`."""
        self._over.clear()
        async with asyncio.TaskGroup() as group:
            for number in range(self._streams):
                group.create_task(self._stream(cycle_s, cycle_s * number / self._streams), name=f"stream {number}")

    def stop(self) -> None:
        """Nothing new is sent; `run` returns when the last answer is whole."""
        self._over.set()

    async def _stream(self, cycle_s: float, first_in_s: float) -> None:
        next_s = CLOCK.now_s() + first_in_s
        while not await self._is_over_by(next_s):
            self.records.append(await self._call())
            if self.records[-1].error is not None:
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)
            next_s = max(next_s + cycle_s * self._choose.uniform(0.8, 1.2), CLOCK.now_s())

    async def _is_over_by(self, due_s: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), max(0.0, due_s - CLOCK.now_s()))
        return self._over.is_set()

    async def _call(self) -> RequestRecord:
        self._number += 1
        seed = self._seed * 1_000_003 + self._number
        now_s = CLOCK.now_s()
        arrival = Arrive(now_s, self._number, self._prompt_tokens, self._tokens, temperature=0.0, seed=seed)
        return await self._client.complete(arrival, build_prompt(self._prompt_tokens, seed), scheduled_s=now_s)

    async def repeat(self, arrival: Arrive) -> RequestRecord:
        """The same call once more."""
        prompt = build_prompt(arrival.prompt_tokens, arrival.seed)
        return await self._client.complete(arrival, prompt, scheduled_s=CLOCK.now_s())
