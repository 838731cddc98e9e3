"""Stores to test: each kind behind one opener, so that a test may open the same store twice, or from another process."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spotserve.checkpoint.open import open_store
from spotserve.checkpoint.store import Store
from spotserve.config import StoreSettings

Opener = Callable[..., Store]


class RedisServer:
    """A real Redis on a free port that can be killed and started again; it keeps everything it acknowledged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            self.port, self.other_port = first.getsockname()[1], second.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def cluster_options(self) -> tuple[str, ...]:
        return "--cluster-enabled", "yes", "--cluster-announce-ip", "127.0.0.1", "--cluster-port", str(self.other_port)

    def start(self, *options: str) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not installed")
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "no", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up_s = time.monotonic() + 20
        while time.monotonic() < give_up_s:
            try:
                if self.ask("PING").startswith(("+PONG", "-NOAUTH")):
                    return
            except OSError:
                pass
            time.sleep(0.02)
        pytest.fail("redis-server did not come up")

    def ask(self, command: str) -> str:
        """The answer of Redis, as it writes it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(4096).decode()

    def form_cluster(self) -> None:
        """All keys are this server's, which was started as a node of a cluster."""
        assert self.ask("CLUSTER ADDSLOTSRANGE 0 16383") == "+OK\r\n"
        self.wait_for_cluster()

    def wait_for_cluster(self) -> None:
        give_up_s = time.monotonic() + 20
        while "cluster_state:ok" not in self.ask("CLUSTER INFO"):
            assert time.monotonic() < give_up_s, "the cluster does not come up"
            time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, not yet started."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A cluster of one node: it refuses calls on keys of several slots, as any cluster does."""
    server = RedisServer(tmp_path_factory.mktemp("cluster"))
    server.start(*server.cluster_options)
    server.form_cluster()
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", "redis", "cluster"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens one and the same store each time; arguments are those of `StoreSettings`."""
    url = None
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
    elif request.param == "cluster":
        url = request.getfixturevalue("redis_cluster").url + "?cluster=true"

    def open_one(**settings: float) -> Store:
        return open_store(StoreSettings.model_validate({"url": url, "timeout_s": 20.0, **settings}), tmp_path / "progress.db")

    return open_one


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
