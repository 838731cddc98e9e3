"""Links: blocking connections between ranks, which have nothing else to do while they wait for each other.

A frame is a header (lengths of message and payload), a msgpack-encoded message of the reader's closed set, and a payload of raw
bytes, which goes from and to the memory of tensors without a copy. Whoever opens a link proves that it knows the
system's secret first (see `handshake`). `close` may be called from any thread, and wakes whoever waits on the link.
"""

import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from spotserve.core.errors import PeerLost, WireError
from spotserve.core.messages import Address
from spotserve.handshake import GREETING_BYTES, PROOF_BYTES, Handshake

MAX_MESSAGE_BYTES = 64 * 2**20
BUFFER_BYTES = 4 * 2**20
"""Asked of the kernel for each direction; it may give less."""
HANDSHAKE_TIMEOUT_S = 5.0

_HEADER = struct.Struct(">IQ")
_encoder = msgspec.msgpack.Encoder()

Inbound = TypeVar("Inbound")


class Link(Generic[Inbound]):
    """One end of a connection. Not to be shared by threads, but for `close`."""

    def __init__(self, connection: socket.socket, inbound: Any) -> None:
        self._connection = connection
        self._decoder: msgspec.msgpack.Decoder[Inbound] = msgspec.msgpack.Decoder(inbound)
        self.peer = _name_of_peer(connection)

    def expecting(self, inbound: Any) -> "Link[Any]":
        """The same connection, for messages of another closed set from here on."""
        return Link(self._connection, inbound)

    def set_timeout(self, seconds: float | None) -> None:
        """How long one read or write may stand still; None: for ever."""
        self._connection.settimeout(seconds)

    def send(self, message: msgspec.Struct, payload: Sequence[memoryview] = ()) -> None:
        """Sends one frame; returns when the kernel has it.

        Raises:
            PeerLost: the other end is gone or stands still.
        """
        body = _encoder.encode(message)
        header = _HEADER.pack(len(body), sum(part.nbytes for part in payload))
        try:
            self._connection.sendall(header + body)
            for part in payload:
                self._connection.sendall(part)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> tuple[Inbound, int]:
        """The next message, and the bytes of payload that follow it and have to be read next, with `read_into`.

        Raises:
            PeerLost: the other end is gone or stands still.
            WireError: it sent something that is no message of the closed set; the link is closed.
        """
        length, payload_bytes = _HEADER.unpack(self.read(_HEADER.size))
        if length > MAX_MESSAGE_BYTES:
            self.close()
            raise WireError(f"{self.peer} announced a message of {length} bytes, at most {MAX_MESSAGE_BYTES} are accepted")
        try:
            return self._decoder.decode(self.read(length)), payload_bytes
        except (msgspec.DecodeError, AssertionError) as error:  # a value that its own constructor refuses is no message either
            self.close()
            raise WireError(f"{self.peer} sent something that is no message of this link: {error}") from error

    def read(self, num_bytes: int) -> bytearray:
        """Exactly so many bytes.

        Raises:
            PeerLost: the other end is gone or stands still.
        """
        into = bytearray(num_bytes)
        self.read_into(memoryview(into))
        return into

    def read_into(self, into: memoryview) -> None:
        """Fills `into`, which is of bytes.

        Raises:
            PeerLost: the other end is gone or stands still.
        """
        at = 0
        try:
            while at < into.nbytes:
                count = self._connection.recv_into(into[at:], into.nbytes - at)
                if count == 0:
                    raise ConnectionResetError("it hung up")
                at += count
        except OSError as error:
            raise self._lost(error) from error

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends bytes without a frame, for two ends that both know what comes next.

        Raises:
            PeerLost: the other end is gone or stands still.
        """
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def close(self) -> None:
        """Hangs up. Harmless when already closed."""
        with contextlib.suppress(OSError):  # not connected any more
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _lost(self, error: OSError) -> PeerLost:
        self.close()
        return PeerLost(f"link to {self.peer}: {error}")


def _name_of_peer(connection: socket.socket) -> str:
    """For logs and errors."""
    try:
        name = connection.getpeername()
    except OSError:
        return "a peer that is gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a process of this machine"


def dial(address: Address, *, secret: str, inbound: Any, timeout_s: float) -> Link[Any]:
    """Opens a link; `timeout_s` holds for it until `set_timeout`.

    Raises:
        PeerLost: nobody listens there, or the other end hung up during the handshake.
        WireError: it speaks another protocol or does not know the secret.
    """
    try:
        connection = socket.create_connection((address.host, address.port), timeout=timeout_s)
    except OSError as error:
        raise PeerLost(f"cannot reach {address.host}:{address.port}: {error}") from error
    return _shake_hands(connection, secret=secret, inbound=inbound, is_server=False, timeout_s=timeout_s)


def accept(connection: socket.socket, *, secret: str, inbound: Any) -> Link[Any]:
    """The other end of `dial`, from a connection that was accepted.

    Raises:
        PeerLost: the other end hung up during the handshake.
        WireError: it speaks another protocol or does not know the secret.
    """
    return _shake_hands(connection, secret=secret, inbound=inbound, is_server=True, timeout_s=HANDSHAKE_TIMEOUT_S)


def _shake_hands(connection: socket.socket, *, secret: str, inbound: Any, is_server: bool, timeout_s: float) -> Link[Any]:
    connection.settimeout(timeout_s)
    with contextlib.suppress(OSError):  # the kernel's own choice will do
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    link: Link[Any] = Link(connection, inbound)
    handshake = Handshake(secret, is_server=is_server)
    try:
        link.write(handshake.greeting())
        link.write(handshake.prove(bytes(link.read(GREETING_BYTES))))
        handshake.check(bytes(link.read(PROOF_BYTES)))
    except WireError:
        link.close()
        raise
    return link
