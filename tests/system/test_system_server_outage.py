"""A whole system in front of a server that goes away in the middle of an answer and comes back."""

import json
import threading
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from local_cluster import local_cluster, with_deadline
from model_server import CONTEXT_TOKENS, EOS, KEY, MODEL, PROMPT, STORY, ModelServer, serving

from spotserve.config import DEMO_MODEL
from spotserve.engine.remote.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary(str(DEMO_MODEL))


def test_an_answer_outlives_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTSERVE_ENGINE__API_KEY", KEY)
    monkeypatch.setenv("SPOTSERVE_ENGINE__SERVED_NAME", MODEL)
    token_ids: list[int] = []
    text: list[str] = []

    def read(url: str) -> None:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": True, "return_token_ids": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    token_ids.extend(choice["token_ids"])
                    text.append(choice["text"])

    first, second = (ModelServer("vllm", key=KEY, token_s=token_s) for token_s in (0.02, 0.0))
    with ExitStack() as at_end:
        with serving(first):
            port = httpx.URL(first.url).port
            assert port is not None
            cluster = at_end.enter_context(local_cluster(tmp_path, "--engine", "openai", "--engine-url", first.url, replicas=2))
            reader = threading.Thread(target=read, args=(cluster.url,))
            reader.start()
            with_deadline(lambda: len(token_ids) > 10, "tokens come")
        with_deadline(lambda: not any(r["state"] == "serving" for r in cluster.status()["replicas"]), "the outage is noticed")
        with serving(second, port=port):
            reader.join(timeout=90)
            assert not reader.is_alive(), cluster.logs()
            status = cluster.status()
    begins = len(VOCABULARY.encode(PROMPT, framed=True))
    whole = (*VOCABULARY.encode(STORY)[begins:], EOS)
    assert "".join(text) == STORY[len(PROMPT) :]
    assert tuple(token_ids) == whole, "every token once"
    assert second.bodies[0]["prompt"] != first.bodies[0]["prompt"] and len(second.bodies[0]["prompt"]) < CONTEXT_TOKENS
    assert status["arithmetic"]["invariant"] == "none"
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
