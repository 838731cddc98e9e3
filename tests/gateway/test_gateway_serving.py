"""Well-formed calls: both APIs, streamed and not, choices, stop strings, logprobs, usage."""

import asyncio

import pytest
from gateway_client import MODEL, build_app, client_of, read_events, text_of

from spotserve.core.request import FinishReason
from spotserve.gateway.intake import choice_seed

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": MODEL, "prompt": "hello"}


def ask(app, path, **body):
    async def go():
        async with client_of(app) as client:
            return await client.post(path, json=body)

    return asyncio.run(go())


def test_chat_answers_in_the_shape_of_the_api(source_of, says, tokenizer):
    source = source_of(says("hello world"))
    response = ask(build_app(source, tokenizer), "/v1/chat/completions", **CHAT)
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == MODEL
    assert response.headers["x-request-id"] == body["id"]
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    prompt = tokenizer.encode("<|begin|><|user|>hello<|end|><|assistant|>", add_special_tokens=False)
    (request,) = source.calls[body["id"]].requests
    assert request.prompt_token_ids == prompt
    tokens = len(says("hello world").token_ids)
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
    assert source.released == [body["id"]] and not source.detached and not source.cancelled


def test_a_stream_has_roles_text_finish_usage_and_done(source_of, says, tokenizer):
    source = source_of(says("hello 🙂 world", group=2))
    response = ask(
        build_app(source, tokenizer), "/v1/chat/completions", **CHAT, stream=True, stream_options={"include_usage": True}
    )
    events = read_events(response.content)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    assert events[0].json["choices"][0]["delta"] == {"role": "assistant", "content": ""} and events[0].id == "0"
    assert text_of(events) == "hello 🙂 world"
    assert events[-1].data == "[DONE]"
    tokens = len(says("hello 🙂 world").token_ids)
    assert events[-2].json["choices"] == [] and events[-2].json["usage"]["completion_tokens"] == tokens
    assert events[-2].id == f"{tokens + 1}.1"
    finish = events[-3].json["choices"][0]
    assert finish["finish_reason"] == "stop" and finish["delta"] == {} and events[-3].id == str(tokens + 1)
    heads = {(e.json["id"], e.json["created"], e.json["model"], e.json["object"]) for e in events[:-1]}
    assert len(heads) == 1 and events[0].json["object"] == "chat.completion.chunk"
    assert all(event.json["usage"] is None for event in events[:-2])
    assert source.released == [events[0].json["id"]] and not source.detached


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_independent_and_usage_counts_each_once(source_of, says, tokenizer, stream):
    texts = ["first", "second one", "third choice here"]
    source = source_of(lambda request: says(texts[int(request.request_id.rpartition("-")[2])]))
    body = dict(COMPLETION, n=3, seed=7, stream=stream, stream_options={"include_usage": True})
    response = ask(build_app(source, tokenizer), "/v1/completions", **body)
    tokens = sum(len(says(text).token_ids) for text in texts)
    if stream:
        events = read_events(response.content)
        assert [text_of(events, index) for index in range(3)] == texts
        usage = events[-2].json["usage"]
    else:
        assert [choice["text"] for choice in response.json()["choices"]] == texts
        usage = response.json()["usage"]
    prompt_tokens = len(tokenizer.encode("hello", add_special_tokens=True))
    assert usage == {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    (call,) = source.calls.values()
    seeds = [request.sampling.seed for request in call.requests]
    assert seeds == [7, choice_seed(7, 1), choice_seed(7, 2)] and len(set(seeds)) == 3


def test_several_prompts_of_all_four_kinds(source_of, says, tokenizer):
    source = source_of(lambda request: says(f"n{len(request.prompt_token_ids)}"))
    app = build_app(source, tokenizer)
    two = [tokenizer.encode("one", add_special_tokens=False), tokenizer.encode("two three", add_special_tokens=False)]
    for prompt, lengths in [
        ("one", [len(two[0])]),
        (["one", "two three"], [len(two[0]), len(two[1])]),
        ([int(i) for i in two[1]], [len(two[1])]),
        ([list(two[0]), list(two[1])], [len(two[0]), len(two[1])]),
    ]:
        body = ask(app, "/v1/completions", model=MODEL, prompt=prompt, n=2).json()
        assert [choice["text"] for choice in body["choices"]] == [f"n{length}" for length in lengths for _ in range(2)]
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(lengths)))
        assert body["usage"]["prompt_tokens"] == sum(lengths)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_token_borders_ends_the_choice_and_its_request(source_of, says, tokenizer, stream, include):
    reply = says("alpha beta gamma delta and much more text that nobody wants")
    source = source_of(reply)
    body = dict(COMPLETION, stop=["ta gam"], include_stop_str_in_output=include, stream=stream, max_tokens=60)
    response = ask(build_app(source, tokenizer), "/v1/completions", **body, stream_options={"include_usage": True})
    (request_id,) = [request.request_id for call in source.calls.values() for request in call.requests]
    if stream:
        events = read_events(response.content)
        text, finish, usage = text_of(events), events[-3].json["choices"][0], events[-2].json["usage"]
    else:
        finish, usage = response.json()["choices"][0], response.json()["usage"]
        text = finish["text"]
    assert text == ("alpha beta gam" if include else "alpha be")
    assert (finish["finish_reason"], finish["stop_reason"]) == ("stop", "ta gam")
    assert source.cancelled == {request_id}
    needed = next(k for k in range(99) if "ta gam" in tokenizer.decode(reply.token_ids[:k]))
    assert usage["completion_tokens"] == needed


