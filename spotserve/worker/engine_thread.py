"""Runs an engine in a thread of its own, so that a long step never keeps the event loop from hearing a notice.

Jobs go in through one queue and run between two steps, in order; what steps make comes out through the loop, in order. A job
that is queued after a step's result was posted therefore sees that step, and whoever awaits a job has seen all results
before it.
"""

import asyncio
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from spotserve.engine.engine import Engine
from spotserve.engine.results import StepResult

Result = TypeVar("Result")

LOADING_NICENESS = 5
"""A quarter of a busy core at least: a fleet that is short of replicas still gets its next one soon."""


class EngineThread:
    """Owner of an engine. Everything that touches the engine is a job."""

    def __init__(
        self, load: Callable[[], Engine], *, on_step: Callable[[StepResult], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        self._load = load
        self._on_step = on_step
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> asyncio.Future[Engine]:
        """Starts loading; the future fails with ModelError when the model cannot be loaded."""
        loaded: asyncio.Future[Engine] = self._loop.create_future()
        self._loaded = loaded
        self._thread.start()
        return loaded

    def call(self, job: Callable[[Engine], Result]) -> asyncio.Future[Result]:
        """Runs `job` between two steps; the future has its result or exception."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def run(engine: Engine) -> None:
            try:
                result = job(engine)
            except Exception as error:  # noqa: BLE001 -- whatever the job raised belongs to the one who awaits it
                self._post(_set_exception, future, error)
            else:
                self._post(_set_result, future, result)

        self._jobs.put(run)
        return future

    def post(self, job: Callable[[Engine], None]) -> None:
        """Runs `job` between two steps; nobody waits, and an exception ends the worker."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Ends the thread after the step that it is in."""
        self._jobs.put(None)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        try:
            engine = _load_gently(self._load)
        except Exception as error:  # noqa: BLE001 -- top of the thread: the one who awaits the engine must hear of it
            self._post(_set_exception, self._loaded, error)
            return
        self._post(_set_result, self._loaded, engine)
        try:
            while self._run_jobs(engine):
                if engine.has_work:
                    self._post(self._on_step, engine.step())
        except Exception as error:  # noqa: BLE001 -- top of the thread: a broken engine ends the worker, others take over
            self._post(self._on_failure, error)

    def _run_jobs(self, engine: Engine) -> bool:
        """Runs what is queued, waiting for a job when there is nothing to step; False when told to stop."""
        while True:
            try:
                job = self._jobs.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if job is None:
                return False
            job(engine)


def _load_gently(load: Callable[[], Engine]) -> Engine:
    """Loads in a thread of lower priority, so that instances that serve on the same machine do not feel it."""
    with ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=_lower_priority) as loader:
        return loader.submit(load).result()


def _lower_priority() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICENESS)


def _set_result(future: "asyncio.Future[Result]", result: Result) -> None:
    if not future.cancelled():
        future.set_result(result)


def _set_exception(future: "asyncio.Future[Result]", error: Exception) -> None:
    if not future.cancelled():
        future.set_exception(error)
