"""What was to finish on a dying instance and did not: it moves with its KV, or is let go where nobody takes it."""

import asyncio
import time

import pytest

from spotserve.core.messages import (
    Address,
    Drain,
    HandOver,
    HandOverAnswered,
    SequenceAction,
    SequenceMoved,
    SequenceOrder,
    WorkerInbound,
)
from spotserve.core.plan import Parallel
from spotserve.core.request import Request, SamplingParams, TokenDelta
from spotserve.wire import Channel, bound_port, listen
from spotserve.worker.drain import carry_out

REQUEST = Request(request_id="a", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=100))


class WallClock:
    def now_s(self) -> float:
        return time.time()


class EndlessWorker:
    """Runs one sequence that does not finish."""

    instance_id = "i-1"

    def __init__(self) -> None:
        self.running = [REQUEST]
        self.shipped: list[str] = []
        self.released: list[str] = []
        self.unfrozen: list[str] = []

    def led(self, replica_id: str) -> None:
        """The peer leads where it goes."""

    def running_requests(self, replica_id: str) -> tuple[Request, ...]:
        assert replica_id == "r-1"
        return tuple(self.running)

    async def pack(self, request_id: str) -> HandOver:
        return HandOver(
            gateway_id="g",
            request=REQUEST,
            epoch=1,
            progress=TokenDelta(request_id=request_id, epoch=1, position=0, token_ids=(3,)),
            emitted_token_ids=(3,),
            computed_tokens=2,
            replica_id="r-1",
            parallel=Parallel(),
            holders=(),
            dtype="float32",
        )

    def ship(self, hand_over: HandOver, destination_replica_id: str) -> None:
        self.running.clear()
        self.shipped.append(destination_replica_id)

    def unfreeze(self, hand_over: HandOver) -> None:
        self.unfrozen.append(hand_over.request.request_id)

    def release(self, request_id: str, reason: str, destination_replica_id: str | None) -> None:
        self.running.clear()
        self.released.append(reason)


async def take_everything(channel: Channel[WorkerInbound]) -> None:
    """A peer that has room."""
    while True:
        message = await channel.receive()
        assert isinstance(message, HandOver)
        channel.send(HandOverAnswered(request_id=message.request.request_id, accepted=True, kv_bytes=2))


async def drain_late(*, peer_listens: bool, named: bool = True) -> tuple[EndlessWorker, list[SequenceMoved]]:
    """Drains a worker whose only sequence was to finish here."""
    server = await listen("127.0.0.1", 0, secret="s", inbound=WorkerInbound, on_channel=take_everything, on_refused=pytest.fail)
    address = Address("127.0.0.1", bound_port(server))
    if not peer_listens:
        server.close()
        await server.wait_closed()
    finish = SequenceOrder(
        request_id="a", action=SequenceAction.FINISH, destination_replica_id=None, destination=None, reason="in time"
    )
    fallback = SequenceOrder(
        request_id="",
        action=SequenceAction.RESUME,
        destination_replica_id="r-2",
        destination=address if named else None,
        reason="not known",
    )
    drain = Drain(instance_id="i-1", replica_id="r-1", deadline_s=time.time() + 0.6, orders=(finish,), fallback=fallback)
    worker, moved = EndlessWorker(), []
    await carry_out(worker, drain, secret="s", clock=WallClock(), on_moved=moved.append)  # type: ignore[arg-type]
    server.close()
    return worker, moved


def test_what_does_not_finish_in_time_moves_with_its_kv() -> None:
    worker, moved = asyncio.run(drain_late(peer_listens=True))
    assert (worker.shipped, worker.released) == (["r-2"], [])
    assert [(event.request_id, event.kv_bytes) for event in moved] == [("a", 2)]


def test_it_is_let_go_when_the_peer_is_gone() -> None:
    worker, moved = asyncio.run(drain_late(peer_listens=False))
    assert worker.shipped == [] and moved == []
    assert len(worker.released) == 1 and "not moved" in worker.released[0]


def test_it_is_let_go_when_there_is_no_peer() -> None:
    worker, moved = asyncio.run(drain_late(peer_listens=True, named=False))
    assert (worker.shipped, worker.released, moved) == ([], ["did not finish in time"], [])
