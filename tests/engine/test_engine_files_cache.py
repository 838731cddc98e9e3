"""The cache that processes share: no byte comes twice, no death harms, what nobody uses can go."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from files_scene import RangedServer, fetch_from
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotserve.core.errors import ModelError
from spotserve.engine.files import range_cache
from spotserve.engine.files.cache_folder import CacheFolder, default_cache_path
from spotserve.engine.files.range_cache import PIECE_BYTES, CachedObject, Fetch, RemoteObject
from spotserve.engine.files.range_lock import locked_range
from spotserve.engine.files.range_log import RangeLog
from spotserve.engine.files.spans import coalesce

SIZE = 3 * PIECE_BYTES + 12_345

RANK = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from files_scene import fetch_from
from spotserve.engine.files.cache_folder import CacheFolder
from spotserve.engine.files.range_cache import CachedObject, RemoteObject

folder, port, size, *ends = sys.argv[1:]
with ThreadPoolExecutor(4) as threads:
    remote = RemoteObject("test://object", "v1", int(size))
    cached = CachedObject(CacheFolder(Path(folder)), remote, fetch_from(int(port)), threads)
    print("ready", flush=True)
    sys.stdin.readline()
    cached.ensure([range(int(start), int(stop)) for start, stop in zip(ends[::2], ends[1::2])])
    print(cached.bytes_fetched, flush=True)
    sys.stdin.readline()
"""


def start_rank(folder: Path, server: RangedServer, wanted: Iterable[range]) -> subprocess.Popen[str]:
    """Another process that is about to want these ranges; a line on its standard input sets it off."""
    ends = [str(end) for span in wanted for end in (span.start, span.stop)]
    command = [sys.executable, "-c", RANK, str(folder), str(server.port), str(len(server.content)), *ends]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    return rank


def go(rank: subprocess.Popen[str]) -> None:
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()


def end(rank: subprocess.Popen[str]) -> None:
    rank.kill()
    rank.communicate()


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def server(content: bytes) -> Iterator[RangedServer]:
    with RangedServer(content).running() as running:
        yield running


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as running:
        yield running


def copy_of(folder: Path, fetch: Fetch, threads: ThreadPoolExecutor, size: int = SIZE, patience_s: float = 60) -> CachedObject:
    return CachedObject(CacheFolder(folder), RemoteObject("test://object", "v1", size), fetch, threads, patience_s)


def holds(copy: CachedObject, content: bytes, wanted: Iterable[range]) -> bool:
    data = copy.data_path.read_bytes()
    return len(data) == len(content) and all(data[span.start : span.stop] == content[span.start : span.stop] for span in wanted)


