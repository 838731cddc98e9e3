"""The little of HTTP/1.1 and of server-sent events that reading a token stream takes.

By hand over asyncio streams, because a general client costs more per token than the model that makes it. An early end shows
as `asyncio.IncompleteReadError`. Knows nothing of completions.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event of a stream: its id, when it has one, and its data."""

    event_id: str | None
    data: bytes


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, names in lower case."""
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, separator, value in (line.partition(":") for line in lines) if separator
    }
    return int(status_line.split(" ")[1]), headers


async def read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body in the pieces it comes in: chunked, of known length, or until the connection ends."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(65_536):
            yield piece


async def read_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events out of a body; comments are passed over."""
    buffer = b""
    async for piece in pieces:
        buffer = (buffer + piece).replace(b"\r\n", b"\n")
        *blocks, buffer = buffer.split(b"\n\n")
        for block in blocks:
            event_id: str | None = None
            data: list[bytes] = []
            for line in block.split(b"\n"):
                name, _, value = line.partition(b":")
                if name == b"data":
                    data.append(value.removeprefix(b" "))
                elif name == b"id":
                    event_id = value.removeprefix(b" ").decode("utf-8", "replace")
            if data:
                yield ServerSentEvent(event_id, b"\n".join(data))
