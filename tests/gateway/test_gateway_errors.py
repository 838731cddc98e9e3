"""Ill-formed calls and failures: each gets its documented status and an OpenAI body; no input makes a 5xx."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from gateway_client import MODEL, build_app, client_of, read_events, text_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotserve.core.errors import ModelError
from spotserve.core.request import FinishReason
from spotserve.gateway.openai import ChatBody, CompletionBody
from spotserve.gateway.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def app(source_of, says, tokenizer):
    return build_app(source_of(says("hello")), tokenizer, max_body_bytes=2**20)


def send(app, method, path, **options):
    async def go():
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


def error_of(response):
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"] and response.headers["content-type"] == "application/json"
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return SimpleNamespace(status=response.status_code, **body["error"])


CHAT_FIELDS = [
    ({"model": "other"}, 404, "model", "model_not_found"),
    ({"model": 7}, 400, "model", None),
    ({"messages": None}, 400, "messages", None),
    ({"messages": []}, 400, "messages", None),
    ({"messages": "hi"}, 400, "messages", None),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role", None),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", None),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", None),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", None),
    ({"messages": [{"role": "function", "content": "x"}]}, 400, "messages", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "messages[0].tool_calls", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "hello " * 400}]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "x" * 900_000}]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "<|end|>" * 252}]}, 400, "messages", "context_length_exceeded"),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"max_tokens": 1.5}, 400, "max_tokens", None),
    ({"max_tokens": "5"}, 400, "max_tokens", None),
    ({"max_tokens": 10**30}, 400, "max_tokens", None),
    ({"max_completion_tokens": -1}, 400, "max_completion_tokens", None),
    ({"max_tokens": 256}, 400, "messages", "context_length_exceeded"),
    ({"n": 0}, 400, "n", None),
    ({"n": 65}, 400, "n", None),
    ({"n": 10**9}, 400, "n", None),
    ({"n": True}, 400, "n", None),
    ({"temperature": 2.01}, 400, "temperature", None),
    ({"temperature": -0.1}, 400, "temperature", None),
    ({"temperature": "hot"}, 400, "temperature", None),
    ({"top_p": 0}, 400, "top_p", None),
    ({"top_p": 1.1}, 400, "top_p", None),
    ({"top_k": -2}, 400, "top_k", None),
    ({"min_p": 1.1}, 400, "min_p", None),
    ({"presence_penalty": 2.1}, 400, "presence_penalty", None),
    ({"frequency_penalty": -2.1}, 400, "frequency_penalty", None),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", None),
    ({"repetition_penalty": 1e300}, 400, "repetition_penalty", None),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias", None),
    ({"logit_bias": {"abc": 1}}, 400, "logit_bias", None),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias", None),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias", None),
    ({"seed": 2**64}, 400, "seed", None),
    ({"seed": 1.5}, 400, "seed", None),
    ({"stop": ""}, 400, "stop", None),
    ({"stop": ["a", ""]}, 400, "stop", None),
    ({"stop": list("abcde")}, 400, "stop", None),
    ({"stop": "x" * 1025}, 400, "stop", None),
    ({"stop": [1]}, 400, "stop[0]", None),
    ({"stop_token_ids": [400]}, 400, "stop_token_ids", None),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids[0]", None),
    ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens", None),
    ({"logprobs": 3}, 400, "logprobs", None),
    ({"top_logprobs": 3}, 400, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    ({"stream": "yes"}, 400, "stream", None),
    ({"stream_options": []}, 400, "stream_options", None),
    ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, 400, "tool_choice", "unsupported_parameter"),
    ({"tool_choice": {"type": "function"}}, 400, "tool_choice", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, 400, "audio", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, 400, "modalities", "unsupported_parameter"),
    ({"prediction": {"type": "content"}}, 400, "prediction", "unsupported_parameter"),
    ({"guided_json": {}}, 400, "guided_json", "unsupported_parameter"),
    ({"echo": True}, 400, "echo", "unsupported_parameter"),
    ({"chat_template_kwargs": []}, 400, "chat_template_kwargs", None),
    ({"return_speculation": "yes"}, 400, "return_speculation", None),
    ({"return_speculation": 1}, 400, "return_speculation", None),
]


@pytest.mark.parametrize(("fields", "status", "param", "code"), CHAT_FIELDS)
def test_chat_refuses_with_the_field_named(app, fields, status, param, code):
    error = error_of(send(app, "POST", CHAT, json={"model": MODEL, "messages": MESSAGES, **fields}))
    assert (error.status, error.param, error.code, error.type) == (status, param, code, "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", None),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [[]]}, "prompt[0]", None),
        ({"prompt": {}}, "prompt", None),
        ({"prompt": ["a", 1]}, "prompt", None),
        ({"prompt": [1, "a"]}, "prompt", None),
        ({"prompt": [[1], "a"]}, "prompt", None),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]", None),
        ({"prompt": [400]}, "prompt", None),
        ({"prompt": [-1]}, "prompt", None),
        ({"prompt": [10**40]}, "prompt", None),
        ({"prompt": [[1], [400]]}, "prompt[1]", None),
        ({"prompt": [True]}, "prompt[0]", None),
        ({"prompt": [1] * 256}, "prompt", "context_length_exceeded"),
        ({"prompt": "<|end|>" * 256}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * 250, "max_tokens": 7}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a"] * 257}, "prompt", None),
        ({"prompt": ["a"] * 5, "n": 64}, "n", None),
        ({"suffix": "tail"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"echo": True, "logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"logprobs": 21}, "logprobs", None),
        ({"logprobs": True}, "logprobs", None),
        ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
        ({"return_speculation": "yes"}, "return_speculation", None),
    ],
)
def test_completions_refuse_with_the_field_named(app, fields, param, code):
    error = error_of(send(app, "POST", COMPLETIONS, json={"model": MODEL, "prompt": "hello", **fields}))
    assert (error.status, error.param, error.code) == (400, param, code)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN, "prompt": "x"}',
        b'{"temperature": Infinity, "prompt": "x"}',
        b'{"temperature": 1e999, "prompt": "x"}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_not_json_objects(app, path, body):
    error = error_of(send(app, "POST", path, content=body))
    assert (error.status, error.type) == (400, "invalid_request_error")


def test_a_large_body_is_refused_announced_or_not(app):
    async def chunks():
        for _ in range(160):
            yield b" " * 65536
        raise AssertionError("the whole body was read")

    for content in (b" " * 10 * 2**20, chunks()):
        error = error_of(send(app, "POST", CHAT, content=content))
        assert (error.status, error.code) == (413, "request_too_large")


def test_a_client_that_leaves_while_sending_its_body(app):
    async def go():
        sent = []
        messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send_message(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": [], "query_string": b""}
        await app({**scope, "http_version": "1.1", "scheme": "http"}, receive, send_message)
        assert not sent

    asyncio.run(go())


def test_unknown_routes_and_methods(app):
    missing = error_of(send(app, "GET", "/v1/nothing"))
    assert (missing.status, missing.code) == (404, "not_found")
    method = send(app, "GET", CHAT)
    assert (error_of(method).status, method.headers["allow"]) == (405, "POST")
    assert error_of(send(app, "GET", "/v1/requests/none/stream")).status == 404
    assert error_of(send(app, "DELETE", "/v1/requests/none")).status == 404


def test_the_key_is_asked_for_and_compared(source_of, says, tokenizer):
    app = build_app(source_of(says("hi")), tokenizer, api_key="kéy")
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": b"Basic \xff"}, {"authorization": "kéy".encode()}):
        error = error_of(send(app, "POST", CHAT, json={"messages": MESSAGES}, headers=header))
        assert (error.status, error.code, error.type) == (401, "invalid_api_key", "authentication_error")
    good = send(app, "POST", CHAT, json={"messages": MESSAGES}, headers={"authorization": "Bearer kéy".encode()})
    assert good.status_code == 200


def test_the_clients_request_id_comes_back_if_it_is_sane(app):
    for given_id, echoed in [("my-id 7", True), ("x" * 128, True), ("x" * 129, False), ("é", False)]:
        for body in ({"messages": MESSAGES}, {"messages": []}):
            response = send(app, "POST", CHAT, json=body, headers={"x-request-id": given_id.encode("latin-1")})
            assert (response.headers["x-request-id"] == given_id) == echoed
            assert response.headers["x-request-id"].isascii()


def test_overload_says_when_to_come_back(source_of, says, tokenizer):
    source = source_of(says("hi"), overloads=2, retry_after_s=1.2)
    app = build_app(source, tokenizer)
    response = send(app, "POST", CHAT, json={"messages": MESSAGES})
    assert (error_of(response).status, error_of(response).type) == (429, "rate_limit_error")
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("2", "1200")
    source.ready = False
    response = send(app, "POST", CHAT, json={"messages": MESSAGES})
    assert (error_of(response).status, error_of(response).type) == (503, "service_unavailable")
    assert response.headers["retry-after"] == "2"


def test_before_a_model_is_loaded_everything_is_503(source_of, says, tokenizer):
    source = source_of(says("hi"), ready=False)
    source.model = None
    app = build_app(source, tokenizer)
    for method, path in [("POST", CHAT), ("POST", COMPLETIONS), ("GET", "/v1/models")]:
        response = send(app, method, path, json={"messages": MESSAGES, "prompt": "x"})
        assert error_of(response).status == 503 and response.headers["retry-after"]


def test_a_bug_inside_is_a_500_without_details(source_of, says, tokenizer, caplog):
    app = build_app(source_of(says("hi"), crashes=1), tokenizer)
    error = error_of(send(app, "POST", CHAT, json={"messages": MESSAGES}))
    assert (error.status, error.type) == (500, "server_error") and "secret" not in error.message
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_while_tokens_come_is_told_and_leaves_nothing_attached(source_of, says, tokenizer, stream, caplog):
    source = source_of(says("part", raises=RuntimeError("secret detail")))
    response = send(build_app(source, tokenizer), "POST", CHAT, json={"messages": MESSAGES, "stream": stream})
    if stream:
        events = read_events(response.content)
        assert events[-1].data == "[DONE]" and events[-2].json["error"]["type"] == "server_error"
    else:
        assert error_of(response).status == 500
    assert b"secret" not in response.content and "secret detail" in caplog.text
    assert source.detached == list(source.calls)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_choice_ends_the_call_with_an_error(source_of, says, tokenizer, stream, raises):
    end = {"raises": ModelError("no replica came back")} if raises else {"error": "no replica came back"}
    failing = says("part of it", finish=FinishReason.FAILED, **end)
    source = source_of(lambda request: failing if request.request_id.endswith("-0") else says("other", hold_at=0))
    app = build_app(source, tokenizer)
    response = send(app, "POST", CHAT, json={"messages": MESSAGES, "n": 2, "stream": stream})
    (call_id,) = source.calls
    if stream:
        events = read_events(response.content)
        assert text_of(events) == "part of it"
        error = events[-2].json["error"]
        assert events[-1].data == "[DONE]" and error["type"] == "server_error"
        assert "no replica came back" in error["message"]
    else:
        assert error_of(response).status == 500 and "no replica came back" in error_of(response).message
    assert source.cancelled == {f"{call_id}-1"} and source.released == [call_id] and not source.detached


def test_a_model_without_a_template_serves_completions_only(source_of, says, tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    bare = load_tokenizer(str(tmp_path))
    app = build_app(source_of(says("hi")), bare)
    assert error_of(send(app, "POST", CHAT, json={"messages": MESSAGES})).code == "no_chat_template"
    assert send(app, "POST", COMPLETIONS, json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_tokenizer_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_is_neither_a_folder_nor_a_hub_id():
    with pytest.raises(ModelError, match="neither a folder nor a model"):
        load_tokenizer("not a name!")


def test_a_template_that_does_not_compile(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    with pytest.raises(ModelError, match="template"):
        load_tokenizer(str(tmp_path))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["none", "text", "user", MODEL]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1"]), inner, max_size=3)
    ),
    max_leaves=8,
)


class Loop:
    """One event loop for all examples of a property."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


@pytest.mark.parametrize(("path", "kind"), [(CHAT, ChatBody), (COMPLETIONS, CompletionBody)])
def test_no_json_value_of_any_field_makes_a_5xx(app, loop, path, kind):
    fields = [*kind.__struct_fields__, "tools", "tool_choice", "response_format", "best_of", "suffix", "echo", "user"]

    async def post(body):
        async with client_of(app) as client:
            return await client.post(path, json=body)

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(given_fields=st.dictionaries(st.sampled_from(fields), JSON, max_size=3))
    def check(given_fields):
        response = loop.run(post({"messages": MESSAGES, "prompt": "hello", **given_fields}))
        assert response.status_code in (200, 400, 404)
        if response.status_code == 200:
            assert b'"choices"' in response.content or b"[DONE]" in response.content
        else:
            assert error_of(response).type == "invalid_request_error"

    check()


def test_a_model_in_a_store_needs_its_tokenizer_named() -> None:
    with pytest.raises(ModelError, match=r"engine\.tokenizer"):
        load_tokenizer("s3://bucket/model")
