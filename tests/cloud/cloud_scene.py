"""A nursery whose workers sleep, a local cloud on it, and what the cloud tells of them."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from spotserve.cloud.local import LocalCloud
from spotserve.cloud.nursery_process import NurseryProcess
from spotserve.config import LocalCloudSettings
from spotserve.core.messages import CloudEvent
from spotserve.system_clock import SystemClock

PATIENCE_S = 20.0
"""A test that waits this long has failed."""

SCRIPT = Path(__file__).with_name("scripted_nursery.py")


def nursery(folder: Path, script: Path = SCRIPT) -> NurseryProcess:
    return NurseryProcess([sys.executable, str(script)], os.environ, folder / "nursery.log")


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


class Cloud:
    """A local cloud and what it says."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.said: list[CloudEvent] = []
        self.options: dict[str, object] = {}
        self.nursery = nursery(folder)
        self.record_path = folder / "instances.json"
        self.cloud = LocalCloud(
            LocalCloudSettings.model_validate({"restock_s": None, **settings}),
            record_path=self.record_path,
            log_path=lambda name: folder / f"{name}.log",
            nursery=self.nursery,
            start_options=lambda instance_id, *_: {"name": f"spot:{instance_id}", **self.options},
            on_event=self.said.append,
            clock=SystemClock(),
        )

    @property
    def pids(self) -> dict[str, int]:
        return {instance.instance_id: instance.pid for instance in self.cloud._instances.values()}

    def kinds(self, instance_id: str) -> list[str]:
        """What was said of an instance, by the names of the messages."""
        about = [(event, getattr(event, "instance_id", None) or event.notice.instance_id) for event in self.said]  # type: ignore[union-attr]
        return [type(event).__name__ for event, name in about if name == instance_id]


@asynccontextmanager
async def cloud(folder: Path, **settings: object) -> AsyncIterator[Cloud]:
    """Whatever it started ends with the test."""
    made = Cloud(folder, **settings)
    try:
        yield made
    finally:
        pids = made.pids.values()
        await made.cloud.close()
        for pid in pids:
            kill(pid)
