"""A worker's process, from start to end, in one function that reads top to bottom.

It listens for gateways and peers, keeps a channel to the controller (reconnecting, since controllers come and go), loads
what it is told to load, and leaves when told to, or when no controller has been there for long.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from spotserve.checkpoint.open import open_store
from spotserve.core.errors import ChannelClosed, ModelError, WireError
from spotserve.core.messages import (
    Activate,
    Address,
    Attach,
    Cancel,
    Claim,
    Drain,
    Drained,
    HandOver,
    HeldSlot,
    KvPart,
    Registered,
    ReplicaFailed,
    ReplicaReady,
    Stop,
    Submit,
    Undrain,
    WorkerCommand,
    WorkerEvent,
    WorkerInbound,
)
from spotserve.engine.engine import Engine
from spotserve.system_clock import SystemClock
from spotserve.system_folder import SystemFolder, process_name
from spotserve.wire import Channel, bound_port, connect, listen
from spotserve.worker.drain import carry_out
from spotserve.worker.engine_thread import EngineThread
from spotserve.worker.options import WorkerOptions
from spotserve.worker.transfer import Arrivals, Parcel
from spotserve.worker.worker import Worker

RECONNECT_S = 0.1
"""Pause between attempts to reach the controller."""

log = logging.getLogger(__name__)


class WorkerProcess:
    """Ties a `Worker` to its listening port, its controller and its engine thread."""

    def __init__(self, options: WorkerOptions, worker: Worker, secret: str) -> None:
        self._options = options
        self._worker = worker
        self._secret = secret
        self._settings = options.worker_settings()
        self._folder = SystemFolder(options.folder_path)
        self._clock = SystemClock()
        self._controller: Channel[WorkerCommand] | None = None
        self._active: Activate | None = None
        self._thread: EngineThread | None = None
        self._loading = asyncio.Lock()
        """Held while weights are loaded: an instance may be told of another replica meanwhile."""
        self._drain: asyncio.Task[None] | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self.address = Address("", 0)
        self.stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the process should end; with an exception when it must."""

    # ------------------------------------------------------------------ gateways and peers

    async def on_channel(self, channel: Channel[WorkerInbound]) -> None:
        """Serves one gateway or peer until it hangs up."""
        gateway_id: str | None = None
        arrivals = Arrivals()
        try:
            while True:
                message = await channel.receive()
                match message:
                    case Attach():
                        gateway_id = message.gateway_id
                        self._worker.attach(gateway_id, channel)  # type: ignore[arg-type]
                    case HandOver():
                        await self._arrived(arrivals.open(message), channel)
                    case KvPart():
                        await self._arrived(arrivals.add(message), channel)
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

    async def _arrived(self, parcel: Parcel | None, channel: Channel[WorkerInbound]) -> None:
        if parcel is not None:
            channel.send(await self._worker.adopt(parcel))

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
        try:
            while True:
                self._obey(await channel.receive())
        finally:
            channel.close()

    def _registration(self) -> Registered:
        active = self._active if self._worker.model is not None else None
        parallel = active.replica.parallel if active else None
        return Registered(
            instance_id=self._options.instance_id,
            address=self.address,
            pid=os.getpid(),
            num_devices=1,
            spot=self._options.spot,
            zone=self._options.zone,
            replicas=(active.replica,) if active else (),
            held=(HeldSlot(0, active.slot, parallel.pipeline, parallel.tensor),) if active and parallel else (),
            model=self._worker.model,
        )

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
                self._start_job(self._activate(command))
            case Drain():
                self._stop_draining()
                self._worker.is_draining = True
                self._worker.suggested_replica_id = command.fallback.destination_replica_id
                self._drain = self._start_job(self._carry_out(command))
            case Undrain():
                self._stop_draining()
            case Stop():
                self.end(None)

    def _stop_draining(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
        self._drain = None
        self._worker.is_draining = False

    async def _carry_out(self, drain: Drain) -> None:
        await carry_out(self._worker, drain, secret=self._secret, clock=self._clock, on_moved=self._report)
        self._report(Drained(instance_id=self._options.instance_id, replica_id=drain.replica_id))

    # ------------------------------------------------------------------ engine

    async def _activate(self, activate: Activate) -> None:
        """Brings a replica up. The weights are loaded once: another replica id on the same instance reuses them."""
        problem = None
        if activate.replica.parallel.num_slots > 1:
            problem = "this engine runs replicas of one stage and one shard"
        else:
            async with self._loading:
                problem = await self._load(activate) if self._thread is None else None
        if problem is not None:
            self._report(
                ReplicaFailed(
                    instance_id=self._options.instance_id,
                    replica_id=activate.replica.replica_id,
                    plan_epoch=activate.plan_epoch,
                    reason=problem,
                )
            )
            return
        self._active = activate
        assert self._worker.model is not None
        self._report(
            ReplicaReady(
                instance_id=self._options.instance_id,
                replica_id=activate.replica.replica_id,
                plan_epoch=activate.plan_epoch,
                model=self._worker.model,
            )
        )

    async def _load(self, activate: Activate) -> str | None:
        """Starts the engine; why it could not, else None."""
        settings = self._options.engine_settings().model_copy(update={"max_batch": activate.replica.parallel.max_batch})
        thread = EngineThread(lambda: Engine(settings), on_step=self._worker.on_step, on_failure=self.end)
        self._thread = thread
        try:
            engine = await thread.start()
        except ModelError as error:
            self._thread = None
            return str(error)
        self._worker.use_engine(thread, engine.spec)
        return None

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


async def serve(options: WorkerOptions) -> None:
    """Runs the worker until it is told to leave."""
    folder = SystemFolder(options.folder_path)
    record = folder.read()
    if record is None:
        raise WireError(f"{folder.record_path} is not there: no system runs in {folder.path}")
    store = open_store(options.store_settings(), folder.default_store_path)
    async with contextlib.AsyncExitStack() as at_end:
        at_end.push_async_callback(store.close)
        worker = Worker(options.instance_id, options.worker_settings(), store, SystemClock())
        process = WorkerProcess(options, worker, record.secret)
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
        asyncio.run(serve(options))
    except (WireError, ModelError) as error:
        log.error("%s", error)
        return 1
    return 0
