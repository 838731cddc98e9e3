"""A worker's process without the process: what it tells a controller that the test plays, and what it does when told to."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from worker_scene import FIRST, PATIENCE_S, SECRET, Ear, Office, ScriptedStore, submit, until

from spotserve.config import WorkerSettings
from spotserve.core.clock import ManualClock
from spotserve.core.cluster import DeviceId
from spotserve.core.errors import PeerLost
from spotserve.core.messages import (
    Activate,
    Address,
    Deactivate,
    Drain,
    Drained,
    Heartbeat,
    HeldSlot,
    Member,
    Registered,
    Released,
    SequenceAction,
    SequenceOrder,
    SlotFailed,
    SlotReady,
    Stop,
    Undrain,
    WorkerEvent,
)
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.system_folder import SystemFolder, SystemRecord
from spotserve.wire import bound_port, listen
from spotserve.worker.app import WorkerProcess
from spotserve.worker.devices import gently
from spotserve.worker.options import WorkerOptions
from spotserve.worker.slots import SlotUp
from spotserve.worker.worker import Worker

pytestmark = pytest.mark.anyio

NOWHERE = Address("127.0.0.1", 1)
"""Where nobody listens."""


@pytest.fixture
def silent() -> Iterator[Address]:
    """Somebody who takes every link, and says nothing on it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Address("127.0.0.1", listening.getsockname()[1])


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
        for replica in tuple(worker._replicas.values()):
            worker.leave(replica.replica_id, "the test is over")
            await asyncio.to_thread(replica.thread._thread.join)
        process._replicas._own.close()
        server.close()


def activate(
    process: WorkerProcess,
    replica_id: str = "r-1",
    *,
    plan_epoch: int = 3,
    device_index: int = 0,
    others: Address = NOWHERE,
    **parallel: int,
) -> Activate:
    """For the first slot of a replica; the other slots, if there are any, are on `others`."""
    replica = ReplicaPlan(replica_id=replica_id, parallel=Parallel(**parallel))
    (rank,) = process._replicas.ranks
    members = tuple(Member(slot, DeviceId("i-1", index), others if index else rank) for index, slot in enumerate(replica.slots))
    return Activate(
        instance_id="i-1", device_index=device_index, replica=replica, slot=replica.slots[0], plan_epoch=plan_epoch, members=members
    )


def deactivate(replica_id: str = "r-1") -> Deactivate:
    return Deactivate(instance_id="i-1", device_index=0, slot=Slot(replica_id, 0, 0))


async def test_it_registers_loads_and_registers_what_it_holds_with_the_next_controller(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, _, office):
        registered = await office.hears(Registered)
        assert (registered.instance_id, registered.address, registered.replicas) == ("i-1", Address("127.0.0.1", 4711), ())
        assert (await office.hears(Heartbeat)).sequences == ()
        assert registered.ranks == process._replicas.ranks
        office.say(activate(process))
        ready = await office.hears(SlotReady)
        assert (ready.slot, ready.plan_epoch, ready.pulled_bytes) == (Slot("r-1", 0, 0), 3, 0)
        assert ready.model.num_layers == 2
        assert office.channel is not None
        office.channel.close()
        again = await office.hears(Registered)
        assert [replica.replica_id for replica in again.replicas] == ["r-1"]
        assert again.held == (HeldSlot(0, Slot("r-1", 0, 0), Parallel()),)
        assert again.model == ready.model


async def test_another_replica_that_is_wanted_while_weights_are_loaded_reuses_them(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, _, office):
        await office.hears(Registered)
        office.say(activate(process, "r-1"))
        office.say(activate(process, "r-2"))
        assert {(await office.hears(SlotReady)).slot.replica_id for _ in range(2)} == {"r-1", "r-2"}
        office.say(activate(process, "r-3"))
        await office.hears(SlotReady)
        held = [up.weights for up in process._replicas._own._slots.values()]
        assert len(held) == 3
        shared = {held[2].tensors[name].data_ptr() for name in held[2].tensors}
        assert shared <= {tensor.data_ptr() for weights in held[:2] for tensor in weights.tensors.values()}
        assert not process.stopped.done()


async def test_a_model_that_is_not_there_fails_the_replica_and_not_the_worker(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(tmp_path / "nothing")) as (process, _, office):
        await office.hears(Registered)
        for _ in range(2):
            office.say(activate(process))
            failed = await office.hears(SlotFailed)
            assert "nothing" in failed.reason
            assert failed.is_permanent
        assert not process.stopped.done()


@pytest.mark.parametrize(
    ("asked", "says", "is_permanent"),
    [
        ({"tensor": 3}, "equal shards", True),
        ({"device_index": 4}, "has 1 devices", True),
        ({"pipeline": 2}, "cannot reach 127.0.0.1:1", False),
    ],
)
async def test_what_cannot_be_brought_up_is_reported_and_can_be_tried_again(
    model_folder: Path, tmp_path: Path, asked: dict[str, int], says: str, is_permanent: bool
) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, _, office):
        await office.hears(Registered)
        office.say(activate(process, **asked))
        failed = await office.hears(SlotFailed)
        assert says in failed.reason
        assert failed.is_permanent is is_permanent
        assert process._replicas._own._groups == {}
        office.say(activate(process, plan_epoch=4))
        assert (await office.hears(SlotReady)).plan_epoch == 4


