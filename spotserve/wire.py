"""Channels: typed messages in frames over one TCP connection, between processes that share a secret.

A frame is a 4-byte big-endian length and a msgpack-encoded message of the reader's closed set; anything else closes the
channel. Both ends prove that they know the secret (HMAC-SHA256 over two nonces) before the first message; the secret itself
never travels. One connection per pair of processes carries everything in order, and its end is how a process learns, at
once, that the other one is gone. Knows nothing of what the messages mean.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec

from spotserve.core.errors import ChannelClosed, WireError
from spotserve.handshake import GREETING_BYTES, PROOF_BYTES, Handshake

MAX_FRAME_BYTES = 64 * 2**20
"""A larger frame is refused: bulk data travels in parts."""

MAX_UNSENT_BYTES = 256 * 2**20
"""A reader that lags this far behind is cut off, so that it cannot take the sender's memory."""

HANDSHAKE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()

Inbound = TypeVar("Inbound")


class Channel(Generic[Inbound]):
    """One end of a connection. `send` never waits; `receive` yields messages in order until `ChannelClosed`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inbound: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[Inbound] = msgspec.msgpack.Decoder(inbound)

    @property
    def peer(self) -> str:
        """Address of the other end, for logs."""
        return str(self._writer.get_extra_info("peername"))

    def send(self, message: msgspec.Struct) -> None:
        """Queues a message.

        Raises:
            ChannelClosed: the other end is gone, or lags hopelessly.
        """
        transport = self._writer.transport
        if transport.is_closing():
            raise ChannelClosed(f"channel to {self.peer} is closed")
        payload = _encoder.encode(message)
        if len(payload) > MAX_FRAME_BYTES:
            raise WireError(f"{type(message).__name__} of {len(payload)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
        self._writer.write(_LENGTH.pack(len(payload)) + payload)
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            transport.abort()
            raise ChannelClosed(f"{self.peer} does not read: {MAX_UNSENT_BYTES} bytes wait for it")

    async def flush(self) -> None:
        """Waits until most of what was sent has left this process.

        Raises:
            ChannelClosed: the other end is gone.
        """
        try:
            await self._writer.drain()
        except OSError as error:
            raise ChannelClosed(f"channel to {self.peer}: {error}") from error

    async def receive(self) -> Inbound:
        """The next message.

        Raises:
            ChannelClosed: the other end is gone.
            WireError: it sent something that is not a message of the closed set; the channel is closed.
        """
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MAX_FRAME_BYTES:
                self.close()
                raise WireError(f"{self.peer} announced a frame of {length} bytes, at most {MAX_FRAME_BYTES} are accepted")
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError) as error:
            self.close()
            raise ChannelClosed(f"{self.peer} closed the channel") from error
        except (msgspec.DecodeError, AssertionError) as error:  # a value that its own constructor refuses is no message either
            self.close()
            raise WireError(f"{self.peer} sent something that is no message of this channel: {error}") from error

    def close(self) -> None:
        """Hangs up. Harmless when already closed."""
        self._writer.close()


async def _handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, *, is_server: bool) -> None:
    handshake = Handshake(secret, is_server=is_server)
    writer.write(handshake.greeting())
    writer.write(handshake.prove(await reader.readexactly(GREETING_BYTES)))
    handshake.check(await reader.readexactly(PROOF_BYTES))


async def connect(host: str, port: int, *, secret: str, inbound: Any) -> Channel[Any]:
    """Opens a channel to a listening process; `inbound` is the union of messages that may come back.

    Raises:
        ChannelClosed: nobody listens there, or the other end hung up during the handshake.
        WireError: the other end speaks another protocol or does not know the secret.
    """
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        raise ChannelClosed(f"cannot reach {host}:{port}: {error}") from error
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            await _handshake(reader, writer, secret, is_server=False)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        writer.close()
        raise ChannelClosed(f"{host}:{port} hung up during the handshake") from error
    except WireError:
        writer.close()
        raise
    return Channel(reader, writer, inbound)


async def listen(
    host: str,
    port: int,
    *,
    secret: str,
    inbound: Any,
    on_channel: Callable[[Channel[Any]], Awaitable[None]],
    on_refused: Callable[[str], None],
) -> asyncio.Server:
    """Accepts channels; each runs `on_channel` until that returns, then it is closed.

    `on_refused` hears why a connection was turned away (wrong secret, wrong protocol) or cut (not a message).
    """

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await _handshake(reader, writer, secret, is_server=True)
            await on_channel(Channel(reader, writer, inbound))
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ChannelClosed):
            pass  # gone before or after it said who it was: its owner's loss handling has run
        except asyncio.CancelledError:
            pass  # the process ends; asyncio logs a task of a server that ends cancelled as an error, up to Python 3.11
        except WireError as error:
            on_refused(str(error))
        finally:
            writer.close()

    return await asyncio.start_server(accept, host, port)


def bound_port(server: asyncio.Server) -> int:
    """The port that a server listening on port 0 was given."""
    return int(server.sockets[0].getsockname()[1])
