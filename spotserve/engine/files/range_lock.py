"""A claim on a range of bytes that ends with its holder, however that ends.

Locks of an open file description (Linux, F_OFD_SETLK): unlike the older record locks they exclude threads of one process from
each other too, and are not lost when some other descriptor of the file is closed. A child that is forked meanwhile keeps the
claim alive until it ends or executes another program: whoever waits should set a limit.
"""

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLOCK = "hhqqi0q"  # struct flock: type, whence, start, length, process id
_POLL_S = 0.002
_MAX_POLL_S = 0.05


@contextmanager
def locked_range(path: Path, span: range, wait_s: float | None) -> Iterator[bool]:
    """Holds the bytes `span` of the file at `path` against everybody else's claims that overlap; yields whether it does.

    Args:
        wait_s: how long to wait for others; None: as long as it takes.

    Raises:
        OSError: the file cannot be opened, or its file system knows no locks.
    """
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, span.start, len(span), 0)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield _lock(descriptor, request, wait_s)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, request: bytes, wait_s: float | None) -> bool:
    if wait_s is None:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, request)
        return True
    give_up_s = time.monotonic() + wait_s
    poll_s = _POLL_S
    while True:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
        except (BlockingIOError, PermissionError):  # the standard allows either
            if time.monotonic() >= give_up_s:
                return False
        else:
            return True
        time.sleep(poll_s)
        poll_s = min(2 * poll_s, _MAX_POLL_S)
