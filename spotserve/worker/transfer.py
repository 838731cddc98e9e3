"""Hands a running sequence from one worker to another.

The old owner has stopped computing the sequence and sends one `HandOver`; the ranks of the new owner pull its KV from the ranks
of the old one, and the answer comes once the sequence has been adopted. Until that answer the old owner is the owner, whatever
happens.
"""

import asyncio

from spotserve.core.errors import ChannelClosed, WireError
from spotserve.core.messages import Address, HandOver, HandOverAnswered
from spotserve.wire import Channel, connect


class PeerLinks:
    """Channels to other workers, opened when first needed and kept while a drain lasts."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._channels: dict[Address, Channel[HandOverAnswered]] = {}

    async def open(self, destination: Address, *, within_s: float) -> None:
        """Connects beforehand, so that no sequence has to stand still for it.

        Raises:
            WireError: the other worker is gone, speaks another language, or did not answer in time.
        """
        try:
            async with asyncio.timeout(within_s):
                await self._channel(destination)
        except TimeoutError as error:
            raise ChannelClosed(f"{destination.host}:{destination.port} did not answer within {within_s:.2f} s") from error

    async def deliver(self, hand_over: HandOver, destination: Address, *, within_s: float) -> HandOverAnswered:
        """Offers a sequence and waits for the answer, at most `within_s`.

        Raises:
            WireError: the other worker is gone, speaks another language, or did not answer in time.
        """
        try:
            async with asyncio.timeout(within_s):
                channel = await self._channel(destination)
                return await _exchange(channel, hand_over)
        except TimeoutError as error:
            self._forget(destination)
            raise ChannelClosed(
                f"{destination.host}:{destination.port} did not take {hand_over.request.request_id} within {within_s:.2f} s"
            ) from error
        except WireError:
            self._forget(destination)
            raise

    def close(self) -> None:
        """Hangs up on all."""
        for destination in list(self._channels):
            self._forget(destination)

    async def _channel(self, destination: Address) -> Channel[HandOverAnswered]:
        if destination not in self._channels:
            self._channels[destination] = await connect(
                destination.host, destination.port, secret=self._secret, inbound=HandOverAnswered
            )
        return self._channels[destination]

    def _forget(self, destination: Address) -> None:
        channel = self._channels.pop(destination, None)
        if channel is not None:
            channel.close()


async def _exchange(channel: Channel[HandOverAnswered], hand_over: HandOver) -> HandOverAnswered:
    channel.send(hand_over)
    while True:
        answer = await channel.receive()
        if answer.request_id == hand_over.request.request_id:
            return answer
