"""Real systems for benchmarks: `spotserve up` as its own process, as a user would start it, and servers it needs.

A system lives in a folder of its own and nothing of it is left afterwards. Knows the public command line and HTTP interface
only. Stopping is SIGTERM, then, for what is still there, SIGKILL.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 20.0
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class SystemFailed(RuntimeError):
    """A system under test did not come up, or ended by itself."""


class RunningSystem:
    """One system that serves."""

    def __init__(self, home: Path, port: int, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        """`start` starts its process; with the same home and port every time."""
        self.url = f"http://127.0.0.1:{port}"
        self.folder = home / str(port)
        self._log_path = home / "up.log"
        self._start = start
        self._process = start()

    @property
    def pid(self) -> int:
        """Of the process of gateway and controller."""
        return self._process.pid

    @property
    def secret(self) -> str:
        """Opens the admin API."""
        return str(json.loads((self.folder / "system.json").read_text())["secret"])

    def status(self) -> dict[str, Any]:
        """`/status`."""
        answer = httpx.get(f"{self.url}/status", timeout=10)
        answer.raise_for_status()
        document: dict[str, Any] = answer.json()
        return document

    def serving(self) -> int:
        """Replicas that serve now; 0 while nobody answers.

        Raises:
            SystemFailed: the system has ended.
        """
        if self._process.poll() is not None:
            raise SystemFailed(f"`spotserve up` ended with code {self._process.returncode}:\n{self._log_path.read_text()[-3000:]}")
        try:
            return sum(replica["state"] == "serving" for replica in self.status()["replicas"])
        except (httpx.HTTPError, KeyError):
            return 0

    def cpu_s(self) -> float:
        """Processor seconds that its gateway, controller and present workers have used."""
        pids = [self._process.pid, *(item["pid"] for item in self.status()["instances"] if item["pid"])]
        return sum(process_cpu_s(pid) for pid in pids)

    def kill_and_start_again(self) -> None:
        """SIGKILL to the process of gateway and controller; the next one adopts what still runs."""
        self._process.kill()
        self._process.wait()
        self._process = self._start()
        wait_until(lambda: self.serving() >= 1, f"a replica serves again; see {self._log_path}")

    def stop(self) -> None:
        """Ends it, whatever that takes."""
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=STOP_DEADLINE_S)
        self._process.kill()
        self._process.wait()
        with suppress(FileNotFoundError):
            for item in json.loads((self.folder / "instances.json").read_text())["instances"]:
                if is_worker(item["pid"], item["instance_id"]):
                    os.kill(item["pid"], signal.SIGKILL)


@contextmanager
def running_system(
    home: Path,
    *arguments: str,
    instances: int,
    replicas: int | None = None,
    port: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[RunningSystem]:
    """A system of which `replicas` serve (None: one per instance), on `port` (None: any). With the home and port of one that
    was stopped it goes on with that one's requests. `settings` are further environment variables.

    Raises:
        SystemFailed: it ended, or did not serve within `START_DEADLINE_S`.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = free_port() if port is None else port
    command = [sys.executable, "-m", "spotserve", "up", "--port", str(port), "--instances", str(instances), *arguments]
    environment = {**os.environ, **(settings or {}), "SPOTSERVE_HOME": str(home)}

    def start() -> subprocess.Popen[bytes]:
        with (home / "up.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    system = RunningSystem(home, port, start)
    try:
        wanted = instances if replicas is None else replicas
        wait_until(lambda: system.serving() >= wanted, f"{wanted} replicas serve; see {home / 'up.log'}")
        yield system
    finally:
        system.stop()


class RedisServer:
    """A Redis of our own."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.url = f"redis://127.0.0.1:{port}"
        self._pid = process.pid

    def cpu_s(self) -> float:
        """Processor seconds that it has used."""
        return process_cpu_s(self._pid)


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer | None]:
    """A Redis server with an append-only file in `folder`; None when none is installed."""
    binary = shutil.which("redis-server")
    if binary is None:
        yield None
        return
    port = free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or _accepts(port), "Redis listens")
            if process.poll() is not None:
                raise SystemFailed(f"redis-server ended with code {process.returncode}")
            yield RedisServer(port, process)
        finally:
            process.terminate()


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Until `condition()` holds.

    Raises:
        SystemFailed: it did not within `START_DEADLINE_S`.
    """
    deadline_s = time.monotonic() + START_DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise SystemFailed(f"gave up after {START_DEADLINE_S:.0f} s waiting until {what}")
        time.sleep(0.05)


def process_cpu_s(pid: int) -> float:
    """Processor seconds, user and kernel, of all threads of a process; 0 when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S


def is_worker(pid: int, instance_id: str) -> bool:
    """Whether the process is still this instance's worker: workers carry their instance in their name."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == f"spot:{instance_id}"[:15]
    except (FileNotFoundError, ProcessLookupError):
        return False


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load_1min": round(os.getloadavg()[0], 2)}


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile of at least one value: the smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-round(share * len(ordered) * 1e6) // 1_000_000) - 1)]


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
