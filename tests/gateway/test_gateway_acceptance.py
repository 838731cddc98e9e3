"""What became of draft tokens: counted once, whoever computed them, and told to callers who ask and in the metrics."""

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest
from gateway_client import MODEL, build_app, client_of, read_events
from relay_scene import ScriptedStore, call, delta, scene, until

from spotserve.checkpoint.store import Progress
from spotserve.core.epoch import after_dispatch, first_epoch
from spotserve.core.messages import Attach, Cancel, Claim, ClaimAnswered, Released, Submit
from spotserve.core.request import FinishReason, TokenDelta
from spotserve.gateway.acceptance import VerifiedDraft, completion_tokens_details
from spotserve.gateway.answer import Answer
from spotserve.gateway.calls import Call, Envelope, TokenStream, pack_envelope
from spotserve.gateway.tokenizer import Tokenizer
from spotserve.metrics import DRAFT_POSITIONS, DRAFTERS, Metrics

END = FinishReason.LENGTH
FIRST = first_epoch()
SECOND = after_dispatch(FIRST)
PATHS = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]}, "/v1/completions": {"prompt": "hi"}}


def drafted(epoch: int, position: int, end: int, *, draft: int = 5, drafter: str = "ngram", **extra: Any) -> TokenDelta:
    """A step whose tokens, all but the last, were drafted."""
    return delta(epoch, position, end, draft_tokens=draft, accepted_tokens=end - position - 1, drafter=drafter, **extra)


def asking_call(*, choices: int = 1) -> Call:
    envelope = Envelope(kind="completion", model="m", created_s=0, choices_per_prompt=choices, return_speculation=True)
    return Call("call", pack_envelope(envelope), call(choices=choices).requests)


async def speculation(asked: Call, streams: tuple[TokenStream, ...], tokenizer: Tokenizer) -> dict[str, Any]:
    """What the usage tells once every choice was read."""
    answer = Answer(asked, tokenizer)
    async with asyncio.timeout(10):
        for choice, stream in zip(answer.choices, streams, strict=True):
            async for item in stream:
                choice.take(item)
    told: dict[str, Any] = answer.usage["completion_tokens_details"]["speculation"]
    return told


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"spotserve_spec_decode_{name}_total", labels)


# ---------------------------------------------------------------------- the arithmetic


def test_counts_add_up_over_drafts_and_drafters() -> None:
    drafts = Counter(
        {
            VerifiedDraft("ngram", 4, 4): 2,
            VerifiedDraft("ngram", 4, 0): 1,
            VerifiedDraft("model", 3, 1): 3,
            VerifiedDraft("", 1, 0): 1,
        }
    )
    assert completion_tokens_details(drafts) == {
        "accepted_prediction_tokens": 11,
        "rejected_prediction_tokens": 11,
        "speculation": {
            "num_spec_steps": 7,
            "num_draft_tokens": 22,
            "num_accepted_tokens": 11,
            "mean_acceptance_length": 1 + 11 / 7,
            "draft_acceptance_rate": 0.5,
            "accepted_per_position": [5, 2, 2, 2],
            "drafters": {
                "model": {"num_spec_steps": 3, "num_draft_tokens": 9, "num_accepted_tokens": 3},
                "ngram": {"num_spec_steps": 3, "num_draft_tokens": 12, "num_accepted_tokens": 8},
                "other": {"num_spec_steps": 1, "num_draft_tokens": 1, "num_accepted_tokens": 0},
            },
        },
    }


def test_where_nothing_was_drafted_rates_are_not_known() -> None:
    details = completion_tokens_details(Counter())
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (0, 0)
    assert details["speculation"] == {
        "num_spec_steps": 0,
        "num_draft_tokens": 0,
        "num_accepted_tokens": 0,
        "mean_acceptance_length": None,
        "draft_acceptance_rate": None,
        "accepted_per_position": [],
        "drafters": {},
    }


