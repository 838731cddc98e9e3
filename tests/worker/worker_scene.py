"""A worker with a real engine that a test may hold still, and gateways that note what they are told."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from spotserve.checkpoint.store import Commit, CommitOutcome, Progress, Verdict
from spotserve.config import EngineSettings, WorkerSettings
from spotserve.core.clock import ManualClock
from spotserve.core.epoch import first_epoch
from spotserve.core.errors import StoreError
from spotserve.core.messages import Address, Deltas, Submit, WorkerInbound
from spotserve.core.request import Request, SamplingParams, TokenDelta, TokenLogprob
from spotserve.engine.engine import Engine
from spotserve.wire import bound_port, listen
from spotserve.worker.app import WorkerProcess
from spotserve.worker.engine_thread import EngineThread
from spotserve.worker.options import WorkerOptions
from spotserve.worker.worker import Worker

VOCABULARY_SIZE = 96
SECRET = "of the scene"
PATIENCE_S = 20.0
"""A test that waits this long has failed."""
FIRST = first_epoch()


def request(request_id: str = "s", *, prompt: Sequence[int] = (5, 6, 7), max_tokens: int = 24, **sampling: object) -> Request:
    given = {"seed": 11, "ignore_eos": True, **sampling}
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **given),  # type: ignore[arg-type]
    )


def submit(epoch: int = FIRST, emitted: Sequence[int] = (), **options: object) -> Submit:
    return Submit(request=request(**options), epoch=epoch, emitted_token_ids=tuple(emitted))  # type: ignore[arg-type]


class Answer(msgspec.Struct):
    """One whole answer."""

    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    gaps: list[float] = []
    finish_reason: object = None
    error: str | None = None
    recomputed_tokens: int = 0

    def take(self, delta: TokenDelta) -> None:
        """What is new in a delta, as every reader does it: what begins beyond the end is not taken, it will come again."""
        known = len(self.token_ids) - delta.position
        if known < 0:
            return
        self.token_ids += delta.token_ids[known:]
        self.logprobs += (delta.logprobs or ())[known:]
        self.gaps += (delta.gaps or ())[known:]
        self.finish_reason = self.finish_reason or delta.finish_reason
        self.error = self.error or delta.error
        self.recomputed_tokens += delta.recomputed_tokens


class Ear:
    """A gateway's channel that notes what a worker says."""

    def __init__(self) -> None:
        self.heard: list[msgspec.Struct] = []

    def send(self, message: msgspec.Struct) -> None:
        self.heard.append(message)

    def of(self, kind: type) -> list[msgspec.Struct]:
        return [message for message in self.heard if isinstance(message, kind)]

    @property
    def deltas(self) -> list[TokenDelta]:
        return [delta for message in self.heard if isinstance(message, Deltas) for delta in message.deltas]

    def answer(self, request_id: str = "s") -> Answer:
        answer = Answer()
        for delta in self.deltas:
            if delta.request_id == request_id:
                answer.take(delta)
        return answer

    def has_end(self, request_id: str = "s") -> bool:
        return any(delta.request_id == request_id and delta.finish_reason is not None for delta in self.deltas)

    async def whole(self, request_id: str = "s") -> Answer:
        """The answer, once it has ended."""
        await until(lambda: self.has_end(request_id))
        return self.answer(request_id)


class ScriptedStore:
    """A store that answers as it is told to: OK unless `verdicts` has something else for the next commit of a request."""

    def __init__(self) -> None:
        self.batches: list[list[Commit]] = []
        self.verdicts: dict[str, list[Verdict]] = {}
        self.down = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once = 0
        self.most_at_once = 0

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.batches.append(list(batch))
        await asyncio.sleep(0)
        await self.gate.wait()
        self.at_once -= 1
        if self.down:
            raise StoreError("down")
        return [
            CommitOutcome(
                commit.request_id, scripted.pop(0) if (scripted := self.verdicts.get(commit.request_id)) else Verdict.OK, 0, 0
            )
            for commit in batch
        ]

    async def load(self, request_ids: Sequence[str]) -> Mapping[str, Progress]:
        raise AssertionError("a worker loads no progress")