async def test_a_slot_that_is_wanted_twice_comes_up_once(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, _, office):
        await office.hears(Registered)
        office.say(activate(process))
        office.say(activate(process))
        await office.hears(SlotReady)
        office.say(activate(process))
        office.say(Stop(instance_id="i-1"))
        await asyncio.wait_for(process.stopped, PATIENCE_S)
        assert all(isinstance(message, Heartbeat) for message in office.unheard)
        assert len(process._replicas._own.slots) == 1


async def test_a_slot_that_is_given_up_while_it_comes_up_leaves_nothing(model_folder: Path, tmp_path: Path) -> None:
    """And can be wanted again at once: what was given up has no say any more."""
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, worker, office):
        await office.hears(Registered)
        own = process._replicas._own
        office.say(activate(process))
        office.say(deactivate())
        office.say(activate(process, plan_epoch=4))
        ready = await office.hears(SlotReady)
        assert ready.plan_epoch == 4
        assert worker.led("r-1") is not None
        office.say(deactivate())
        await until(lambda: own.slots == ())
        assert worker.led("r-1") is None
        office.say(activate(process, "r-2", plan_epoch=5))
        await office.hears(SlotReady)
        assert len(own.memory._weights) == 1, "weights that were kept for the next slot are its own now"


async def test_a_replica_that_loses_a_rank_gives_back_what_ran_and_the_worker_lives(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, worker, office):
        await office.hears(Registered)
        office.say(activate(process))
        await office.hears(SlotReady)
        gateway = Ear()
        worker.attach("g", gateway)  # type: ignore[arg-type]
        for name in ("s", "t"):
            worker.submit("g", submit(request_id=name, max_tokens=400))
        await until(lambda: len(gateway.answer("s").token_ids) > 2)
        led = worker.led("r-1")
        assert led is not None
        led.thread.post(_lose_a_peer)
        failed = await office.hears(SlotFailed)
        assert (failed.is_permanent, failed.slot, failed.plan_epoch) == (False, Slot("r-1", 0, 0), 3)
        assert "its machine is gone" in failed.reason
        assert {released.request_id for released in gateway.of(Released)} == {"s", "t"}  # type: ignore[attr-defined]
        assert worker.led("r-1") is None
        assert await office.hears(Heartbeat), "it goes on reporting"
        assert not process.stopped.done()
        office.say(activate(process, plan_epoch=4))
        await office.hears(SlotReady)
        worker.submit("g", submit(request_id="u"))
        assert len((await gateway.whole("u")).token_ids) == 24


async def test_a_replica_that_breaks_after_it_was_given_up_does_not_take_its_successor_along(
    model_folder: Path, tmp_path: Path
) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, worker, office):
        await office.hears(Registered)
        office.say(activate(process))
        await office.hears(SlotReady)
        led, go_on = worker.led("r-1"), threading.Event()
        assert led is not None
        led.thread.post(lambda _: _lose_a_peer(go_on.wait(PATIENCE_S)))
        office.say(deactivate())
        office.say(activate(process, plan_epoch=4))
        assert (await office.hears(SlotReady)).plan_epoch == 4
        go_on.set()
        await asyncio.to_thread(led.thread._thread.join)
        gateway = Ear()
        worker.attach("g", gateway)  # type: ignore[arg-type]
        worker.submit("g", submit())
        assert len((await gateway.whole()).token_ids) == 24
        assert not any(isinstance(message, SlotFailed) for message in office.unheard)


def _lose_a_peer(_: object) -> None:
    raise PeerLost("its machine is gone")


async def test_drain_and_undrain(model_folder: Path, tmp_path: Path) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, worker, office):
        await office.hears(Registered)
        office.say(activate(process))
        await office.hears(SlotReady)
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
        office.say(activate(process, "r-2"))
        await office.hears(SlotReady)
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
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, worker, office):
        await office.hears(Registered)
        office.say(activate(process))
        await office.hears(SlotReady)
        led = worker.led("r-1")
        assert led is not None
        led.thread.post(lambda _: 1 // 0)  # type: ignore[arg-type,return-value]
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(process.stopped, PATIENCE_S)


async def test_what_a_lost_controller_wanted_is_given_up_before_the_next_one_is_told(
    model_folder: Path, tmp_path: Path, silent: Address
) -> None:
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, _, office):
        await office.hears(Registered)
        office.say(activate(process, pipeline=2, others=silent))
        await until(lambda: process._replicas._active)
        assert office.channel is not None
        office.channel.close()
        again = await office.hears(Registered)
        assert again.replicas == ()
        office.say(activate(process, plan_epoch=9))  # the same name, given by a controller that knows nothing of the first
        assert (await office.hears(SlotReady)).plan_epoch == 9


async def test_a_slot_that_is_given_up_before_its_loader_has_begun_joins_nobody(
    model_folder: Path, tmp_path: Path, silent: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaders are threads of low priority: on a busy machine they begin after the next message has been heard."""
    has_left, late = asyncio.Event(), []

    async def gently_and_late(load: Callable[[], SlotUp]) -> SlotUp:
        late.append(load)
        if len(late) == 1:
            await has_left.wait()
        return await gently(load)

    monkeypatch.setattr("spotserve.worker.devices.gently", gently_and_late)
    async with at_work(SystemFolder(tmp_path), str(model_folder)) as (process, _, office):
        await office.hears(Registered)
        office.say(activate(process, pipeline=2, others=silent))
        await until(lambda: late)
        office.say(deactivate())
        await until(lambda: not process._replicas._active)
        has_left.set()
        office.say(activate(process, plan_epoch=9))
        assert (await office.hears(SlotReady)).plan_epoch == 9
