"""Many families through one attention: logits are the library's own, and what would not be is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.request import Request
from spotserve.engine.attention import KvCache
from spotserve.engine.batch import RowLayout
from spotserve.engine.engine import Engine
from spotserve.engine.forward import LibraryForward
from spotserve.engine.fused import FusedForward
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.selfcheck import choose_forward
from spotserve.engine.sequence import new_sequence
from spotserve.engine.weights import load_model

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 3,
    "initializer_range": 0.2,
}
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 12},
    "gemma2": {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "phi3": {**GROUPED, "original_max_position_embeddings": 128},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"intermediate_size": 48},
}
FUSED = {"llama", "qwen2", "qwen3"}


@pytest.fixture(scope="module")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("families")

    def save(family: str, **extra: object) -> Path:
        torch.manual_seed(1)
        config: PreTrainedConfig = AutoConfig.for_model(family, **{**SHAPE, **extra})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / family)
        return folder / family

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, save_model: Callable[..., Path], collect: Callable, make_request: Callable[..., Request]) -> None:
    """Greedy tokens and their log-probabilities against the library's own forward, past the sliding windows."""
    folder = save_model(family, **FAMILIES[family])
    # Eager, as SDPA has no soft cap; it rounds its softmax to float32, and thus sets the tolerance.
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    engine = Engine(EngineSettings(model=str(folder), dtype="float64", speculation="off", max_step_tokens=16, kv_tokens=512))
    requests = [make_request(f"{family}{i}", 5 + 9 * i, temperature=0.0, logprobs=0, max_tokens=24) for i in range(3)]
    for request in requests:
        engine.add(request)
    collected = collect(engine)
    for request in requests:
        got = collected[request.request_id]
        tokens = torch.tensor([[*request.prompt_token_ids, *got.token_ids]])
        with torch.inference_mode():
            logits = library(tokens, use_cache=False).logits[0, len(request.prompt_token_ids) - 1 : -1]
        best = logits.argmax(-1).tolist()
        assert got.token_ids == best
        expected = logits.log_softmax(-1).amax(-1).tolist()
        assert [item.logprob for item in got.logprobs] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", sorted(FUSED))
def test_fused_pass_is_taken_and_equals_the_library(family: str, dtype: str, save_model: Callable[..., Path]) -> None:
    settings = EngineSettings(model=str(save_model(family, **FAMILIES[family])), dtype=dtype)
    with torch.inference_mode():
        model = load_model(settings)
        assert isinstance(choose_forward(model, block_tokens=16), FusedForward)


@pytest.mark.parametrize("family", sorted(FUSED))
def test_both_passes_give_the_same_logits(
    family: str, save_model: Callable[..., Path], make_request: Callable[..., Request]
) -> None:
    """On the rows of one step, each with a cache of its own, and past the first padded length."""
    logits = []
    with torch.inference_mode():
        model = load_model(EngineSettings(model=str(save_model(family, **FAMILIES[family])), dtype="float64"))
        for forward in (LibraryForward(model), FusedForward(model)):
            cache = KvCache(model.spec, num_blocks=9, block_tokens=16, dtype=model.dtype, device=torch.device("cpu"))
            sequence = new_sequence(make_request("a", 100), seniority=0, end_token_ids=(), emitted_token_ids=())
            sequence.block_ids.extend(range(1, 8))
            rows = RowLayout((ScheduledSequence(sequence, 100),), cache).build()
            logits.append(forward(rows, torch.arange(100)))
        token_ids = torch.tensor([sequence.token_ids])
        model.module.set_attn_implementation("sdpa")
        logits.append(model.module(token_ids, use_cache=False).logits[0])
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() < 1e-12


def test_other_families_go_through_the_library(save_model: Callable[..., Path]) -> None:
    with torch.inference_mode():
        model = load_model(EngineSettings(model=str(save_model("gpt2"))))
        assert isinstance(choose_forward(model, block_tokens=16), LibraryForward)


def test_spec_counts_bytes(tiny_llama: Path) -> None:
    spec = load_model(EngineSettings(model=str(tiny_llama), dtype="bfloat16", served_name="mine")).spec
    assert (spec.name, spec.num_layers, spec.num_kv_heads, spec.head_size) == ("mine", 2, 2, 8)
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert spec.layer_bytes == 2 * layer
    assert spec.embedding_bytes == 2 * 96 * 32
    assert spec.head_bytes == spec.embedding_bytes + 2 * 32
    assert spec.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2
    assert (spec.vocabulary_size, spec.context_tokens, spec.value_bytes) == (96, 256, 2)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        Engine(EngineSettings(model=str(tmp_path / "nowhere")))


def test_damaged_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Engine(EngineSettings(model=str(tmp_path)))


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        Engine(EngineSettings(model=str(tmp_path)))


def test_a_family_with_attention_of_its_own_is_refused(save_model: Callable[..., Path]) -> None:
    folder = save_model("falcon", alibi=True)
    with pytest.raises(ModelError):
        Engine(EngineSettings(model=str(folder)))
