"""A family that the engine would get wrong is refused, whatever the reason."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from architectures import GROUPED, SERVED, SLIDING_AND_FULL
from stage_scene import library_stage, tiny_config
from transformers import PreTrainedConfig

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.engine import selfcheck, sharding_rules
from spotserve.engine.catalogue import Catalogue, make_catalogue
from spotserve.engine.cuts import StageSlice
from spotserve.engine.selfcheck import check
from spotserve.engine.sharding import Division
from spotserve.engine.shards import Alone, Shards
from spotserve.engine.shrunken import shrunken
from spotserve.engine.stage import Stage
from spotserve.engine.stages import choose_stage


def verdict(config: PreTrainedConfig, tensor: int = 1) -> str | None:
    catalogue = make_catalogue(config, name="tiny", dtype=torch.float32)
    return check(catalogue, tensor, library_stage, dtype=torch.float32, kind="test")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Verdicts and rules of one test are not for the next."""
    before = dict(sharding_rules._RULES)
    selfcheck._verdicts.clear()
    yield
    selfcheck._verdicts.clear()
    sharding_rules._RULES.clear()
    sharding_rules._RULES.update(before)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "gpt2", "gpt_oss"])
def test_what_is_served_passes(model_type: str, tensor: int) -> None:
    settings = next(architecture.settings for architecture in SERVED if architecture.model_type == model_type)
    assert verdict(tiny_config(model_type, **settings), tensor) is None


def test_a_wrong_rule_is_caught() -> None:
    """One that forgets to add what the shards computed."""
    right = sharding_rules._RULES["GPT2MLP"]
    sharding_rules._RULES["GPT2MLP"] = lambda mlp: Division(cuts=right(mlp).cuts)
    assert verdict(tiny_config("gpt2")) is None
    reason = verdict(tiny_config("gpt2"), 2)
    assert reason is not None
    assert "other logits on a paged cache and 2 shards" in reason


@pytest.mark.parametrize("model_type", ["jamba", "qwen3_next", "recurrent_gemma"])
def test_state_that_a_paged_cache_does_not_hold_is_caught(model_type: str) -> None:
    assert verdict(tiny_config(model_type, **GROUPED)) is not None


def test_layers_behind_many_of_another_kind_are_tried_too() -> None:
    config = tiny_config("lfm2", **GROUPED, layer_types=["full_attention"] * 2 + ["conv"])
    assert verdict(config) is not None
    assert verdict(tiny_config("lfm2", **GROUPED, layer_types=["full_attention"] * 3)) is None


def test_a_slot_of_a_refused_model_says_why() -> None:
    config = tiny_config("jamba", **GROUPED)
    catalogue = make_catalogue(config, name="mine", dtype=torch.float32)
    needed = catalogue.needed(part := StageSlice(range(1), 3))
    weights = {name: torch.zeros(catalogue.entries[name].shape) for name in needed}
    with pytest.raises(ModelError, match="mine: JambaForCausalLM"):
        choose_stage(catalogue, part, weights, Alone(), EngineSettings())


def test_a_verdict_is_kept() -> None:
    calls = []

    def counted(catalogue: Catalogue, stage_slice: StageSlice, weights: Mapping[str, torch.Tensor], shards: Shards) -> Stage:
        calls.append(stage_slice)
        return library_stage(catalogue, stage_slice, weights, shards)

    catalogue = make_catalogue(tiny_config("llama", **GROUPED), name="tiny", dtype=torch.float32)
    for _ in range(2):
        assert check(catalogue, 1, counted, dtype=torch.float32, kind="counted") is None
    assert len(calls) == 2, "two layers, once"


def test_the_small_copy_has_every_kind_of_layer() -> None:
    config = tiny_config("gemma3_text", **GROUPED, sliding_window=64, layer_types=SLIDING_AND_FULL)
    catalogue = make_catalogue(config, name="tiny", dtype=torch.float32)
    small = next(shrunken(catalogue, 2))
    assert small.layer_types == SLIDING_AND_FULL[:2]
    assert small.sliding_window < 12, "the probe is longer"
    assert config.num_hidden_layers == 3, "the model's own is as it was"
