"""Moves a running sequence and its KV from one worker to another.

The old owner has already stopped computing the sequence. It sends one `HandOver` and a `KvPart` per layer over a channel; the
new owner answers once it has adopted the sequence. Until that answer the old owner is the owner, whatever happens.
"""

import asyncio
from dataclasses import dataclass

from spotserve.core.errors import ChannelClosed, WireError
from spotserve.core.messages import Address, HandOver, HandOverAnswered, KvPart
from spotserve.core.request import Request, TokenDelta
from spotserve.engine.results import ExportedSequence
from spotserve.wire import Channel, connect


@dataclass(frozen=True, slots=True)
class Parcel:
    """A sequence on its way: who waits for it, what it has said, and its KV."""

    gateway_id: str
    epoch: int
    """The old owner's."""
    progress: TokenDelta
    exported: ExportedSequence

    @property
    def request_id(self) -> str:
        """Whose."""
        return self.exported.request.request_id

    @property
    def kv_bytes(self) -> int:
        """Size of its KV."""
        return sum(len(layer) for layer in self.exported.kv)


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

    async def deliver(self, parcel: Parcel, destination: Address, *, within_s: float) -> HandOverAnswered:
        """Sends a parcel and waits for the answer, at most `within_s`.

        Raises:
            WireError: the other worker is gone, speaks another language, or did not answer in time.
        """
        try:
            async with asyncio.timeout(within_s):
                channel = await self._channel(destination)
                return await _exchange(channel, parcel)
        except TimeoutError as error:
            self._forget(destination)
            raise ChannelClosed(
                f"{destination.host}:{destination.port} did not take {parcel.request_id} within {within_s:.2f} s"
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


async def _exchange(channel: Channel[HandOverAnswered], parcel: Parcel) -> HandOverAnswered:
    exported = parcel.exported
    channel.send(
        HandOver(
            gateway_id=parcel.gateway_id,
            request=exported.request,
            epoch=parcel.epoch,
            progress=parcel.progress,
            emitted_token_ids=exported.output_token_ids,
            computed_tokens=exported.computed_tokens,
            num_parts=len(exported.kv),
        )
    )
    for layer, data in enumerate(exported.kv):
        channel.send(KvPart(request_id=parcel.request_id, layer=layer, dtype=exported.dtype, data=data))
        await channel.flush()
    while True:
        answer = await channel.receive()
        if answer.request_id == parcel.request_id:
            return answer


class Arrivals:
    """Parcels that are arriving on one channel, put together part by part."""

    def __init__(self) -> None:
        self._opened: dict[str, tuple[HandOver, list[KvPart]]] = {}

    def open(self, hand_over: HandOver) -> Parcel | None:
        """Notes the first message; the parcel when it has no parts."""
        self._opened[hand_over.request.request_id] = (hand_over, [])
        return self._complete(hand_over.request.request_id)

    def add(self, part: KvPart) -> Parcel | None:
        """Adds a part; the parcel when that was the last one.

        Raises:
            WireError: the part belongs to nothing, or is out of order.
        """
        opened = self._opened.get(part.request_id)
        if opened is None or part.layer != len(opened[1]):
            raise WireError(f"KV of layer {part.layer} of {part.request_id} came without its hand-over, or out of order")
        opened[1].append(part)
        return self._complete(part.request_id)

    def _complete(self, request_id: str) -> Parcel | None:
        hand_over, parts = self._opened[request_id]
        if len(parts) < hand_over.num_parts:
            return None
        del self._opened[request_id]
        return Parcel(
            gateway_id=hand_over.gateway_id,
            epoch=hand_over.epoch,
            progress=hand_over.progress,
            exported=_exported(hand_over.request, hand_over, parts),
        )


def _exported(request: Request, hand_over: HandOver, parts: list[KvPart]) -> ExportedSequence:
    return ExportedSequence(
        request=request,
        output_token_ids=hand_over.emitted_token_ids,
        computed_tokens=hand_over.computed_tokens,
        kv=tuple(part.data for part in parts),
        dtype=parts[0].dtype if parts else "",
    )
