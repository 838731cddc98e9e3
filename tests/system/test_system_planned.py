"""A model that takes several devices, on machines that come and go, with the planner in charge: answers go through all of it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from local_cluster import Answer, LocalCluster, code_request, local_cluster, read_events, run, stream, stream_all

STREAMS = 4
INSTANCES = 4
CALM_S = 0.5
"""Long enough for a heartbeat to tell of what runs."""


def body(number: int) -> dict[str, object]:
    return code_request(number, max_tokens=500)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Devices that are too small for the model: in float64 its weights and 2,048 tokens of KV take 70 MB, a device has 60."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SPOTSERVE_CLOUD__DEVICE_MEMORY_BYTES", "60000000")
        environment.setenv("SPOTSERVE_ENGINE__KV_TOKENS", "2048")
        arguments = ("--dtype", "float64", "--parallel", "auto", "--restock", "0.5", "--instances", str(INSTANCES))
        with local_cluster(tmp_path_factory.mktemp("home"), *arguments, replicas=1) as running:
            running.wait_until(lambda: settled(running), "everything serves")
            yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster) -> list[Answer]:
    return run(answers(cluster))


async def answers(cluster: LocalCluster) -> list[Answer]:
    return await stream_all(cluster, [body(number) for number in range(STREAMS)])


def settled(cluster: LocalCluster) -> bool:
    """Whether all machines are there, and what should serve does."""
    status = cluster.status()
    ready = sum(item["state"] == "ready" for item in status["instances"])
    return ready >= INSTANCES and bool(status["replicas"]) and all(item["state"] == "serving" for item in status["replicas"])


async def until(cluster: LocalCluster, condition: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition(await asyncio.to_thread(cluster.status)):
            await asyncio.sleep(0.02)


def is_changing(status: dict[str, Any]) -> bool:
    return any(item["state"] == "loading" for item in status["replicas"])


def members(cluster: LocalCluster) -> list[str]:
    """Machines of the replica that leads the list, its leader last."""
    return list(reversed(cluster.status()["replicas"][0]["instances"]))


async def notice(cluster: LocalCluster) -> None:
    cluster.admin("preempt", {"instance": members(cluster)[0], "grace_s": 2.0})


async def no_notice(cluster: LocalCluster) -> None:
    cluster.admin("preempt", {"instance": members(cluster)[0], "grace_s": 0.0})


async def two_at_once(cluster: LocalCluster) -> None:
    for instance in members(cluster)[:2]:
        cluster.admin("preempt", {"instance": instance, "grace_s": 0.0})


async def loss_during_a_migration(cluster: LocalCluster) -> None:
    first, second, *_ = members(cluster)
    cluster.admin("preempt", {"instance": first, "grace_s": 0.0})
    await until(cluster, is_changing)
    cluster.admin("preempt", {"instance": second, "grace_s": 0.0})


async def join_during_a_drain(cluster: LocalCluster) -> None:
    cluster.admin("preempt", {"instance": members(cluster)[0], "grace_s": 2.0})
    cluster.admin("launch", {"count": 1})


async def notice_from_two_sources_that_does_not_come_true(cluster: LocalCluster) -> None:
    deadline_s = time.time() + 1.0
    for source in ("metadata", "queue"):
        cluster.admin("notice", {"instance": members(cluster)[0], "deadline_s": deadline_s, "source": source})
    assert len([event for event in cluster.events("notice") if event["deadline_s"] == deadline_s]) == 1


@pytest.mark.parametrize(
    "deed",
    [
        notice,
        no_notice,
        two_at_once,
        loss_during_a_migration,
        join_during_a_drain,
        notice_from_two_sources_that_does_not_come_true,
    ],
)
def test_answers_pass_through(
    cluster: LocalCluster, undisturbed: list[Answer], deed: Callable[[LocalCluster], Awaitable[None]]
) -> None:
    async def scenario() -> list[Answer]:
        reading = asyncio.create_task(answers(cluster))
        await asyncio.sleep(CALM_S)
        await deed(cluster)
        return await reading

    shapes = {(item["parallel"]["pipeline"], item["parallel"]["tensor"]) for item in cluster.status()["replicas"]}
    assert all(pipeline * tensor > 1 for pipeline, tensor in shapes)
    disturbed = run(scenario())
    assert [answer.token_ids for answer in disturbed] == [answer.token_ids for answer in undisturbed]
    cluster.wait_until(lambda: settled(cluster), "everything serves again")


def test_answers_pass_through_a_controller_that_is_killed_in_a_migration(cluster: LocalCluster, undisturbed: list[Answer]) -> None:
    cut = [Answer() for _ in range(STREAMS)]

    async def until_cut() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            asking = [asyncio.create_task(stream(client, cluster.url, body(number), answer)) for number, answer in enumerate(cut)]
            await asyncio.sleep(CALM_S)
            cluster.admin("preempt", {"instance": members(cluster)[0], "grace_s": 0.0})
            await until(cluster, is_changing)
            await asyncio.to_thread(cluster.kill)
            ended = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(each, httpx.HTTPError) for each in ended)

    async def go_on() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            await asyncio.gather(*(come_back(client, cluster.url, answer) for answer in cut))

    run(until_cut())
    cluster.start(replicas=0)
    run(go_on())
    assert [answer.token_ids for answer in cut] == [answer.token_ids for answer in undisturbed]
    cluster.wait_until(lambda: settled(cluster), "everything serves again")


async def come_back(client: httpx.AsyncClient, url: str, answer: Answer) -> None:
    """Reads the rest of a call whose connection broke."""
    headers = {"last-event-id": answer.event_ids[-1]}
    async with client.stream("GET", f"{url}/v1/requests/{answer.call_id}/stream", headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        await read_events(response, answer)
