"""An enlarged model computes what the small one computes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from spotserve.bench.enlarged import SHAPES, enlarge, enlarge_to
from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import lone_engine

MODELS = Path(__file__).parents[2] / "spotserve" / "demo" / "models"
DRAFT = MODELS / "draft"
TOKEN_IDS = tuple((17 + 131 * place * place) % 4096 for place in range(24))


def logits(folder: Path) -> torch.Tensor:
    """By the library in float64, whose norms compute in float32 if they are let."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda rows, norm=module: F.rms_norm(rows, (rows.shape[-1],), norm.weight, norm.variance_epsilon)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKEN_IDS]), use_cache=False).logits[0]


def answer(folder: Path) -> list[int]:
    """Greedy, of 32 tokens."""
    engine = lone_engine(EngineSettings(model=str(folder), dtype="float64", speculation="off", kv_tokens=256))
    sampling = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    engine.add(Request(request_id="one", prompt_token_ids=TOKEN_IDS, sampling=sampling))
    token_ids: list[int] = []
    while engine.has_work:
        token_ids += [token_id for output in engine.step().outputs for token_id in output.token_ids]
    return token_ids


@pytest.mark.parametrize("hidden_size", [64, 128, 192, 256, 512], ids=["same", "copied", "three copies", "padded", "both"])
def test_an_enlarged_model_has_the_logits_and_the_text_of_the_small_one(hidden_size: int, tmp_path: Path) -> None:
    enlarge(DRAFT, tmp_path, hidden_size=hidden_size, layers=6, intermediate_size=256, heads=8, dtype="float64")
    assert (logits(tmp_path) - logits(DRAFT)).abs().max() <= 1e-9
    assert answer(tmp_path) == answer(DRAFT)


def test_it_is_as_large_as_was_asked_and_speaks_the_same_tokens(tmp_path: Path) -> None:
    enlarge(DRAFT, tmp_path, hidden_size=128, layers=5, intermediate_size=200, heads=8, dtype="bfloat16")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 4, 16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[4].mlp.gate_proj.weight.shape == (200, 128)
    assert (tmp_path / "tokenizer.json").read_bytes() == (DRAFT / "tokenizer.json").read_bytes()


def test_what_is_added_costs_arithmetic_like_any_other(tmp_path: Path) -> None:
    enlarge(DRAFT, tmp_path, hidden_size=256, layers=5, intermediate_size=256, heads=8, dtype="float32")
    layer = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[4]
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight, layer.input_layernorm.weight):
        assert 1e-3 < weight.abs().min() <= weight.abs().max() < 10, "neither zeros nor denormals"


def test_the_sizes_have_the_parameters_that_they_are_named_for() -> None:
    for name, shape in SHAPES.items():
        named = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        assert shape.num_parameters(vocabulary_size=4096, queries_per_kv_head=2) == pytest.approx(named, rel=0.1)


def test_a_size_is_counted_as_the_library_counts(tmp_path: Path) -> None:
    enlarge_to("30M", DRAFT, tmp_path, dtype="bfloat16")
    counted = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    assert counted == SHAPES["30M"].num_parameters(vocabulary_size=4096, queries_per_kv_head=2)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"hidden_size": 100}, "multiple of 64"),
        ({"layers": 3}, "layers of 4"),
        ({"heads": 5}, "multiple of 2"),
        ({"heads": 12}, "number of heads"),
    ],
    ids=["hidden size", "layers", "heads", "heads and hidden size"],
)
def test_a_shape_that_the_small_one_does_not_fit_into_is_refused(asked: dict[str, int], reason: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "layers": 4, "intermediate_size": 192, "heads": 8} | asked
    with pytest.raises(ModelError, match=reason):
        enlarge(DRAFT, tmp_path, dtype="float32", **shape)


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(ModelError, match="no Llama"):
        enlarge_to("30M", tmp_path, tmp_path / "out", dtype="float32")
    with pytest.raises(ModelError, match="no shape"):
        enlarge_to("31M", DRAFT, tmp_path / "out", dtype="float32")
