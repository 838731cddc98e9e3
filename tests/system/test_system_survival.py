"""What a client sees while things die: an official client through a preemption, a gateway that is killed, a store that goes."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from local_cluster import Answer, LocalCluster, alive, busy_instance, local_cluster, read_events, stream, with_deadline

BODY: dict[str, Any] = {
    "model": "spotserve-demo",
    "prompt": "import json\n\n\ndef load(path):\n",
    "max_tokens": 150,
    "seed": 3,
    "temperature": 0.8,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    # Speculation off: the second time the suffix drafter knows the answer, which would be over before anybody is taken.
    arguments = ("--dtype", "float64", "--restock", "0.3", "--speculation", "off")
    with local_cluster(tmp_path_factory.mktemp("home"), *arguments, replicas=2) as running:
        yield running


@pytest.fixture
def fleet(cluster: LocalCluster) -> LocalCluster:
    """The cluster with both replicas up and nothing running."""
    cluster.wait_until(lambda: sum(item["state"] == "serving" for item in cluster.status()["replicas"]) == 2, "two replicas serve")
    cluster.wait_until_idle()
    return cluster


@pytest.mark.parametrize("grace_s", [0.0, 3.0])
def test_the_official_client_does_not_notice_a_preemption(fleet: LocalCluster, grace_s: float) -> None:
    client = openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="unused", max_retries=0)
    extra = {"ignore_eos": True}
    options = {key: value for key, value in BODY.items() if key != "ignore_eos"}
    undisturbed = client.completions.create(**options, extra_body=extra)
    pieces, finish_reasons, usages = [], [], []
    taken = None
    for chunk in client.completions.create(**options, extra_body=extra, stream=True, stream_options={"include_usage": True}):
        if chunk.usage is not None:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            pieces.append(choice.text)
            finish_reasons += [choice.finish_reason] if choice.finish_reason else []
        if taken is None and len(pieces) > 5:
            taken = busy_instance(fleet)
            fleet.admin("preempt", {"instance": taken, "grace_s": grace_s})
    assert taken is not None
    assert "".join(pieces) == undisturbed.choices[0].text
    assert finish_reasons == ["length"]
    assert [usage.completion_tokens for usage in usages] == [150]
    client.close()


def test_many_async_clients_pass_through_a_preemption(fleet: LocalCluster) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        text = ""
        messages = [{"role": "user", "content": "Write a function `double`. It doubles a number."}]
        chunks = await client.chat.completions.create(
            model="spotserve-demo",
            messages=messages,
            seed=seed,
            max_completion_tokens=150,
            temperature=1.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
        return text

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="unused", max_retries=0) as client:
            undisturbed = await asyncio.gather(*(ask(client, seed) for seed in range(8)))
            asking = asyncio.gather(*(ask(client, seed) for seed in range(8)))
            victim = await asyncio.to_thread(busy_instance, fleet)
            await asyncio.to_thread(fleet.admin, "preempt", {"instance": victim, "grace_s": 0.0})
            assert await asking == undisturbed

    asyncio.run(scenario())


def test_kv_moves_when_there_is_time_and_nothing_is_computed_again(fleet: LocalCluster) -> None:
    long_body = BODY | {"max_tokens": 600}

    async def scenario() -> tuple[Answer, Answer]:
        async with httpx.AsyncClient(timeout=120) as client:
            undisturbed = await stream(client, fleet.url, long_body)
            streaming = asyncio.create_task(stream(client, fleet.url, long_body))
            victim = await asyncio.to_thread(busy_instance, fleet)
            await asyncio.sleep(0.6)  # until a heartbeat has told of it
            await asyncio.to_thread(fleet.admin, "preempt", {"instance": victim, "grace_s": 0.8})
            return undisturbed, await streaming

    moved_before = len(fleet.events("moved"))
    recomputed_before = metric(fleet, "spotserve_tokens_recomputed_total")
    undisturbed, answer = asyncio.run(scenario())
    assert answer.token_ids == undisturbed.token_ids
    moved = fleet.events("moved")[moved_before:]
    assert len(moved) == 1
    assert moved[0]["kv_bytes"] > 0
    assert metric(fleet, "spotserve_tokens_recomputed_total") == recomputed_before


def metric(cluster: LocalCluster, name: str) -> float:
    """One sample of `/metrics`."""
    lines = httpx.get(f"{cluster.url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def test_a_client_that_leaves_frees_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTSERVE_GATEWAY__DETACH_GRACE_S", "0.2")
    with local_cluster(tmp_path, replicas=1) as cluster:

        async def leave_early() -> None:
            async with httpx.AsyncClient() as client:
                body = BODY | {"max_tokens": 900, "stream": True}
                async with client.stream("POST", f"{cluster.url}/v1/completions", json=body) as response:
                    async for _ in response.aiter_lines():
                        return

        asyncio.run(leave_early())
        cluster.wait_until_idle()
        cluster.wait_until(lambda: cluster.status()["requests"]["running"] == 0, "nothing runs")


@pytest.mark.parametrize("workers_die_too", [False, True])
def test_a_stream_goes_on_after_the_gateway_was_killed(tmp_path: Path, workers_die_too: bool) -> None:
    with local_cluster(tmp_path, "--dtype", "float64", "--speculation", "off", replicas=2) as cluster:

        async def ask(answer: Answer) -> None:
            async with httpx.AsyncClient(timeout=60) as client:
                await stream(client, cluster.url, BODY, answer)

        undisturbed, answer = Answer(), Answer()
        asyncio.run(ask(undisturbed))

        async def ask_until_cut() -> None:
            asking = asyncio.create_task(ask(answer))
            while len(answer.event_ids) < 20:
                await asyncio.sleep(0.005)
            pids = [item["pid"] for item in (await asyncio.to_thread(cluster.status))["instances"]]
            await asyncio.to_thread(cluster.kill)
            with pytest.raises(httpx.HTTPError):
                await asking
            for pid in pids if workers_die_too else ():
                os.kill(pid, signal.SIGKILL)
            assert workers_die_too or all(alive(pid) for pid in pids)

        asyncio.run(ask_until_cut())
        assert not answer.is_done
        cluster.start(replicas=1 if workers_die_too else 2)

        async def go_on() -> None:
            headers = {"last-event-id": answer.event_ids[-1]}
            async with httpx.AsyncClient(timeout=60) as client:
                url = f"{cluster.url}/v1/requests/{answer.call_id}/stream"
                async with client.stream("GET", url, headers=headers) as response:
                    assert response.status_code == 200, await response.aread()
                    await read_events(response, answer)

        asyncio.run(go_on())
        assert answer.is_done
        assert answer.token_ids == undisturbed.token_ids
        assert answer.text == undisturbed.text
        assert answer.num_usages == 1
        if not workers_die_too:
            assert len(cluster.status()["instances"]) == 2, "the workers were adopted, not replaced"


def test_a_controller_without_workers_ends_nothing_and_orphans_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTSERVE_WORKER__ORPHAN_S", "1")
    with local_cluster(tmp_path, replicas=1) as cluster:
        pid = cluster.status()["instances"][0]["pid"]
        cluster.kill()
        assert alive(pid)
        with_deadline(lambda: not alive(pid), "a worker without a controller leaves")
        cluster.start(replicas=1)


def test_a_hanging_worker_is_replaced_and_its_answers_go_on(fleet: LocalCluster) -> None:
    async def scenario() -> tuple[Answer, Answer]:
        async with httpx.AsyncClient(timeout=120) as client:
            undisturbed = await stream(client, fleet.url, BODY)
            streaming = asyncio.create_task(stream(client, fleet.url, BODY))
            victim = await asyncio.to_thread(busy_instance, fleet)
            pid = next(item["pid"] for item in (await asyncio.to_thread(fleet.status))["instances"] if item["id"] == victim)
            os.kill(pid, signal.SIGSTOP)
            answer = await streaming
            await asyncio.to_thread(with_deadline, lambda: not alive(pid), "the hanging worker is ended")
            return undisturbed, answer

    undisturbed, answer = asyncio.run(scenario())
    assert answer.token_ids == undisturbed.token_ids


def test_serving_goes_on_without_its_store(tmp_path: Path) -> None:
    store = tmp_path / "store" / "progress.sqlite"
    store.parent.mkdir()
    arguments = ("--store", f"sqlite:///{store}", "--dtype", "float64", "--restock", "0.3", "--speculation", "off")
    with local_cluster(tmp_path, *arguments, replicas=2) as cluster:

        async def scenario() -> tuple[Answer, Answer]:
            async with httpx.AsyncClient(timeout=120) as client:
                undisturbed = await stream(client, cluster.url, BODY)
                for path in store.parent.iterdir():
                    path.unlink()
                store.parent.rmdir()
                streaming = asyncio.create_task(stream(client, cluster.url, BODY))
                victim = await asyncio.to_thread(busy_instance, cluster)
                await asyncio.to_thread(cluster.admin, "preempt", {"instance": victim, "grace_s": 0.0})
                return undisturbed, await streaming

        undisturbed, answer = asyncio.run(scenario())
        assert answer.token_ids == undisturbed.token_ids


BAD_BODIES: dict[str, tuple[bytes, int]] = {
    "malformed JSON": (b'{"prompt": ', 400),
    "broken UTF-8": (b'{"prompt": "\xff\xfe"}', 400),
    "wrong type": (b'{"prompt": "a", "max_tokens": "many"}', 400),
    "unknown model": (b'{"model": "gpt-0", "prompt": "a"}', 404),
    "prompt longer than the context": (b'{"prompt": "' + b"word " * 5000 + b'"}', 400),
    "token id out of range": (b'{"prompt": [1, 2, 999999]}', 400),
    "huge n": (b'{"prompt": "a", "n": 1000000}', 400),
    "NaN temperature": (b'{"prompt": "a", "temperature": NaN}', 400),
    "10 MB": (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413),
}


def test_bad_input_is_refused_by_name_and_nothing_leaks(fleet: LocalCluster) -> None:
    with httpx.Client(base_url=fleet.url, timeout=30) as client:
        for what, (body, status) in BAD_BODIES.items():
            answer = client.post("/v1/completions", content=body)
            assert answer.status_code == status, (what, answer.text)
            error = answer.json()["error"]
            assert error["message"]
            assert error["type"] == "invalid_request_error", (what, error)
        for _ in range(5):
            with client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 900, "stream": True}) as response:
                next(response.iter_lines())  # and leaves
        call_ids = [client.post("/v1/completions", json=BODY | {"max_tokens": 1}).json()["id"]]
        assert client.delete(f"/v1/requests/{call_ids[0]}").status_code == 200
    fleet.wait_until_idle()
    fleet.wait_until(lambda: fleet.status()["requests"]["running"] == 0, "nothing runs")


def test_a_taken_port_is_one_line_that_says_what_to_do(fleet: LocalCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spotserve", "up", "--port", str(fleet.port)]
    environment = {**os.environ, "SPOTSERVE_HOME": str(tmp_path), "COLUMNS": "200"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "choose another --port" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
