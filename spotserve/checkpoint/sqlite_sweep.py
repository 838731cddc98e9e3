"""Forgetting what is old, a bounded piece at a time, so that no commit waits long behind it.

A sweep looks at the next rows in order of creation and deletes those past their time; then, while the file is above its bound,
it deletes the oldest of the rows that were created first. There is no index on time: keeping one would cost every commit.
"""

import sqlite3
from dataclasses import dataclass, field

_ROWS_PER_SWEEP = 2000
_ROWS_PER_CUT = 256
_CUTS_PER_SWEEP = 16
_TABLES = ("progress", "calls")


@dataclass(slots=True)
class Sweeper:
    """Where the next sweep goes on. One per store; sweeps of several processes do not disturb each other."""

    max_bytes: int
    _next_number: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TABLES, 0))

    def sweep(self, connection: sqlite3.Connection, *, expired_before_s: float) -> int:
        """Rows deleted. `expired_before_s`: rows last written before it are past their time."""
        deleted = sum(self._expire(connection, table, expired_before_s) for table in _TABLES)
        for _ in range(_CUTS_PER_SWEEP):
            if used_bytes(connection) <= self.max_bytes:
                break
            cut = _cut_oldest(connection)
            deleted += cut
            if cut == 0:
                break
        return deleted

    def _expire(self, connection: sqlite3.Connection, table: str, expired_before_s: float) -> int:
        first = self._next_number[table]
        last, rows = connection.execute(
            f"SELECT max(number), count(*) FROM (SELECT number FROM {table} WHERE number >= ? ORDER BY number LIMIT ?)",
            (first, _ROWS_PER_SWEEP),
        ).fetchone()
        self._next_number[table] = last + 1 if rows == _ROWS_PER_SWEEP else 0
        if rows == 0:
            return 0
        return connection.execute(
            f"DELETE FROM {table} WHERE number BETWEEN ? AND ? AND written_s < ?", (first, last, expired_before_s)
        ).rowcount


def used_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of the file that hold something; pages of deleted rows are used again."""
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    used: int = (pages - free) * page_bytes
    return used


def _cut_oldest(connection: sqlite3.Connection) -> int:
    """Deletes, of the rows that were created first, those that were written longest ago."""
    first_created = [
        (written_s, table, number)
        for table in _TABLES
        for written_s, number in connection.execute(f"SELECT written_s, number FROM {table} ORDER BY number LIMIT {_ROWS_PER_CUT}")
    ]
    oldest = sorted(first_created)[:_ROWS_PER_CUT]
    for table in _TABLES:
        numbers = [(number,) for _, of, number in oldest if of == table]
        connection.executemany(f"DELETE FROM {table} WHERE number = ?", numbers)
    return len(oldest)
