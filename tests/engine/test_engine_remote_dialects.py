"""What servers are asked and what is made of their answers, without a server: no parameter is dropped, no word misread."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.errors import InvalidRequest, ModelError, Overloaded, SpotServeError, WireError
from spotserve.core.request import FinishReason, SamplingParams
from spotserve.engine.remote.completions import PlainDialect, SglangDialect, SpotServeDialect, VllmDialect
from spotserve.engine.remote.dialect import Ask, Dialect, Piece, check_expressible
from spotserve.engine.remote.llama_cpp import LlamaCppDialect
from spotserve.engine.remote.reading import error_of
from spotserve.engine.remote.tgi import TgiDialect

DIALECTS: dict[str, Dialect] = {
    each.name: each
    for each in (VllmDialect(), SglangDialect(), SpotServeDialect(), LlamaCppDialect(), TgiDialect(), PlainDialect())
}
NEUTRAL = SamplingParams(max_tokens=10)
ASKED = {
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "logit_bias": {"logit_bias": {7: -3.5}},
    "min_tokens": {"min_tokens": 3},
    "stop_token_ids": {"stop_token_ids": (9,)},
    "ignore_eos": {"ignore_eos": True},
    "logprobs": {"logprobs": 2},
    "return_gaps": {"gaps": True},
    "seed": {"seed": 12345},
}
EVERYWHERE = {"temperature", "top_p", "seed"}
ENFORCED_HERE = {"stop_token_ids"}
"""The engine itself ends an answer at these, wherever the stream has ids."""


def ask(sampling: SamplingParams, seed: int | None = None) -> Ask:
    return Ask(
        model="m",
        token_ids=(3, 4, 5),
        text="a prompt",
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        seed=sampling.seed if seed is None else seed,
        sampling=sampling,
    )


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
@pytest.mark.parametrize("param", ASKED)
def test_what_is_asked_is_sent_or_refused(dialect: Dialect, param: str) -> None:
    sampling = msgspec.structs.replace(NEUTRAL, **ASKED[param])
    if param not in dialect.parameters | EVERYWHERE:
        with pytest.raises(InvalidRequest, match=dialect.name) as refused:
            check_expressible(dialect, sampling)
        assert refused.value.param == param
        return
    check_expressible(dialect, sampling)
    if param not in ENFORCED_HERE:
        assert dialect.body(ask(sampling)) != dialect.body(ask(NEUTRAL)), "asked for, and dropped"


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
def test_greedy_choice_needs_no_cuts(dialect: Dialect) -> None:
    check_expressible(dialect, msgspec.structs.replace(NEUTRAL, temperature=0.0, top_k=1, min_p=0.5))


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
@given(seed=st.integers(0, 2**64 - 1))
def test_no_seed_means_any_seed(dialect: Dialect, seed: int) -> None:
    body = dialect.body(ask(NEUTRAL, seed))
    sent = body.get("seed", body.get("parameters", {}).get("seed"))  # type: ignore[attr-defined]
    assert isinstance(sent, int)
    if dialect.name == "llama.cpp":
        assert 0 <= sent < 2**32 - 1
    elif dialect.name == "tgi":
        assert 1 <= sent < 2**64
    else:
        assert 0 <= sent < 2**63


def test_the_prompt_goes_as_ids_where_they_are_taken() -> None:
    for dialect in DIALECTS.values():
        body = dialect.body(ask(NEUTRAL))
        prompt = body.get("prompt", body.get("inputs"))
        assert prompt == ([3, 4, 5] if dialect.takes_token_ids else "a prompt")


VLLM_EVENT = (
    b'{"id":"cmpl-8","object":"text_completion","created":1795184818,"model":"m","choices":[{"index":0,"text":".",'
    b'"logprobs":{"text_offset":[0],"token_logprobs":[-3.63],"tokens":["token_id:19"],'
    b'"top_logprobs":[{"token_id:68":-3.77,"token_id:19":-3.63}]},"finish_reason":"length","stop_reason":null,'
    b'"prompt_token_ids":[1,50],"token_ids":[19]}],"system_fingerprint":"vllm-0.32.0"}'
)


def test_an_event_as_vllm_writes_it() -> None:
    piece = DIALECTS["vllm"].read(VLLM_EVENT)
    assert (piece.text, piece.token_ids, piece.finish_reason) == (".", (19,), FinishReason.LENGTH)
    assert piece.logprobs is not None
    assert (piece.logprobs[0].logprob, piece.logprobs[0].top) == (-3.63, ((19, -3.63), (68, -3.77)))


@pytest.mark.parametrize(
    ("name", "event", "piece"),
    [
        ("vllm", b'{"choices":[],"usage":{"prompt_tokens":1}}', Piece(token_ids=())),
        (
            "sglang",
            b'{"choices":[{"index":0,"text":"a","finish_reason":"stop","matched_stop":2,"token_ids":[5,2]}]}',
            Piece(text="a", token_ids=(5, 2), finish_reason=FinishReason.STOP),
        ),
        ("sglang", b'{"choices":[{"index":0,"text":"a"}]}', Piece(text="a", token_ids=None)),
        ("openai", b'{"choices":[{"text":"a","finish_reason":null}]}', Piece(text="a")),
        ("llama.cpp", b'{"index":0,"content":" a","tokens":[5],"stop":false,"id_slot":-1}', Piece(text=" a", token_ids=(5,))),
        (
            "llama.cpp",
            b'{"content":"","tokens":[],"stop":true,"stop_type":"eos","timings":{}}',
            Piece(token_ids=(), finish_reason=FinishReason.STOP),
        ),
        (
            "tgi",
            b'{"index":1,"token":{"id":5,"text":" a","logprob":-0.1,"special":false},"generated_text":null,"details":null}',
            Piece(text=" a", token_ids=(5,)),
        ),
        (
            "tgi",
            b'{"index":2,"token":{"id":2,"text":"</s>","logprob":0,"special":true},"generated_text":" a",'
            b'"details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null}}',
            Piece(text="</s>", token_ids=(2,), finish_reason=FinishReason.STOP),
        ),
    ],
)
def test_events_as_servers_write_them(name: str, event: bytes, piece: Piece) -> None:
    assert DIALECTS[name].read(event) == piece


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
@given(event=st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(msgspec.json.encode))
def test_garbage_is_a_wire_error(dialect: Dialect, event: bytes) -> None:
    try:
        dialect.read(event)
    except WireError:
        pass
    else:
        pytest.fail("garbage was read")


@pytest.mark.parametrize(
    ("said", "status", "kind"),
    [
        ({"message": "too long", "code": 400}, 200, InvalidRequest),
        ({"message": "who are you", "code": 401}, 200, ModelError),
        ("overloaded", 429, Overloaded),
        ({"message": "loading", "code": 503}, 200, Overloaded),
        ("no such path", 404, ModelError),
        ("validation", 422, InvalidRequest),
        ({"message": "a bug", "type": "server_error"}, 500, WireError),
        ({"message": "a word for a code", "code": "oops"}, 400, InvalidRequest),
    ],
)
def test_errors_by_who_has_to_act(said: object, status: int, kind: type[SpotServeError]) -> None:
    error = error_of(said, status)
    assert type(error) is kind
    for dialect in DIALECTS.values():
        with pytest.raises(SpotServeError):
            dialect.read(msgspec.json.encode({"error": said}))
    assert "word" in str(error) or str(said if isinstance(said, str) else said["message"]) in str(error)  # type: ignore[index]


def test_an_answer_that_was_aborted_has_not_ended() -> None:
    with pytest.raises(WireError, match="abort"):
        DIALECTS["vllm"].read(b'{"choices":[{"text":"","finish_reason":"abort"}]}')
