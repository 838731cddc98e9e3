"""A real system is cut anew while clients read: over instances and over devices of one, and while machines are taken away.

In float64, where every difference would be a bug.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_cluster import Answer, LocalCluster, code_request, local_cluster, run, stream_all

STREAMS = 6
CALM_S = 0.3
"""Between two changes: long enough for answers to go on, short enough for them to see several."""


def body(number: int) -> dict[str, object]:
    return code_request(number, max_tokens=700)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    arguments = ("--dtype", "float64", "--restock", "0.3", "--parallel", "auto,1,1")
    with local_cluster(tmp_path_factory.mktemp("home"), *arguments, replicas=3) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster) -> list[Answer]:
    return run(answers(cluster))


async def answers(cluster: LocalCluster) -> list[Answer]:
    return await stream_all(cluster, [body(number) for number in range(STREAMS)])


async def reshape(cluster: LocalCluster, data: int | None, pipeline: int, tensor: int) -> dict[str, Any]:
    """Commands a shape, and waits for it; what the migration came to."""
    cluster.admin("reshape", {"data": data, "pipeline": pipeline, "tensor": tensor})
    async with asyncio.timeout(60):
        while True:
            status = await asyncio.to_thread(cluster.status)
            shapes = {(item["parallel"]["pipeline"], item["parallel"]["tensor"]) for item in status["replicas"]}
            whole = data is None or len(status["replicas"]) == data
            if whole and shapes == {(pipeline, tensor)} and all(item["state"] == "serving" for item in status["replicas"]):
                newest: dict[str, Any] = status["migrations"][-1]
                return newest
            await asyncio.sleep(0.05)


def assert_same(disturbed: list[Answer], undisturbed: list[Answer]) -> None:
    assert [answer.token_ids for answer in disturbed] == [answer.token_ids for answer in undisturbed]


def test_answers_pass_through_every_shape(cluster: LocalCluster, undisturbed: list[Answer]) -> None:
    async def scenario() -> tuple[list[Answer], list[dict[str, Any]]]:
        reading = asyncio.create_task(answers(cluster))
        migrations = []
        for shape in ((1, 2, 1), (1, 1, 2), (2, 1, 1), (1, 3, 1), (None, 1, 1)):
            await asyncio.sleep(CALM_S)
            migrations.append(await reshape(cluster, *shape))
        return await reading, migrations

    disturbed, migrations = run(scenario())
    assert_same(disturbed, undisturbed)
    assert all(migration["moved_bytes"] == migration["planned_bytes"] for migration in migrations)
    assert any(migration["planned_bytes"] for migration in migrations)
    cluster.wait_until_idle()
    assert cluster.status()["kv"]["tokens_used"] == 0


@pytest.mark.parametrize("grace_s", [0.0, 3.0])
def test_answers_pass_through_the_loss_of_a_stage(cluster: LocalCluster, undisturbed: list[Answer], grace_s: float) -> None:
    async def scenario() -> list[Answer]:
        await reshape(cluster, 1, 2, 1)
        reading = asyncio.create_task(answers(cluster))
        for stage in (1, 0):
            await asyncio.sleep(CALM_S)
            await serving(cluster)
            slots = cluster.status()["replicas"][0]["slots"]
            cluster.admin("preempt", {"instance": slots[stage % len(slots)]["instance"], "grace_s": grace_s})
        return await reading

    assert_same(run(scenario()), undisturbed)


async def serving(cluster: LocalCluster) -> None:
    async with asyncio.timeout(60):
        while [item["state"] for item in (await asyncio.to_thread(cluster.status))["replicas"]] != ["serving"]:
            await asyncio.sleep(0.05)


def test_one_instance_of_three_devices_serves_every_shape(tmp_path: Path, undisturbed: list[Answer]) -> None:
    arguments = ("--dtype", "float64", "--devices", "3", "--instances", "1", "--parallel", "1,3,1")
    with local_cluster(tmp_path, *arguments, replicas=1) as cluster:

        async def scenario() -> list[Answer]:
            reading = asyncio.create_task(answers(cluster))
            for shape in ((1, 1, 2), (3, 1, 1), (1, 2, 1)):
                await asyncio.sleep(CALM_S)
                migration = await reshape(cluster, *shape)
                assert migration["moved_bytes"] == migration["planned_bytes"]
            return await reading

        assert_same(run(scenario()), undisturbed)


def test_an_impossible_shape_is_refused_and_nothing_changes(cluster: LocalCluster) -> None:
    before = cluster.status()["shape"]
    answer = httpx.post(
        f"{cluster.url}/admin/reshape",
        json={"data": 1, "pipeline": 2, "tensor": 64},
        headers=cluster.credentials,
        timeout=10,
    )
    assert answer.status_code == 409
    assert "devices" in answer.text or "cannot be cut" in answer.text
    assert cluster.status()["shape"] == before


def test_a_killed_controller_finds_a_replica_that_is_spread_over_instances(tmp_path: Path, undisturbed: list[Answer]) -> None:
    with local_cluster(tmp_path, "--dtype", "float64", "--parallel", "1,2,1", "--instances", "2", replicas=1) as cluster:
        before = {slot["instance"] for slot in cluster.status()["replicas"][0]["slots"]}
        cluster.kill()
        cluster.start(replicas=1)
        replica = cluster.status()["replicas"][0]
        assert {slot["instance"] for slot in replica["slots"]} == before
        assert replica["parallel"] == {"pipeline": 2, "tensor": 1}
        assert_same(run(answers(cluster)), undisturbed)


def test_a_hanging_rank_is_given_up_and_its_answers_go_on(cluster: LocalCluster, undisturbed: list[Answer]) -> None:
    async def scenario() -> list[Answer]:
        await reshape(cluster, 1, 2, 1)
        reading = asyncio.create_task(answers(cluster))
        await asyncio.sleep(CALM_S)
        status = cluster.status()
        last = status["replicas"][0]["slots"][-1]["instance"]
        pid = next(item["pid"] for item in status["instances"] if item["id"] == last)
        os.kill(pid, signal.SIGSTOP)
        return await reading

    assert_same(run(scenario()), undisturbed)
