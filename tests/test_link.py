"""Links: what arrives is what was sent, whoever is no friend gets nowhere, and nobody waits for ever."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import msgspec
import pytest
import torch

from spotserve.core.errors import PeerLost, WireError
from spotserve.core.messages import PROTOCOL_VERSION, Address
from spotserve.engine.ranks.group import raw_bytes
from spotserve.handshake import GREETING_BYTES, PROOF_BYTES, Handshake
from spotserve.link import MAX_MESSAGE_BYTES, Link, accept, dial

SECRET = "of the links"
PATIENCE_S = 20.0
GREETING = struct.Struct(">9sH16s")


class Note(msgspec.Struct, frozen=True, tag=True, array_like=True):
    text: str


class Number(msgspec.Struct, frozen=True, tag=True, array_like=True):
    value: int

    def __post_init__(self) -> None:
        assert self.value >= 0


Inbound = Note | Number


@contextmanager
def listening() -> Iterator[tuple[Address, "Future[Link[Inbound]]"]]:
    """A place to dial; the other end of the link, once somebody has."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(PATIENCE_S)
        accepted = pool.submit(lambda: accept(server.accept()[0], secret=SECRET, inbound=Inbound))
        yield Address("127.0.0.1", server.getsockname()[1]), accepted


@contextmanager
def linked() -> Iterator[tuple[Link[Inbound], Link[Inbound]]]:
    with listening() as (address, accepted):
        here = dial(address, secret=SECRET, inbound=Inbound, timeout_s=PATIENCE_S)
        there = accepted.result(PATIENCE_S)
        try:
            yield here, there
        finally:
            here.close()
            there.close()


@contextmanager
def stranger() -> Iterator[tuple[socket.socket, "Future[Link[Inbound]]"]]:
    """A connection of somebody who speaks by hand."""
    with listening() as (address, accepted), socket.create_connection((address.host, address.port), timeout=PATIENCE_S) as raw:
        yield raw, accepted


def read(raw: socket.socket, num_bytes: int) -> bytes:
    got = b""
    while len(got) < num_bytes and (part := raw.recv(num_bytes - len(got))):
        got += part
    return got


def is_hung_up(raw: socket.socket) -> bool:
    try:
        while raw.recv(4096):
            pass
    except ConnectionResetError:
        return True
    return True


def introduced(raw: socket.socket) -> None:
    """A stranger who knows the secret after all."""
    handshake = Handshake(SECRET, is_server=False)
    raw.sendall(handshake.greeting())
    raw.sendall(handshake.prove(read(raw, GREETING_BYTES)))
    handshake.check(read(raw, PROOF_BYTES))


# ---------------------------------------------------------------------- what arrives


