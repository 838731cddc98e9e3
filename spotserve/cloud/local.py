"""A cloud on one machine: its instances are worker processes, and it takes them back like the real ones do.

An instance that is preempted with a grace hears a notice and is killed (SIGKILL) at the deadline; one that is preempted now
is killed without a word. Its place goes to a new instance after `restock_s`, unless a trace drives the fleet. Instances
outlive this object: they are listed in the system's folder, and a restarted cloud adopts those that still run.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from spotserve.cloud.nursery_process import NurseryProcess
from spotserve.config import LocalCloudSettings
from spotserve.core.clock import Clock
from spotserve.core.cluster import Notice, NoticeKind
from spotserve.core.errors import CloudError
from spotserve.core.messages import TERMINATED, CloudEvent, InstanceLaunched, InstanceLost, NoticeReceived
from spotserve.system_folder import process_name, replace_file

POLL_ADOPTED_S = 0.5
"""How often an adopted process is looked for: it is no child of ours, so nobody tells when it ends."""

log = logging.getLogger(__name__)


class LocalInstance(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of the local cloud."""

    instance_id: str
    pid: int
    spot: bool
    zone: str


class LocalFleet(msgspec.Struct, frozen=True):
    """Contents of `instances.json`."""

    next_number: int
    instances: tuple[LocalInstance, ...]


