"""vLLM's CPU build in a virtual environment of its own, serving the model that ships; and a wire to it that can be cut."""

import asyncio
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from spotserve.config import DEMO_MODEL

START_DEADLINE_S = 180.0
KEY = "sk-of-the-real-server"


@contextmanager
def vllm_server(python: str, log_path: Path) -> Iterator[str]:
    """Starts the server; its URL, once it serves. `python` is the interpreter that has vLLM."""
    port = free_port()
    arguments = ["--model", str(DEMO_MODEL), "--served-model-name", "spotserve-demo", "--dtype", "float32", "--enforce-eager"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_API_KEY": KEY,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", *arguments, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=log_path.parent,
        )
    try:
        url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + START_DEADLINE_S
        while not _is_up(url):
            assert process.poll() is None and time.monotonic() < deadline_s, log_path.read_text()[-4000:]
            time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Wire:
    """A proxy of bytes: `cut` hangs up on everyone at once, in the middle of whatever they were told."""

    url: str
    connections: int = 0
    """Made so far."""
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop | None = None

    def cut(self) -> None:
        """Resets every connection."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in self._writers])


@contextmanager
def wire_to(url: str) -> Iterator[Wire]:
    """A wire to the server at `url`, on a port of its own."""
    target, port = httpx.URL(url), free_port()
    wire = Wire(f"http://127.0.0.1:{port}/v1")
    up, done = threading.Event(), asyncio.Event()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire.connections += 1
        there_reader, there_writer = await asyncio.open_connection(target.host, target.port)
        both = {writer, there_writer}
        wire._writers |= both
        await asyncio.gather(carry(reader, there_writer), carry(there_reader, writer))
        wire._writers -= both

    async def serve() -> None:
        wire._loop = asyncio.get_running_loop()
        async with await asyncio.start_server(connect, "127.0.0.1", port):
            up.set()
            await done.wait()
            for writer in wire._writers:
                writer.transport.abort()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    up.wait()
    try:
        yield wire
    finally:
        assert wire._loop is not None
        wire._loop.call_soon_threadsafe(done.set)
        thread.join()
