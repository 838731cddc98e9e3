"""Runs an engine in a thread of its own, so that a long step never keeps the event loop from hearing a notice.

Jobs go in through one queue and run between two steps, in order; what steps make comes out through the loop, in order. A job
that is queued after a step's result was posted therefore sees that step, and whoever awaits a job has seen all results
before it.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from spotserve.core.errors import PeerLost
from spotserve.engine.results import StepResult
from spotserve.engine.serving import ServingEngine

Result = TypeVar("Result")


class EngineThread:
    """Owner of an engine. Everything that touches the engine is a job."""

    def __init__(
        self, engine: ServingEngine, *, on_step: Callable[[StepResult], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        """`on_failure` hears why the thread ended when nobody stopped it; no job runs after that: who awaits one gets PeerLost."""
        self._engine = engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Callable[[ServingEngine], None] | None] = queue.SimpleQueue()
        self._awaited: set[asyncio.Future[Any]] = set()
        """Of jobs that have not run; touched by the loop only."""
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Steps from now on."""
        self._thread.start()

    def call(self, job: Callable[[ServingEngine], Result], *, settled: bool = False) -> asyncio.Future[Result]:
        """Runs `job` between two steps; the future has its result or exception. `settled`: with no step under way."""
        future: asyncio.Future[Result] = self._loop.create_future()
        if self._has_ended:
            future.set_exception(_ended())
            return future
        self._awaited.add(future)
        future.add_done_callback(self._awaited.discard)

        def run(engine: ServingEngine) -> None:
            try:
                for step in engine.settle() if settled else ():
                    self._post(self._on_step, step)
                result = job(engine)
            except Exception as error:  # noqa: BLE001 -- whatever the job raised belongs to the one who awaits it
                self._post(_set_exception, future, error)
            else:
                self._post(_set_result, future, result)

        self._jobs.put(run)
        return future

    def post(self, job: Callable[[ServingEngine], None]) -> None:
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
            while self._run_jobs(self._engine):
                if self._engine.has_work:
                    self._post(self._on_step, self._engine.step())
                    self._check_when_dry()
        except Exception as error:  # noqa: BLE001 -- top of the thread: a broken engine ends, others take over
            self._post(self._on_failure, error)
        try:
            self._engine.close()
        finally:
            self._post(self._end)

    def _end(self) -> None:
        """Jobs that are still queued will not run: nobody may wait for them."""
        self._has_ended = True
        for future in tuple(self._awaited):
            _set_exception(future, _ended())

    def _check_when_dry(self) -> None:
        """Books that do not balance end the replica before they harm anyone; looked at when there is time."""
        if not self._engine.has_work:
            self._engine.check_integrity()

    def _run_jobs(self, engine: ServingEngine) -> bool:
        """Runs what is queued, waiting for a job when there is nothing to step; False when told to stop."""
        while True:
            try:
                job = self._jobs.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if job is None:
                return False
            job(engine)


def _ended() -> PeerLost:
    return PeerLost("the replica has ended")


def _set_result(future: "asyncio.Future[Result]", result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: "asyncio.Future[Result]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
