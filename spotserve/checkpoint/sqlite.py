"""Progress in one SQLite file, written by every process of one machine at once.

Write-ahead log with `synchronous=NORMAL`: a commit is in the operating system's hands before it is acknowledged, so it
survives `kill -9` of any process; only a loss of power may take the last commits, which costs recomputing, never an answer.

All calls of a store run on one thread of its own. A batch is one transaction of two statements, each of which runs in one
step of SQLite, because every step lets go of the interpreter lock and has to win it back from the engine.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import msgspec

from spotserve.checkpoint.codec import TOKEN_BYTES, finish_code, finish_reason, pack_tokens, unpack_tokens
from spotserve.checkpoint.rules import Stored, Write, settle
from spotserve.checkpoint.sqlite_file import SqliteFile
from spotserve.checkpoint.sqlite_sweep import Sweeper
from spotserve.checkpoint.store import Commit, CommitOutcome, Progress
from spotserve.core.clock import Clock
from spotserve.core.errors import StoreError

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

_SWEEP_EVERY_S = 10.0
_ROWS_PER_WRITE = 512
"""Bounds the number of bound values in one statement."""

_STORED = f"""
SELECT json_group_array(json_array(asked.key, epoch, length(tokens) / {TOKEN_BYTES}, written_s >= ?))
FROM json_each(?) AS asked CROSS JOIN progress ON request_id = asked.value
"""
_LOAD = """
SELECT request_id, epoch, finish, tokens
FROM json_each(?) AS asked CROSS JOIN progress ON request_id = asked.value WHERE written_s >= ?
"""
_FORGET = "DELETE FROM progress WHERE request_id IN (SELECT value FROM json_each(?))"
_PUT_CALL = """
INSERT INTO calls (call_id, written_s, record) VALUES (?, ?, ?)
ON CONFLICT (call_id) DO UPDATE SET written_s = excluded.written_s, record = excluded.record
"""
_stored_rows = msgspec.json.Decoder(list[tuple[int, int, int, int]])


class SqliteStore:
    """`store.Store` in the file at `path`, which other processes may use at the same time."""

    def __init__(self, path: Path, *, time_to_live_s: float, max_bytes: int, timeout_s: float, clock: Clock) -> None:
        self._path = path.absolute()
        self._time_to_live_s = time_to_live_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._file = SqliteFile(self._path, busy_s=timeout_s)
        self._sweeper = Sweeper(max_bytes)
        self._next_sweep_s = clock.now_s()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._closed = False

    @property
    def display_url(self) -> str:
        """With the absolute path."""
        return f"sqlite:///{self._path}"

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        """See `store.ProgressStore`."""
        if not batch:
            return []
        now_s = self._clock.now_s()
        outcomes = await self._run(lambda connection: self._commit(connection, batch, now_s))
        if now_s >= self._next_sweep_s and not self._closed:
            self._next_sweep_s = now_s + min(_SWEEP_EVERY_S, self._time_to_live_s)
            self._thread.submit(self._sweep)
        return outcomes

    async def load(self, request_ids: Sequence[str]) -> Mapping[str, Progress]:
        """See `store.ProgressStore`."""
        rows = await self._run(lambda connection: connection.execute(_LOAD, (_json(request_ids), self._oldest_s())).fetchall())
        return {
            request_id: Progress(epoch, unpack_tokens(tokens), finish_reason(finish)) for request_id, epoch, finish, tokens in rows
        }

    async def put_call(self, call_id: str, record: bytes) -> None:
        """See `store.CallStore`."""
        await self._run(lambda connection: connection.execute(_PUT_CALL, (call_id, self._clock.now_s(), record)))

    async def get_call(self, call_id: str) -> bytes | None:
        """See `store.CallStore`."""
        query = "SELECT record FROM calls WHERE call_id = ? AND written_s >= ?"
        row = await self._run(lambda connection: connection.execute(query, (call_id, self._oldest_s())).fetchone())
        return None if row is None else row[0]

    async def delete_call(self, call_id: str, request_ids: Sequence[str]) -> None:
        """See `store.CallStore`."""

        def delete(connection: sqlite3.Connection) -> None:
            with _writing(connection):
                connection.execute("DELETE FROM calls WHERE call_id = ?", (call_id,))
                connection.execute(_FORGET, (_json(request_ids),))

        await self._run(delete)

    async def ping(self) -> None:
        """See `store.Store`; reads the file."""
        await self._run(lambda connection: connection.execute("SELECT count(*) FROM sqlite_schema").fetchone())

    async def close(self) -> None:
        """See `store.Store`. What was asked before is still done."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._file.close)
            self._thread.shutdown(wait=False)

    async def _run(self, job: Callable[[sqlite3.Connection], Result]) -> Result:
        if self._closed:
            raise StoreError(f"{self.display_url} is closed")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._file.run, job)
        except TimeoutError as error:
            raise StoreError(f"{self.display_url} did not answer within {self._timeout_s:g} s") from error
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.display_url}: {error}") from error

    def _commit(self, connection: sqlite3.Connection, batch: Sequence[Commit], now_s: float) -> list[CommitOutcome]:
        with _writing(connection):
            settlement = settle(batch, self._stored(connection, [commit.request_id for commit in batch], now_s))
            rows = list(settlement.writes.items())
            for start in range(0, len(rows), _ROWS_PER_WRITE):
                _write(connection, rows[start : start + _ROWS_PER_WRITE], now_s)
        return settlement.outcomes

    def _stored(self, connection: sqlite3.Connection, request_ids: list[str], now_s: float) -> dict[str, Stored]:
        asked = (now_s - self._time_to_live_s, _json(request_ids))
        rows = _stored_rows.decode(connection.execute(_STORED, asked).fetchone()[0])
        expired = [request_ids[index] for index, _, _, alive in rows if not alive]
        if expired:
            connection.execute(_FORGET, (_json(expired),))
        return {request_ids[index]: Stored(epoch, length) for index, epoch, length, alive in rows if alive}

    def _oldest_s(self) -> float:
        return self._clock.now_s() - self._time_to_live_s

    def _sweep(self) -> None:
        """On the store's thread, behind the commit that was due to start it; nobody waits for it."""

        def sweep(connection: sqlite3.Connection) -> int:
            with _writing(connection):
                return self._sweeper.sweep(connection, expired_before_s=self._oldest_s())

        try:
            deleted = self._file.run(sweep)
        except (sqlite3.Error, OSError, StoreError) as error:
            _log.warning("%s: could not forget old progress: %s", self.display_url, error)
        else:
            if deleted:
                _log.debug("%s: forgot %d old rows", self.display_url, deleted)


@contextmanager
def _writing(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction that holds the write lock from its beginning, so that what it reads stays true until it ends."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _write(connection: sqlite3.Connection, rows: Sequence[tuple[str, Write]], now_s: float) -> None:
    values: list[object] = []
    for request_id, write in rows:
        values += (request_id, write.epoch, finish_code(write.finish_reason), now_s, pack_tokens(write.tail))
    connection.execute(_write_statement(len(rows)), values)


@cache
def _write_statement(num_rows: int) -> str:
    return f"""
        INSERT INTO progress (request_id, epoch, finish, written_s, tokens) VALUES {",".join(["(?,?,?,?,?)"] * num_rows)}
        ON CONFLICT (request_id) DO UPDATE SET
            epoch = excluded.epoch,
            finish = CASE excluded.finish WHEN 0 THEN finish ELSE excluded.finish END,
            written_s = excluded.written_s,
            tokens = CAST(tokens || excluded.tokens AS BLOB)
    """


def _json(values: Sequence[str]) -> str:
    return msgspec.json.encode(values).decode()