small_ranges = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 300)).map(lambda ends: range(min(ends), max(ends))), max_size=4
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.tuples(st.booleans(), small_ranges), max_size=6))
def test_every_byte_comes_once_whatever_is_asked_by_whom(
    calls: list[tuple[bool, list[range]]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_cache, "PIECE_BYTES", 64)
    content = bytes(place % 251 for place in range(300))
    fetched: list[range] = []

    def fetch(span: range) -> Iterator[bytes]:
        fetched.append(span)
        middle = (span.start + span.stop) // 2
        yield from (content[span.start : middle], content[middle : span.stop])

    folder = tmp_path_factory.mktemp("cache")
    with ThreadPoolExecutor(3) as threads:
        copies = [copy_of(folder, fetch, threads, len(content)) for _ in range(2)]
        for second, wanted in calls:
            copies[second].ensure(coalesce(wanted, 0))
            assert holds(copies[second], content, wanted)
        everything = coalesce((span for _, wanted in calls for span in wanted), 0)
        assert sum(map(len, fetched)) == sum(map(len, everything)) == sum(copy.bytes_fetched for copy in copies)
        assert coalesce(fetched, 0) == everything
        for copy in copies:
            copy.close()


def test_two_processes_share_the_work_and_fetch_no_byte_twice(
    tmp_path: Path, server: RangedServer, content: bytes, threads: ThreadPoolExecutor
) -> None:
    wanted = [[range(SIZE)], [range(1000, 2_000_000), range(PIECE_BYTES - 10, SIZE)]]
    ranks = [start_rank(tmp_path, server, each) for each in wanted]
    server.open_gate.clear()  # nobody is done before both have begun
    for rank in ranks:
        go(rank)
    assert server.half_sent.wait(60)
    time.sleep(0.3)
    server.open_gate.set()
    fetched = [int(rank.stdout.readline()) for rank in ranks if rank.stdout is not None]
    assert server.sent_bytes == SIZE == sum(fetched)
    copy = copy_of(tmp_path, fetch_from(server.port), threads)
    copy.ensure([range(SIZE)])
    assert copy.bytes_fetched == 0
    assert holds(copy, content, [range(SIZE)])
    copy.close()
    for rank in ranks:
        end(rank)


def test_what_a_killed_process_was_fetching_is_taken_over(
    tmp_path: Path, server: RangedServer, content: bytes, threads: ThreadPoolExecutor
) -> None:
    server.open_gate.clear()
    rank = start_rank(tmp_path, server, [range(PIECE_BYTES)])
    go(rank)
    assert server.half_sent.wait(60)
    copy = copy_of(tmp_path, fetch_from(server.port), threads)
    waiting = threading.Thread(target=copy.ensure, args=([range(PIECE_BYTES)],))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    assert len(server.asked) == 1, "somebody else is at it already"
    rank.send_signal(signal.SIGKILL)
    rank.communicate()
    server.open_gate.set()
    waiting.join(60)
    assert holds(copy, content, [range(PIECE_BYTES)])
    assert server.asked == [range(PIECE_BYTES)] * 2
    copy.close()


def test_killed_at_any_moment_leaves_a_cache_that_works(
    tmp_path: Path, server: RangedServer, content: bytes, threads: ThreadPoolExecutor
) -> None:
    for generation in range(3):
        rank = start_rank(tmp_path, server, [range(SIZE)])
        go(rank)
        while not server.asked:
            time.sleep(0.001)
        time.sleep(0.004 * generation)
        end(rank)
        copy = copy_of(tmp_path, fetch_from(server.port), threads)
        present = RangeLog(copy.data_path.with_name("present"), SIZE).present()
        assert holds(copy, content, present), "what is written down is there"
        server.asked.clear()
        copy.ensure([range(SIZE)])
        assert holds(copy, content, [range(SIZE)])
        assert copy.bytes_fetched == SIZE - sum(map(len, present))
        server.asked.clear()
        copy.close()
        assert CacheFolder(tmp_path).remove_unused() >= SIZE, "the dead use nothing"


def test_process_that_hangs_is_waited_for_only_so_long(
    tmp_path: Path, server: RangedServer, content: bytes, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    server.open_gate.clear()
    rank = start_rank(tmp_path, server, [range(100)])
    go(rank)
    assert server.half_sent.wait(60)
    rank.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)
    server.open_gate.set()
    copy = copy_of(tmp_path, fetch_from(server.port), threads, patience_s=0.1)
    copy.ensure([range(100)])
    assert holds(copy, content, [range(100)])
    assert "has not brought bytes 0-100 of test://object" in caplog.text
    end(rank)
    copy.close()


@pytest.mark.parametrize(
    ("chunks", "says"),
    [([b"x" * 5], "ended at byte 5, expected 10"), ([b"x" * 11], "more bytes came"), ([b"x" * 10, b"x"], "more bytes came")],
)
def test_answers_of_the_wrong_length_are_not_kept(
    tmp_path: Path, threads: ThreadPoolExecutor, chunks: list[bytes], says: str
) -> None:
    copy = copy_of(tmp_path, lambda span: chunks, threads, 20)
    with pytest.raises(ModelError, match=f"test://object: {says}"):
        copy.ensure([range(10)])
    other = copy_of(tmp_path, lambda span: [b"y" * len(span)], threads, 20)
    other.ensure([range(10)])
    assert holds(other, b"y" * 20, [range(10)])
    copy.close()
    other.close()


def test_one_piece_that_fails_lets_go_of_the_others(
    tmp_path: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_cache, "PIECE_BYTES", 10)
    broken = True

    def fetch(span: range) -> Iterator[bytes]:
        if broken and span.start == 40:
            raise ModelError("no such luck")
        yield b"y" * len(span)

    copy = copy_of(tmp_path, fetch, threads, 100)
    with pytest.raises(ModelError, match="no such luck"):
        copy.ensure([range(100)])
    broken = False
    copy.ensure([range(100)])
    assert holds(copy, b"y" * 100, [range(100)])
    assert copy.bytes_fetched == 100
    copy.close()


def test_log_goes_on_after_a_torn_or_damaged_record(tmp_path: Path) -> None:
    path = tmp_path / "present"
    path.touch()
    log = RangeLog(path, 100)
    log.add(range(10))
    path.write_bytes(path.read_bytes() + b"torn")
    log.add(range(20, 30))
    assert log.present() == RangeLog(path, 100).present() == [range(10), range(20, 30)]
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 1
    path.write_bytes(damaged)
    assert RangeLog(path, 100).present() == [range(20, 30)]
    assert RangeLog(path, 25).present() == [], "no file of this size"


def test_claims_exclude_those_that_overlap_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "claims"
    path.touch()
    with locked_range(path, range(10, 20), 0) as first, locked_range(path, range(20, 30), 0) as beside:
        with locked_range(path, range(19, 21), 0) as across:
            assert (first, beside, across) == (True, True, False)
        with locked_range(path, range(15, 16), 0.05) as inside:
            assert not inside, "closing another descriptor lost the claim"
    with locked_range(path, range(40), 0) as afterwards:
        assert afterwards


def test_only_what_nobody_uses_is_removed_longest_unused_first(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path / "cache")

    def enter(name: str):
        return cache.enter([name], lambda folder: (folder / "data").write_bytes(os.urandom(2**16)) and None)

    entries = {name: enter(name) for name in ("old", "used", "new")}
    for age, name in enumerate(("new", "used", "old")):
        os.utime(entries[name].path / "in-use", (1e9 - age, 1e9 - age))
    entries["old"].close()
    entries["new"].close()
    assert cache.remove_unused(keep_bytes=100_000) >= 2**16
    assert [name for name, entry in entries.items() if entry.path.exists()] == ["used", "new"]
    cache.remove_unused()
    assert [name for name, entry in entries.items() if entry.path.exists()] == ["used"]
    entries["used"].close()


def test_entry_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path)

    def break_off(folder: Path) -> None:
        (folder / "half").touch()
        raise ModelError("broke off")

    with pytest.raises(ModelError, match="broke off"):
        cache.enter(["name"], break_off)
    entry = cache.enter(["name"], lambda folder: (folder / "whole").touch())
    assert sorted(each.name for each in entry.path.iterdir()) == ["in-use", "whole"]
    entry.close()


def test_full_disk_is_an_error_and_passes(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    copy = copy_of(tmp_path, lambda span: [bytes(len(span))], threads, 2**20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(ModelError, match=r"a copy of test://object cannot be kept: .*too large"):
            copy.ensure([range(2**20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    copy.ensure([range(2**20)])
    assert holds(copy, bytes(2**20), [range(2**20)])
    copy.close()


def test_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"Not a directory.*SPOTSERVE_CACHE"):
        CacheFolder(tmp_path / "file" / "cache").enter(["a"], lambda folder: None)


def test_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPOTSERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_cache_path() == Path.home() / ".cache" / "spotserve" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_path() == Path("/x/spotserve/weights")
    monkeypatch.setenv("SPOTSERVE_CACHE", "/y")
    assert default_cache_path() == Path("/y")