class Stage:
    """One worker, its engine and its gateway `g`."""

    def __init__(self, name: str, folder: Path, clock: ManualClock) -> None:
        self.clock = clock
        self.store = ScriptedStore()
        self.failures: list[BaseException] = []
        self.worker = Worker(name, WorkerSettings(keep_finished_s=30), self.store, clock)
        self.gateway = Ear()
        self.worker.attach("g", self.gateway)  # type: ignore[arg-type]
        self.process = WorkerProcess(
            WorkerOptions(instance_id=name, spot=True, zone="z", system_folder=str(folder), engine={}, worker={}, store={}),
            self.worker,
            SECRET,
        )
        self.address = Address("127.0.0.1", 0)
        self._free = threading.Event()
        self._free.set()
        self.thread: EngineThread | None = None

    async def load(self, model_folder: Path, **settings: object) -> None:
        given = {"model": str(model_folder), "dtype": "float64", "speculation": "off", "kv_tokens": 2048, **settings}
        self.thread = EngineThread(
            lambda: Engine(EngineSettings.model_validate(given)), on_step=self.worker.on_step, on_failure=self.failures.append
        )
        engine = await self.thread.start()
        self.worker.use_engine(self.thread, engine.spec)

    def note_refused(self, reason: str) -> None:
        self.gateway.heard.append(Refused(reason))

    def hold(self) -> None:
        """The engine does nothing more until `let_go`: it waits in a job."""
        assert self.thread is not None
        self._free.clear()
        self.thread.post(lambda _: _wait(self._free))

    def let_go(self) -> None:
        self._free.set()

    async def tokens_so_far(self, at_least: int, request_id: str = "s") -> None:
        """Runs until the gateway has heard so many tokens; then the engine holds still."""
        assert self.thread is not None
        await until(lambda: len(self.gateway.answer(request_id).token_ids) >= at_least)
        self.hold()

    async def close(self) -> None:
        self.let_go()
        if self.thread is not None:
            self.thread.stop()
            await asyncio.to_thread(self.thread._thread.join)

    async def check(self) -> None:
        """Blocks and sequences of the engine are accounted for, and it runs exactly what this worker owns."""
        assert self.thread is not None
        self.let_go()
        running = {owned.request_id for owned in self.worker.running_requests()}
        reported = await self.thread.call(lambda engine: (engine.check_integrity(), engine.reports())[1])
        assert {report.request_id for report in reported} <= running
        assert not self.failures

    async def check_idle(self) -> None:
        """Nothing is left, neither sequences nor blocks."""
        assert self.thread is not None
        self.let_go()
        used = await self.thread.call(lambda engine: (engine.check_integrity(), engine.kv_tokens_used)[1])
        assert used == 0
        assert self.worker.running_requests() == ()
        assert not self.failures


def _wait(free: threading.Event) -> None:
    assert free.wait(PATIENCE_S)


@asynccontextmanager
async def stage(
    model_folder: Path, tmp_path: Path, *names: str, clock: ManualClock | None = None, **settings: object
) -> AsyncIterator[list[Stage]]:
    """Workers that listen for gateways and peers. In the end each engine's books must balance."""
    async with AsyncExitStack() as at_end:
        stages = []
        for name in names:
            made = Stage(name, tmp_path, clock or ManualClock(1000.0))
            at_end.push_async_callback(made.close)
            await made.load(model_folder, **settings)
            server = await listen(
                "127.0.0.1",
                0,
                secret=SECRET,
                inbound=WorkerInbound,
                on_channel=made.process.on_channel,
                on_refused=made.note_refused,
            )
            at_end.callback(server.close)
            made.address = Address("127.0.0.1", bound_port(server))
            stages.append(made)
        yield stages
        for made in stages:
            await made.check()


class Refused(msgspec.Struct):
    """A connection was cut, and why."""

    reason: str


async def until(condition: Callable[[], bool]) -> None:
    """Lets the others work until the condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def undisturbed(model_folder: Path, tmp_path: Path, **options: object) -> Answer:
    """The answer of a worker that nothing happens to."""
    async with stage(model_folder, tmp_path, "alone") as [alone]:
        alone.worker.submit("g", submit(**options))  # type: ignore[arg-type]
        return await alone.gateway.whole()
