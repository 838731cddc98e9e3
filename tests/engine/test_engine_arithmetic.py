"""Logits of a position have the same bits whatever is computed beside it; with `full`, on all numbers of stages and shards."""

import os
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from spotserve.config import DEMO_MODEL, Invariant
from spotserve.engine.attention import KvCache
from spotserve.engine.catalogue import make_catalogue
from spotserve.engine.fused import FusedStage
from spotserve.engine.library_stage import LibraryStage, build_module
from spotserve.engine.thread_shards import thread_shards
from tests.engine.mixes import Mixes, lone_run
from tests.engine.stage_scene import BLOCK_TOKENS, Pipeline, cut_weights, slices

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch cannot pack weights")

LONG = os.environ.get("SPOTSERVE_INVARIANCE") == "long"
STEPS = 200 if LONG else 16
"""200 of each kind with `make invariance`."""
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2)]


def half_billion(num_layers: int, vocabulary_size: int) -> PreTrainedConfig:
    """Qwen2.5-0.5B's widths."""
    return Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=num_layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.05,
    )


class Scene:
    """A model's weights, whole, and pipelines that hold them in parts."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        if name == "demo":
            config = AutoConfig.from_pretrained(DEMO_MODEL)
            model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype)
        else:
            config = half_billion(24, 32_000) if LONG else half_billion(2, 512)
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self._catalogue = make_catalogue(config, name=name, dtype=dtype)
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
        generator = torch.Generator().manual_seed(5)
        lengths = (40, 75, 90, 130, 23, 66) if LONG else (33, 58, 20)
        self.texts = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]

    def pipeline(self, invariant: Invariant, shape: tuple[int, int] = (1, 1), *, fused: bool = True) -> Pipeline:
        made = Pipeline([], [], [])
        spec = self._catalogue.spec
        num_blocks = 1 + sum(-(-len(text) // BLOCK_TOKENS) for text in self.texts)
        for parts in slices(*shape, spec.num_layers):
            shards = thread_shards(len(parts))
            modules = [build_module(self._catalogue, part, cut_weights(self._catalogue, self._weights, part)) for part in parts]
            assert all(FusedStage.fits(module, part) for module, part in zip(modules, parts, strict=True))
            ranks = list(zip(modules, parts, shards, strict=True))
            made.stages.append(
                [FusedStage(*rank, invariant=invariant) for rank in ranks]
                if fused
                else [LibraryStage(self._catalogue, *rank, invariant=invariant) for rank in ranks]
            )
            made.shards.append(shards)
            made.caches.append(
                [
                    KvCache(
                        part.layers,
                        num_kv_heads=max(1, spec.num_kv_heads // part.tensor),
                        head_size=spec.head_size,
                        num_blocks=num_blocks,
                        block_tokens=BLOCK_TOKENS,
                        dtype=self._catalogue.dtype,
                        device=torch.device("cpu"),
                    )
                    for part in parts
                ]
            )
        return made


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["demo", "half-billion"])
def scene(request: pytest.FixtureRequest, dtype: torch.dtype) -> Scene:
    return Scene(request.param, dtype)


@pytest.fixture(scope="module", params=["batch", "full"])
def invariant(request: pytest.FixtureRequest) -> Invariant:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def alone(scene: Scene, invariant: Invariant) -> list[torch.Tensor]:
    with torch.inference_mode():
        pipeline = scene.pipeline(invariant)
        return [lone_run(pipeline, text) for text in scene.texts]


def differences(pipeline: Pipeline, scene: Scene, alone: list[torch.Tensor], *, steps: int, seed: int) -> list[str]:
    """What is not equal to the last bit, of all that `steps` mixed steps show."""
    different, compared = [], 0
    with torch.inference_mode():
        for step, seen in enumerate(Mixes(pipeline, scene.texts, seed=seed).steps(steps)):
            for one in seen:
                compared += 1
                if not torch.equal(one.logits, alone[one.text][one.position]):
                    lead = (one.logits - alone[one.text][one.position]).abs().max()
                    different.append(f"step {step}, text {one.text}, position {one.position}: {lead:.2g}")
    assert compared >= steps, "too little was compared"
    return different


def test_logits_do_not_depend_on_what_is_computed_beside_them(
    scene: Scene, alone: list[torch.Tensor], invariant: Invariant, threads: int
) -> None:
    with torch.inference_mode():
        pipeline = scene.pipeline(invariant)
    assert differences(pipeline, scene, alone, steps=STEPS, seed=threads) == []


@pytest.mark.parametrize("invariant", ["batch"], indirect=True)
def test_nor_do_those_of_the_stage_that_serves_any_model(scene: Scene, invariant: Invariant) -> None:
    with torch.inference_mode():
        lone, mixed = scene.pipeline(invariant, fused=False), scene.pipeline(invariant, fused=False)
        alone = [lone_run(lone, text) for text in scene.texts]
    assert differences(mixed, scene, alone, steps=STEPS, seed=7) == []


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("invariant", ["full"], indirect=True)
def test_with_full_logits_do_not_depend_on_stages_and_shards(
    scene: Scene, alone: list[torch.Tensor], invariant: Invariant, shape: tuple[int, int]
) -> None:
    with torch.inference_mode():
        pipeline = scene.pipeline(invariant, shape)
    assert differences(pipeline, scene, alone, steps=STEPS // 2, seed=sum(shape)) == []
