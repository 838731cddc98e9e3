"""A worker whose engine is a server: what it tells its controller and its gateways while that server comes, serves and goes."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from model_server import EOS, MODEL, PROMPT, STORY, Fault, ModelServer, serving

from spotserve.checkpoint.null import NullStore
from spotserve.config import EngineSettings, WorkerSettings
from spotserve.core.clock import ManualClock
from spotserve.core.epoch import first_epoch
from spotserve.core.messages import Activate, Address, Deactivate, Deltas, HandOver, Released, SlotFailed, SlotReady, Submit
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.core.request import FinishReason, Request, SamplingParams, TokenDelta
from spotserve.engine.remote.vocabulary import load_vocabulary
from spotserve.worker.remote_starter import RemoteStarter
from spotserve.worker.worker import Worker

pytestmark = pytest.mark.anyio

VOCABULARY = load_vocabulary(EngineSettings().model)
PROMPT_IDS = VOCABULARY.encode(PROMPT)
ANSWER = (*VOCABULARY.encode(STORY)[len(PROMPT_IDS) :], EOS)


class Scene:
    """One worker; a gateway and a controller that note what they are told."""

    def __init__(self, url: str) -> None:
        self.told: list[msgspec.Struct] = []
        self.heard: list[msgspec.Struct] = []
        self.failures: list[BaseException] = []
        self.worker = Worker("i-1", WorkerSettings(), NullStore(), ManualClock())
        self.worker.attach("g", self)  # type: ignore[arg-type]
        settings = EngineSettings(kind="openai", url=url, served_name=MODEL)
        self.starter = RemoteStarter(
            self.worker, settings, host="127.0.0.1", report=self.told.append, on_failure=self.failures.append
        )

    def send(self, message: msgspec.Struct) -> None:
        """What the worker says to its gateway."""
        self.heard.append(message)

    @property
    def deltas(self) -> list[TokenDelta]:
        return [delta for message in self.heard if isinstance(message, Deltas) for delta in message.deltas]

    def token_ids(self, request_id: str = "r") -> tuple[int, ...]:
        token_ids: list[int] = []
        for delta in self.deltas:
            if delta.request_id == request_id and delta.position <= len(token_ids):
                token_ids[delta.position :] = delta.token_ids
        return tuple(token_ids)

    async def until(self, kind: type, where: str = "told") -> msgspec.Struct:
        async with asyncio.timeout(20):
            while not (found := [message for message in getattr(self, where) if isinstance(message, kind)]):
                await asyncio.sleep(0.005)
        return found[-1]

    async def end_of(self, request_id: str = "r") -> TokenDelta:
        async with asyncio.timeout(20):
            while not (found := [d for d in self.deltas if d.request_id == request_id and d.finish_reason is not None]):
                await asyncio.sleep(0.005)
        return found[-1]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    with serving(ModelServer("vllm", token_s=0.002)) as running:
        yield running


def activation(replica_id: str = "r-1", pipeline: int = 1) -> Activate:
    plan = ReplicaPlan(replica_id=replica_id, parallel=Parallel(pipeline=pipeline, tensor=1, max_batch=4))
    return Activate(
        instance_id="i-1", device_index=0, replica=plan, slot=Slot(replica_id, 0, 0), plan_epoch=1, members=(), transfers=()
    )


def request(request_id: str = "r") -> Request:
    sampling = SamplingParams(max_tokens=200, temperature=0.0)
    return Request(request_id=request_id, prompt_token_ids=PROMPT_IDS, sampling=sampling)


def submit(emitted: tuple[int, ...] = (), request_id: str = "r") -> Submit:
    return Submit(request=request(request_id), epoch=first_epoch(), emitted_token_ids=emitted)


async def test_a_replica_comes_up_serves_and_leaves(server: ModelServer) -> None:
    scene = Scene(server.url)
    await scene.starter.activate(activation())
    ready = await scene.until(SlotReady)
    assert isinstance(ready, SlotReady)
    assert (ready.invariant, ready.pulled_bytes, ready.model) == ("none", 0, scene.starter.model)
    assert [plan.replica_id for plan in scene.starter.serving] == ["r-1"] and len(scene.starter.ranks) == 1
    scene.worker.submit("g", submit())
    assert (await scene.end_of()).finish_reason is FinishReason.STOP
    assert scene.token_ids() == ANSWER
    assert (await scene.worker.heartbeat()).running == 0
    scene.starter.deactivate(Deactivate(instance_id="i-1", device_index=0, slot=Slot("r-1", 0, 0)))
    assert scene.starter.serving == () and not scene.failures


async def test_a_failed_request_tells_its_gateway_why(server: ModelServer) -> None:
    scene = Scene(server.url)
    await scene.starter.activate(activation())
    server.faults.append(Fault("status", status=400, message="no such thing"))
    scene.worker.submit("g", submit())
    end = await scene.end_of()
    assert end.finish_reason is FinishReason.FAILED and end.error is not None and "no such thing" in end.error
    scene.worker.attach("g", scene)  # type: ignore[arg-type]
    assert scene.deltas[-1].error == end.error, "a gateway that comes back hears it as well"


async def test_a_server_that_dies_gives_its_requests_back() -> None:
    with serving(ModelServer("vllm", token_s=0.005)) as server:
        scene = Scene(server.url)
        await scene.starter.activate(activation())
        scene.worker.submit("g", submit())
        while not scene.token_ids():
            await asyncio.sleep(0.005)
    failed = await scene.until(SlotFailed)
    assert isinstance(failed, SlotFailed) and not failed.is_permanent
    released = await scene.until(Released, "heard")
    assert isinstance(released, Released) and released.request_id == "r"
    assert scene.starter.serving == () and not scene.failures
    begun = scene.token_ids()
    with serving(ModelServer("vllm"), port=int(server.url.rsplit(":", 1)[1].removesuffix("/v1"))):
        await scene.starter.activate(activation("r-2"))
        scene.worker.submit("g", submit(begun))
        await scene.end_of()
    assert scene.token_ids() == ANSWER, "the answer went on where it was cut"


async def test_a_sequence_is_handed_over_by_its_tokens(server: ModelServer) -> None:
    scene = Scene(server.url)
    await scene.starter.activate(activation())
    scene.worker.submit("g", submit())
    assert await scene.worker.pack("r") is None, "no KV leaves a server"
    progress = TokenDelta(request_id="s", epoch=first_epoch(), position=0, token_ids=ANSWER[:30])
    answered = await scene.worker.adopt(
        HandOver(
            gateway_id="g",
            request=request("s"),
            epoch=first_epoch(),
            progress=progress,
            emitted_token_ids=ANSWER[:30],
            computed_tokens=40,
            replica_id="elsewhere",
            parallel=Parallel(pipeline=1, tensor=1, max_batch=4),
            holders=(),
            dtype="float32",
        )
    )
    assert answered.accepted and answered.kv_bytes == 0
    await scene.end_of("s")
    assert scene.token_ids("s") == ANSWER
    assert (await scene.end_of("r")).finish_reason is FinishReason.STOP


async def test_what_cannot_come_up_is_told() -> None:
    with serving(ModelServer("vllm", key="of somebody else")) as server:
        scene = Scene(server.url)
        await scene.starter.activate(activation())
        await scene.starter.activate(activation("wide", pipeline=2))
    refused, wide = (message for message in scene.told if isinstance(message, SlotFailed))
    assert refused.is_permanent and "SPOTSERVE_ENGINE__API_KEY" in refused.reason
    assert wide.is_permanent and "whole" in wide.reason
    assert isinstance(scene.starter.ranks[0], Address)
