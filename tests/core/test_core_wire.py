"""Channels over real sockets: the handshake, the closed set, the limits, and how an end is noticed."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from spotserve import wire
from spotserve.core.errors import ChannelClosed, WireError
from spotserve.core.messages import PROTOCOL_VERSION, Attach, Cancel, GatewayCommand, Submit
from spotserve.core.request import Request, SamplingParams
from spotserve.wire import Channel, bound_port, connect, listen


class Server:
    """A listening end that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.refused: list[str] = []
        self.ended = asyncio.Event()
        self.port = 0

    async def on_channel(self, channel: Channel[GatewayCommand]) -> None:
        try:
            while True:
                message = await channel.receive()
                self.heard.append(message)
                channel.send(message)
        finally:
            self.ended.set()


@asynccontextmanager
async def listening(secret: str = "s") -> AsyncIterator[Server]:
    state = Server()
    server = await listen(
        "127.0.0.1", 0, secret=secret, inbound=GatewayCommand, on_channel=state.on_channel, on_refused=state.refused.append
    )
    state.port = bound_port(server)
    try:
        yield state
    finally:
        server.close()


def test_messages_arrive_whole_and_in_order() -> None:
    async def scenario() -> None:
        request = Request(request_id="a", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=5, logit_bias={7: -1.5}))
        sent = [Attach(gateway_id="g"), Submit(request=request, epoch=1), Cancel(request_id="a", epoch=2)] * 50
        async with listening() as server:
            channel = await connect("127.0.0.1", server.port, secret="s", inbound=GatewayCommand)
            for message in sent:
                channel.send(message)
            echoed = [await channel.receive() for _ in sent]
            channel.close()
            await server.ended.wait()
        assert echoed == sent == server.heard

    asyncio.run(scenario())


def test_a_wrong_secret_is_refused_by_both_ends() -> None:
    async def scenario() -> None:
        async with listening(secret="right") as server:
            with pytest.raises(WireError):
                await connect("127.0.0.1", server.port, secret="wrong", inbound=GatewayCommand)
            await asyncio.sleep(0.05)
            assert server.heard == []
            assert any("secret" in reason for reason in server.refused) or server.refused == []

    asyncio.run(scenario())


def test_another_version_is_named() -> None:
    async def scenario() -> None:
        async with listening() as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(struct.pack(">9sH16s", b"SPOTSERVE", PROTOCOL_VERSION + 1, bytes(16)))
            await reader.read()  # greeting, then the end
            writer.close()
            assert any("version" in reason for reason in server.refused)

    asyncio.run(scenario())


@pytest.mark.parametrize("garbage", [b"\xc1", b"\x93\x01\x02\x03", msgspec.msgpack.encode(["Unknown", 1]), b""])
def test_what_is_no_message_closes_the_channel(garbage: bytes) -> None:
    async def scenario() -> None:
        async with listening() as server:
            channel = await connect("127.0.0.1", server.port, secret="s", inbound=GatewayCommand)
            channel._writer.write(struct.pack(">I", len(garbage)) + garbage)
            with pytest.raises(ChannelClosed):
                await channel.receive()
            assert server.heard == []
            assert any("no message" in reason for reason in server.refused)

    asyncio.run(scenario())


def test_an_announced_giant_is_refused_before_it_is_read() -> None:
    async def scenario() -> None:
        async with listening() as server:
            channel = await connect("127.0.0.1", server.port, secret="s", inbound=GatewayCommand)
            channel._writer.write(struct.pack(">I", wire.MAX_FRAME_BYTES + 1))
            with pytest.raises(ChannelClosed):
                await channel.receive()
            assert any("frame" in reason for reason in server.refused)

    asyncio.run(scenario())


def test_the_end_of_the_other_side_is_noticed() -> None:
    async def scenario() -> None:
        async with listening() as server:
            channel = await connect("127.0.0.1", server.port, secret="s", inbound=GatewayCommand)
            channel.close()
            await asyncio.wait_for(server.ended.wait(), 5)
            with pytest.raises(ChannelClosed):
                channel.send(Attach(gateway_id="g"))

    asyncio.run(scenario())


def test_nobody_there_is_a_closed_channel() -> None:
    async def scenario() -> None:
        async with listening() as server:
            port = server.port
        with pytest.raises(ChannelClosed, match=str(port)):
            await connect("127.0.0.1", port, secret="s", inbound=GatewayCommand)

    asyncio.run(scenario())


def test_a_value_that_its_own_constructor_refuses_is_no_message() -> None:
    async def scenario() -> None:
        async with listening() as server:
            channel = await connect("127.0.0.1", server.port, secret="s", inbound=GatewayCommand)
            sampling = msgspec.to_builtins(SamplingParams(max_tokens=5))
            request = {"request_id": "a", "prompt_token_ids": [], "sampling": sampling}
            payload = msgspec.msgpack.encode(["Submit", request, 1, []])
            channel._writer.write(struct.pack(">I", len(payload)) + payload)
            with pytest.raises(ChannelClosed):
                await channel.receive()
            assert any("no message" in reason for reason in server.refused)

    asyncio.run(scenario())


def test_an_end_that_announces_a_giant_is_hung_up_on() -> None:
    async def announce(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await wire._handshake(reader, writer, "s", is_server=True)
        writer.write(struct.pack(">I", wire.MAX_FRAME_BYTES + 1))
        await reader.read()
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(announce, "127.0.0.1", 0)
        channel = await connect("127.0.0.1", bound_port(server), secret="s", inbound=GatewayCommand)
        with pytest.raises(WireError, match="frame"):
            await channel.receive()
        with pytest.raises(ChannelClosed):
            channel.send(Attach(gateway_id="g"))
        server.close()
        await asyncio.sleep(0.01)

    asyncio.run(scenario())