def test_a_false_start_of_a_stop_string_is_said_after_all(source_of, says, tokenizer):
    source = source_of(says("tell me STO", finish=FinishReason.LENGTH))
    events = read_events(ask(build_app(source, tokenizer), "/v1/chat/completions", **CHAT, stop="STOP", stream=True).content)
    assert text_of(events) == "tell me STO"
    assert events[-2].json["choices"][0]["finish_reason"] == "length"
    assert not source.cancelled


def test_a_stop_token_is_silent_unless_asked_for(source_of, tokenizer, says):
    reply = says("some END")
    stop_id = reply.token_ids[-2]
    source = source_of(type(reply)(reply.token_ids[:-1]))
    app = build_app(source, tokenizer)
    quiet = ask(app, "/v1/completions", **COMPLETION, stop_token_ids=[stop_id]).json()["choices"][0]
    loud = ask(app, "/v1/completions", **COMPLETION, stop_token_ids=[stop_id], include_stop_str_in_output=True).json()["choices"][0]
    assert quiet["text"] == tokenizer.decode(reply.token_ids[:-2]) and quiet["stop_reason"] == stop_id
    assert loud["text"] == "some END"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(source_of, says, tokenizer, stream):
    reply = says("héllo 🙂")
    app = build_app(source_of(reply), tokenizer)
    response = ask(app, "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        choices = [event.json["choices"][0] for event in read_events(response.content)[:-1]]
        content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [-0.5 * i for i in range(len(reply.token_ids))]
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == "héllo 🙂"
    assert content[-1]["token"] == "<|end|>"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_and_offsets(source_of, says, tokenizer, stream):
    reply = says("one two three")
    app = build_app(source_of(reply), tokenizer)
    response = ask(app, "/v1/completions", **COMPLETION, logprobs=1, stream=stream)
    bodies = [event.json for event in read_events(response.content)[:-1]] if stream else [response.json()]
    choices = [body["choices"][0] for body in bodies]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens = [token for part in parts for token in part["tokens"]]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert "".join(tokens[:-1]) == "one two three"
    assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    assert all(list(top) == [token] for part in parts for top, token in zip(part["top_logprobs"], part["tokens"], strict=True))


def test_impossible_tokens_have_the_least_logprob(source_of, says, tokenizer):
    app = build_app(source_of(says("x", finish=FinishReason.LENGTH)), tokenizer)
    chat = ask(app, "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=4).json()["choices"][0]
    assert chat["logprobs"]["content"][0]["top_logprobs"][3]["logprob"] == -9999.0
    completion = ask(app, "/v1/completions", **COMPLETION, logprobs=4).json()["choices"][0]
    assert min(completion["logprobs"]["top_logprobs"][0].values()) == -9999.0


def test_every_choice_gets_its_role_and_only_the_last_role_an_id(source_of, says, tokenizer):
    response = ask(build_app(source_of(says("x")), tokenizer), "/v1/chat/completions", **CHAT, n=3, stream=True)
    events = read_events(response.content)
    assert [event.json["choices"][0]["index"] for event in events[:3]] == [0, 1, 2]
    assert all(event.json["choices"][0]["delta"]["role"] == "assistant" for event in events[:3])
    assert [event.id for event in events[:3]] == [None, None, "0.0.0"]


def test_messages_reach_the_template_in_its_own_terms(source_of, says, tokenizer):
    source = source_of(says("x"))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    ask(build_app(source, tokenizer), "/v1/chat/completions", messages=messages)
    (call,) = source.calls.values()
    prompt = tokenizer.decode(call.requests[0].prompt_token_ids, show_special_tokens=True)
    assert prompt == "<|begin|><|system|>be kind<|end|><|user|>one\ntwo<|end|><|assistant|>"


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_and_gaps_come_back_when_asked(source_of, says, tokenizer, stream):
    reply = says("a 🙂 b", group=3)
    source = source_of(reply)
    response = ask(
        build_app(source, tokenizer), "/v1/chat/completions", **CHAT, return_token_ids=True, return_gaps=True, stream=stream
    )
    (call,) = source.calls.values()
    assert call.requests[0].sampling.gaps
    if stream:
        choices = [event.json["choices"][0] for event in read_events(response.content)[1:-1]]
    else:
        choices = response.json()["choices"]
        assert response.json()["prompt_token_ids"] == list(call.requests[0].prompt_token_ids)
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == list(reply.token_ids)
    assert [gap for choice in choices for gap in choice["gaps"]] == [i / 4 for i in range(len(reply.token_ids))]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(source_of, says, tokenizer, stream):
    app = build_app(source_of(says(" world")), tokenizer)
    for prompt in ("hello", [int(i) for i in tokenizer.encode("hello", add_special_tokens=False)]):
        response = ask(app, "/v1/completions", model=MODEL, prompt=prompt, echo=True, stream=stream)
        text = text_of(read_events(response.content)) if stream else response.json()["choices"][0]["text"]
        assert text == "hello world"


def test_defaults_and_parameters_reach_the_request(source_of, says, tokenizer):
    source = source_of(says("x"))
    app = build_app(source, tokenizer)
    given = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": -100},
        "min_tokens": 2,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "priority": -3,
        "seed": -1,
        "max_completion_tokens": 9,
        "max_tokens": 5,
    }
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": [], "tool_choice": "auto"}
    first = ask(app, "/v1/chat/completions", **CHAT, **given, **harmless, unknown_field={"x": 1}).json()
    sampling = source.calls[first["id"]].requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert sampling.logit_bias == {7: -100} and sampling.min_tokens == 2 and sampling.stop_token_ids == (9,)
    assert sampling.ignore_eos and sampling.seed == 2**64 - 1 and sampling.max_tokens == 9
    assert source.calls[first["id"]].requests[0].priority == -3
    plain = ask(app, "/v1/chat/completions", **CHAT).json()
    request = source.calls[plain["id"]].requests[0]
    assert request.priority == 0
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)
    completion = ask(app, "/v1/completions", **COMPLETION).json()
    assert source.calls[completion["id"]].requests[0].sampling.max_tokens == 16
    seeds = {call.requests[0].sampling.seed for call in source.calls.values()}
    assert len(seeds) == 3, "calls without a seed must not share one"


def test_models_health_and_version(source_of, says, tokenizer):
    source = source_of(says("x"))
    app = build_app(source, tokenizer, api_key="secret")

    async def go():
        async with client_of(app, headers={"authorization": "Bearer secret"}) as client:
            models = (await client.get("/v1/models")).json()
            assert models["object"] == "list" and models["data"][0]["id"] == MODEL and models["data"][0]["max_model_len"] == 256
            assert (await client.get(f"/v1/models/{MODEL}")).json() == models["data"][0]
            missing = await client.get("/v1/models/other")
            assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
        async with client_of(app) as client:
            assert (await client.get("/health/live")).status_code == 200
            assert (await client.get("/health/ready")).status_code == 200
            assert "version" in (await client.get("/version")).json()
            source.ready = False
            draining = await client.get("/health/ready")
            assert draining.status_code == 503 and draining.json()["error"]["type"] == "service_unavailable"
            assert (await client.get("/health/live")).status_code == 200

    asyncio.run(go())
