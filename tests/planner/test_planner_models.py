"""Well-known shapes: as many weights as they are known for, and cut as the real thing is."""

import pytest

from spotserve.core.cut import held_bytes, misfit, stage_cuts
from spotserve.core.errors import ConfigError
from spotserve.planner.models import named_model

PARAMETERS = {
    "llama-2-7b": 6.738e9,
    "llama-2-13b": 13.016e9,
    "llama-2-70b": 68.977e9,
    "llama-3-8b": 8.030e9,
    "llama-3-70b": 70.554e9,
    "mistral-7b": 7.242e9,
    "qwen2.5-7b": 7.616e9,
    "qwen2.5-0.5b": 0.494e9 + 896 * 151_936,
    "opt-6.7b": 6.658e9 + 4096 * 50_272,
}
"""As published; a tied embedding counts twice, once as the head."""
DEGREES = {"qwen2.5-0.5b": (1, 2), "qwen2.5-7b": (1, 2, 4), "llama-2-13b": (1, 2, 4, 8), "gpt-20b": (1, 2, 3, 4, 8, 16)}


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_are_as_many_as_published(name: str) -> None:
    model = named_model(name)
    assert model.weight_bytes / model.value_bytes == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize(("name", "gib"), [("opt-6.7b", 25.0), ("gpt-20b", 74.5), ("llama-30b", 111.8)])
def test_spotserves_models_have_the_sizes_of_its_table(name: str, gib: float) -> None:
    model = named_model(name)
    assert (model.weight_bytes - model.head_bytes) / 2**30 == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize("name", [*PARAMETERS, "gpt-20b", "llama-30b"])
def test_the_usual_shards_are_possible_and_alike(name: str) -> None:
    model = named_model(name)
    assert model.num_heads * model.head_size == model.hidden_size
    for tensor in DEGREES.get(name, (1, 2, 4, 8)):
        assert misfit(model, 1, tensor) is None
        held = [held_bytes(model.layer, tensor, shard) for shard in range(tensor)]
        assert len(set(held)) == 1
        assert model.layer_bytes <= held[0] * tensor <= 1.1 * model.layer_bytes, "what is kept twice is little"
    assert misfit(model, 1, 5) is not None


def test_operations_are_two_for_each_weight_of_a_matrix() -> None:
    model = named_model("llama-3-8b")
    assert model.layer_flops_per_token == pytest.approx(2 * model.layer_bytes / 2, rel=1e-4)
    assert model.head_flops_per_token == 2 * 4096 * 128_256


def test_the_head_of_a_large_vocabulary_weighs_as_much_as_layers() -> None:
    assert [len(layers) for layers in stage_cuts(named_model("llama-3-8b"), 4)] == [9, 9, 9, 5], "2.4 layers"


def test_what_is_not_known_is_refused_with_what_is() -> None:
    with pytest.raises(ConfigError, match="'gpt-5' is not known; known are llama-2-7b"):
        named_model("gpt-5")
