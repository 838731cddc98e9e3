"""A worker's process without the process: what it tells a controller that the test plays, and what it does when told to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from worker_scene import FIRST, PATIENCE_S, SECRET, Ear, ScriptedStore, submit

from spotserve.config import WorkerSettings
from spotserve.core.clock import ManualClock
from spotserve.core.messages import (
    Activate,
    Address,
    Drain,
    Drained,
    Heartbeat,
    HeldSlot,
    Registered,
    Released,
    ReplicaFailed,
    ReplicaReady,
    SequenceAction,
    SequenceOrder,
    Stop,
    Undrain,
    WorkerEvent,
)
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.system_folder import SystemFolder, SystemRecord
from spotserve.wire import Channel, bound_port, listen
from spotserve.worker.app import WorkerProcess
from spotserve.worker.options import WorkerOptions
from spotserve.worker.worker import Worker

pytestmark = pytest.mark.anyio

Heard = TypeVar("Heard", bound=msgspec.Struct)


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

    def say(self, command: msgspec.Struct) -> None:
        assert self.channel is not None
        self.channel.send(command)


@asynccontextmanager
async def at_work(
    folder: SystemFolder, model: str, worker_settings: dict[str, object] | None = None, *, controller: bool = True
) -> AsyncIterator[tuple[WorkerProcess, Worker, Office]]:
    """A worker that knows a controller's address, and the controller."""
    office = Office()
    server = await listen("127.0.0.1", 0, secret=SECRET, inbound=WorkerEvent, on_channel=office.serve, on_refused=print)
    folder.create()
    if controller:
        folder.write(SystemRecord(pid=1, url="", controller=Address("127.0.0.1", bound_port(server)), secret=SECRET))
    engine = {"model": model, "dtype": "float64", "kv_tokens": 1024}
    settings = {"heartbeat_s": 0.02, **(worker_settings or {})}
    options = WorkerOptions(
        instance_id="i-1", spot=True, zone="z", system_folder=str(folder.path), engine=engine, worker=settings, store={}
    )
    worker = Worker("i-1", WorkerSettings.model_validate(settings), ScriptedStore(), ManualClock())
    process = WorkerProcess(options, worker, SECRET)
    process.address = Address("127.0.0.1", 4711)
    tasks = [asyncio.create_task(process.keep_registered()), asyncio.create_task(process.send_heartbeats())]
    try:
        yield process, worker, office
    finally:
        for task in (*tasks, *process._jobs):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if process._thread is not None:
            process._thread.stop()
            await asyncio.to_thread(process._thread._thread.join)
        server.close()


def activate(replica_id: str = "r-1", **parallel: int) -> Activate:
    return Activate(
        instance_id="i-1",
        device_index=0,
        replica=ReplicaPlan(replica_id=replica_id, parallel=Parallel(**parallel)),
        slot=Slot(replica_id, 0, 0),
        plan_epoch=3,
    )


async def test_it_registers_loads_and_registers_what_it_holds_with_the_next_controller(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (_, worker, office):
        registered = await office.hears(Registered)
        assert (registered.instance_id, registered.address, registered.replicas) == ("i-1", Address("127.0.0.1", 4711), ())
        assert (await office.hears(Heartbeat)).sequences == ()
        office.say(activate())
        ready = await office.hears(ReplicaReady)
        assert (ready.replica_id, ready.plan_epoch) == ("r-1", 3)
        assert ready.model == worker.model
        assert office.channel is not None
        office.channel.close()
        again = await office.hears(Registered)
        assert [replica.replica_id for replica in again.replicas] == ["r-1"]
        assert again.held == (HeldSlot(0, Slot("r-1", 0, 0), 1, 1),)
        assert again.model == ready.model


async def test_another_replica_that_is_wanted_while_weights_are_loaded_reuses_them(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, _, office):
        await office.hears(Registered)
        office.say(activate("r-1"))
        office.say(activate("r-2"))
        assert [(await office.hears(ReplicaReady)).replica_id for _ in range(2)] == ["r-1", "r-2"]
        assert not process.stopped.done()


async def test_a_model_that_is_not_there_fails_the_replica_and_not_the_worker(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(tmp_path / "nothing")) as (process, _, office):
        await office.hears(Registered)
        for _ in range(2):
            office.say(activate())
            failed = await office.hears(ReplicaFailed)
            assert "nothing" in failed.reason
        assert not process.stopped.done()


async def test_a_shape_that_it_cannot_run_is_refused(tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), "unused") as (_, _, office):
        await office.hears(Registered)
        office.say(activate(pipeline=2))
        assert "one stage" in (await office.hears(ReplicaFailed)).reason


async def test_drain_and_undrain(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (_, worker, office):
        await office.hears(Registered)
        office.say(activate())
        await office.hears(ReplicaReady)
        gateway = Ear()
        worker.attach("g", gateway)  # type: ignore[arg-type]
        resume = SequenceOrder(
            request_id="", action=SequenceAction.RESUME, destination_replica_id="r-9", destination=None, reason="grace is short"
        )
        office.say(Drain(instance_id="i-1", replica_id="r-1", deadline_s=2e9, orders=(), fallback=resume))
        assert (await office.hears(Drained)).replica_id == "r-1"
        worker.submit("g", submit())
        assert gateway.of(Released) == [
            Released(request_id="s", epoch=FIRST, reason="i-1 is draining", destination_replica_id="r-9")
        ]
        office.say(Undrain(instance_id="i-1", replica_id="r-1"))
        office.say(activate("r-2"))
        await office.hears(ReplicaReady)
        worker.submit("g", submit())
        assert len((await gateway.whole()).token_ids) == 24


async def test_stop_ends_it(tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), "unused") as (process, _, office):
        await office.hears(Registered)
        office.say(Stop(instance_id="i-1"))
        assert await asyncio.wait_for(process.stopped, PATIENCE_S) is None


async def test_a_worker_that_never_finds_a_controller_leaves(tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), "unused", {"orphan_s": 0.05}, controller=False) as (process, _, _):
        assert await asyncio.wait_for(process.stopped, PATIENCE_S) is None


async def test_an_engine_that_breaks_ends_the_process_with_its_error(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, _, office):
        await office.hears(Registered)
        office.say(activate())
        await office.hears(ReplicaReady)
        assert process._thread is not None
        process._thread.post(lambda _: 1 // 0)  # type: ignore[arg-type,return-value]
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(process.stopped, PATIENCE_S)
