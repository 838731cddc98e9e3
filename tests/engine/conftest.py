"""Tiny models with random weights, and engines on them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from spotserve.config import EngineSettings
from spotserve.core.request import FinishReason, Request, SamplingParams, TokenLogprob
from spotserve.engine.bring_up import lone_engine
from spotserve.engine.engine import Engine
from spotserve.speculation.speculator import Speculator

VOCABULARY_SIZE = 96


@dataclass
class Collected:
    """Everything that one sequence got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    recomputed_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers that has grouped heads; its logits are wide enough to be no tie."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=[1, 2],
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_engine(tiny_llama: Path) -> Callable[..., Engine]:
    """An engine on the tiny Llama, float64 and without speculation unless asked otherwise."""

    def make(*, speculator: Speculator | None = None, **settings: object) -> Engine:
        given = {"model": str(tiny_llama), "dtype": "float64", "speculation": "off", "kv_tokens": 4096, **settings}
        return lone_engine(EngineSettings.model_validate(given), speculator=speculator)

    return make


@pytest.fixture(scope="session")
def collect() -> Callable[[Engine], dict[str, Collected]]:
    """Steps an engine until it is idle, checking its books at every step."""

    def run(engine: Engine, max_steps: int = 5000) -> dict[str, Collected]:
        collected: dict[str, Collected] = {}
        for _ in range(max_steps):
            if not engine.has_work:
                break
            for output in engine.step().outputs:
                into = collected.setdefault(output.request_id, Collected())
                into.token_ids.extend(output.token_ids)
                into.logprobs.extend(output.logprobs or ())
                into.gaps.extend(output.gaps or ())
                into.finish_reason = output.finish_reason
                into.recomputed_tokens += output.recomputed_tokens
                into.draft_tokens += output.draft_tokens
                into.accepted_tokens += output.accepted_tokens
            engine.check_integrity()
        assert not engine.has_work, "it does not end"
        assert engine.kv_tokens_used == 0
        return collected

    return run


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """A request with a prompt of its own, derived from its id."""

    def make(request_id: str, prompt: int | Iterable[int] = 7, **sampling: object) -> Request:
        salt = sum(request_id.encode())
        ids = (
            tuple((3 + salt * 31 + place * place * 7) % VOCABULARY_SIZE for place in range(prompt))
            if isinstance(prompt, int)
            else prompt
        )
        given = {"max_tokens": 20, "ignore_eos": True, "seed": salt, **sampling}
        return Request(request_id=request_id, prompt_token_ids=tuple(ids), sampling=SamplingParams(**given))  # type: ignore[arg-type]

    return make
