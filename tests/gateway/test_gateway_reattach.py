"""Streams that outlive their connection and their gateway: what was read and what comes after are one stream, byte for byte."""

import asyncio

import pytest
from gateway_client import MODEL, build_app, client_of, read_events, text_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotserve.core.errors import InvalidRequest
from spotserve.gateway.answer import Answer
from spotserve.gateway.calls import Call
from spotserve.gateway.chunks import read_cursor
from spotserve.gateway.text import ChoiceText, TextRules

TEXT = "héllo 🙂🚀 STO STO你好P, then STOP and more"
BODY = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}


async def open_stream(app, **body):
    async with client_of(app) as client:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return (await client.post(path, json={**BODY, **body})).content


async def resume(app, call_id, last_id, *, by_query=False):
    async with client_of(app) as client:
        if last_id is None:
            response = await client.get(f"/v1/requests/{call_id}/stream")
        elif by_query:
            response = await client.get(f"/v1/requests/{call_id}/stream", params={"last_event_id": last_id})
        else:
            response = await client.get(f"/v1/requests/{call_id}/stream", headers={"last-event-id": last_id})
        assert response.status_code == 200, response.text
        assert response.headers["x-request-id"] == call_id
        return response.content


VARIANTS = {
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "completion": {"prompt": "hi"},
    "echo": {"prompt": "hi 🙂", "echo": True},
    "stop": {"prompt": "hi", "stop": ["STOP", "🚀x"]},
    "stop text": {"prompt": "hi", "stop": ["STOP"], "include_stop_str_in_output": True},
    "logprobs": {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1, "stop": "STOP"},
    "extras": {"prompt": "hi", "return_token_ids": True, "return_gaps": True, "logprobs": 0},
    "speculation": {"prompt": "hi", "return_speculation": True, "stop": "STOP"},
}


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_after_every_event_the_stream_goes_on_in_another_gateway(source_of, says, tokenizer, variant, group):
    source = source_of(says(TEXT, group=group, draft_tokens=4))

    async def go():
        whole = await open_stream(build_app(source, tokenizer), **VARIANTS[variant], max_tokens=200)
        events = read_events(whole)
        (call_id,) = source.calls
        for cut in range(len(events)):
            seen = events[:cut]
            last_id = next((event.id for event in reversed(seen) if event.id is not None), None)
            source.cancelled.clear()
            rest = await resume(build_app(source, tokenizer), call_id, last_id, by_query=cut % 2 == 1)
            assert b"".join(event.raw for event in seen) + rest == whole

    asyncio.run(go())


def test_cut_at_every_position_even_inside_a_character_or_a_stop_string(source_of, says, tokenizer):
    reply = says(TEXT)

    async def go():
        source = source_of(reply)
        whole = text_of(read_events(await open_stream(build_app(source, tokenizer), prompt="hi", stop="STOP", max_tokens=200)))
        assert whole == TEXT[: TEXT.index("STOP")]
        (call_id,) = source.calls
        text = ChoiceText(tokenizer.detokenizer(), TextRules(stop=("STOP",)))
        read = ""
        for position, token_id in enumerate(reply.token_ids):
            if position:
                source.cancelled.clear()
                rest = await resume(build_app(source, tokenizer), call_id, str(position))
                assert read + text_of(read_events(rest)) == whole
            if text.stopped is None:
                read += text.push(token_id)

    asyncio.run(go())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_several_choices_regrouped_go_on_where_each_one_stood(source_of, says, tokenizer, data):
    texts = [data.draw(st.text(alphabet="aé🙂 S\nT", max_size=12)) for _ in range(3)]
    groups = st.integers(1, 5)

    def respond(request):
        return says(texts[int(request.request_id[-1])], group=group, end_apart=apart)

    async def go():
        nonlocal group, apart
        source = source_of(respond)
        events = read_events(await open_stream(build_app(source, tokenizer), prompt="x", n=3, stop=["ST"], max_tokens=99))
        (call_id,) = source.calls
        cut = data.draw(st.integers(0, len(events)))
        last_id = next((event.id for event in reversed(events[:cut]) if event.id is not None), None)
        group, apart = data.draw(groups), data.draw(st.booleans())
        source.cancelled.clear()
        rest = read_events(await resume(build_app(source, tokenizer), call_id, last_id))
        for index in range(3):
            assert text_of(events[:cut] + rest, index) == text_of(events, index)
        finishes = [c for e in [*events[:cut], *rest] if e.data != "[DONE]" for c in e.json["choices"] if c["finish_reason"]]
        assert sorted(choice["index"] for choice in finishes) == [0, 1, 2]
        usages = {str(e.json["usage"]) for e in [*events[:cut], *rest] if e.data != "[DONE]" and e.json["usage"]}
        assert len(usages) == 1

    group, apart = data.draw(groups), data.draw(st.booleans())
    asyncio.run(go())


