"""Many families, cut into stages and shards: logits and greedy tokens are those of the library's own unpartitioned forward."""

from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest
import torch
from architectures import GROUPED, PIPELINES, SERVED, TENSORS, Architecture
from stage_scene import Pipeline, generate, make_pipeline, random_model, tiny_config

from spotserve.config import EngineSettings
from spotserve.engine.catalogue import Catalogue, make_catalogue
from spotserve.engine.fused import FusedStage
from spotserve.engine.library_stage import LibraryStage
from spotserve.engine.selfcheck import MakeStage
from spotserve.engine.stages import choose_stage

TOLERANCE = 1e-4
"""Largest difference, as a share of the range of the logits."""
PROMPTS = [[(3 + number * 31 + place * place * 7) % 96 for place in range(5 + 16 * number)] for number in range(2)]
BY_TYPE = {architecture.model_type: architecture for architecture in SERVED}


@cache
def model_of(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Catalogue]:
    config = tiny_config(model_type, **BY_TYPE[model_type].settings)
    return random_model(config, dtype), make_catalogue(config, name=model_type, dtype=dtype)


def assert_is_the_library(
    model: torch.nn.Module, pipeline: Pipeline, prompts: Sequence[Sequence[int]] = PROMPTS, tolerance: float = TOLERANCE
) -> None:
    """64 greedy tokens after prompts in chunks of 8, against one forward pass over the same tokens."""
    result = generate(pipeline, prompts, num_tokens=64, chunk=8)
    for prompt, token_ids, logits in zip(prompts, result.token_ids, result.logits, strict=True):
        tokens = torch.tensor([[*prompt, *token_ids]])
        expected = model(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
        served = torch.stack(logits)
        assert float((served - expected).abs().max()) <= tolerance * float(expected.max() - expected.min())
        if tolerance <= TOLERANCE:
            assert token_ids == expected.argmax(-1).tolist()


CUTS = [
    pytest.param(architecture, pipeline, tensor, id=f"{architecture.model_type}-{pipeline}-{tensor}")
    for architecture in SERVED
    for pipeline, tensor in product(PIPELINES, TENSORS)
    if architecture.every_cut or (pipeline, tensor) == (max(PIPELINES), max(TENSORS))
]


@pytest.mark.parametrize(("architecture", "pipeline", "tensor"), CUTS)
def test_stages_and_shards_compute_what_the_library_computes(architecture: Architecture, pipeline: int, tensor: int) -> None:
    with torch.inference_mode():
        model, catalogue = model_of(architecture.model_type)
        assert catalogue.unshardable is None
        assert_is_the_library(model, make_pipeline(catalogue, model.state_dict(), pipeline, tensor))


@pytest.mark.parametrize(
    ("model_type", "num_kv_heads", "tensor"), [("llama", 2, 4), ("llama", 1, 2), ("olmo2", 2, 4), ("phi3", 1, 4), ("gpt_oss", 2, 4)]
)
def test_shards_may_share_key_value_heads(model_type: str, num_kv_heads: int, tensor: int) -> None:
    with torch.inference_mode():
        config = tiny_config(model_type, **{**BY_TYPE[model_type].settings, "num_key_value_heads": num_kv_heads})
        model, catalogue = random_model(config), make_catalogue(config, name=model_type, dtype=torch.float32)
        assert_is_the_library(model, make_pipeline(catalogue, model.state_dict(), 1, tensor))


def test_a_vocabulary_that_does_not_divide_is_computed_whole_by_every_shard() -> None:
    with torch.inference_mode():
        config = tiny_config("llama", **GROUPED, vocab_size=97)
        model, catalogue = random_model(config), make_catalogue(config, name="odd", dtype=torch.float32)
        assert not catalogue.entries["lm_head.weight"].cut.segments
        assert_is_the_library(model, make_pipeline(catalogue, model.state_dict(), 2, 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt2"])
def test_other_dtypes(model_type: str, dtype: torch.dtype, tolerance: float) -> None:
    with torch.inference_mode():
        model, catalogue = model_of(model_type, dtype)
        assert_is_the_library(model, make_pipeline(catalogue, model.state_dict(), 3, 2), tolerance=tolerance)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_short_path_is_taken_where_it_fits(model_type: str) -> None:
    settings = EngineSettings()
    with torch.inference_mode():
        model, catalogue = model_of(model_type)
        pipeline = make_pipeline(catalogue, model.state_dict(), 3, 2, make_stage=chosen(settings))
        assert all(isinstance(stage, FusedStage) for stages in pipeline.stages for stage in stages)
        assert_is_the_library(model, pipeline)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "mistral"])
def test_other_families_go_through_the_library(model_type: str) -> None:
    with torch.inference_mode():
        model, catalogue = model_of(model_type)
        pipeline = make_pipeline(catalogue, model.state_dict(), 2, 2, make_stage=chosen(EngineSettings()))
        assert all(isinstance(stage, LibraryStage) for stages in pipeline.stages for stage in stages)
        assert_is_the_library(model, pipeline)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "phi3"])
def test_full_invariance_gives_the_same_bits_for_every_cut(model_type: str) -> None:
    """With columns in multiples of a processor's vectors: activations compute the rest of a row in another way."""
    with torch.inference_mode():
        config = tiny_config(model_type, **{**BY_TYPE[model_type].settings, "intermediate_size": 128})
        model, catalogue = random_model(config), make_catalogue(config, name=model_type, dtype=torch.float32)
        make = chosen(EngineSettings(invariant="full"))
        runs = []
        for pipeline, tensor in ((1, 1), (2, 1), (1, 2), (2, 2)):
            made = make_pipeline(catalogue, model.state_dict(), pipeline, tensor, make_stage=make)
            runs.append(generate(made, PROMPTS, num_tokens=16, chunk=8))
        for run in runs[1:]:
            assert run.token_ids == runs[0].token_ids
            for ours, first in zip(run.logits, runs[0].logits, strict=True):
                assert torch.equal(torch.stack(ours), torch.stack(first))


def chosen(settings: EngineSettings) -> MakeStage:
    return lambda catalogue, stage_slice, weights, shards: choose_stage(catalogue, stage_slice, weights, shards, settings)
