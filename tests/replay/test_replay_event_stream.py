"""Bodies and events, however the network cuts them."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.replay.event_stream import ServerSentEvent, read_body, read_events, read_head

STREAM = b': hello\n\nid: 3\r\ndata: {"a": 1}\r\n\r\ndata:first\ndata: second\n\nevent: x\n\nid: 4.1\ndata: [DONE]\n\ndata: cut of'
EVENTS = [ServerSentEvent("3", b'{"a": 1}'), ServerSentEvent(None, b"first\nsecond"), ServerSentEvent("4.1", b"[DONE]")]


async def pieces(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def events(parts: list[bytes]) -> list[ServerSentEvent]:
    async def run() -> list[ServerSentEvent]:
        return [event async for event in read_events(pieces(parts))]

    return asyncio.run(run())


def cut(text: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % len(text) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(st.lists(st.integers(0, 10_000), max_size=12))
def test_events_do_not_depend_on_where_the_stream_is_cut(places: list[int]) -> None:
    assert events(cut(STREAM, places)) == EVENTS


def body(raw: bytes, headers: dict[str, str]) -> bytes:
    async def run() -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        return b"".join([piece async for piece in read_body(reader, headers)])

    return asyncio.run(run())


def test_bodies_of_three_kinds() -> None:
    assert body(b"5\r\nhello\r\nA;name=x\r\n, you two!\r\n0\r\n\r\n", {"transfer-encoding": "Chunked"}) == b"hello, you two!"
    assert body(b"hello and more", {"content-length": "5"}) == b"hello"
    assert body(b"until the end", {}) == b"until the end"


@pytest.mark.parametrize("raw", [b"", b"5", b"5\r\nhel", b"5\r\nhello\r\n"])
def test_a_chunked_body_that_ends_early_is_not_taken_for_whole(raw: bytes) -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        body(raw, {"transfer-encoding": "chunked"})


def test_a_body_shorter_than_its_length_is_not_taken_for_whole() -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        body(b"hel", {"content-length": "5"})


def test_the_head() -> None:
    async def run() -> tuple[int, dict[str, str]]:
        reader = asyncio.StreamReader()
        reader.feed_data(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nX-Time: 10:30\r\n\r\nrest")
        return await read_head(reader)

    assert asyncio.run(run()) == (429, {"retry-after": "1", "x-time": "10:30"})
