"""What a configuration says of its model: bytes that agree with the plans', parts that can be cut, refusals by name."""

from collections.abc import Iterator

import pytest
import torch
from architectures import EXPERTS, GROUPED, SERVED, Architecture
from stage_scene import LAYERS, random_model, slices, tiny_config

from spotserve.core.cut import EMBEDDING, head_of, held_bytes, misfit
from spotserve.core.errors import ModelError
from spotserve.engine import sharding_rules
from spotserve.engine.catalogue import Catalogue, make_catalogue
from spotserve.engine.cuts import Segment, StageSlice, TensorCut
from spotserve.engine.sharding import Division
from spotserve.engine.sharding_rules import register_rule
from spotserve.engine.skeleton import LibraryModule


def catalogue_of(model_type: str, **settings: object) -> Catalogue:
    return make_catalogue(tiny_config(model_type, **settings), name="tiny", dtype=torch.float32)


ALIKE = [architecture for architecture in SERVED if architecture.model_type != "deepseek_v3"]


@pytest.mark.parametrize("architecture", ALIKE, ids=lambda architecture: architecture.model_type)
def test_bytes_are_those_that_plans_reckon_with(architecture: Architecture) -> None:
    """Where layers are alike: per slice; and the whole is what the library's module has, tied ends counted twice."""
    config = tiny_config(architecture.model_type, **architecture.settings)
    catalogue = make_catalogue(config, name="tiny", dtype=torch.float32)
    spec = catalogue.spec
    for tensor in (1, 2):
        assert misfit(spec, LAYERS, tensor) is None
        for part in (part for pipeline in (1, 3) for stage in slices(pipeline, tensor) for part in stage):
            expected = len(part.layers) * held_bytes(spec.layer, tensor, part.shard)
            expected += held_bytes(spec.embedding, tensor, part.shard) * part.is_first
            expected += held_bytes(spec.head, tensor, part.shard) * part.is_last
            assert catalogue.needed_bytes(part) == expected
    model = random_model(config)
    assert spec.weight_bytes == sum(parameter.nbytes for _, parameter in model.named_parameters(remove_duplicate=False))


def test_the_spec_of_a_tied_llama() -> None:
    spec = make_catalogue(tiny_config("llama", **GROUPED, tie_word_embeddings=True), name="tiny", dtype=torch.bfloat16).spec
    assert (spec.name, spec.num_layers, spec.num_kv_heads, spec.head_size) == ("tiny", LAYERS, 2, 8)
    assert spec.layer_bytes == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)
    assert spec.embedding_bytes == 2 * 96 * 32
    assert spec.head_bytes == spec.embedding_bytes + 2 * 32
    assert (spec.vocabulary_size, spec.context_tokens, spec.value_bytes) == (96, 128, 2)
    assert {portion.units for portion in spec.layer} == {1, 2, 4, 48}, "norms, key-value heads, query heads, columns"


def test_a_typical_layer_is_one_of_the_most_frequent_kind() -> None:
    settings = next(architecture.settings for architecture in SERVED if architecture.model_type == "deepseek_v3")
    catalogue = catalogue_of("deepseek_v3", **settings)
    assert catalogue.needed_bytes(StageSlice(range(1, 2), LAYERS)) == catalogue.spec.layer_bytes
    first = catalogue.needed_bytes(StageSlice(range(1), LAYERS)) - catalogue.spec.embedding_bytes
    assert first < catalogue.spec.layer_bytes


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_what_the_library_keeps_precise_is_kept_precise(dtype: torch.dtype, expected: torch.dtype) -> None:
    settings = next(architecture.settings for architecture in SERVED if architecture.model_type == "deepseek_v3")
    entries = make_catalogue(tiny_config("deepseek_v3", **settings), name="tiny", dtype=dtype).entries
    assert entries["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == expected
    assert entries["model.layers.1.mlp.gate.weight"].dtype == dtype


def test_homes_are_found_by_when_a_module_runs() -> None:
    catalogue = catalogue_of("opt", ffn_dim=48, word_embed_proj_dim=16)
    homes = {name: entry.home for name, entry in catalogue.entries.items()}
    assert homes["model.decoder.embed_positions.weight"] == EMBEDDING
    assert homes["model.decoder.project_in.weight"] == EMBEDDING
    assert homes["model.decoder.project_out.weight"] == head_of(catalogue.spec)
    assert homes["model.decoder.final_layer_norm.bias"] == head_of(catalogue.spec)
    assert homes["model.decoder.layers.2.fc1.weight"] == 2
    assert catalogue.entries["lm_head.weight"].tied_to == "model.decoder.embed_tokens.weight"


def test_a_stage_in_the_middle_needs_its_layers_only() -> None:
    needed = catalogue_of("gpt2").needed(StageSlice(range(1, 2), LAYERS))
    assert needed
    assert all(name.startswith("transformer.h.1.") for name in needed)


@pytest.mark.parametrize(
    ("settings", "tensor", "reason"),
    [
        ({**GROUPED, "intermediate_size": 50}, 4, "50 units"),
        (GROUPED, 3, "cannot be cut into 3"),
        (GROUPED, 8, "4 units"),  # two shards would add the same heads twice
    ],
)
def test_what_does_not_divide_is_refused(settings: dict[str, object], tensor: int, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        catalogue_of("llama", **settings).needed(StageSlice(range(LAYERS), LAYERS, 0, tensor))


def test_what_nobody_knows_how_to_shard_is_cut_into_stages_only() -> None:
    catalogue = catalogue_of("persimmon", intermediate_size=48, num_key_value_heads=4)
    assert catalogue.needed(StageSlice(range(1), LAYERS))
    with pytest.raises(ModelError, match=r"tiny: .*model\.layers\.0\.self_attn\.query_key_value"):
        catalogue.needed(StageSlice(range(1), LAYERS, 0, 2))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "its attention cannot be replaced"),
        ("gptj", "its attention cannot be replaced"),
        ("mamba", "its attention cannot be replaced"),
        ("vit", "the library cannot build it"),
    ],
)
def test_what_cannot_be_served_is_refused(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"tiny: .*{reason}"):
        catalogue_of(model_type)


@pytest.fixture
def rules() -> Iterator[None]:
    before = dict(sharding_rules._RULES)
    yield
    sharding_rules._RULES.clear()
    sharding_rules._RULES.update(before)


@pytest.mark.usefixtures("rules")
def test_a_rule_can_be_added() -> None:
    @register_rule("PersimmonAttention")
    def _(attention: LibraryModule) -> Division:
        fused = Segment(attention.num_heads, 3 * attention.head_dim)  # interleaved by head
        one = Segment(attention.num_heads, attention.head_dim)
        return Division(
            cuts={
                "query_key_value.weight": TensorCut(0, (fused,)),
                "query_key_value.bias": TensorCut(0, (fused,)),
                "dense.weight": TensorCut(1, (one,)),
            },
            sums=frozenset({"dense"}),
            counts={"num_heads": Segment(attention.num_heads, 1)},
        )

    catalogue = catalogue_of("persimmon", intermediate_size=48, num_key_value_heads=4)
    assert catalogue.unshardable is None
    assert catalogue.needed(StageSlice(range(1), LAYERS, 1, 2))["model.layers.0.self_attn.dense.weight"] == (range(2, 4),)


def test_experts_are_cut_over_their_inner_columns() -> None:
    entry = catalogue_of("mixtral", **EXPERTS).entries["model.layers.0.mlp.experts.gate_up_proj"]
    assert entry.shape == (4, 96, 32)
    assert entry.cut == TensorCut(1, (Segment(48, 1), Segment(48, 1)))
