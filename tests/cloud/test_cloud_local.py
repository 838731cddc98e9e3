"""The cloud that one machine plays: notices, deaths, replacements, and what a restarted one finds."""

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cloud_scene import alive, cloud, kill, until

from spotserve.cloud.local import LocalFleet, LocalInstance
from spotserve.core.errors import CloudError
from spotserve.core.messages import TERMINATED, InstanceLaunched, InstanceLost, NoticeReceived
from spotserve.system_folder import replace_file

pytestmark = pytest.mark.anyio


async def test_what_is_launched_is_told_with_zone_market_and_price(tmp_path: Path) -> None:
    async with cloud(tmp_path, zones=("x", "y"), spot_usd_per_hour=1.0, on_demand_usd_per_hour=3.0) as made:
        assert await made.cloud.launch(2, spot=True) == ["i-1", "i-2"]
        await made.cloud.launch(1, spot=False)
        assert made.said == [
            InstanceLaunched(instance_id="i-1", spot=True, zone="y", usd_per_hour=1.0),
            InstanceLaunched(instance_id="i-2", spot=True, zone="x", usd_per_hour=1.0),
            InstanceLaunched(instance_id="i-3", spot=False, zone="y", usd_per_hour=3.0),
        ]
        assert all(map(alive, made.pids.values()))


async def test_a_zone_that_is_named_is_the_one(tmp_path: Path) -> None:
    async with cloud(tmp_path, zones=("x", "y")) as made:
        await made.cloud.launch(2, spot=True, zone="x")
        await made.cloud.launch(1, spot=False, zone="y")
        launched = [event for event in made.said if isinstance(event, InstanceLaunched)]
        assert [(event.zone, event.spot) for event in launched] == [("x", True), ("x", True), ("y", False)]
        with pytest.raises(CloudError, match=r"no zone 'z'; known: x, y"):
            await made.cloud.launch(1, spot=True, zone="z")
        assert len(made.said) == 3


async def test_without_grace_it_is_gone_without_a_word(tmp_path: Path) -> None:
    async with cloud(tmp_path) as made:
        await made.cloud.launch(1, spot=True)
        pid = made.pids["i-1"]
        made.cloud.preempt("i-1", grace_s=0)
        assert made.kinds("i-1") == ["InstanceLaunched", "InstanceLost"]
        await until(lambda: not alive(pid))
        with pytest.raises(CloudError, match="no instance 'i-1'; running: none"):
            made.cloud.preempt("i-1", grace_s=0)
        assert made.kinds("i-1") == ["InstanceLaunched", "InstanceLost"], "its exit is not told as a second loss"


async def test_with_grace_it_hears_and_lives_until_the_deadline(tmp_path: Path) -> None:
    async with cloud(tmp_path) as made:
        await made.cloud.launch(1, spot=True)
        pid = made.pids["i-1"]
        deadline_s = made.cloud.preempt("i-1", grace_s=0.2)
        notice = made.said[-1]
        assert isinstance(notice, NoticeReceived)
        assert notice.notice.deadline_s == deadline_s
        assert alive(pid)
        await until(lambda: made.kinds("i-1")[-1] == "InstanceLost")
        await until(lambda: not alive(pid))


async def test_a_second_notice_takes_the_place_of_the_first(tmp_path: Path) -> None:
    async with cloud(tmp_path) as made:
        await made.cloud.launch(1, spot=True)
        made.cloud.preempt("i-1", grace_s=3600)
        made.cloud.preempt("i-1", grace_s=0.02)
        await until(lambda: made.kinds("i-1").count("InstanceLost") == 1)
        assert made.kinds("i-1") == ["InstanceLaunched", "NoticeReceived", "NoticeReceived", "InstanceLost"]
        assert not made.cloud._doomed


async def test_a_preemption_at_once_overtakes_a_notice(tmp_path: Path) -> None:
    async with cloud(tmp_path) as made:
        await made.cloud.launch(1, spot=True)
        made.cloud.preempt("i-1", grace_s=0.02)
        made.cloud.preempt("i-1", grace_s=0)
        await asyncio.sleep(0.05)
        assert made.kinds("i-1").count("InstanceLost") == 1


async def test_an_instance_that_is_still_being_launched_cannot_be_taken(tmp_path: Path) -> None:
    async with cloud(tmp_path) as made:
        launching = asyncio.create_task(made.cloud.launch(1, spot=True))
        await asyncio.sleep(0)
        with pytest.raises(CloudError, match="no instance 'i-1'"):
            made.cloud.preempt("i-1", grace_s=0)
        await launching
        made.cloud.preempt("i-1", grace_s=0)


