"""A whole system on one machine: controller and gateway in this process, every instance a worker process of the local cloud.

Controller and gateway still talk through a channel, as they would from two machines. Ctrl-C or SIGTERM ends everything;
after a SIGKILL the workers go on, and the next `spotserve up` on the same port adopts them and their requests.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from spotserve.checkpoint.open import open_store
from spotserve.cloud.local import LocalCloud
from spotserve.cloud.local_hardware import local_instance_type
from spotserve.cloud.nursery_process import NurseryProcess
from spotserve.config import Settings
from spotserve.controller.app import create_router, status_of
from spotserve.controller.controller import Controller
from spotserve.controller.executor import Executor
from spotserve.controller.hedging import Place
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.state import ControllerState
from spotserve.core.errors import ConfigError, StoreError
from spotserve.core.messages import Address, ControllerInbound
from spotserve.gateway.app import create_app
from spotserve.gateway.controller_link import ControllerLink
from spotserve.gateway.relay import Relay
from spotserve.gateway.tokenizer import load_tokenizer
from spotserve.metrics import Metrics
from spotserve.system_clock import SystemClock
from spotserve.system_folder import SystemFolder, SystemRecord
from spotserve.wire import bound_port, listen
from spotserve.worker.options import WorkerOptions

GATEWAY_ID = "gateway-local"
STORE_CHECK_S = 1.0

log = logging.getLogger(__name__)


def run_local_system(settings: Settings, console: Console) -> None:
    """Runs until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: the port is taken, or a setting does not fit this machine.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto").get_loop_factory()) as runner:
        runner.run(_LocalSystem(settings, console).run())


