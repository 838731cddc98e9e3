"""Controller and executor over real channels: who is told what, and what the end of a connection means."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from spotserve.config import ControllerSettings
from spotserve.controller.controller import Controller
from spotserve.controller.executor import Executor
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.state import ControllerState
from spotserve.core.clock import ManualClock
from spotserve.core.cluster import InstanceState
from spotserve.core.errors import CloudError
from spotserve.core.messages import (
    Activate,
    Address,
    ControllerInbound,
    GatewayAttached,
    GatewayReport,
    InstanceLaunched,
    Launch,
    Registered,
    RoutingTable,
    Stop,
    Terminate,
    WorkerCommand,
)
from spotserve.gateway.controller_link import ControllerLink
from spotserve.metrics import Metrics
from spotserve.wire import Channel, bound_port, connect, listen

pytestmark = pytest.mark.anyio

SECRET = "s3cret"
PATIENCE_S = 10.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class ScriptedCloud:
    """Notes what is wished for; `full`: refuses."""

    def __init__(self) -> None:
        self.wishes: list[object] = []
        self.full = False

    async def launch(self, count: int, *, spot: bool, zone: str | None = None) -> Sequence[str]:
        if self.full:
            raise CloudError("no capacity")
        self.wishes.append((count, spot, zone))
        return []

    async def terminate(self, instance_id: str) -> None:
        self.wishes.append(instance_id)

    async def close(self) -> None:
        return


class House:
    """A listening controller."""

    def __init__(self) -> None:
        self.cloud = ScriptedCloud()
        self.executor = Executor(self.cloud, lambda event: self.controller.dispatch(event))
        self.state = ControllerState(ControllerSettings(), EngineTerms(8))
        self.controller = Controller(self.state, self.executor, clock=ManualClock(1000.0), metrics=Metrics())
        self.port = 0

    async def connect(self, inbound: Any) -> Channel[Any]:
        return await connect("127.0.0.1", self.port, secret=SECRET, inbound=inbound)

    async def register(self, instance_id: str = "i-1") -> Channel[Any]:
        channel = await self.connect(WorkerCommand)
        channel.send(
            Registered(
                instance_id=instance_id,
                address=Address("127.0.0.1", 1),
                pid=1,
                ranks=(Address("127.0.0.1", 2),),
                spot=True,
                zone="z",
            )
        )
        return channel


@asynccontextmanager
async def house() -> AsyncIterator[House]:
    made = House()
    server = await listen(
        "127.0.0.1", 0, secret=SECRET, inbound=ControllerInbound, on_channel=made.controller.on_channel, on_refused=print
    )
    made.port = bound_port(server)
    yield made
    await made.executor.close()
    server.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_worker_that_registers_is_told_what_to_load_and_is_lost_with_its_connection() -> None:
    async with house() as made:
        made.controller.dispatch(InstanceLaunched(instance_id="i-1", spot=True, zone="z", usd_per_hour=1.0))
        worker = await made.register()
        assert isinstance(await worker.receive(), Activate)
        worker.close()
        await until(lambda: made.state.instances["i-1"].state is InstanceState.GONE)


async def test_the_end_of_an_older_connection_is_not_the_loss_of_its_worker() -> None:
    async with house() as made:
        older = await made.register()
        await older.receive()
        newer = await made.register()
        await until(lambda: len([event for event in made.state.events if event.kind == "registered"]) == 2)
        older.close()
        await asyncio.sleep(0.02)
        assert made.state.instances["i-1"].state is InstanceState.READY
        made.executor.carry_out([Stop(instance_id="i-1")])
        while not isinstance(await asyncio.wait_for(newer.receive(), PATIENCE_S), Stop):
            pass
        newer.close()


async def test_a_gateway_hears_the_table_at_once_and_every_change() -> None:
    async with house() as made:
        gateway = await made.connect(RoutingTable)
        gateway.send(GatewayAttached(gateway_id="g"))
        first = await gateway.receive()
        assert first.replicas == ()
        gateway.send(GatewayReport(gateway_id="g", queued=1, running=0, suspended=0, finished=0, lost=0))
        await until(lambda: made.controller.gateway_reports)
        gateway.close()
        await until(lambda: not made.controller.gateway_reports)


async def test_commands_to_those_who_are_gone_are_dropped() -> None:
    async with house() as made:
        made.executor.carry_out([Stop(instance_id="never")])
        worker = await made.register()
        await worker.receive()
        worker.close()
        made.executor.carry_out([Stop(instance_id="i-1")])


async def test_wishes_reach_the_cloud_and_a_refusal_ends_nothing() -> None:
    async with house() as made:
        made.executor.carry_out([Launch(count=2, spot=True), Launch(count=1, spot=False, zone="a"), Terminate(instance_id="i-9")])
        await until(lambda: made.cloud.wishes == [(2, True, None), (1, False, "a"), "i-9"])
        made.cloud.full = True
        made.executor.carry_out([Launch(count=1, spot=True, zone="a")])
        await until(lambda: not made.executor._tasks)
        (refused,) = [event.detail for event in made.state.events if event.kind == "refused"]
        assert refused == {"count": 1, "spot": True, "zone": "a", "reason": "no capacity"}


async def test_nothing_is_commanded_once_the_end_has_begun() -> None:
    async with house() as made:
        made.executor.carry_out([Launch(count=1, spot=True)])
        await made.executor.close()
        assert made.cloud.wishes == [(1, True, None)], "what was under way is let finish: somebody has to end it"
        made.executor.carry_out([Launch(count=1, spot=True)])
        assert not made.executor._tasks


async def test_a_gateway_finds_its_controller_again() -> None:
    async with house() as made:
        addresses: list[Address | None] = [None, Address("127.0.0.1", 1), Address("127.0.0.1", made.port)]
        tables: list[RoutingTable] = []
        link = ControllerLink("g", lambda: addresses.pop(0) if len(addresses) > 1 else addresses[0], secret=SECRET)
        report = GatewayReport(gateway_id="g", queued=0, running=7, suspended=0, finished=0, lost=0)
        link.tell(report)  # nobody is there: nobody needs to know
        running = asyncio.create_task(link.run(tables.append, lambda: report))
        await until(lambda: made.controller.gateway_reports.get("g") == report)
        await until(lambda: len(tables) == 1)
        made.executor._gateways["g"].close()
        await until(lambda: len(tables) == 2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
