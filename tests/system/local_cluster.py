"""Starts and handles real local clusters for the tests: `spotserve up` as its own process, killed like any other."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from spotserve.system_folder import SystemFolder

START_DEADLINE_S = 90.0


class LocalCluster:
    """One running system."""

    def __init__(self, home: Path, port: int, arguments: Sequence[str]) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._home = home
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> SystemFolder:
        """Where its processes keep their files."""
        return SystemFolder(self._home / str(self.port))

    def start(self, *, replicas: int) -> None:
        """Starts `spotserve up` and waits until it answers and `replicas` serve."""
        log = (self._home / "up.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spotserve", "up", "--port", str(self.port), *self._arguments],
            env={**os.environ, "SPOTSERVE_HOME": str(self._home)},
            stdout=log,
            stderr=log,
        )
        log.close()
        self.wait_until(lambda: self._serving() >= replicas, "replicas serve")

    def kill(self) -> None:
        """SIGKILL to the process that is gateway and controller."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        """SIGTERM, as `spotserve down` does; then nothing of it may be left."""
        pids = [item["pid"] for item in self.status()["instances"]] if self._process is not None else []
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(timeout=30) == 0, self.logs()
        self._process = None
        for pid in filter(None, pids):
            with_deadline(lambda pid=pid: not alive(pid), f"worker {pid} ends")

    def stop_hard(self) -> None:
        """Whatever it takes; for the end of a test that has already failed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self.folder.instances_path.exists():
            for item in json.loads(self.folder.instances_path.read_text())["instances"]:
                if alive(item["pid"]):
                    os.kill(item["pid"], signal.SIGKILL)

    def status(self) -> dict[str, Any]:
        """`/status`."""
        answer = httpx.get(f"{self.url}/status", timeout=10)
        answer.raise_for_status()
        document: dict[str, Any] = answer.json()
        return document

    def admin(self, path: str, body: dict[str, object]) -> Any:
        """One pull of a lever."""
        answer = httpx.post(f"{self.url}/admin/{path}", json=body, headers=self.credentials, timeout=10)
        answer.raise_for_status()
        return answer.json()

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What happened to the fleet, of one kind."""
        answer = httpx.get(f"{self.url}/admin/events", headers=self.credentials, timeout=10)
        return [event for event in answer.json()["events"] if event["kind"] == kind]

    @property
    def credentials(self) -> dict[str, str]:
        """Header of the levers."""
        record = self.folder.read()
        assert record is not None
        return {"authorization": f"Bearer {record.secret}"}

    def logs(self) -> str:
        """Ends of all logs, for the message of a failing test."""
        paths = [self._home / "up.log", *sorted((self.folder.path / "logs").glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths if path.exists())

    def wait_until_idle(self) -> None:
        """Until no replica runs anything and every KV block is free."""
        self.wait_until(lambda: self.status()["kv"]["tokens_used"] == 0, "every KV block is free")

    def wait_until(self, condition: Any, what: str) -> None:
        """Until `condition()` holds."""
        try:
            with_deadline(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def _serving(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, self.logs()
        try:
            return sum(item["state"] == "serving" for item in self.status()["replicas"])
        except httpx.HTTPError:
            return -1  # nobody answers


@contextmanager
def local_cluster(home: Path, *arguments: str, replicas: int) -> Iterator[LocalCluster]:
    """A cluster that serves; nothing of it is left afterwards."""
    cluster = LocalCluster(home, free_port(), ["--instances", str(replicas), *arguments])
    try:
        cluster.start(replicas=replicas)
        yield cluster
        cluster.stop()
    finally:
        cluster.stop_hard()


def busy_instance(cluster: LocalCluster) -> str:
    """The instance that runs something, as soon as a heartbeat has told of one. What runs has to last: drafted answers may not."""
    found: list[str] = []

    def look() -> bool:
        found[:] = [item["instances"][0] for item in cluster.status()["replicas"] if item["running"]]
        return bool(found)

    cluster.wait_until(look, "some replica runs something")
    return found[0]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def with_deadline(condition: Any, what: str) -> None:
    """Waits for `condition()`; fails when that takes forever."""
    deadline_s = time.monotonic() + START_DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"gave up waiting until {what}"
        time.sleep(0.05)


class Answer:
    """What one streamed call said, put together as a client would."""

    def __init__(self) -> None:
        self.call_id = ""
        self.text: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.gaps: dict[int, list[float]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.finish_reasons: dict[int, str] = {}
        self.usage: dict[str, int] | None = None
        self.num_usages = 0
        self.event_ids: list[str] = []
        self.event_times_s: list[float] = []
        self.is_done = False

    def add(self, event_id: str, data: str) -> None:
        """One event."""
        if data == "[DONE]":
            self.is_done = True
            return
        document = json.loads(data)
        assert "error" not in document, document
        self.event_ids.append(event_id)
        self.event_times_s.append(time.monotonic())
        assert self.call_id in ("", document["id"])
        self.call_id = document["id"]
        if document.get("usage") is not None:
            self.usage = document["usage"]
            self.num_usages += 1
        for choice in document["choices"]:
            index = choice["index"]
            self.text[index] = self.text.get(index, "") + choice["text"]
            self.token_ids.setdefault(index, []).extend(choice.get("token_ids") or [])
            self.gaps.setdefault(index, []).extend(choice.get("gaps") or [])
            self.logprobs.setdefault(index, []).extend((choice.get("logprobs") or {}).get("token_logprobs") or [])
            if choice["finish_reason"] is not None:
                assert index not in self.finish_reasons, "a choice ended twice"
                self.finish_reasons[index] = choice["finish_reason"]

    @property
    def longest_gap_s(self) -> float:
        """Longest pause between two events."""
        return max(
            (later - earlier for earlier, later in zip(self.event_times_s, self.event_times_s[1:], strict=False)), default=0.0
        )


def code_request(number: int, *, max_tokens: int) -> dict[str, object]:
    """A completion of code, the same for the same number: every second one is sampled, the others are greedy."""
    return {
        "model": "spotserve-demo",
        "prompt": "import json\n\n\n" + f"def load_{number}(path):\n",
        "max_tokens": max_tokens,
        "seed": number,
        "temperature": 0.8 * (number % 2),
        "ignore_eos": True,
    }


async def stream_all(cluster: LocalCluster, bodies: Sequence[dict[str, object]]) -> list[Answer]:
    """All of these at once; the answers, in the order of the bodies."""
    async with httpx.AsyncClient(timeout=120) as client:
        return list(await asyncio.gather(*(stream(client, cluster.url, body) for body in bodies)))


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, object], answer: Answer | None = None) -> Answer:
    """Streams one completion to its end."""
    answer = answer or Answer()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, "return_gaps": True}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200, (await response.aread(), response.status_code)
        await read_events(response, answer)
    return answer


async def read_events(response: httpx.Response, answer: Answer) -> None:
    """Feeds an answer from an event stream."""
    event_id = ""
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            answer.add(event_id, line[6:])


def run(work: Any) -> Any:
    """Runs a coroutine in a loop of its own."""
    return asyncio.run(work)
