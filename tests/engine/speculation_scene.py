"""Ways of drafting, ways of sampling, and plain answers to hold drafted ones against."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from spotserve.core.request import FinishReason, Request, SamplingParams, TokenLogprob
from spotserve.core.ties import near_tie_gap
from spotserve.engine.engine import Engine
from spotserve.engine.results import SequenceOutput

VOCABULARY_SIZE = 96
FAVOURITES = (7, 11, 13, 17)
"""Tokens that some kinds prefer, so that their texts repeat and drafts are right at times."""

KINDS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "greedy": {"temperature": 0.0},
        "cool": {"temperature": 0.7},
        "hot": {"temperature": 1.3, "top_p": 0.9},
        "penalties": {"temperature": 0.0, "presence_penalty": 0.4, "frequency_penalty": 0.6, "repetition_penalty": 1.15},
        "warm penalties": {"temperature": 0.8, "presence_penalty": -0.5, "frequency_penalty": -0.7, "repetition_penalty": 0.9},
        "bias": {"temperature": 0.9, "logit_bias": {**dict.fromkeys(FAVOURITES, 9.0), 1: -50.0}},
        "least length": {
            "temperature": 0.6,
            "min_tokens": 9,
            "stop_token_ids": FAVOURITES[:2],
            "logit_bias": dict.fromkeys(FAVOURITES, 9.0),
        },
        "stop": {
            "temperature": 0.5,
            "stop_token_ids": (13,),
            "logit_bias": {**dict.fromkeys(FAVOURITES, 10.0), 13: 8.5},
        },
        "end of text": {"temperature": 0.7, "ignore_eos": False, "logit_bias": {**dict.fromkeys(FAVOURITES, 9.0), 2: 8.5}},
        "truncated": {"temperature": 1.0, "top_k": 5, "min_p": 0.02},
        "no more asked": {"temperature": 0.0, "gaps": False, "logprobs": None},
    }
)
"""Sampling by name; all but the last report gaps and the most likely tokens."""


@dataclass
class Answer:
    """Everything that one sequence got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    outputs: list[SequenceOutput] = field(default_factory=list)

    def take(self, output: SequenceOutput) -> None:
        """One more step's part of it."""
        assert self.finish_reason is None, "it goes on after its end"
        assert output.position == len(self.token_ids)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        self.gaps += output.gaps or ()
        self.finish_reason = output.finish_reason
        self.outputs.append(output)

    @property
    def draft_tokens(self) -> int:
        """Verified for it."""
        return sum(output.draft_tokens for output in self.outputs)

    @property
    def accepted_tokens(self) -> int:
        """Of those, accepted."""
        return sum(output.accepted_tokens for output in self.outputs)


def run(engine: Engine, *, most_steps: int = 3000) -> dict[str, Answer]:
    """Steps an engine until it is idle, checking its books, and those of its draft model, at every step."""
    answers: dict[str, Answer] = {}
    for _ in range(most_steps):
        if not engine.has_work:
            break
        for output in engine.step().outputs:
            answers.setdefault(output.request_id, Answer()).take(output)
        engine.check_integrity()
    assert not engine.has_work, "it does not end"
    assert engine.kv_tokens_used == 0
    return answers


def make_mixed(count: int) -> list[Request]:
    """So many requests of all kinds in turn; prompts of all lengths, some beginning alike, some repeating themselves; the last two
    are two choices of one prompt."""
    names = list(KINDS)
    requests = []
    for number in range(count):
        kind = names[number % len(names)]
        beginning = [(5 + 11 * place * place) % 90 + 3 for place in range(9)] if number % 3 == 0 else []
        own = [(3 + 31 * number + place * place * 7) % 93 + 3 for place in range(2 + (number * 5) % 19)]
        prompt = [*beginning, *own, *own[:6]] if number % 2 else [*beginning, *own]
        requests.append(request_of(f"{number}: {kind}", prompt, seed=1000 + number, max_tokens=14 + number % 9, **KINDS[kind]))
    if count >= 2:
        twin = request_of("second choice", requests[-2].prompt_token_ids, max_tokens=18, seed=77, **KINDS["cool"])
        other = request_of("first choice", requests[-2].prompt_token_ids, max_tokens=18, seed=78, **KINDS["cool"])
        requests[-2:] = [other, twin]
    return requests


def request_of(request_id: str, prompt: Iterable[int], **sampling: object) -> Request:
    """A request that reports everything unless asked otherwise."""
    given = {"max_tokens": 20, "ignore_eos": True, "gaps": True, "logprobs": 3, **sampling}
    return Request(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=SamplingParams(**given))  # type: ignore[arg-type]


def one_by_one(engine: Engine, requests: Sequence[Request]) -> dict[str, Answer]:
    """Each with the engine to itself."""
    answers: dict[str, Answer] = {}
    for request in requests:
        engine.add(request)
        answers.update(run(engine))
    return answers


def together(engine: Engine, requests: Sequence[Request], *, batch: int) -> dict[str, Answer]:
    """So many at a time."""
    answers: dict[str, Answer] = {}
    for start in range(0, len(requests), batch):
        for request in requests[start : start + batch]:
            engine.add(request)
        answers.update(run(engine))
    return answers


def assert_same_answers(got: Mapping[str, Answer], plain: Mapping[str, Answer]) -> None:
    """Tokens, ends, log-probabilities and gaps of every request: float64, so that every difference is a bug."""
    for name, answer in got.items():
        expected = plain[name]
        assert answer.token_ids == expected.token_ids, name
        assert answer.finish_reason == expected.finish_reason, name
        assert answer.gaps == pytest.approx(expected.gaps, abs=1e-12), name
        assert len(answer.logprobs) == len(expected.logprobs), name
        for mine, theirs in zip(answer.logprobs, expected.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-12), name
            assert [token_id for token_id, _ in mine.top] == [token_id for token_id, _ in theirs.top], name
            assert [value for _, value in mine.top] == pytest.approx([value for _, value in theirs.top], abs=1e-12), name


def count_ties(got: Mapping[str, Answer], plain: Mapping[str, Answer], dtype: str) -> int:
    """How many answers flipped at a near tie; one that differs otherwise is altered, which is a failure."""
    flips = 0
    for name, answer in got.items():
        expected = plain[name]
        first = next(
            (at for at, pair in enumerate(zip(answer.token_ids, expected.token_ids, strict=False)) if pair[0] != pair[1]), None
        )
        if first is None:
            assert len(answer.token_ids) == len(expected.token_ids), name
            continue
        assert expected.gaps, f"{name} is altered at {first}, and nobody knows its lead"
        assert expected.gaps[first] < near_tie_gap(dtype), f"{name} is altered at {first} with a lead of {expected.gaps[first]}"
        flips += 1
    return flips


def save_llama(folder: Path, *, seed: int, layers: int = 1, context_tokens: int = 256) -> Path:
    """A Llama with the tiny one's vocabulary and weights of its own."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context_tokens,
        tie_word_embeddings=True,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=[1, 2],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
