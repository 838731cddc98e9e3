"""What goes wrong becomes a `StoreError` in time, loses nothing that was acknowledged, and passes."""

import asyncio
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from spotserve.checkpoint.open import open_store
from spotserve.checkpoint.sqlite_file import SqliteFile
from spotserve.checkpoint.store import Commit, Store, Verdict
from spotserve.config import StoreSettings
from spotserve.core.errors import StoreError

pytestmark = pytest.mark.anyio

WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from spotserve.checkpoint.open import open_store
from spotserve.checkpoint.sqlite_file import SqliteFile
from spotserve.checkpoint.store import Commit
from spotserve.config import StoreSettings

async def main(url, name):
    store = open_store(StoreSettings(url=url, timeout_s=20), Path("unused"))
    for position in itertools.count():
        await store.commit([
            Commit(request_id=f"{name}-{row}", epoch=1, position=position, token_ids=(position * 64 + row,)) for row in range(64)
        ])
        print(position + 1, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def sqlite_at(path: Path, **settings: float) -> Store:
    return open_store(StoreSettings.model_validate(settings), path)


def redis_at(url: str, timeout_s: float = 20.0) -> Store:
    return open_store(StoreSettings(url=url, timeout_s=timeout_s), Path("unused"))


def commit(name: str, position: int, *token_ids: int) -> Commit:
    return Commit(request_id=name, epoch=1, position=position, token_ids=token_ids)


def start_writer(url: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, url, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def kill_after(writer: subprocess.Popen[str], acknowledged: int) -> int:
    """Kills the writer in the middle of its commits, some time after `acknowledged` of them; how many it had acknowledged."""
    assert writer.stdout is not None
    with writer.stdout as lines:
        last = next(int(line) for line in lines if int(line) >= acknowledged)
        writer.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in lines if line.endswith("\n"))])
    assert writer.wait() == -signal.SIGKILL
    return last


async def test_killed_writers_leave_all_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "progress.db"
    store = sqlite_at(path, timeout_s=20)
    for generation in range(3):
        names = [f"g{generation}-{index}" for index in range(3)]
        writers = [start_writer(store.display_url, name) for name in names]
        for name, writer in zip(names, writers, strict=True):
            acknowledged = kill_after(writer, 5 + generation)
            progress = await store.load([f"{name}-{row}" for row in range(64)])
            lengths = {len(each.token_ids) for each in progress.values()}
            assert len(lengths) == 1, "a batch was written in part"
            assert lengths.pop() >= acknowledged
            for row in range(64):
                token_ids = progress[f"{name}-{row}"].token_ids
                assert token_ids == tuple(position * 64 + row for position in range(len(token_ids)))
    await store.close()


@pytest.mark.parametrize("clustered", [False, True])
async def test_killed_redis_is_an_error_while_away_and_works_again(own_redis, clustered: bool) -> None:
    options = own_redis.cluster_options if clustered else ()
    own_redis.start(*options)
    if clustered:
        own_redis.form_cluster()
    store = redis_at(own_redis.url + ("?cluster=true" if clustered else ""))
    for round_index in range(2):
        await store.commit([commit("r", round_index, round_index)])
        own_redis.kill()
        for call in (store.commit([commit("r", 0, 1)]), store.load(["r"]), store.put_call("c", b""), store.ping()):
            with pytest.raises(StoreError):
                await call
        own_redis.start(*options)
        if clustered:
            own_redis.wait_for_cluster()
        assert (await store.load(["r"]))["r"].token_ids == tuple(range(round_index + 1))
    await store.close()


async def test_script_is_sent_again_when_redis_forgot_it(own_redis) -> None:
    own_redis.start()
    store = redis_at(own_redis.url)
    await store.commit([commit("r", 0, 1)])
    assert own_redis.ask("SCRIPT FLUSH") == "+OK\r\n"
    assert (await store.commit([commit("r", 1, 2)]))[0].verdict is Verdict.OK
    await store.close()


