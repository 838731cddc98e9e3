"""A worker with a real engine that a test may hold still, and gateways that note what they are told."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from spotserve.checkpoint.store import Commit, CommitOutcome, Progress, Verdict
from spotserve.config import WorkerSettings
from spotserve.core.clock import ManualClock
from spotserve.core.cluster import DeviceId
from spotserve.core.epoch import first_epoch
from spotserve.core.errors import StoreError
from spotserve.core.messages import Activate, Address, Deactivate, Deltas, Heartbeat, Member, Submit, WorkerInbound
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.core.request import Request, SamplingParams, TokenDelta, TokenLogprob
from spotserve.engine.ranks.memory import RankMemory
from spotserve.wire import Channel, bound_port, listen
from spotserve.worker.app import WorkerProcess
from spotserve.worker.options import WorkerOptions
from spotserve.worker.replicas import LedReplica
from spotserve.worker.worker import Worker

VOCABULARY_SIZE = 96
SECRET = "of the scene"
PATIENCE_S = 20.0
"""A test that waits this long has failed."""
FIRST = first_epoch()
Heard = TypeVar("Heard", bound=msgspec.Struct)


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


class Office:
    """A controller that the test plays."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[msgspec.Struct] = asyncio.Queue()
        self.channel: Channel[Any] | None = None

    async def serve(self, channel: Channel[Any]) -> None:
        self.channel = channel
        while True:
            self._heard.put_nowait(await channel.receive())

    async def hears(self, kind: type[Heard]) -> Heard:
        """The next message that is not a heartbeat, or the next heartbeat."""
        async with asyncio.timeout(PATIENCE_S):
            while isinstance(message := await self._heard.get(), Heartbeat) and kind is not Heartbeat:
                pass
        assert isinstance(message, kind), message
        return message

    @property
    def unheard(self) -> list[msgspec.Struct]:
        """What came and was not asked for."""
        return [self._heard.get_nowait() for _ in range(self._heard.qsize())]

    def say(self, command: msgspec.Struct) -> None:
        assert self.channel is not None
        self.channel.send(command)


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
    """One worker, its gateway `g`, and replicas that it leads."""

    def __init__(self, name: str, folder: Path, clock: ManualClock, engine: dict[str, object]) -> None:
        self.clock = clock
        self.replica_id = f"r-{name}"
        """The one that runs from the beginning."""
        self.store = ScriptedStore()
        self.worker = Worker(name, WorkerSettings(keep_finished_s=30), self.store, clock)
        self.gateway = Ear()
        self.worker.attach("g", self.gateway)  # type: ignore[arg-type]
        self.process = WorkerProcess(
            WorkerOptions(instance_id=name, spot=True, zone="z", system_folder=str(folder), engine=engine, worker={}, store={}),
            self.worker,
            SECRET,
        )
        self.address = Address("127.0.0.1", 0)
        self._free = threading.Event()
        self._free.set()

    @property
    def replica(self) -> LedReplica:
        """The one that runs from the beginning."""
        led = self.worker.led(self.replica_id)
        assert led is not None
        return led

    @property
    def memory(self) -> RankMemory:
        """Of its device."""
        return self.process._replicas._own.memory

    @property
    def failure(self) -> BaseException | None:
        """What ended its process."""
        return self.process.stopped.exception() if self.process.stopped.done() else None

    async def lead(self, replica_id: str) -> LedReplica:
        """Brings one more replica up on its device."""
        parallel = Parallel()
        slot = Slot(replica_id, 0, 0)
        (rank,) = self.process._replicas.ranks
        await self.process._replicas.activate(
            Activate(
                instance_id=self.worker.instance_id,
                device_index=0,
                replica=ReplicaPlan(replica_id=replica_id, parallel=parallel),
                slot=slot,
                plan_epoch=1,
                members=(Member(slot, DeviceId(self.worker.instance_id, 0), rank),),
            )
        )
        led = self.worker.led(replica_id)
        assert led is not None
        return led

    def end(self, replica_id: str) -> None:
        """Takes one of its replicas down."""
        self.process._replicas.deactivate(
            Deactivate(instance_id=self.worker.instance_id, device_index=0, slot=Slot(replica_id, 0, 0))
        )

    def note_refused(self, reason: str) -> None:
        self.gateway.heard.append(Refused(reason))

    def hold(self) -> None:
        """No engine does anything more until `let_go`: each waits in a job."""
        self._free.clear()
        for replica in self.worker._replicas.values():
            replica.thread.post(lambda _: _wait(self._free))

    def let_go(self) -> None:
        self._free.set()

    async def tokens_so_far(self, at_least: int, request_id: str = "s") -> None:
        """Runs until the gateway has heard so many tokens; then the engines hold still."""
        await until(lambda: len(self.gateway.answer(request_id).token_ids) >= at_least)
        self.hold()

    async def close(self) -> None:
        self.let_go()
        for replica in tuple(self.worker._replicas.values()):
            self.end(replica.replica_id)
            await asyncio.to_thread(replica.thread._thread.join)
        self.process._replicas._own.close()

    async def check(self) -> None:
        """Blocks and sequences of the engines are accounted for, and they run exactly what this worker owns."""
        self.let_go()
        for replica in tuple(self.worker._replicas.values()):
            running = {owned.request_id for owned in self.worker.running_requests(replica.replica_id)}
            reported = await replica.thread.call(lambda engine: (engine.check_integrity(), engine.reports())[1])
            assert {report.request_id for report in reported} <= running
        assert self.failure is None

    async def check_idle(self) -> None:
        """Nothing is left: neither sequences nor blocks, nor KV for anybody, nor from anybody."""
        self.let_go()
        for replica in tuple(self.worker._replicas.values()):
            used = await replica.thread.call(lambda engine: (engine.check_integrity(), engine.kv_tokens_used)[1])
            assert used == 0
            assert self.worker.running_requests(replica.replica_id) == ()
            assert replica.fetcher is not None
            await asyncio.wrap_future(replica.fetcher.forget("nothing"))  # after whatever was asked of it before
        assert self.memory._kv == {}
        assert self.memory._fetched == {}
        assert self.failure is None


def _wait(free: threading.Event) -> None:
    assert free.wait(PATIENCE_S)


@asynccontextmanager
async def stage(
    model_folder: Path, tmp_path: Path, *names: str, clock: ManualClock | None = None, **settings: object
) -> AsyncIterator[list[Stage]]:
    """Workers that listen for gateways and peers. In the end each engine's books must balance."""
    given = {"model": str(model_folder), "dtype": "float64", "speculation": "off", "kv_tokens": 2048}
    async with AsyncExitStack() as at_end:
        stages = []
        for name in names:
            made = Stage(name, tmp_path, clock or ManualClock(1000.0), {**given, **settings})
            at_end.push_async_callback(made.close)
            await made.lead(made.replica_id)
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