# ---------------------------------------------------------------------- in answers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_the_usage_tells_of_all_choices_when_asked_and_is_as_ever_when_not(source_of, says, tokenizer, path, stream):
    reply = says("hello world", group=3, draft_tokens=4)
    app = build_app(source_of(reply), tokenizer)
    steps = -(-len(reply.token_ids) // 3)

    def usage_of(**fields: Any) -> dict[str, Any]:
        async def go() -> dict[str, Any]:
            body = {"model": MODEL, "n": 2, "max_tokens": 50, "stream": stream, **PATHS[path], **fields}
            if stream:
                body["stream_options"] = {"include_usage": True}
            async with client_of(app) as client:
                response = await client.post(path, json=body)
            return (read_events(response.content)[-2].json if stream else response.json())["usage"]

        return asyncio.run(go())

    plain, asked = usage_of(), usage_of(return_speculation=True)
    assert set(plain) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    details = asked.pop("completion_tokens_details")
    assert asked == plain == usage_of(return_speculation=False) == usage_of(return_speculation=None)
    told = details["speculation"]
    assert told["num_spec_steps"] == 2 * steps and told["num_draft_tokens"] == 8 * steps
    assert told["num_accepted_tokens"] == details["accepted_prediction_tokens"] == asked["completion_tokens"] - 2 * steps
    assert details["rejected_prediction_tokens"] == told["num_draft_tokens"] - told["num_accepted_tokens"]
    assert sum(told["accepted_per_position"]) == told["num_accepted_tokens"]
    assert set(told["drafters"]) == {"ngram"}


def test_what_was_accepted_beyond_a_stop_string_is_not_part_of_the_answer(source_of, says, tokenizer):
    reply = says("abcdef", group=6, draft_tokens=5)
    body = {"model": MODEL, "prompt": "x", "stop": "c", "return_speculation": True}

    async def go() -> dict[str, Any]:
        async with client_of(build_app(source_of(reply), tokenizer)) as client:
            return (await client.post("/v1/completions", json=body)).json()["usage"]

    usage = asyncio.run(go())
    assert usage["completion_tokens"] == usage["completion_tokens_details"]["accepted_prediction_tokens"] == 3
    assert usage["completion_tokens_details"]["rejected_prediction_tokens"] == 2


@pytest.mark.anyio
async def test_counts_add_up_over_owners(tokenizer: Tokenizer) -> None:
    async with scene("a", "b") as (stage, [a, b]):
        asked = asking_call()
        streams = await stage.relay.submit(asked)
        await a.hears(Submit)
        a.say(drafted(FIRST, 0, 4), delta(FIRST, 4, 5))
        await until(lambda: stage.metrics.output_tokens._value.get() == 5)
        a.die()
        await b.hears(Submit)
        b.say(drafted(SECOND, 5, 7, drafter="suffix", finish=END))
        told = await speculation(asked, streams, tokenizer)
        assert (told["num_spec_steps"], told["num_draft_tokens"], told["num_accepted_tokens"]) == (2, 10, 4)
        assert told["accepted_per_position"] == [2, 1, 1]
        assert {name: of["num_accepted_tokens"] for name, of in told["drafters"].items()} == {"ngram": 3, "suffix": 1}
        found = await stage.relay.reattach("call")
        assert found is not None
        assert await speculation(*found, tokenizer) == told, "a reader that comes back is told the same"


@pytest.mark.anyio
async def test_another_gateway_knows_what_it_has_seen_itself(tokenizer: Tokenizer) -> None:
    store = ScriptedStore()
    store.calls["call"] = msgspec.msgpack.encode(asking_call())
    store.progress["call-0"] = Progress(FIRST, delta(0, 0, 4).token_ids, None)
    async with scene("a", store=store) as (stage, [a]):
        reading = asyncio.create_task(stage.relay.reattach("call"))
        await a.hears(Claim)
        a.say(ClaimAnswered(request_id="call-0", found=True), delta(FIRST, 0, 6))
        found = await reading
        assert found is not None
        a.say(drafted(FIRST, 6, 8, finish=END))
        told = await speculation(*found, tokenizer)
        assert (told["num_spec_steps"], told["num_accepted_tokens"]) == (1, 1)


# ---------------------------------------------------------------------- in metrics


@pytest.mark.anyio
async def test_what_comes_again_is_counted_once(tokenizer: Tokenizer) -> None:
    async with scene("a", "b") as (stage, [a, b]):
        asked = asking_call()
        streams = await stage.relay.submit(asked)
        await a.hears(Submit)
        a.say(drafted(FIRST, 0, 3), drafted(FIRST, 0, 3), drafted(FIRST, 2, 5), drafted(FIRST, 8, 9))
        await until(lambda: stage.metrics.output_tokens._value.get() == 5)
        a.say(Released(request_id="call-0", epoch=FIRST, reason="drain"))
        await b.hears(Submit)
        a.say(drafted(FIRST, 5, 7))
        await a.hears(Cancel)
        b.say(drafted(SECOND, 5, 7, finish=END), drafted(SECOND, 5, 7, finish=END))
        told = await speculation(asked, streams, tokenizer)
        assert (told["num_spec_steps"], told["num_draft_tokens"], told["num_accepted_tokens"]) == (2, 10, 3)
        assert sample(stage.metrics, "num_drafts", drafter="ngram") == 2
        assert sample(stage.metrics, "num_draft_tokens", drafter="ngram") == 10
        assert sample(stage.metrics, "num_accepted_tokens", drafter="ngram") == 3
        at = [sample(stage.metrics, "num_accepted_tokens_per_pos", drafter="ngram", position=str(i)) for i in range(3)]
        assert at == [2, 1, 0]


@pytest.mark.anyio
async def test_progress_told_again_after_a_break_adds_no_drafts() -> None:
    async with scene("a") as (stage, [a]):
        await stage.relay.submit(asking_call())
        await a.hears(Submit)
        a.say(drafted(FIRST, 0, 3))
        await until(lambda: stage.metrics.output_tokens._value.get() == 3)
        a.glitch()
        await a.hears(Attach)
        assert (await a.hears(Submit)).epoch == SECOND
        a.say(delta(SECOND, 0, 5))  # what a worker says of a sequence that it has
        a.say(drafted(SECOND, 3, 5), drafted(SECOND, 5, 8, finish=END))
        await until(lambda: stage.report() == {"finished": 1})
        assert stage.metrics.output_tokens._value.get() == 8
        assert sample(stage.metrics, "num_drafts", drafter="ngram") == 2
        assert sample(stage.metrics, "num_accepted_tokens", drafter="ngram") == 4


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for drafter in ("ngram", "suffix", "model", "staged", "", "whatever a worker says", "another"):
        metrics.count_draft(drafter, drafted=40, accepted=30)
    counted = {drafter: sample(metrics, "num_drafts", drafter=drafter) for drafter in (*DRAFTERS, "other")}
    assert counted == {"ngram": 1, "suffix": 1, "model": 1, "staged": 1, "other": 3}
    assert sample(metrics, "num_accepted_tokens", drafter="other") == 90
    (family,) = metrics.accepted_tokens_per_position.collect()
    labels = {(one.labels["drafter"], one.labels["position"]) for one in family.samples}
    assert labels == {(drafter, str(position)) for drafter in counted for position in range(DRAFT_POSITIONS)}


def test_the_metrics_have_the_names_of_the_field() -> None:
    metrics = Metrics()
    metrics.count_draft("ngram", drafted=4, accepted=2)
    text = metrics.render().decode()
    assert 'spotserve_spec_decode_num_drafts_total{drafter="ngram"} 1.0' in text
    assert 'spotserve_spec_decode_num_draft_tokens_total{drafter="ngram"} 4.0' in text
    assert 'spotserve_spec_decode_num_accepted_tokens_total{drafter="ngram"} 2.0' in text
    assert 'spotserve_spec_decode_num_accepted_tokens_per_pos_total{drafter="ngram",position="1"} 1.0' in text
    assert 'spotserve_spec_decode_num_accepted_tokens_per_pos_total{drafter="ngram",position="2"} 0.0' in text