def test_leaving_a_stream_detaches_it_and_coming_back_finishes_it(source_of, says, tokenizer):
    source = source_of(says("hello world", hold_at=3))

    async def go():
        app = build_app(source, tokenizer)
        sent, left = [], asyncio.Event()
        body = b'{"prompt": "hi", "stream": true}'
        requests = [{"type": "http.request", "body": body}]

        async def receive():
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"", "scheme": "http"}
        serving = asyncio.create_task(app({**scope, "http_version": "1.1"}, receive, send))
        while len(sent) < 3:
            await asyncio.sleep(0)
        left.set()
        await serving
        (call_id,) = source.calls
        assert source.detached == [call_id] and not source.released and not source.cancelled
        seen = read_events(b"".join(message.get("body", b"") for message in sent))
        source.go.set()
        rest = read_events(await resume(build_app(source, tokenizer), call_id, seen[-1].id))
        assert text_of(seen + rest) == "hello world" and rest[-1].data == "[DONE]"
        assert source.released == [call_id]

    asyncio.run(go())


def test_a_gateway_that_is_stopped_detaches_its_streams(source_of, says, tokenizer):
    source = source_of(says("hello world", hold_at=3))

    async def go():
        serving = asyncio.create_task(open_stream(build_app(source, tokenizer), prompt="hi"))
        while not source.calls:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert source.detached == list(source.calls) and not source.released

    asyncio.run(go())


def test_leaving_a_call_that_is_not_streamed_cancels_all_its_choices(source_of, says, tokenizer):
    source = source_of(says("hello world", hold_at=1))

    async def go():
        app = build_app(source, tokenizer)
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"prompt": "hi", "n": 3}'}]

        async def receive():
            if len(messages) == 1:
                while not source.calls:
                    await asyncio.sleep(0)
            return messages.pop()

        async def send(message):
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"", "scheme": "http"}
        await app({**scope, "http_version": "1.1"}, receive, send)
        (call_id,) = source.calls
        assert source.cancelled == {f"{call_id}-{index}" for index in range(3)}
        assert source.detached == [call_id] and not source.released

    asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_withdrawing_a_call_ends_it_with_an_error(source_of, says, tokenizer, stream):
    source = source_of(says("hello world", hold_at=1))

    async def go():
        app = build_app(source, tokenizer)
        async with client_of(app) as client:
            serving = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "stream": stream}))
            while not source.calls:
                await asyncio.sleep(0)
            (call_id,) = source.calls
            answer = await client.delete(f"/v1/requests/{call_id}")
            assert answer.json() == {"id": call_id, "object": "request.deleted", "deleted": True}
            response = await serving
            error = read_events(response.content)[-2].json["error"] if stream else response.json()["error"]
            assert error["code"] == "request_cancelled"
            assert source.cancelled == {f"{call_id}-0"}

    asyncio.run(go())


def test_silence_is_filled_with_comments(source_of, says, tokenizer):
    source = source_of(says("hello world", hold_at=2))

    async def go():
        app = build_app(source, tokenizer, keep_alive_s=0.005)
        serving = asyncio.create_task(open_stream(app, prompt="hi"))
        await asyncio.sleep(0.05)
        source.go.set()
        body = await serving
        assert body.count(b": ping\n\n") >= 2
        assert text_of(read_events(body)) == "hello world"

    asyncio.run(go())


@pytest.mark.parametrize("last_id", ["x", "1.2.3", "-1", "1.", "9" * 11, "１"])
def test_ids_that_no_event_had(source_of, says, tokenizer, last_id):
    source = source_of(says("hello"))

    async def go():
        app = build_app(source, tokenizer)
        await open_stream(app, prompt="hi")
        (call_id,) = source.calls
        async with client_of(app) as client:
            response = await client.get(f"/v1/requests/{call_id}/stream", params={"last_event_id": last_id})
        assert response.status_code == 400 and response.json()["error"]["param"] == "last_event_id"
        assert source.detached == [call_id], "the call must not stay attached to nobody"

    asyncio.run(go())


@given(positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=5), usage_sent=st.booleans())
def test_cursors_read_what_ids_say(positions, usage_sent):
    text = ".".join(map(str, positions)) + (".1" if usage_sent else "")
    cursor = read_cursor(text, choices=len(positions))
    assert list(cursor.positions) == positions and cursor.usage_sent == usage_sent
    with pytest.raises(InvalidRequest):
        read_cursor(text, choices=len(positions) + 2)


def test_an_envelope_rebuilds_the_answer_elsewhere(source_of, says, tokenizer):
    source = source_of(says("hello"))
    asyncio.run(open_stream(build_app(source, tokenizer), prompt=["a", "b"], n=2, stop="zz", echo=True))
    (call,) = source.calls.values()
    copied = Call(call.call_id, bytes(call.envelope), call.requests)
    ours, theirs = Answer(call, tokenizer), Answer(copied, tokenizer)
    assert ours.envelope == theirs.envelope and ours.usage == theirs.usage
    assert [choice.echo for choice in theirs.choices] == ["a", "a", "b", "b"]
