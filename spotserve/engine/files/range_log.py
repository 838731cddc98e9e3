"""Which byte ranges of a file are there: a log that processes share, one record per range, each with a checksum.

Appending is one write under a lock. A process that is killed, or a disk that is full, in the middle of it leaves a record that
does not count; the next one writes over it.
"""

import os
import struct
import threading
import zlib
from pathlib import Path

from spotserve.engine.files.range_lock import locked_range
from spotserve.engine.files.spans import ByteRanges, coalesce

_RECORD = struct.Struct("<QQ")
_CHECKSUM = struct.Struct("<I")
_RECORD_BYTES = _RECORD.size + _CHECKSUM.size


class RangeLog:
    """The log at `path`, of a file of `file_bytes`. Safe to use from several threads."""

    def __init__(self, path: Path, file_bytes: int) -> None:
        self._path = path
        self._file_bytes = file_bytes
        self._present: ByteRanges = []
        self._position = 0
        self._lock = threading.Lock()

    def present(self) -> ByteRanges:
        """What is there by now, whoever brought it.

        Raises:
            OSError: the log cannot be read.
        """
        with self._lock, self._path.open("rb") as file:
            file.seek(self._position)
            news = file.read()
            news = news[: len(news) // _RECORD_BYTES * _RECORD_BYTES]
            self._position += len(news)
            records = (news[start : start + _RECORD_BYTES] for start in range(0, len(news), _RECORD_BYTES))
            added = [span for record in records if (span := self._decode(record)) is not None]
            if added:
                self._present = coalesce([*self._present, *added], 0)
            return self._present

    def add(self, span: range) -> None:
        """Says that the bytes of `span` are there.

        Raises:
            OSError: the log cannot be written.
        """
        record = _RECORD.pack(span.start, span.stop)
        record += _CHECKSUM.pack(zlib.crc32(record))
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with locked_range(self._path, range(1), wait_s=None):
                end = os.fstat(descriptor).st_size // _RECORD_BYTES * _RECORD_BYTES
                if os.pwrite(descriptor, record, end) != len(record):
                    raise OSError(f"{self._path}: the disk is full")
        finally:
            os.close(descriptor)

    def _decode(self, record: bytes) -> range | None:
        start, stop = _RECORD.unpack_from(record)
        (checksum,) = _CHECKSUM.unpack_from(record, _RECORD.size)
        sound = checksum == zlib.crc32(record[: _RECORD.size]) and start < stop <= self._file_bytes
        return range(start, stop) if sound else None
