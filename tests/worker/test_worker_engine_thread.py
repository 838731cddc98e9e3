"""Order between the event loop and the engine's thread, and what happens when either side breaks."""

import asyncio
import threading
from dataclasses import dataclass

import pytest
from worker_scene import until

from spotserve.core.errors import PeerLost
from spotserve.engine.engine import StepResult
from spotserve.worker.engine_thread import EngineThread

pytestmark = pytest.mark.anyio


@dataclass
class CountingEngine:
    """Makes a step as long as there are any left; its results carry their number as `step_s`."""

    left: int = 0
    made: int = 0
    broken: bool = False
    closed: bool = False

    @property
    def has_work(self) -> bool:
        return self.left > 0

    def settle(self) -> list[StepResult]:
        """One step is always under way while there are any left."""
        return [self.step()] if self.left else []

    def check_integrity(self) -> None:
        assert self.left == 0, "it is checked when it is idle"

    def close(self) -> None:
        self.closed = True

    def step(self) -> StepResult:
        if self.broken:
            raise RuntimeError("the device is gone")
        self.left -= 1
        self.made += 1
        return StepResult(outputs=(), num_prefill_tokens=0, num_decode_tokens=0, step_s=float(self.made))


class Loop:
    """The loop's side of a thread."""

    def __init__(self, engine: CountingEngine) -> None:
        self.seen: list[float] = []
        self.failures: list[BaseException] = []
        self.thread = EngineThread(
            engine,  # type: ignore[arg-type]
            on_step=lambda result: self.seen.append(result.step_s),
            on_failure=self.failures.append,
        )

    async def end(self) -> None:
        self.thread.stop()
        await asyncio.to_thread(self.thread._thread.join)


async def test_who_awaits_a_job_has_seen_every_step_before_it() -> None:
    loop = Loop(CountingEngine(left=100_000))
    loop.thread.start()
    for _ in range(50):
        made = await loop.thread.call(lambda engine: engine.made)  # type: ignore[attr-defined]
        assert len(loop.seen) >= made
        assert loop.seen[:made] == [float(number) for number in range(1, made + 1)]
    await loop.end()


async def test_jobs_run_in_order_and_in_the_thread_of_the_engine() -> None:
    loop = Loop(CountingEngine())
    loop.thread.start()
    ran: list[object] = []
    loop.thread.post(lambda _: ran.append("posted"))
    name = await loop.thread.call(lambda _: (ran.append("called"), threading.current_thread().name)[1])
    assert ran == ["posted", "called"]
    assert name == "engine"
    await loop.end()


async def test_an_exception_of_a_job_belongs_to_who_awaits_it() -> None:
    loop = Loop(CountingEngine())
    loop.thread.start()
    with pytest.raises(ZeroDivisionError):
        await loop.thread.call(lambda _: 1 // 0)
    assert await loop.thread.call(lambda _: "alive") == "alive"
    assert not loop.failures
    await loop.end()


async def test_a_job_whose_waiter_left_runs_all_the_same() -> None:
    loop = Loop(CountingEngine())
    loop.thread.start()
    ran: list[int] = []
    loop.thread.call(lambda _: ran.append(1)).cancel()
    await loop.thread.call(lambda _: None)
    assert ran == [1]
    await loop.end()


async def test_an_exception_of_a_posted_job_ends_the_worker() -> None:
    loop = Loop(CountingEngine())
    loop.thread.start()
    loop.thread.post(lambda _: 1 // 0)  # type: ignore[arg-type,return-value]
    await until(lambda: len(loop.failures) == 1)
    await loop.end()


async def test_an_exception_of_a_step_ends_the_worker() -> None:
    loop = Loop(CountingEngine(left=1, broken=True))
    loop.thread.start()
    await until(lambda: len(loop.failures) == 1)
    assert "device" in str(loop.failures[0])
    await loop.end()


async def test_a_job_that_wants_it_settled_sees_no_step_under_way() -> None:
    loop = Loop(CountingEngine(left=1000))
    loop.thread.start()
    made = await loop.thread.call(lambda engine: engine.made, settled=True)  # type: ignore[attr-defined]
    assert loop.seen[:made] == [float(number) for number in range(1, made + 1)], "what settling made was told as well"
    assert made >= 1
    await loop.end()


@pytest.mark.parametrize("broken", [False, True])
async def test_nobody_waits_for_a_job_of_an_engine_that_has_ended(broken: bool) -> None:
    engine = CountingEngine(left=1, broken=True) if broken else CountingEngine()
    loop = Loop(engine)
    release = threading.Event()
    loop.thread.post(lambda _: release.wait(20.0))  # type: ignore[arg-type,return-value]
    loop.thread.start()
    if not broken:
        loop.thread.stop()
    else:
        engine.left = 1
    early = loop.thread.call(lambda engine: engine.step())  # type: ignore[attr-defined]
    release.set()
    with pytest.raises((PeerLost, RuntimeError)):
        await asyncio.wait_for(early, 20.0)
    await until(lambda: loop.thread._has_ended)
    with pytest.raises(PeerLost, match="has ended"):
        await asyncio.wait_for(loop.thread.call(lambda _: None), 20.0)
    assert engine.closed
    await loop.end()


async def test_stop_does_not_wait_for_the_work_that_is_left() -> None:
    engine = CountingEngine(left=10**9)
    loop = Loop(engine)
    loop.thread.start()
    await loop.end()
    assert engine.has_work
