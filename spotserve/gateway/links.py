"""Channels from one gateway to every replica of the routing table: opened, kept, and their end noticed at once."""

import asyncio
import logging
from collections.abc import Callable, Iterable

from spotserve.core.errors import ChannelClosed, WireError
from spotserve.core.messages import Attach, GatewayCommand, Route, WorkerReply
from spotserve.wire import Channel, connect

RECONNECT_S = 0.1
"""Pause before a replica that is still in the table is tried again."""

log = logging.getLogger(__name__)


class ReplicaLinks:
    """One channel per replica."""

    def __init__(
        self,
        gateway_id: str,
        *,
        secret: str,
        on_reply: Callable[[str, WorkerReply], None],
        on_open: Callable[[str], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._gateway_id = gateway_id
        self._secret = secret
        self._on_reply = on_reply
        self._on_open = on_open
        self._on_lost = on_lost
        self._routes: dict[str, Route] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._any = asyncio.Event()
        self._channels: dict[str, Channel[WorkerReply]] = {}

    def follow(self, routes: Iterable[Route]) -> None:
        """Connects to replicas that are new in the table and hangs up on those that are gone from it."""
        wanted = {route.replica_id: route for route in routes}
        for replica_id, known in tuple(self._routes.items()):
            if replica_id not in wanted or wanted[replica_id].address != known.address:
                del self._routes[replica_id]
                self._tasks.pop(replica_id).cancel()
                self._drop(replica_id)
        for replica_id in wanted.keys() - self._routes.keys():
            self._routes[replica_id] = wanted[replica_id]
            self._tasks[replica_id] = asyncio.create_task(self._keep(wanted[replica_id]), name=f"link to {replica_id}")

    async def wait_for_any(self, within_s: float) -> None:
        """Returns when some replica can be talked to, or the time is over."""
        try:
            async with asyncio.timeout(within_s):
                await self._any.wait()
        except TimeoutError:
            log.warning("no replica within %.0f s", within_s)

    def connected(self, routes: Iterable[Route]) -> list[Route]:
        """Those of `routes` that can be talked to now."""
        return [route for route in routes if route.replica_id in self._channels]

    def connected_ids(self) -> list[str]:
        """Replicas that can be talked to now."""
        return list(self._channels)

    def send(self, replica_id: str, command: GatewayCommand) -> None:
        """Queues a command.

        Raises:
            ChannelClosed: there is no channel to this replica.
        """
        channel = self._channels.get(replica_id)
        if channel is None:
            raise ChannelClosed(f"no channel to {replica_id}")
        channel.send(command)

    async def close(self) -> None:
        """Hangs up on all, without calling anyone lost."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for channel in self._channels.values():
            channel.close()
        self._tasks.clear()
        self._channels.clear()

    async def _keep(self, route: Route) -> None:
        while True:
            try:
                channel = await connect(route.address.host, route.address.port, secret=self._secret, inbound=WorkerReply)
                channel.send(Attach(gateway_id=self._gateway_id))
                self._channels[route.replica_id] = channel
                self._any.set()
                self._on_open(route.replica_id)
                while True:
                    self._on_reply(route.replica_id, await channel.receive())
            except WireError as error:
                log.debug("%s: %s", route.replica_id, error)
                self._drop(route.replica_id)
            await asyncio.sleep(RECONNECT_S)

    def _drop(self, replica_id: str) -> None:
        channel = self._channels.pop(replica_id, None)
        if channel is not None:
            channel.close()
            if not self._channels:
                self._any.clear()
            self._on_lost(replica_id)
