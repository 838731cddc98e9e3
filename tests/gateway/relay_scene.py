"""A relay among replicas that a test plays, over real channels, with a store that can be told to fail."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
from model_specs import small_spec

from spotserve.checkpoint.store import Commit, CommitOutcome, Progress
from spotserve.config import GatewaySettings
from spotserve.core.cluster import ReplicaState
from spotserve.core.errors import StoreError
from spotserve.core.messages import Address, Attach, Deltas, Route, RoutingTable, SequenceResumed, WorkerInbound
from spotserve.core.model import Portion
from spotserve.core.request import FinishReason, Request, SamplingParams, TokenDelta
from spotserve.gateway.calls import Call
from spotserve.gateway.relay import Relay
from spotserve.metrics import Metrics
from spotserve.system_clock import SystemClock
from spotserve.wire import Channel, bound_port, listen

SECRET = "of the scene"
PATIENCE_S = 10.0
"""A test that waits this long has failed."""

MODEL = small_spec(
    name="scripted",
    num_layers=1,
    num_kv_heads=1,
    head_size=1,
    vocabulary_size=1000,
    context_tokens=1000,
    layer=(Portion(1, 1),),
    embedding=(Portion(1, 1),),
    head=(Portion(1, 1),),
    value_bytes=4,
)

Heard = TypeVar("Heard", bound=msgspec.Struct)


def request(request_id: str = "call-0", *, max_tokens: int = 100, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(request_id=request_id, prompt_token_ids=(1, 2, 3), sampling=params)


def call(call_id: str = "call", *, choices: int = 1, **sampling: object) -> Call:
    return Call(call_id, b"", tuple(request(f"{call_id}-{index}", **sampling) for index in range(choices)))


def token_at(position: int) -> int:
    """Every sequence of these tests says this."""
    return 100 + position


def delta(
    epoch: int, position: int, end: int, *, request_id: str = "call-0", finish: FinishReason | None = None, **extra: object
) -> TokenDelta:
    tokens = tuple(map(token_at, range(position, end)))
    return TokenDelta(
        request_id=request_id,
        epoch=epoch,
        position=position,
        token_ids=tokens,
        finish_reason=finish,
        **extra,  # type: ignore[arg-type]
    )


class ScriptedStore:
    """A store in memory; `down` makes it refuse, `gate` makes it slow."""

    display_url = "memory"

    def __init__(self) -> None:
        self.progress: dict[str, Progress] = {}
        self.calls: dict[str, bytes] = {}
        self.down = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def _answer(self) -> None:
        await self.gate.wait()
        if self.down:
            raise StoreError("down")

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        raise AssertionError("a gateway commits no progress")

    async def load(self, request_ids: Sequence[str]) -> Mapping[str, Progress]:
        await self._answer()
        return {request_id: self.progress[request_id] for request_id in request_ids if request_id in self.progress}

    async def put_call(self, call_id: str, record: bytes) -> None:
        await self._answer()
        self.calls[call_id] = record

    async def get_call(self, call_id: str) -> bytes | None:
        await self._answer()
        return self.calls.get(call_id)

    async def delete_call(self, call_id: str, request_ids: Sequence[str]) -> None:
        self.calls.pop(call_id, None)

    async def ping(self) -> None:
        await self._answer()

    async def close(self) -> None:
        return


class ScriptedReplica:
    """A worker whose part the test plays: it keeps what it hears and says what it is told to."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self._port = 0
        self._server: asyncio.Server | None = None
        self._channel: Channel[object] | None = None
        self._heard: asyncio.Queue[msgspec.Struct] = asyncio.Queue()

    async def open(self) -> None:
        """Listens; at the second time where it listened before."""
        self._server = await listen(
            "127.0.0.1", self._port, secret=SECRET, inbound=WorkerInbound, on_channel=self._serve, on_refused=self._refused
        )
        self._port = bound_port(self._server)

    def glitch(self) -> None:
        """The connection breaks; the replica still listens."""
        assert self._channel is not None
        self._channel.close()

    def die(self) -> None:
        """It neither listens nor talks any more."""
        assert self._server is not None
        self._server.close()
        if self._channel is not None:
            self._channel.close()

    def route(self, state: ReplicaState = ReplicaState.SERVING) -> Route:
        return Route(
            replica_id=self.replica_id,
            instance_id=f"i-{self.replica_id}",
            address=Address("127.0.0.1", self._port),
            state=state,
            max_batch=4,
        )

    async def hears(self, kind: type[Heard]) -> Heard:
        """The next message, which must be of this kind."""
        message = await asyncio.wait_for(self._heard.get(), PATIENCE_S)
        assert isinstance(message, kind), message
        return message

    @property
    def has_heard_nothing_more(self) -> bool:
        return self._heard.empty()

    def say(self, *replies: msgspec.Struct | TokenDelta) -> None:
        """Replies to the gateway; bare deltas are put into one message each."""
        assert self._channel is not None
        for reply in replies:
            self._channel.send(Deltas(deltas=(reply,)) if isinstance(reply, TokenDelta) else reply)

    async def _serve(self, channel: Channel[object]) -> None:
        while True:
            message = await channel.receive()
            assert isinstance(message, msgspec.Struct)
            if isinstance(message, Attach):
                self._channel = channel
            self._heard.put_nowait(message)

    def _refused(self, reason: str) -> None:
        raise AssertionError(reason)


