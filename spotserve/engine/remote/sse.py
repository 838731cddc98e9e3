"""Bytes to the data of server-sent events (WHATWG HTML, section 9.2), whatever borders the bytes arrive in.

Lines end where the standard says (CR LF, LF or CR) and nowhere else: a text may hold U+2028 or U+0085, which `str.splitlines`
would take for ends of lines.
"""

import re

from spotserve.core.errors import WireError

MAX_EVENT_BYTES = 2**23
"""An event of one step's tokens is a few kilobytes."""

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
"""A CR at the end of what has arrived may be the first half of CR LF."""


class EventReader:
    """Takes bytes of one stream in order."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that ends in `chunk`; comments and events without data are left out.

        Raises:
            WireError: an event does not end.
        """
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise WireError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return [data for line in lines if (data := self._take(line)) is not None]

    def _take(self, line: bytes) -> bytes | None:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        data, self._data = self._data, []
        return b"\n".join(data) if data else None