class LocalCloud:
    """Provider whose machines are processes. `start_options` builds what a new worker is told, from its identity."""

    def __init__(
        self,
        settings: LocalCloudSettings,
        *,
        record_path: Path,
        log_path: Callable[[str], Path],
        nursery: NurseryProcess,
        start_options: Callable[[str, bool, str], object],
        on_event: Callable[[CloudEvent], None],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._record_path = record_path
        self._log_path = log_path
        self._nursery = nursery
        self._start_options = start_options
        self._on_event = on_event
        self._clock = clock
        self._instances: dict[str, LocalInstance] = {}
        self._doomed: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_number = 1
        self.restock_s = settings.restock_s

    # ------------------------------------------------------------------ provider

    async def launch(self, count: int, *, spot: bool, zone: str | None = None) -> list[str]:
        """Starts workers in `zone`, or in all zones in turn; their ids.

        Raises:
            CloudError: there is no such zone, or a process could not be started.
        """
        if zone is not None and zone not in self._settings.zones:
            raise CloudError(f"there is no zone {zone!r}; known: {', '.join(self._settings.zones)}")
        return [await self._launch_one(spot=spot, zone=zone) for _ in range(count)]

    async def terminate(self, instance_id: str) -> None:
        """Ends an instance at the user's wish: its place stays empty."""
        instance = self._instances.get(instance_id)
        if instance is not None:
            self._forget(instance_id, TERMINATED)
            _kill(instance.pid)

    async def close(self) -> None:
        """Stops looking after the instances; they go on."""
        for handle in self._doomed.values():
            handle.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._nursery.close()

    # ------------------------------------------------------------------ playing the market

    def preempt(self, instance_id: str, *, grace_s: float) -> float:
        """Takes an instance: notice now and SIGKILL at the deadline, or SIGKILL at once when `grace_s` is 0; the deadline.

        Raises:
            CloudError: there is no such instance.
        """
        self._known(instance_id)
        deadline_s = self._clock.now_s() + grace_s
        if grace_s <= 0:
            self._take(instance_id)
        else:
            earlier = self._doomed.get(instance_id)
            if earlier is not None:
                earlier.cancel()
            self._doomed[instance_id] = asyncio.get_running_loop().call_later(grace_s, self._take, instance_id)
            self._on_event(NoticeReceived(notice=Notice(instance_id=instance_id, deadline_s=deadline_s)))
        return deadline_s

    def warn(self, instance_id: str, *, deadline_s: float, kind: NoticeKind, source: str) -> None:
        """Passes a notice on, as any of a cloud's sources may: whether it comes true is another matter.

        Raises:
            CloudError: there is no such instance.
        """
        self._known(instance_id)
        self._on_event(NoticeReceived(notice=Notice(instance_id=instance_id, deadline_s=deadline_s, kind=kind, source=source)))

    def _known(self, instance_id: str) -> LocalInstance:
        instance = self._instances.get(instance_id)
        if instance is None:
            known = ", ".join(self._instances) or "none"
            raise CloudError(f"there is no instance {instance_id!r}; running: {known}")
        return instance

    async def adopt(self) -> list[str]:
        """Takes over instances of an earlier run that still live; their ids."""
        try:
            fleet = msgspec.json.decode(self._record_path.read_bytes(), type=LocalFleet)
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            raise CloudError(f"{self._record_path} cannot be read: {error}; remove it to start afresh") from error
        self._next_number = fleet.next_number
        for instance in fleet.instances:
            if _is_worker(instance.pid, instance.instance_id):
                self._add(instance)
                self._start_task(self._watch_adopted(instance))
        return list(self._instances)

    # ------------------------------------------------------------------ inner

    async def _launch_one(self, *, spot: bool, zone: str | None = None) -> str:
        number = self._next_number
        self._next_number += 1
        instance_id = f"i-{number}"
        zone = zone or self._settings.zones[number % len(self._settings.zones)]
        pid = await self._nursery.start(
            self._start_options(instance_id, spot, zone), instance_id, self._log_path(instance_id), self._on_exit
        )
        self._add(LocalInstance(instance_id=instance_id, pid=pid, spot=spot, zone=zone))
        return instance_id

    def _add(self, instance: LocalInstance) -> None:
        self._instances[instance.instance_id] = instance
        self._write_record()
        prices = self._settings
        self._on_event(
            InstanceLaunched(
                instance_id=instance.instance_id,
                spot=instance.spot,
                zone=instance.zone,
                usd_per_hour=prices.spot_usd_per_hour if instance.spot else prices.on_demand_usd_per_hour,
            )
        )

    def _take(self, instance_id: str) -> None:
        """The cloud takes the machine back, and gives its place to a new one after a while."""
        instance = self._instances.get(instance_id)
        if instance is None:
            return
        _kill(instance.pid)
        self._forget(instance_id, "preempted")
        self._restock()

    def _on_exit(self, pid: int, exit_code: int) -> None:
        for instance in tuple(self._instances.values()):
            if instance.pid == pid:
                log.warning(
                    "%s ended by itself with exit code %d; see %s",
                    instance.instance_id,
                    exit_code,
                    self._log_path(instance.instance_id),
                )
                self._forget(instance.instance_id, f"ended with exit code {exit_code}")
                self._restock()

    def _forget(self, instance_id: str, reason: str) -> None:
        del self._instances[instance_id]
        doomed = self._doomed.pop(instance_id, None)
        if doomed is not None:
            doomed.cancel()
        self._write_record()
        self._on_event(InstanceLost(instance_id=instance_id, reason=reason))

    def _restock(self) -> None:
        if self.restock_s is not None:
            self._start_task(self._launch_later(self.restock_s))

    async def _launch_later(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        try:
            await self._launch_one(spot=True)
        except CloudError as error:
            log.error("no replacement: %s", error)

    async def _watch_adopted(self, instance: LocalInstance) -> None:
        while instance.instance_id in self._instances:
            if not _is_worker(instance.pid, instance.instance_id):
                self._on_exit(instance.pid, -1)
                return
            await asyncio.sleep(POLL_ADOPTED_S)

    def _write_record(self) -> None:
        fleet = LocalFleet(self._next_number, tuple(self._instances.values()))
        replace_file(self._record_path, msgspec.json.format(msgspec.json.encode(fleet)))

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # gone already: what was wanted
        os.kill(pid, signal.SIGKILL)


def _is_worker(pid: int, instance_id: str) -> bool:
    """Whether the process is still the worker of this instance: neither another that was given its number, nor its remains,
    which stay until somebody asks for the exit code."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")  # PID (NAME) STATE ...
    except (FileNotFoundError, ProcessLookupError):
        return False
    return before.partition("(")[2] == process_name(instance_id) and after.split()[0] != "Z"