class Scene:
    """One gateway's relay and the replicas that it is told of."""

    def __init__(self, store: ScriptedStore | None = None, **settings: object) -> None:
        self.store = store or ScriptedStore()
        self.metrics = Metrics()
        self.resumed: list[SequenceResumed] = []
        self.relay = Relay(
            "gateway",
            GatewaySettings.model_validate(settings),
            self.store,
            secret=SECRET,
            clock=SystemClock(),
            metrics=self.metrics,
            on_resumed=self.resumed.append,
        )
        self._version = 0

    def publish(self, *routes: Route) -> None:
        self._version += 1
        self.relay.use_table(RoutingTable(version=self._version, replicas=routes, model=MODEL))

    async def connect(self, *replicas: ScriptedReplica) -> None:
        """Publishes these and waits until each is attached to."""
        self.publish(*(replica.route() for replica in replicas))
        for replica in replicas:
            await replica.hears(Attach)
        await until(lambda: set(self.relay._links.connected_ids()) == {replica.replica_id for replica in replicas})

    def report(self) -> dict[str, int]:
        """Sequences by state, those that are not zero."""
        report = msgspec.structs.asdict(self.relay.report("gateway"))
        return {name: count for name, count in report.items() if name not in ("gateway_id", "arrived", "served") and count}


@asynccontextmanager
async def scene(
    *names: str, store: ScriptedStore | None = None, connected: bool = True, **settings: object
) -> AsyncIterator[tuple[Scene, list[ScriptedReplica]]]:
    """A relay and listening replicas of these names; all end with the test."""
    replicas = [ScriptedReplica(name) for name in names]
    for replica in replicas:
        await replica.open()
    stage = Scene(store, **settings)
    try:
        if connected and replicas:
            await stage.connect(*replicas)
        yield stage, replicas
    finally:
        await stage.relay.close()
        for replica in replicas:
            replica.die()
        await asyncio.sleep(0)


async def until(condition: object) -> None:
    """Lets the others work until `condition()` holds."""
    assert callable(condition)
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def read(stream: AsyncIterator[TokenDelta]) -> list[TokenDelta]:
    """Every delta to the end; each position once and in order."""
    deltas: list[TokenDelta] = []
    async with asyncio.timeout(PATIENCE_S):
        async for item in stream:
            assert item.position == (deltas[-1].end_position if deltas else 0)
            assert item.token_ids == tuple(map(token_at, range(item.position, item.end_position)))
            deltas.append(item)
    return deltas


async def length(stream: AsyncIterator[TokenDelta]) -> int:
    """How many tokens a whole answer has."""
    return (await read(stream))[-1].end_position