class _LocalSystem:
    """The parts of one system, and the order in which they start and end."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._clock = SystemClock()
        self._metrics = Metrics()
        self._store_healthy = True
        self._failure: BaseException | None = None

    async def run(self) -> None:
        """Start, serve, end: top to bottom."""
        gateway_socket = _bind(self._settings.gateway.host, self._settings.gateway.port)
        port = gateway_socket.getsockname()[1]
        folder = SystemFolder.for_port(port)
        folder.create()
        secret = folder.secret()
        store = open_store(self._settings.store, folder.default_store_path)
        async with contextlib.AsyncExitStack() as at_end:
            at_end.push_async_callback(store.close)
            cloud = self._make_cloud(folder)
            engine = self._settings.engine
            terms = EngineTerms(engine.max_batch, kv_tokens=engine.kv_tokens, step_tokens=engine.max_step_tokens)
            state = ControllerState(self._settings.controller, terms, self._places())
            executor = Executor(cloud, lambda event: self._controller.dispatch(event))
            controller = Controller(state, executor, clock=self._clock, metrics=self._metrics)
            self._controller = controller
            self._store = store
            server = await listen(
                self._settings.controller.host,
                self._settings.controller.port,
                secret=secret,
                inbound=ControllerInbound,
                on_channel=controller.on_channel,
                on_refused=log.warning,
            )
            address = Address(self._settings.controller.host, bound_port(server))
            url = f"http://{self._settings.gateway.host}:{port}"
            folder.write(SystemRecord(pid=os.getpid(), url=url, controller=address, secret=secret))
            link = ControllerLink(GATEWAY_ID, lambda: address, secret=secret)
            relay = Relay(
                GATEWAY_ID,
                self._settings.gateway,
                store,
                secret=secret,
                clock=self._clock,
                metrics=self._metrics,
                on_resumed=link.tell,
            )
            web = _Server(_web_config(self._make_web(relay, cloud, secret)))
            background = [
                asyncio.create_task(controller.keep_time(), name="time"),
                asyncio.create_task(link.run(relay.use_table, lambda: relay.report(GATEWAY_ID)), name="routing tables"),
                asyncio.create_task(self._watch_store(), name="store health"),
                asyncio.create_task(self._fill_fleet(cloud), name="fleet"),
            ]
            for task in background:
                task.add_done_callback(lambda ended: self._note_end(ended, web))
            self._console.print(
                f"serving at [bold]{url}/v1[/] once the first replica is up; `spotserve status --url {url}` shows the fleet"
            )
            await web.serve(sockets=[gateway_socket])
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await executor.close()  # before anything ends: what is lost from here on is not replaced
            for instance_id in list(state.instances):
                await cloud.terminate(instance_id)
            await relay.close()
            await cloud.close()
            server.close()
        if self._failure is not None:
            raise self._failure

    def _note_end(self, task: asyncio.Task[None], web: uvicorn.Server) -> None:
        """A background task that ends with an error ends the system."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            web.should_exit = True

    def _make_cloud(self, folder: SystemFolder) -> LocalCloud:
        sections = {name: getattr(self._settings, name).model_dump(mode="json") for name in ("worker", "store")}
        sections["engine"] = self._settings.engine.for_worker()

        hardware = local_instance_type(self._settings.cloud) if self._settings.controller.planning == "auto" else None

        def start_options(instance_id: str, spot: bool, zone: str) -> WorkerOptions:
            return WorkerOptions(
                instance_id=instance_id,
                spot=spot,
                zone=zone,
                system_folder=str(folder.path),
                devices=self._settings.cloud.devices,
                hardware=hardware,
                **sections,
            )

        threads = str(self._settings.engine.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",  # glibc would give every thread that brings a slot up an arena, and keep it
        }
        nursery = NurseryProcess([sys.executable, "-m", "spotserve.worker.nursery"], environment, folder.log_path("nursery"))
        is_held = self._settings.controller.instances is not None
        return LocalCloud(
            self._settings.cloud.model_copy(update={"restock_s": None}) if is_held else self._settings.cloud,
            record_path=folder.instances_path,
            log_path=folder.log_path,
            nursery=nursery,
            start_options=start_options,
            on_event=lambda event: self._controller.dispatch(event),
            clock=self._clock,
        )

    def _places(self) -> list[Place]:
        """Where the local cloud rents machines out."""
        cloud = self._settings.cloud
        return [Place(zone, cloud.spot_usd_per_hour, cloud.on_demand_usd_per_hour) for zone in dict.fromkeys(cloud.zones)]

    def _make_web(self, relay: Relay, cloud: LocalCloud, secret: str) -> FastAPI:
        tokenizer = load_tokenizer(self._settings.engine.tokenizer or self._settings.engine.model)
        web = create_app(relay, self._settings.gateway, tokenizer, model_name=self._settings.engine.model_name)
        web.include_router(create_router(self._controller, cloud, secret=secret, status=self._status, metrics=self._metrics))
        return web

    def _status(self) -> dict[str, Any]:
        return status_of(
            self._controller,
            model_name=self._settings.engine.model_name,
            store_url=self._store.display_url,
            store_healthy=self._store_healthy,
        )

    async def _fill_fleet(self, cloud: LocalCloud) -> None:
        """Adopts what still runs from before, and starts what is missing, unless that is the controller's."""
        adopted = await cloud.adopt()
        if adopted:
            log.info("adopted %s", ", ".join(adopted))
        if self._settings.controller.instances is None:
            await cloud.launch(max(0, self._settings.cloud.instances - len(adopted)), spot=True)

    async def _watch_store(self) -> None:
        while True:
            try:
                await self._store.ping()
                healthy = True
            except StoreError as error:
                healthy = False
                if self._store_healthy:
                    log.warning("progress store lost, resuming is degraded until it is back: %s", error)
            self._store_healthy = healthy
            await asyncio.sleep(STORE_CHECK_S)


class _Server(uvicorn.Server):
    """uvicorn that ends on a signal without raising it again: the rest of the system still has to be ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server; a second one does not wait for answers under way."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _bind(host: str, port: int) -> socket.socket:
    """The gateway's socket, bound before anything is started, so that a taken port costs nothing."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return bound


def _web_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="off")
