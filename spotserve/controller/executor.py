"""Carries commands to those they are for: workers, gateways, the cloud. Decides nothing."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from spotserve.cloud.provider import Provider
from spotserve.core.errors import ChannelClosed, CloudError
from spotserve.core.messages import (
    Activate,
    Command,
    Deactivate,
    Drain,
    Event,
    Launch,
    LaunchRefused,
    Publish,
    RoutingTable,
    Stop,
    Terminate,
    Undrain,
    WorkerCommand,
)
from spotserve.wire import Channel

CLOSE_S = 5.0
"""How long what is under way may still take in the end: a machine that is being started should be known, to be returned."""

log = logging.getLogger(__name__)


class Executor:
    """Owner of the channels to workers and gateways. What the cloud refuses goes to `on_event`."""

    def __init__(self, provider: Provider, on_event: Callable[[Event], None]) -> None:
        self._provider = provider
        self._on_event = on_event
        self._is_closed = False
        self._workers: dict[str, Channel[Any]] = {}
        self._gateways: dict[str, Channel[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def carry_out(self, commands: Sequence[Command]) -> None:
        """Sends every command; nothing is awaited, so a notice's table is on its way before anything else happens. When closed:
        nothing."""
        for command in commands if not self._is_closed else ():
            match command:
                case Publish():
                    for gateway_id in tuple(self._gateways):
                        self._publish(gateway_id, command.table)
                case Activate() | Deactivate() | Drain() | Undrain() | Stop():
                    self._command(command)
                case Launch():
                    self._start(self._launch(command))
                case Terminate():
                    self._start(self._provider.terminate(command.instance_id))

    def add_worker(self, instance_id: str, channel: Channel[Any]) -> None:
        """Commands for this instance go here from now on."""
        self._workers[instance_id] = channel

    def remove_worker(self, instance_id: str, channel: Channel[Any]) -> bool:
        """Forgets a channel; False when the instance has a newer one already."""
        if self._workers.get(instance_id) is not channel:
            return False
        del self._workers[instance_id]
        return True

    def add_gateway(self, gateway_id: str, channel: Channel[Any], table: RoutingTable) -> None:
        """Routing tables go here from now on, beginning with `table`."""
        self._gateways[gateway_id] = channel
        self._publish(gateway_id, table)

    def remove_gateway(self, gateway_id: str, channel: Channel[Any]) -> None:
        """Forgets a gateway."""
        if self._gateways.get(gateway_id) is channel:
            del self._gateways[gateway_id]

    async def close(self) -> None:
        """Takes no more commands, and abandons what is still under way after a while."""
        self._is_closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _publish(self, gateway_id: str, table: RoutingTable) -> None:
        try:
            self._gateways[gateway_id].send(table)
        except ChannelClosed:
            del self._gateways[gateway_id]

    def _command(self, command: WorkerCommand) -> None:
        channel = self._workers.get(command.instance_id)
        if channel is None:
            log.info("%s is gone: %s not sent", command.instance_id, type(command).__name__)
            return
        try:
            channel.send(command)
        except ChannelClosed:
            log.info("%s is gone: %s not sent", command.instance_id, type(command).__name__)

    async def _launch(self, launch: Launch) -> None:
        try:
            await self._provider.launch(launch.count, spot=launch.spot, zone=launch.zone)
        except CloudError as error:
            log.error("launch failed: %s", error)
            self._on_event(LaunchRefused(count=launch.count, spot=launch.spot, zone=launch.zone, reason=str(error)))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