def test_messages_arrive_in_order_both_ways() -> None:
    with linked() as (here, there):
        for number in range(100):
            here.send(Number(number))
            there.send(Note(f"n{number}"))
        assert [there.receive() for _ in range(100)] == [(Number(number), 0) for number in range(100)]
        assert [here.receive()[0] for _ in range(100)] == [Note(f"n{number}") for number in range(100)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_payload_goes_from_tensor_to_tensor(dtype: torch.dtype) -> None:
    parts = [torch.randn(7, 3), torch.randn(0, 4), torch.randn(5, 6).t()]
    sent = [(4 * part).to(dtype) for part in parts]
    arrived = [torch.empty(part.shape, dtype=dtype) for part in parts]
    with linked() as (here, there):
        here.send(Note("tensors"), [raw_bytes(part.contiguous()) for part in sent])
        here.send(Note("more"))
        message, payload_bytes = there.receive()
        assert payload_bytes == sum(part.nbytes for part in sent)
        for part in arrived:
            there.read_into(raw_bytes(part))
        assert (message, there.receive()[0]) == (Note("tensors"), Note("more"))
    for part, expected in zip(arrived, sent, strict=True):
        assert torch.equal(part, expected)


def test_a_payload_larger_than_every_buffer_arrives() -> None:
    values = torch.arange(4 * 2**20, dtype=torch.float32)
    into = torch.empty_like(values)
    with linked() as (here, there), ThreadPoolExecutor(1) as pool:
        sending = pool.submit(here.send, Note("much"), [raw_bytes(values)])
        assert there.receive() == (Note("much"), values.nbytes)
        there.read_into(raw_bytes(into))
        sending.result(PATIENCE_S)
    assert torch.equal(into, values)


def test_a_link_can_go_on_in_another_language() -> None:
    with linked() as (here, there):
        here.send(Note("now numbers"))
        here.send(Number(1))
        assert there.receive()[0] == Note("now numbers")
        assert there.expecting(Number).receive()[0] == Number(1)


def test_links_between_processes_of_one_machine_need_no_address() -> None:
    ours, theirs = socket.socketpair()
    here: Link[Inbound] = Link(ours, Inbound)
    there: Link[Inbound] = Link(theirs, Inbound)
    here.send(Note("hello"))
    assert there.receive()[0] == Note("hello")
    here.close()
    with pytest.raises(PeerLost, match="of this machine"):
        there.receive()


# ---------------------------------------------------------------------- the end


def test_the_end_of_one_is_noticed_by_the_other() -> None:
    with linked() as (here, there):
        here.send(Note("last"))
        here.close()
        assert there.receive()[0] == Note("last")
        with pytest.raises(PeerLost, match="hung up"):
            there.receive()


def test_an_end_in_the_middle_of_a_frame_is_no_message() -> None:
    with stranger() as (raw, accepted):
        introduced(raw)
        raw.sendall(struct.pack(">IQ", 100, 0) + b"half")
        raw.close()
        with pytest.raises(PeerLost):
            accepted.result(PATIENCE_S).receive()


@pytest.mark.parametrize(
    "wait",
    [lambda link: link.receive(), lambda link: [link.write(bytes(2**20)) for _ in range(100)]],
    ids=["reading", "writing"],
)
def test_closing_from_another_thread_wakes_who_waits(wait: Callable[[Link[Inbound]], object]) -> None:
    with linked() as (here, _), ThreadPoolExecutor(1) as pool:
        here.set_timeout(None)
        waiting = pool.submit(wait, here)
        threading.Event().wait(0.1)  # until it is in the call
        assert not waiting.done()
        here.close()
        with pytest.raises(PeerLost):
            waiting.result(PATIENCE_S)


def test_who_says_nothing_is_given_up() -> None:
    with linked() as (here, _):
        here.set_timeout(0.05)
        with pytest.raises(PeerLost, match="timed out"):
            here.receive()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PeerLost, match=f"cannot reach 127.0.0.1:{port}"):
        dial(Address("127.0.0.1", port), secret=SECRET, inbound=Inbound, timeout_s=1.0)


# ---------------------------------------------------------------------- strangers


def test_neither_end_talks_to_one_that_does_not_know_the_secret() -> None:
    with listening() as (address, accepted):
        with pytest.raises((WireError, PeerLost)):
            dial(address, secret="a guess", inbound=Inbound, timeout_s=PATIENCE_S)
        with pytest.raises((WireError, PeerLost)):
            accepted.result(PATIENCE_S)


def test_a_proof_that_was_overheard_is_worth_nothing() -> None:
    """The other end's own proof sent back, and one of an earlier connection."""
    overheard = Handshake(SECRET, is_server=False)
    with stranger() as (raw, accepted):
        raw.sendall(overheard.greeting())
        old_proof = overheard.prove(read(raw, GREETING_BYTES))
        raw.sendall(read(raw, PROOF_BYTES))
        with pytest.raises(WireError, match="secret"):
            accepted.result(PATIENCE_S)
    with stranger() as (raw, accepted):
        raw.sendall(overheard.greeting())
        raw.sendall(old_proof)
        with pytest.raises(WireError, match="secret"):
            accepted.result(PATIENCE_S)
        assert is_hung_up(raw)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "does not speak"),
        (GREETING.pack(b"SPOTSERVE", PROTOCOL_VERSION + 1, bytes(16)), "version"),
        (bytes(64), "does not speak"),
    ],
)
def test_another_language_is_refused(said: bytes, says: str) -> None:
    with stranger() as (raw, accepted):
        raw.sendall(said)
        with pytest.raises(WireError, match=says):
            accepted.result(PATIENCE_S)
        assert is_hung_up(raw)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (struct.pack(">IQ", MAX_MESSAGE_BYTES + 1, 0), "announced a message of"),
        (struct.pack(">IQ", 5, 0) + b"\xc1\xc1\xc1\xc1\xc1", "no message"),
        (struct.pack(">IQ", 10, 0) + msgspec.msgpack.encode(["Strange", 1])[:10].ljust(10, b"\0"), "no message"),
        (struct.pack(">IQ", 9, 0) + msgspec.msgpack.encode(["Number", -1]), "no message"),
    ],
)
def test_what_is_no_message_ends_the_link(frame: bytes, says: str) -> None:
    with stranger() as (raw, accepted):
        introduced(raw)
        link = accepted.result(PATIENCE_S)
        raw.sendall(frame)
        with pytest.raises(WireError, match=says):
            link.receive()
        assert is_hung_up(raw)
