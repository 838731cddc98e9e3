"""One connection to the SQLite file: opened when first needed, opened anew after an error, replaced when the file is damaged.

Invariant: the connection that is handed out belongs to the file that is at the path now. Another process may have moved that
file aside in the meantime; who went on with the old one would write into nowhere. Used from one thread only.
"""

import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from spotserve.core.errors import StoreError

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

_FORMAT_VERSION = 1
_BUSY_RETRY_S = 0.01
_LOG_SIZE_LIMIT_BYTES = 16 * 2**20
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})

_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS progress (
    number INTEGER PRIMARY KEY,  -- in order of first commit
    request_id TEXT NOT NULL UNIQUE,
    epoch INTEGER NOT NULL,
    finish INTEGER NOT NULL,
    written_s REAL NOT NULL,
    tokens BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS calls (
    number INTEGER PRIMARY KEY,
    call_id TEXT NOT NULL UNIQUE,
    written_s REAL NOT NULL,
    record BLOB NOT NULL
);
PRAGMA user_version = {_FORMAT_VERSION};
COMMIT;
"""


class SqliteFile:
    """The file at `path`; `busy_s` is how long to wait for other writers."""

    def __init__(self, path: Path, *, busy_s: float) -> None:
        self.path = path
        self._busy_s = busy_s
        self._connection: sqlite3.Connection | None = None
        self._file_number: int | None = None

    def run(self, job: Callable[[sqlite3.Connection], Result]) -> Result:
        """`job` on a sound connection. A damaged file is moved aside and `job` runs once more, on a fresh file.

        Raises:
            sqlite3.Error, OSError, StoreError: what went wrong. Whatever transaction was open is rolled back.
        """
        try:
            return self._attempt(job)
        except sqlite3.DatabaseError as error:
            if _primary_code(error) not in _DAMAGED:
                raise
            self._move_aside(error)
        return self._attempt(job)

    def close(self) -> None:
        """Closes the connection, which rolls back what is open; the next `run` opens another."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def _attempt(self, job: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            return job(self._current())
        except (sqlite3.Error, OSError):
            self.close()
            raise

    def _current(self) -> sqlite3.Connection:
        if self._connection is None or self._number_at_path() != self._file_number:
            self.close()
            self._file_number = self._number_at_path()  # known before the file is read, in case it is damaged
            self._connection = self._open()
            self._file_number = self._number_at_path()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=self._busy_s, isolation_level=None)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        give_up_s = time.monotonic() + self._busy_s
        while True:
            try:
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, _FORMAT_VERSION):
                    raise StoreError(f"{self.path} has format {version}, this version of SpotServe writes {_FORMAT_VERSION}")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(f"PRAGMA journal_size_limit = {_LOG_SIZE_LIMIT_BYTES}")
                if version == 0:
                    connection.executescript(_SCHEMA)
                return
            except sqlite3.OperationalError as error:
                # Two processes that turn one fresh file into WAL mode at once: SQLite says busy without waiting.
                if _primary_code(error) not in _LOCKED or time.monotonic() > give_up_s:
                    raise
                time.sleep(_BUSY_RETRY_S)

    def _number_at_path(self) -> int | None:
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return None

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        opened = self._file_number
        if opened is not None and self._number_at_path() != opened:
            return  # another process did it
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        _log.error("Progress file %s is damaged (%s): moved to %s, beginning a fresh one", self.path, error, aside)
        for suffix in ("-wal", "-shm", ""):  # the file itself last: SQLite drops a log that is older than its file
            with suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        self._file_number = None


def _primary_code(error: sqlite3.Error) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
