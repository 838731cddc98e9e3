"""The folder where what came from a network is kept, shared by all processes of a user on one machine.

Each entry is a folder of its own, named by a digest of what it holds a copy of. Entries are made whole or not at all: prepared
under another name and renamed. A process that uses one holds a shared lock on its `in-use` file, which the kernel lets go when
the process dies, however it dies; only what nobody uses is removed.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from spotserve.core.errors import ModelError

KEEP_BYTES = 64 * 2**30
"""How much of what nobody uses stays when a model is closed."""
_IN_USE = "in-use"
_DRAFT = "draft"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def default_cache_path() -> Path:
    """SPOTSERVE_CACHE, or `spotserve/weights` in the user's cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SPOTSERVE_CACHE") or cache / "spotserve" / "weights")


class CacheEntry:
    """A folder that stays until it is closed, or this process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Lets others remove it. Files of it that are mapped stay mapped."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


class CacheFolder:
    """Entries below `path`, which is made when it is first needed.

    What is in a file's pages when the machine goes down may never reach the disk, so an entry is good for one boot.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def enter(self, identity: Sequence[str], prepare: Callable[[Path], None]) -> CacheEntry:
        """The entry that holds a copy of what `identity` names; `prepare` fills a new one. Of processes that want the same one
        at once, one prepares it.

        Raises:
            ModelError: the cache folder cannot be written.
        """
        digest = hashlib.sha256("\0".join([*identity, _boot_id()]).encode()).hexdigest()[:40]
        entry = self.path / digest
        with self._changing():
            if not entry.exists():
                draft = self.path / _DRAFT
                shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
                draft.mkdir()
                (draft / _IN_USE).touch()
                prepare(draft)
                draft.rename(entry)
            descriptor = os.open(entry / _IN_USE, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor)
        return CacheEntry(entry, descriptor)

    def remove_unused(self, keep_bytes: int = 0) -> int:
        """Removes entries that no process uses, longest unused first, until those left hold at most `keep_bytes`; how many bytes
        that gave back.

        Raises:
            ModelError: the cache folder cannot be written.
        """
        removed_bytes = 0
        with self._changing():
            unused = sorted((entry for entry in self.path.iterdir() if _is_unused(entry)), key=_last_used_s)
            sizes = [_disk_bytes(entry) for entry in unused]
            left_bytes = sum(sizes)
            for entry, size_bytes in zip(unused, sizes, strict=True):
                if left_bytes <= keep_bytes:
                    break
                shutil.rmtree(self.path / _DRAFT, ignore_errors=True)
                shutil.rmtree(entry.rename(self.path / _DRAFT))
                left_bytes -= size_bytes
                removed_bytes += size_bytes
        return removed_bytes

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """While entries are made, taken into use or removed, by one process at a time."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path / "changing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ModelError(
                f"{error.filename or self.path}: {error.strerror or error}; expected a cache folder that can be written "
                "(SPOTSERVE_CACHE names another)"
            ) from error


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _is_unused(entry: Path) -> bool:
    if entry.name == _DRAFT or not (entry / _IN_USE).is_file():
        return False
    descriptor = os.open(entry / _IN_USE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _last_used_s(entry: Path) -> float:
    return (entry / _IN_USE).stat().st_mtime


def _disk_bytes(entry: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in entry.rglob("*"))
