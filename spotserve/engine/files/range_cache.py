"""A copy of one remote object on this machine that fills up range by range; no byte of it comes over the network twice.

    data     a sparse file of the object's size
    present  which ranges of it are there (`RangeLog`)
    claims   an empty file whose byte ranges are locked while somebody fetches them

Who needs a range that is absent claims it, looks again, fetches what is still absent, writes it down and lets go. Others that
need it fetch something else first and then wait for the claim. A claim ends with its process, so whoever waits takes over from
the dead; bytes that were written but not written down are fetched again.
"""

import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from pathlib import Path

from spotserve.core.errors import ModelError
from spotserve.engine.files.cache_folder import CacheFolder
from spotserve.engine.files.range_lock import locked_range
from spotserve.engine.files.range_log import RangeLog
from spotserve.engine.files.spans import ByteRanges, cut_at_grid, subtract

_log = logging.getLogger(__name__)

PIECE_BYTES = 8 * 2**20
"""What one request fetches at most: several run at once, and processes share the work piece by piece. Amazon advises 8 to 16 MiB
for ranged requests ("Performance design patterns for Amazon S3")."""
PATIENCE_S = 60.0
"""How long to wait for a process that holds a piece and lives before it counts as stuck and the piece is fetched without it."""

Fetch = Callable[[range], Iterable[bytes]]
"""The bytes of a range of the object, in order, in chunks of any size; raises `ModelError`."""


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """One version of an object."""

    url: str
    etag: str
    """What the store calls this version."""
    size_bytes: int


class CachedObject:
    """The copy of `remote` in `cache`. Safe to use from several threads; `threads` run the requests."""

    def __init__(
        self, cache: CacheFolder, remote: RemoteObject, fetch: Fetch, threads: Executor, patience_s: float = PATIENCE_S
    ) -> None:
        self._remote = remote
        self._fetch = fetch
        self._threads = threads
        self._patience_s = patience_s
        self._entry = cache.enter((remote.url, remote.etag, str(remote.size_bytes)), self._prepare)
        self._log = RangeLog(self._entry.path / "present", remote.size_bytes)
        self._fetched: list[int] = []

    @property
    def data_path(self) -> Path:
        """The sparse file; only ranges that were ensured hold what the object holds."""
        return self._entry.path / "data"

    @property
    def bytes_fetched(self) -> int:
        """Bytes that this object brought over the network."""
        return sum(self._fetched)

    def ensure(self, ranges: ByteRanges) -> None:
        """Returns when all `ranges` are in the sparse file.

        Raises:
            ModelError: they cannot be fetched, or there is no room for them.
        """
        try:
            pieces = cut_at_grid(subtract(ranges, self._log.present()), PIECE_BYTES)
            held_by_others = [piece for piece, done in zip(pieces, self._bring(pieces, 0.0), strict=True) if not done]
            self._bring(held_by_others, self._patience_s)
        except OSError as error:
            raise ModelError(f"{self._entry.path}: a copy of {self._remote.url} cannot be kept: {error}") from error

    def close(self) -> None:
        """Lets others remove the copy."""
        self._entry.close()

    def _prepare(self, folder: Path) -> None:
        for name in ("data", "present", "claims"):
            (folder / name).touch(0o600)
        os.truncate(folder / "data", self._remote.size_bytes)
        (folder / "source").write_text(f"{self._remote.url}\n{self._remote.etag}\n")

    def _bring(self, pieces: ByteRanges, wait_s: float) -> list[bool]:
        """Whether each piece is there now; one held by others longer than `wait_s` is not, unless that was their last chance."""
        running = [self._threads.submit(self._bring_piece, piece, wait_s) for piece in pieces]
        try:
            return [each.result() for each in running]
        except BaseException:
            for each in running:
                each.cancel()
            wait(running)
            raise

    def _bring_piece(self, piece: range, wait_s: float) -> bool:
        with locked_range(self._entry.path / "claims", piece, wait_s) as claimed:
            if not claimed:
                if wait_s == 0:
                    return False
                _log.warning(
                    "Another process has not brought bytes %d-%d of %s in %g s", piece.start, piece.stop, self._remote.url, wait_s
                )
            for span in subtract([piece], self._log.present()):
                self._bring_span(span)
        return True

    def _bring_span(self, span: range) -> None:
        position = span.start
        descriptor = os.open(self.data_path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for chunk in self._fetch(span):
                if position + len(chunk) > span.stop:
                    raise ModelError(f"{self._remote.url}: more bytes came than were asked for ({len(span)} from {span.start})")
                rest = memoryview(chunk)
                while rest:
                    written = os.pwrite(descriptor, rest, position)
                    rest, position = rest[written:], position + written
        finally:
            os.close(descriptor)
        if position != span.stop:
            raise ModelError(f"{self._remote.url}: ended at byte {position}, expected {span.stop}")
        self._log.add(span)
        self._fetched.append(len(span))
