"""A gateway's channel to whoever is controller: routing tables come in, counts and news go out.

Controllers come and go: the link connects again for ever, and a gateway without a controller goes on with the last table.
"""

import asyncio
import logging
from collections.abc import Callable

from spotserve.core.errors import ChannelClosed, WireError
from spotserve.core.messages import Address, GatewayAttached, GatewayMessage, GatewayReport, RoutingTable
from spotserve.wire import Channel, connect

RECONNECT_S = 0.1
REPORT_S = 0.25

log = logging.getLogger(__name__)


class ControllerLink:
    """One gateway's link. `locate` says where the controller is now; None: nobody is."""

    def __init__(self, gateway_id: str, locate: Callable[[], Address | None], *, secret: str) -> None:
        self._gateway_id = gateway_id
        self._locate = locate
        self._secret = secret
        self._channel: Channel[RoutingTable] | None = None

    def tell(self, message: GatewayMessage) -> None:
        """Sends news; without a controller nobody needs them."""
        if self._channel is not None:
            try:
                self._channel.send(message)
            except ChannelClosed:
                log.debug("the controller left before it heard %s", type(message).__name__)

    async def run(self, on_table: Callable[[RoutingTable], None], report: Callable[[], GatewayReport]) -> None:
        """Stays connected for ever."""
        while True:
            try:
                await self._talk(on_table, report)
            except WireError as error:
                log.debug("controller: %s", error)
            await asyncio.sleep(RECONNECT_S)

    async def _talk(self, on_table: Callable[[RoutingTable], None], report: Callable[[], GatewayReport]) -> None:
        address = self._locate()
        if address is None:
            return
        channel = await connect(address.host, address.port, secret=self._secret, inbound=RoutingTable)
        channel.send(GatewayAttached(gateway_id=self._gateway_id))
        self._channel = channel
        reporting = asyncio.create_task(self._report(report), name="gateway reports")
        try:
            while True:
                on_table(await channel.receive())
        finally:
            reporting.cancel()
            self._channel = None
            channel.close()

    async def _report(self, report: Callable[[], GatewayReport]) -> None:
        while True:
            self.tell(report())
            await asyncio.sleep(REPORT_S)
