"""A worker's process, from start to end, in one function that reads top to bottom.

It listens for gateways and peers, keeps a channel to the controller (reconnecting, since controllers come and go), loads
what it is told to load, and leaves when told to, or when no controller has been there for long.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from spotserve.checkpoint.open import open_store
from spotserve.core.errors import ChannelClosed, ModelError, PeerLost, WireError
from spotserve.core.messages import (
    Activate,
    Address,
    Attach,
    Calibrated,
    Cancel,
    Claim,
    Deactivate,
    Drain,
    Drained,
    HandOver,
    ModelRead,
    Registered,
    Stop,
    Submit,
    Undrain,
    WorkerCommand,
    WorkerEvent,
    WorkerInbound,
)
from spotserve.system_clock import SystemClock
from spotserve.system_folder import SystemFolder, SystemRecord, process_name
from spotserve.wire import Channel, bound_port, connect, listen
from spotserve.worker.calibrate import calibrated
from spotserve.worker.devices import gently
from spotserve.worker.drain import LEAVE_BEFORE_DEADLINE_S, carry_out
from spotserve.worker.options import WorkerOptions
from spotserve.worker.rank_process import fork_ranks
from spotserve.worker.remote_starter import RemoteStarter
from spotserve.worker.replica_starter import ReplicaStarter
from spotserve.worker.worker import Worker

RECONNECT_S = 0.1
"""Pause between attempts to reach the controller."""

log = logging.getLogger(__name__)


class WorkerProcess:
    """Ties a `Worker` to its listening port, its controller and its engine thread."""

    def __init__(
        self, options: WorkerOptions, worker: Worker, secret: str, *, rank_processes: Sequence[socket.socket] = ()
    ) -> None:
        self._options = options
        self._worker = worker
        self._secret = secret
        self._settings = options.worker_settings()
        self._folder = SystemFolder(options.folder_path)
        self._clock = SystemClock()
        self._controller: Channel[WorkerCommand] | None = None
        engine = options.engine_settings()
        self._replicas: ReplicaStarter | RemoteStarter
        if engine.kind == "openai":
            self._replicas = RemoteStarter(worker, engine, host=options.host, report=self._report, on_failure=self.end)
        else:
            self._replicas = ReplicaStarter(
                self._worker,
                engine,
                self._settings,
                host=options.host,
                secret=secret,
                rank_processes=rank_processes,
                report=self._report,
                on_failure=self.end,
            )
        self._hardware = options.hardware
        self._unprepared = True
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._jobs: set[asyncio.Task[None]] = set()
        self.address = Address("", 0)
        self.stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the process should end; with an exception when it must."""

    # ------------------------------------------------------------------ gateways and peers

    async def on_channel(self, channel: Channel[WorkerInbound]) -> None:
        """Serves one gateway or peer until it hangs up."""
        gateway_id: str | None = None
        try:
            while True:
                message = await channel.receive()
                match message:
                    case Attach():
                        gateway_id = message.gateway_id
                        self._worker.attach(gateway_id, channel)  # type: ignore[arg-type]
                    case HandOver():
                        channel.send(await self._worker.adopt(message))
                    case _ if gateway_id is None:
                        raise WireError(f"{type(message).__name__} before Attach")
                    case Submit():
                        self._worker.submit(gateway_id, message)
                    case Claim():
                        self._worker.claim(gateway_id, message)
                    case Cancel():
                        self._worker.cancel(message)
        finally:
            if gateway_id is not None:
                self._worker.detach(gateway_id, channel)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ controller

    async def keep_registered(self) -> None:
        """Stays connected to whoever is controller; ends the process when nobody has been for long."""
        last_seen_s = self._clock.now_s()
        while True:
            try:
                await self._talk_to_controller()
            except WireError as error:
                log.debug("controller: %s", error)
            if self._controller is not None:
                last_seen_s, self._controller = self._clock.now_s(), None
                self._replicas.give_up_coming()
            if self._clock.now_s() - last_seen_s > self._settings.orphan_s:
                log.warning("no controller for %.0f s: leaving", self._settings.orphan_s)
                self.end(None)
                return
            await asyncio.sleep(RECONNECT_S)

    async def _talk_to_controller(self) -> None:
        record = self._folder.read()
        if record is None:
            return
        channel = await connect(record.controller.host, record.controller.port, secret=self._secret, inbound=WorkerCommand)
        channel.send(self._registration())
        self._controller = channel
        if self._unprepared:
            self._unprepared = False
            self._start_job(self.prepare_to_be_planned())
        try:
            while True:
                self._obey(await channel.receive())
        finally:
            channel.close()

    def _registration(self) -> Registered:
        return Registered(
            instance_id=self._options.instance_id,
            address=self.address,
            pid=os.getpid(),
            ranks=self._replicas.ranks,
            spot=self._options.spot,
            zone=self._options.zone,
            replicas=self._replicas.serving,
            held=self._replicas.held,
            model=self._replicas.model,
            hardware=self._hardware,
        )

    async def prepare_to_be_planned(self) -> None:
        """Reads what the model is and measures the devices, so that the controller can plan with both; says what it has found."""
        if self._hardware is None or isinstance(self._replicas, RemoteStarter):
            return
        instance_id, engine = self._options.instance_id, self._options.engine_settings()
        try:
            self._report(ModelRead(instance_id=instance_id, model=await self._replicas.read_model()))
        except ModelError as error:
            self._report(ModelRead(instance_id=instance_id, model=None, reason=str(error)))
            return
        prior = self._hardware
        self._hardware = await gently(lambda: calibrated(prior, engine, self._folder))
        self._report(Calibrated(instance_id=instance_id, hardware=self._hardware))

    async def send_heartbeats(self) -> None:
        """A few times a second, while there is a controller."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_s)
            if self._controller is not None:
                self._report(await self._worker.heartbeat())

    def _report(self, event: WorkerEvent) -> None:
        if self._controller is not None:
            try:
                self._controller.send(event)
            except ChannelClosed:
                log.debug("controller left before it heard %s", type(event).__name__)

    def _obey(self, command: WorkerCommand) -> None:
        match command:
            case Activate():
                self._start_job(self._replicas.activate(command))
            case Deactivate():
                self._replicas.deactivate(command)
            case Drain():
                self._start_draining(command)
            case Undrain():
                self._stop_draining(command.replica_id)
            case Stop():
                self.end(None)

    def _start_draining(self, drain: Drain) -> None:
        self._stop_draining(drain.replica_id)
        replica = self._worker.led(drain.replica_id)
        if replica is not None:
            replica.is_draining = True
            replica.suggested_replica_id = drain.fallback.destination_replica_id
            left_s = drain.deadline_s - LEAVE_BEFORE_DEADLINE_S - self._clock.now_s()
            deadline_s = time.perf_counter() + left_s  # the engine's clock does not jump
            replica.thread.post(lambda engine: engine.finish_before(deadline_s))
        self._drains[drain.replica_id] = self._start_job(self._carry_out(drain))

    def _stop_draining(self, replica_id: str) -> None:
        under_way = self._drains.pop(replica_id, None)
        if under_way is not None:
            under_way.cancel()
        replica = self._worker.led(replica_id)
        if replica is not None:
            replica.is_draining = False
            replica.thread.post(lambda engine: engine.finish_before(None))

    async def _carry_out(self, drain: Drain) -> None:
        await carry_out(self._worker, drain, secret=self._secret, clock=self._clock, on_moved=self._report)
        self._report(Drained(instance_id=self._options.instance_id, replica_id=drain.replica_id))

    # ------------------------------------------------------------------ inner

    def end(self, error: BaseException | None) -> None:
        """Ends the process, with an error if there is one."""
        if self.stopped.done():
            return
        if error is None:
            self.stopped.set_result(None)
        else:
            self.stopped.set_exception(error)

    def _start_job(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs a job beside the others; an exception that nobody expected ends the process."""
        task = asyncio.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._job_done)
        return task

    def _job_done(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(error)


async def serve(options: WorkerOptions, record: SystemRecord, rank_processes: Sequence[socket.socket]) -> None:
    """Runs the worker until it is told to leave."""
    folder = SystemFolder(options.folder_path)
    store = open_store(options.store_settings(), folder.default_store_path)
    async with contextlib.AsyncExitStack() as at_end:
        at_end.push_async_callback(store.close)
        worker = Worker(options.instance_id, options.worker_settings(), store, SystemClock())
        process = WorkerProcess(options, worker, record.secret, rank_processes=rank_processes)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, process.end, None)
        server = await listen(
            options.host, 0, secret=record.secret, inbound=WorkerInbound, on_channel=process.on_channel, on_refused=log.warning
        )
        process.address = Address(options.host, bound_port(server))
        eternal = [
            asyncio.create_task(process.keep_registered(), name="controller"),
            asyncio.create_task(process.send_heartbeats(), name="heartbeats"),
            asyncio.create_task(worker.committer.run(), name="commits"),
        ]
        done, _ = await asyncio.wait([process.stopped, *eternal], return_when=asyncio.FIRST_COMPLETED)
        server.close()
        for task in eternal:
            task.cancel()
        await asyncio.gather(*eternal, return_exceptions=True)
        for finished in done:
            finished.result()


def main(options: WorkerOptions) -> int:
    """Entry of a forked or started worker; its exit code."""
    with contextlib.suppress(OSError):  # the name by which a restarted local cloud knows its workers; only Linux has it
        Path("/proc/self/comm").write_text(process_name(options.instance_id))
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {options.instance_id} %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        folder = SystemFolder(options.folder_path)
        record = folder.read()
        if record is None:
            raise WireError(f"{folder.record_path} is not there: no system runs in {folder.path}")
        silence_s = options.worker_settings().rank_silence_s
        rank_processes = fork_ranks(
            options.devices, options.engine_settings(), host=options.host, secret=record.secret, silence_s=silence_s
        )
        asyncio.run(serve(options, record, rank_processes))
    except (WireError, ModelError, PeerLost) as error:
        log.error("%s", error)
        return 1
    return 0
