"""The process that forks workers, as seen by the local cloud: orders go in as lines of JSON, births and deaths come out.

When the nursery itself dies, its workers live on; it is started again when the next one is wanted.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from spotserve.core.errors import CloudError

START_TIMEOUT_S = 60.0
"""Importing torch on a loaded machine takes a while."""

log = logging.getLogger(__name__)


class _Line(msgspec.Struct, frozen=True):
    """What the nursery says: a birth has an instance id, a death an exit code."""

    pid: int
    instance_id: str | None = None
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class _Child:
    """A worker that was born; it may be dead before whoever wanted it hears of its birth."""

    pid: int
    exit_code: asyncio.Future[int]


class NurseryProcess:
    """Client of a process that is started as `command` with `environment`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> None:
        self._command = command
        self._environment = environment
        self._log_path = log_path
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._births: dict[str, asyncio.Future[_Child]] = {}
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._starting = asyncio.Lock()

    async def start(self, options: object, instance_id: str, log_path: Path, on_exit: Callable[[int, int], None]) -> int:
        """Forks a worker; its process id. `on_exit(pid, exit_code)` is called when it ends.

        Raises:
            CloudError: the nursery could not be started or did not answer.
        """
        order = msgspec.json.encode({"options": options, "log": str(log_path)}) + b"\n"
        birth: asyncio.Future[_Child] = asyncio.get_running_loop().create_future()
        try:
            process = await self._running()
            assert process.stdin is not None
            self._births[instance_id] = birth
            process.stdin.write(order)
            child = await asyncio.wait_for(birth, START_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            raise CloudError(f"{instance_id} could not be started: {error or 'no answer'}; see {self._log_path}") from error
        finally:
            self._births.pop(instance_id, None)
        child.exit_code.add_done_callback(lambda exit_code: on_exit(child.pid, exit_code.result()))
        return child.pid

    async def close(self) -> None:
        """Ends the nursery; its workers go on."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()
        if self._reading is not None:
            await self._reading

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                if self._reading is not None:
                    await self._reading  # it still has births of the old one to fail
                with self._log_path.open("ab") as log_file:
                    self._process = await asyncio.create_subprocess_exec(
                        *self._command,
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE,
                        stderr=log_file,
                        env=dict(self._environment),
                        start_new_session=True,
                    )
                self._reading = asyncio.create_task(self._read(self._process), name="nursery")
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for text in process.stdout:
            try:
                line = msgspec.json.decode(text, type=_Line)
            except msgspec.DecodeError:
                log.warning("the nursery said %r", text)  # a library that prints, say
                continue
            if line.instance_id is not None:
                birth = self._births.get(line.instance_id)
                if birth is not None and not birth.done():
                    self._exits[line.pid] = asyncio.get_running_loop().create_future()
                    birth.set_result(_Child(line.pid, self._exits[line.pid]))
            elif line.exit_code is not None and (exit_code := self._exits.pop(line.pid, None)) is not None:
                exit_code.set_result(line.exit_code)
        await process.wait()
        for birth in self._births.values():
            if not birth.done():
                birth.set_exception(CloudError(f"the nursery ended; see {self._log_path}"))
