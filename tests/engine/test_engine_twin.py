"""The engine against a naive twin: the library's forward over the whole sequence for every token, and the law in plain Python."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spotserve.core.request import FinishReason, Request, SamplingParams
from spotserve.engine.engine import Engine

MASK = 2**64 - 1


def splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def gumbel(seed: int, position: int, token_id: int) -> float:
    golden = 0x9E3779B97F4A7C15
    key = splitmix((splitmix((seed + golden) & MASK) + (position + 1) * golden) & MASK)
    uniform = ((splitmix((key + (token_id + 1) * golden) & MASK) >> 12) + 0.5) * 2.0**-52
    return -math.log(-math.log(uniform))


def naive_choice(logits: list[float], prompt: tuple[int, ...], output: list[int], s: SamplingParams, ends: set[int]) -> int:
    scores = list(logits)
    counts = Counter(output)
    for token_id in set(prompt) | set(output):
        score = scores[token_id]
        scores[token_id] = score / s.repetition_penalty if score > 0 else score * s.repetition_penalty
    for token_id, count in counts.items():
        scores[token_id] -= s.presence_penalty + s.frequency_penalty * count
    for token_id, bias in s.logit_bias.items():
        scores[token_id] += bias
    if len(output) < s.min_tokens:
        for token_id in ends | set(s.stop_token_ids):
            scores[token_id] = -math.inf
    everything = range(len(scores))
    if s.temperature == 0:
        return max(everything, key=lambda x: (scores[x], -x))
    scores = [score / s.temperature for score in scores]
    ranked = sorted(everything, key=lambda x: (-scores[x], x))[: s.top_k or None]
    weights = [math.exp(scores[x] - scores[ranked[0]]) for x in ranked]
    kept, before = [], 0.0
    for x, weight in zip(ranked, weights, strict=True):
        if not kept or (before < s.top_p * sum(weights) and weight >= s.min_p):
            kept.append(x)
        before += weight
    return max(kept, key=lambda x: (scores[x] + gumbel(s.seed, len(output), x), -x))


@pytest.fixture(scope="module")
def twin(tiny_llama: Path) -> Callable[[Request], tuple[list[int], list[float]]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64, attn_implementation="sdpa").eval()
    ends = set(model.config.eos_token_id)

    def run(request: Request) -> tuple[list[int], list[float]]:
        s, prompt = request.sampling, request.prompt_token_ids
        output: list[int] = []
        logprobs = []
        while len(output) < s.max_tokens:
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *output]]), use_cache=False).logits[0, -1]
            output.append(naive_choice(logits.tolist(), prompt, output, s, ends))
            logprobs.append(logits.log_softmax(-1)[output[-1]].item())
            if output[-1] in set(s.stop_token_ids) | (set() if s.ignore_eos else ends):
                break
        return output, logprobs

    return run


CASES: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "greedy to the end of text": {"temperature": 0.0, "ignore_eos": False, "logit_bias": {1: 3.0}},
    "sampled": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.05},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1, "temperature": 1.5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2, "temperature": 1.3},
    "all cuts": {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.2},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.4},
    "presence": {"temperature": 0.0, "presence_penalty": 1.5},
    "frequency": {"temperature": 0.8, "frequency_penalty": 0.7, "presence_penalty": -0.3},
    "bias": {"temperature": 0.7, "logit_bias": {5: 4.0, 9: -100.0, 90: 2.5}},
    "end of text": {"temperature": 2.0, "ignore_eos": False, "logit_bias": {2: 2.0}},
    "min_tokens": {"temperature": 1.0, "ignore_eos": False, "min_tokens": 9, "logit_bias": {1: 30.0}},
    "stop ids": {"temperature": 1.5, "stop_token_ids": (11, 40, 60), "min_tokens": 3},
    "large seed": {"temperature": 1.0, "seed": 2**64 - 1},
}


@pytest.mark.parametrize("speculation", ["off", "ngram:4", "adaptive"])
def test_engine_equals_twin(
    speculation: str, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable[..., Request], twin: Callable
) -> None:
    """All cases in one batch, so that rows of every kind stand side by side."""
    engine = make_engine(speculation=speculation, max_step_tokens=40)
    requests = {name: make_request(name, 9, **{"logprobs": 3, "gaps": True, **case}) for name, case in CASES.items()}
    for request in requests.values():
        engine.add(request)
    collected = collect(engine)
    for name, request in requests.items():
        token_ids, logprobs = twin(request)
        got = collected[name]
        assert got.token_ids == token_ids, name
        assert [item.logprob for item in got.logprobs] == pytest.approx(logprobs, abs=1e-10), name
        assert len(got.gaps) == len(token_ids)
        assert all(gap >= 0 for gap in got.gaps)
        assert all(len(item.top) == 3 and item.top[0][1] >= item.logprob - 1e-12 for item in got.logprobs)
        ended = token_ids[-1] in set(request.sampling.stop_token_ids) | (set() if request.sampling.ignore_eos else {1, 2})
        assert got.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
    if speculation == "ngram:4":
        assert sum(item.accepted_tokens for item in collected.values()) > 0, "no draft was ever accepted: nothing was tested"


def test_min_tokens_holds_and_releases(
    make_engine: Callable[..., Engine], collect: Callable, make_request: Callable[..., Request]
) -> None:
    engine = make_engine()
    engine.add(make_request("m", temperature=0.0, ignore_eos=False, min_tokens=6, logit_bias={1: 100.0}))
    got = collect(engine)["m"]
    assert len(got.token_ids) == 7
    assert got.token_ids[-1] == 1
    assert 1 not in got.token_ids[:-1]
