"""Servers that stream `/v1/completions`: OpenAI's API as it is, and with what vLLM, SGLang and this project add to it.

Facts from the sources: vLLM 0.32 `entrypoints/openai/completion`; SGLang `srt/entrypoints/openai/serving_completions.py` and
`srt/sampling/sampling_params.py`. Where an older server does not know `return_token_ids`, its text is read instead.
"""

from typing import Any

import msgspec

from spotserve.core.errors import WireError
from spotserve.core.request import TokenLogprob
from spotserve.engine.remote.dialect import EVERYTHING, Ask, Body, Piece
from spotserve.engine.remote.reading import decode, error_of, finish_reason

_POSITIVE_INT64 = 2**63 - 1
"""-1 would mean any seed."""


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


class _Completions:
    """What those have in common that stream OpenAI's completions."""

    name = "openai"
    path = "/v1/completions"
    health_path = "/v1/models"
    takes_token_ids = False
    omits_split_characters = False
    parameters: frozenset[str] = frozenset({"presence_penalty", "frequency_penalty", "logit_bias"})

    def body(self, ask: Ask) -> Body:
        """OpenAI's own parameters and no other."""
        sampling = ask.sampling
        return {
            "model": ask.model,
            "prompt": list(ask.token_ids) if self.takes_token_ids else ask.text,
            "stream": True,
            "max_tokens": ask.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "seed": ask.seed & _POSITIVE_INT64,
            **({"logit_bias": {str(i): bias for i, bias in sampling.logit_bias.items()}} if sampling.logit_bias else {}),
        }

    def read(self, data: bytes) -> Piece:
        """One chunk; those without a choice (usage) add nothing."""
        chunk = decode(data, _Completion)
        if chunk.error is not None:
            raise error_of(chunk.error)
        if not chunk.choices:
            return Piece(token_ids=())
        choice = chunk.choices[0]
        return Piece(
            text=choice.text or "",
            token_ids=None if choice.token_ids is None else tuple(choice.token_ids),
            logprobs=None if choice.logprobs is None else _logprobs(choice.logprobs),
            finish_reason=finish_reason(choice.finish_reason),
        )


class PlainDialect(_Completions):
    """Any other server with `/v1/completions`: text in, text out."""


class VllmDialect(_Completions):
    """vLLM: ids in and out, and every parameter, which were its names first."""

    name = "vllm"
    health_path = "/health"
    takes_token_ids = True
    parameters = EVERYTHING

    def body(self, ask: Ask) -> Body:
        """With vLLM's further parameters."""
        sampling = ask.sampling
        logprobs: Body = {}
        if sampling.logprobs is not None:
            logprobs = {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        return {
            **super().body(ask),
            "top_k": sampling.top_k or -1,  # 0 is refused by SGLang and by older versions
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "min_tokens": ask.min_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": sampling.ignore_eos,
            "return_token_ids": True,
            **logprobs,
        }


class SpotServeDialect(VllmDialect):
    """This project's own gateway, which speaks as vLLM does but names tokens in log-probabilities by their text."""

    name = "spotserve"
    health_path = "/health/live"
    parameters = EVERYTHING - {"logprobs"}


class SglangDialect(VllmDialect):
    """SGLang: as vLLM, but log-probabilities come after temperature and name tokens by their text."""

    name = "sglang"
    parameters = EVERYTHING - {"logprobs"}


def _logprobs(said: _Logprobs) -> tuple[TokenLogprob, ...]:
    tops = said.top_logprobs or [None] * len(said.tokens)
    if not len(said.tokens) == len(said.token_logprobs) == len(tops):
        raise WireError("log-probabilities of another number of tokens")
    found = []
    for value, top in zip(said.token_logprobs, tops, strict=True):
        named = sorted(((_id(name), each) for name, each in (top or {}).items()), key=lambda pair: (-pair[1], pair[0]))
        found.append(TokenLogprob(float("-inf") if value is None else value, tuple(named)))
    return tuple(found)


def _id(name: str) -> int:
    kind, _, number = name.partition(":")
    if kind != "token_id" or not number.isdecimal():
        raise WireError(f"a token named {name[:40]!r} where its id was asked for")
    return int(number)