async def test_full_redis_is_an_error(own_redis) -> None:
    own_redis.start("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    store = redis_at(own_redis.url)
    with suppress(StoreError):
        await store.put_call("c", bytes(2**20))
    with pytest.raises(StoreError, match="maxmemory"):
        await store.put_call("d", bytes(2**20))
    await store.close()


async def test_redis_evicts_what_was_written_longest_ago(own_redis) -> None:
    own_redis.start("--maxmemory", "8mb", "--maxmemory-policy", "volatile-ttl", "--maxmemory-samples", "64")
    store = redis_at(own_redis.url)
    for index in range(40):
        await store.commit([Commit(request_id=f"r-{index}", epoch=1, position=0, token_ids=range(2**16))])
        await asyncio.sleep(0.002)  # expiry has a resolution of a millisecond
    assert (await store.load(["r-39", "r-0"])).keys() == {"r-39"}
    await store.close()


async def test_password_is_used_and_never_shown(own_redis, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    own_redis.start("--requirepass", "s3cret")
    host = f"127.0.0.1:{own_redis.port}/0"
    store = redis_at(f"redis://:s3cret@{host}")
    await store.commit([commit("r", 0, 1)])
    assert store.display_url == f"redis://{host}"
    await store.close()
    wrong = redis_at(f"redis://someone:wr0ng@{host}?client_name=wr0ng")
    with pytest.raises(StoreError) as caught:
        await wrong.ping()
    await wrong.close()
    assert "wr0ng" not in f"{caught.value}{wrong.display_url}{wrong!r}{caplog.text}"


async def test_redis_behind_tls(own_redis, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    secret, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=redis"]
    request += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(secret), "-out", str(certificate)]
    subprocess.run(request, check=True, capture_output=True)
    port = own_redis.other_port
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(secret), "--tls-ca-cert-file", str(certificate))
    own_redis.start("--tls-port", str(port), "--tls-auth-clients", "no", *files)
    trusting = redis_at(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}")
    assert (await trusting.commit([commit("r", 0, 1)]))[0].verdict is Verdict.OK
    doubting = redis_at(f"rediss://127.0.0.1:{port}")
    with pytest.raises(StoreError, match="certificate"):
        await doubting.ping()
    await trusting.close()
    await doubting.close()


async def test_redis_that_never_answers_does_not_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = redis_at(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        with pytest.raises(StoreError):
            await asyncio.wait_for(store.commit([commit("r", 0, 1)]), 20)
        await store.close()


async def test_locked_file_does_not_hang_and_works_again(tmp_path: Path) -> None:
    path = tmp_path / "progress.db"
    store = sqlite_at(path, timeout_s=0.3)
    await store.commit([commit("r", 0, 1)])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError):
        await asyncio.wait_for(store.commit([commit("r", 1, 2)]), 20)
    assert (await store.load(["r"]))["r"].token_ids == (1,)
    other.execute("ROLLBACK")
    other.close()
    outcome = None
    while outcome is None:  # the commit that timed out may still hold the store's thread for a moment
        with suppress(StoreError):
            (outcome,) = await store.commit([commit("r", 1, 2)])
    assert outcome.length_tokens == 2
    await store.close()


async def test_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = sqlite_at(tmp_path / "file" / "progress.db")
    with pytest.raises(StoreError):
        await store.ping()
    await store.close()


@pytest.mark.parametrize("content", [b"this is not a database, it is a long text" * 200, b"SQLite format 3\0" + b"\xff" * 8000])
async def test_damaged_file_is_moved_aside(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "progress.db"
    path.write_bytes(content)
    store = sqlite_at(path)
    assert (await store.commit([commit("r", 0, 1)]))[0].verdict is Verdict.OK
    assert "damaged" in caplog.text and str(path) in caplog.text
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.read_bytes() == content
    await store.close()


async def test_file_damaged_while_in_use_is_replaced_for_every_process(tmp_path: Path) -> None:
    path = tmp_path / "progress.db"
    first, second = sqlite_at(path), sqlite_at(path)
    names = [f"r-{index}" for index in range(3000)]
    await first.commit([commit(name, 0, *range(20)) for name in names])
    await second.load(names[:1])
    await first.close()
    first = sqlite_at(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with path.open("r+b") as file:  # all but the first pages, so that opening succeeds and looking up fails
        file.seek(3 * 4096)
        file.write(b"\xff" * (path.stat().st_size - 3 * 4096))
    assert (await first.commit([commit(name, 20, 1) for name in names]))[0].verdict is Verdict.GAP
    await first.commit([commit("fresh", 0, 7)])
    assert (await second.load(["fresh", names[0]])).keys() == {"fresh"}
    assert len([each for each in tmp_path.glob("*.damaged-*") if not each.name.endswith(("-wal", "-shm"))]) == 1
    await first.close()
    await second.close()


async def test_nobody_writes_into_a_file_that_was_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "progress.db"
    store = sqlite_at(path)
    await store.commit([commit("r", 0, 1)])
    for file in list(tmp_path.iterdir()):
        file.rename(file.with_name(f"moved-{file.name}"))
    assert (await store.commit([commit("r", 1, 2)]))[0].verdict is Verdict.GAP
    await store.commit([commit("r", 0, 1, 2)])
    other = sqlite_at(path)
    assert (await other.load(["r"]))["r"].token_ids == (1, 2)
    await store.close()
    await other.close()


async def test_full_disk_is_an_error_and_passes(tmp_path: Path) -> None:
    store = sqlite_at(tmp_path / "progress.db")
    await store.put_call("c", b"kept")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, hard))
    try:
        with pytest.raises(StoreError):
            await store.put_call("c", bytes(2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await store.get_call("c") == b"kept"
    await store.put_call("c", bytes(2**20))
    assert await store.get_call("c") == bytes(2**20)
    await store.close()


async def test_file_of_another_format_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "progress.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    store = sqlite_at(path)
    with pytest.raises(StoreError, match="format 99"):
        await store.ping()
    assert [each.name for each in tmp_path.iterdir()] == ["progress.db"]
    await store.close()


async def test_many_processes_may_begin_one_file_at_once(tmp_path: Path) -> None:
    url = sqlite_at(tmp_path / "progress.db").display_url
    writers = [start_writer(url, f"w{index}") for index in range(6)]
    assert all(kill_after(writer, 2) >= 2 for writer in writers)


def test_one_file_may_be_begun_at_the_same_moment(tmp_path: Path) -> None:
    num_threads = 8
    begin = threading.Barrier(num_threads)

    def open_at(path: Path) -> int:
        file = SqliteFile(path, busy_s=20)
        begin.wait()
        try:
            return file.run(lambda connection: connection.execute("SELECT count(*) FROM progress").fetchone()[0])
        finally:
            file.close()

    with ThreadPoolExecutor(num_threads) as threads:
        for index in range(80):
            assert set(threads.map(open_at, [tmp_path / f"{index}.db"] * num_threads)) == {0}