async def test_a_taken_place_goes_to_a_new_instance(tmp_path: Path) -> None:
    async with cloud(tmp_path, restock_s=0.01) as made:
        await made.cloud.launch(1, spot=True)
        made.cloud.preempt("i-1", grace_s=0)
        await until(lambda: list(made.pids) == ["i-2"])


async def test_restocking_can_be_switched_off(tmp_path: Path) -> None:
    async with cloud(tmp_path, restock_s=0.01) as made:
        await made.cloud.launch(1, spot=True)
        made.cloud.restock_s = None
        made.cloud.preempt("i-1", grace_s=0)
        await asyncio.sleep(0.05)
        assert not made.pids
        assert not made.cloud._tasks


async def test_a_worker_that_ends_by_itself_is_lost_and_replaced(tmp_path: Path) -> None:
    async with cloud(tmp_path, restock_s=0.01) as made:
        await made.cloud.launch(1, spot=True)
        kill(made.pids["i-1"])
        await until(lambda: list(made.pids) == ["i-2"])
        lost = [event for event in made.said if isinstance(event, InstanceLost)]
        assert [event.reason for event in lost] == ["ended with exit code -9"]


async def test_a_worker_that_ends_at_birth_is_lost(tmp_path: Path) -> None:
    async with cloud(tmp_path) as made:
        made.options["exit"] = 1
        await made.cloud.launch(1, spot=True)
        await until(lambda: made.kinds("i-1") == ["InstanceLaunched", "InstanceLost"])


async def test_what_is_terminated_stays_away(tmp_path: Path) -> None:
    async with cloud(tmp_path, restock_s=0.01) as made:
        await made.cloud.launch(1, spot=True)
        pid = made.pids["i-1"]
        await made.cloud.terminate("i-1")
        await made.cloud.terminate("i-1")
        await until(lambda: not alive(pid))
        assert made.said[-1] == InstanceLost(instance_id="i-1", reason=TERMINATED)
        await asyncio.sleep(0.05)
        assert not made.pids


async def test_a_launch_that_fails_is_an_error(tmp_path: Path) -> None:
    async with cloud(tmp_path) as made:
        made.options["crash"] = True
        with pytest.raises(CloudError):
            await made.cloud.launch(1, spot=True)
        assert made.said == []


async def test_a_restarted_cloud_adopts_what_still_runs_and_goes_on_counting(tmp_path: Path) -> None:
    async with cloud(tmp_path) as before:
        await before.cloud.launch(2, spot=True)
        pids = before.pids
        await before.cloud.close()
        kill(pids["i-1"])
        await until(lambda: not alive(pids["i-1"]))
        async with cloud(tmp_path, restock_s=0.01) as after:
            assert await after.cloud.adopt() == ["i-2"]
            assert [type(event) for event in after.said] == [InstanceLaunched]
            kill(pids["i-2"])  # no child of this cloud's nursery: it is looked for
            await until(lambda: list(after.pids) == ["i-3"])


async def test_a_process_that_was_given_the_number_of_a_worker_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        async with cloud(tmp_path) as made:
            write_fleet(made.record_path, stranger.pid)
            assert await made.cloud.adopt() == []
            assert made.said == []
            assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_the_remains_of_a_worker_are_not_adopted(tmp_path: Path) -> None:
    """In a container, nobody may ask for the exit code of an orphan: its entry in the process table stays."""
    rename = "import pathlib, time; pathlib.Path('/proc/self/comm').write_text('spot:i-1'); print(flush=True); time.sleep(60)"
    dead = subprocess.Popen([sys.executable, "-c", rename], stdout=subprocess.PIPE)
    assert dead.stdout is not None
    dead.stdout.readline()
    try:
        async with cloud(tmp_path) as made:
            write_fleet(made.record_path, dead.pid)
            dead.kill()
            await until(lambda: not alive(dead.pid))
            assert Path(f"/proc/{dead.pid}/comm").read_text().strip() == "spot:i-1"
            assert await made.cloud.adopt() == []
    finally:
        dead.wait()
        dead.stdout.close()


def write_fleet(path: Path, pid: int) -> None:
    fleet = LocalFleet(2, (LocalInstance(instance_id="i-1", pid=pid, spot=True, zone="z"),))
    replace_file(path, msgspec.json.encode(fleet))


async def test_without_a_record_nothing_is_adopted_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    async with cloud(tmp_path) as made:
        assert await made.cloud.adopt() == []
        made.record_path.write_text("{")
        with pytest.raises(CloudError, match="remove it to start afresh"):
            await made.cloud.adopt()
