"""The official `openai` client against a real server on a socket, and in process: what users' programs do."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import httpx
import openai
import pytest
from gateway_client import MODEL, build_app, read_events, serving, text_of

from spotserve.core.request import FinishReason

MESSAGES = [{"role": "user", "content": "hello"}]
TEXT = "hello 🙂 world"


@contextmanager
def client_of_server(app, **options) -> Iterator[openai.OpenAI]:
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="key", **options) as client:
        yield client


def wait_until(condition) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


def test_chat_completions_and_models_over_a_socket(source_of, says, tokenizer):
    source = source_of(says(TEXT))
    with client_of_server(build_app(source, tokenizer, api_key="key")) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1, n=2)
        assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
        assert answer._request_id == answer.id
        assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == 0
        completion = client.completions.create(model=MODEL, prompt="hi", stop=" world", logprobs=1, max_tokens=30)
        assert completion.choices[0].text == "hello 🙂" and completion.choices[0].finish_reason == "stop"
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 3}
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens == len(says(TEXT).token_ids)
        texts = client.completions.create(model=MODEL, prompt="hi", stream=True, max_tokens=30)
        assert "".join(chunk.choices[0].text for chunk in texts) == TEXT


def test_the_client_reads_what_became_of_draft_tokens(source_of, says, tokenizer):
    reply = says(TEXT, group=3, draft_tokens=5)
    with client_of_server(build_app(source_of(reply), tokenizer)) as client:
        asked = {"model": MODEL, "messages": MESSAGES, "extra_body": {"return_speculation": True}}
        whole = client.chat.completions.create(**asked)
        *_, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        for usage in (whole.usage, last.usage):
            details = usage.completion_tokens_details
            steps = -(-len(reply.token_ids) // 3)
            assert details.accepted_prediction_tokens == len(reply.token_ids) - steps
            assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == 5 * steps
            assert details.speculation["num_spec_steps"] == steps
            assert details.speculation["mean_acceptance_length"] == len(reply.token_ids) / steps
        assert client.chat.completions.create(model=MODEL, messages=MESSAGES).usage.completion_tokens_details is None


def test_the_client_retries_what_will_pass_and_raises_the_rest(source_of, says, tokenizer):
    source = source_of(says(TEXT), overloads=1, crashes=1)
    with client_of_server(build_app(source, tokenizer), max_retries=2) as client:
        assert client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content == TEXT
        source.overloads = 9
        with pytest.raises(openai.RateLimitError) as limited:
            client.with_options(max_retries=1).chat.completions.create(model=MODEL, messages=MESSAGES)
        assert source.overloads == 7 and limited.value.code == "rate_limit_exceeded"
        source.overloads, source.crashes = 0, 1
        with pytest.raises(openai.InternalServerError):
            client.with_options(max_retries=0).chat.completions.create(model=MODEL, messages=MESSAGES)
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="other", messages=MESSAGES)
        assert missing.value.code == "model_not_found" and missing.value.request_id
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
        assert bad.value.param == "temperature"


def test_a_failure_in_a_stream_raises_in_the_client(source_of, says, tokenizer):
    failing = says("some text", error="gone", finish=FinishReason.FAILED)
    with client_of_server(build_app(source_of(failing), tokenizer)) as client:
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        read = [next(stream).choices[0].delta.content for _ in range(1 + len(failing.token_ids) - 1)]
        assert "".join(read) == "some text"
        with pytest.raises(openai.APIError, match="gone"):
            next(stream)


def test_a_client_that_hangs_up_detaches_and_can_come_back(source_of, says, tokenizer):
    source = source_of(says(TEXT, hold_at=5))
    with serving(build_app(source, tokenizer)) as url:
        seen = b""
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}) as response:
            for part in response.iter_raw():
                seen += part
                if seen.count(b"data:") >= 4:
                    break
        wait_until(lambda: source.detached)
        (call_id,) = source.calls
        events = read_events(seen)
        source.respond = lambda _request: says(TEXT)
        rest = httpx.get(f"{url}/v1/requests/{call_id}/stream", headers={"last-event-id": events[-1].id})
        assert text_of(events + read_events(rest.content)) == TEXT
        assert source.detached == [call_id] and source.released == [call_id]


def test_a_client_that_hangs_up_on_a_plain_call_cancels_it(source_of, says, tokenizer):
    source = source_of(says(TEXT, hold_at=2))
    with serving(build_app(source, tokenizer)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=0.3)
        wait_until(lambda: source.cancelled)


def test_a_body_of_ten_megabytes_gets_413_over_a_socket(source_of, says, tokenizer):
    with serving(build_app(source_of(says(TEXT)), tokenizer)) as url:
        host, port = url.removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)), timeout=10)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {10 * 2**20}\r\nconnection: close\r\n\r\n"
            connection.sendall(head.encode())
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413") and b"request_too_large" in answer


def test_the_asynchronous_client_in_process(source_of, says, tokenizer):
    app = build_app(source_of(says(TEXT)), tokenizer)

    async def go():
        transport = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
        async with openai.AsyncOpenAI(base_url="http://gateway/v1", api_key="x", http_client=transport) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, n=2)
            texts = {0: "", 1: ""}
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            assert texts == {0: TEXT, 1: TEXT}
            parsed = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=30)
            assert [choice.text for choice in parsed.choices] == [TEXT, TEXT]

    asyncio.run(go())


def test_no_tensors_come_with_the_gateway():
    program = "import json, sys, spotserve.gateway.app; print(json.dumps(sorted({'torch', 'transformers'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
