"""Births and deaths of workers, as told by a process that may die itself."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from cloud_scene import alive, kill, nursery, until

from spotserve.cloud.nursery_process import NurseryProcess
from spotserve.core.errors import CloudError
from spotserve.worker.options import WorkerOptions

pytestmark = pytest.mark.anyio


class Deaths(list[tuple[int, int]]):
    """Exits in the order in which they were told."""

    def note(self, pid: int, exit_code: int) -> None:
        self.append((pid, exit_code))


def named(name: str, **more: object) -> dict[str, object]:
    return {"name": f"spot:{name}", **more}


async def test_a_birth_and_a_death_are_told(tmp_path: Path) -> None:
    deaths, process = Deaths(), nursery(tmp_path)
    pids = [await process.start(named(name), name, tmp_path / "log", deaths.note) for name in ("a", "b")]
    assert all(map(alive, pids))
    assert deaths == []
    kill(pids[0])
    await until(lambda: deaths == [(pids[0], -signal.SIGKILL)])
    await process.close()
    assert alive(pids[1]), "workers outlive the nursery"
    kill(pids[1])


async def test_a_worker_that_dies_at_birth_is_told_after_its_birth(tmp_path: Path) -> None:
    deaths, process = Deaths(), nursery(tmp_path)
    pid = await process.start(named("a", exit=7), "a", tmp_path / "log", deaths.note)
    assert deaths == [], "whoever wanted it must know its process id first"
    await until(lambda: deaths == [(pid, 7)])
    await process.close()


async def test_many_at_once(tmp_path: Path) -> None:
    deaths, process = Deaths(), nursery(tmp_path)
    names = [f"i-{number}" for number in range(8)]
    pids = await asyncio.gather(*(process.start(named(name), name, tmp_path / "log", deaths.note) for name in names))
    assert len(set(pids)) == 8
    for pid in pids:
        kill(pid)
    await until(lambda: len(deaths) == 8)
    await process.close()


async def test_a_nursery_that_is_killed_is_started_again_and_its_workers_live_on(tmp_path: Path) -> None:
    process = nursery(tmp_path)
    first = await process.start(named("a"), "a", tmp_path / "log", print)
    assert process._process is not None
    process._process.kill()
    await process._process.wait()
    second = await process.start(named("b"), "b", tmp_path / "log", print)
    assert alive(first)
    assert alive(second)
    await process.close()
    kill(first)
    kill(second)


async def test_a_nursery_that_dies_before_it_answers_is_an_error_and_the_next_start_works(tmp_path: Path) -> None:
    process = nursery(tmp_path)
    with pytest.raises(CloudError, match=r"nursery\.log"):
        await process.start(named("a", crash=True), "a", tmp_path / "log", print)
    pid = await process.start(named("b"), "b", tmp_path / "log", print)
    assert alive(pid)
    kill(pid)
    await process.close()


async def test_a_command_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    process = NurseryProcess([str(tmp_path / "nothing")], os.environ, tmp_path / "nursery.log")
    with pytest.raises(CloudError, match="could not be started"):
        await process.start({}, "a", tmp_path / "log", print)
    await process.close()


async def test_the_real_nursery_forks_workers_that_say_why_they_end(tmp_path: Path) -> None:
    deaths = Deaths()
    process = NurseryProcess([sys.executable, "-m", "spotserve.worker.nursery"], os.environ, tmp_path / "nursery.log")
    options = WorkerOptions(instance_id="i-1", spot=True, zone="z", system_folder=str(tmp_path), engine={}, worker={}, store={})
    pid = await process.start(options, "i-1", tmp_path / "i-1.log", deaths.note)
    await until(lambda: deaths == [(pid, 1)])
    assert "no system runs in" in (tmp_path / "i-1.log").read_text()
    await process.close()
