"""A real cluster whose size the controller holds: replaced at the notice, unchanged for clients, and not begun twice."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest
from local_cluster import Answer, LocalCluster, busy_instance, local_cluster, run, stream

INSTANCES = 2
BODY: dict[str, object] = {
    "model": "spotserve-demo",
    "prompt": "import json\n\n\ndef load(path):\n",
    "max_tokens": 250,
    "seed": 3,
    "temperature": 0.8,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    # Speculation off: the second time the suffix drafter knows the answer, which would be over before anybody is taken.
    arguments = ("--dtype", "float64", "--hedge", "--speculation", "off")
    with local_cluster(tmp_path_factory.mktemp("home"), *arguments, replicas=INSTANCES) as running:
        yield running
        running.stop()
        record = json.loads(running.folder.instances_path.read_text())
        assert record["instances"] == []
        assert record["next_number"] == 1 + INSTANCES + 1, "one was replaced, and none while the system ended"


def settled(cluster: LocalCluster) -> bool:
    """Whether all that is wanted serves, and nothing more is there."""
    status = cluster.status()
    return [item["state"] for item in status["instances"]] == ["ready"] * INSTANCES and (
        sum(item["state"] == "serving" for item in status["replicas"]) == INSTANCES
    )


def test_a_replacement_is_there_before_the_machine_is_gone(cluster: LocalCluster) -> None:
    async def scenario() -> tuple[Answer, Answer, str]:
        async with httpx.AsyncClient(timeout=60) as client:
            undisturbed = await stream(client, cluster.url, BODY)
            streaming = asyncio.create_task(stream(client, cluster.url, BODY))
            victim = await asyncio.to_thread(busy_instance, cluster)
            await asyncio.to_thread(cluster.admin, "preempt", {"instance": victim, "grace_s": 2.5})
            return undisturbed, await streaming, victim

    undisturbed, answer, victim = run(scenario())
    assert answer.token_ids == undisturbed.token_ids
    cluster.wait_until(lambda: cluster.events("lost"), "the machine is gone")
    cluster.wait_until(lambda: settled(cluster), "as many serve as before")
    (notice,), (lost,) = cluster.events("notice"), cluster.events("lost")
    *first, new = cluster.events("launched")
    assert notice["instance"] == lost["instance"] == victim and len(first) == INSTANCES
    assert notice["seq"] < new["seq"] < lost["seq"]
    hedge = cluster.status()["hedge"]
    assert (hedge["wanted"], hedge["spot"], hedge["on_demand"], hedge["asked"]) == (INSTANCES, INSTANCES, 0, 0)


def test_a_controller_that_comes_back_starts_nothing_that_is_there(cluster: LocalCluster) -> None:
    before = {item["id"]: item["pid"] for item in cluster.status()["instances"]}
    cluster.kill()
    cluster.start(replicas=INSTANCES)
    cluster.wait_until(lambda: cluster.status()["hedge"]["spot"] == INSTANCES, "the controller has looked at the fleet's size")
    assert {item["id"]: item["pid"] for item in cluster.status()["instances"]} == before
    assert cluster.status()["hedge"]["asked"] == 0
