"""Tiny models of many architectures, cut into stages and shards that run in threads of one process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from spotserve.core.request import Request, SamplingParams
from spotserve.engine.attention import KvCache
from spotserve.engine.batch import RowLayout, StepLayout
from spotserve.engine.catalogue import Catalogue
from spotserve.engine.cuts import StageSlice
from spotserve.engine.library_stage import LibraryStage, build_module
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.selfcheck import MakeStage
from spotserve.engine.sequence import Sequence as Progress
from spotserve.engine.sequence import new_sequence
from spotserve.engine.shards import Shards
from spotserve.engine.stage import Stage
from spotserve.engine.thread_shards import run_shards, thread_shards

LAYERS = 3
BLOCK_TOKENS = 16
SHAPE: Mapping[str, object] = MappingProxyType(
    {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 3,
        "initializer_range": 0.2,
    }
)


def tiny_config(model_type: str, **extra: object) -> PreTrainedConfig:
    """A configuration of three layers and four heads."""
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **{**SHAPE, **extra})
    return config


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The library's own model with eager attention; no parameter is 0 or 1 everywhere, so each can be missed."""
    torch.manual_seed(7)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def slices(pipeline: int, tensor: int, num_layers: int = LAYERS) -> list[list[StageSlice]]:
    """Slices of each stage's shards; the first stages are the longer ones."""
    each, rest = divmod(num_layers, pipeline)
    cuts = [stage * each + min(stage, rest) for stage in range(pipeline + 1)]
    return [
        [StageSlice(range(cuts[stage], cuts[stage + 1]), num_layers, shard, tensor) for shard in range(tensor)]
        for stage in range(pipeline)
    ]


def cut_weights(catalogue: Catalogue, whole: Mapping[str, torch.Tensor], stage_slice: StageSlice) -> dict[str, torch.Tensor]:
    """A rank's part of weights that are all here."""
    local = {}
    for name, held in catalogue.needed(stage_slice).items():
        cut = catalogue.entries[name].cut
        local[name] = cut.cut_out(whole[name], cut.whole, held).clone()
    return local


@dataclass
class Pipeline:
    """All ranks of one replica: P stages of M threads each."""

    stages: list[list[Stage]]
    caches: list[list[KvCache]]
    shards: list[list[Shards]]

    def step(self, layout: StepLayout, logit_rows: Sequence[int]) -> torch.Tensor:
        """Logits [wanted, vocabulary]; all shards of the last stage must agree to the bit."""
        hidden: torch.Tensor | None = None
        for number, (stages, caches, shards) in enumerate(zip(self.stages, self.caches, self.shards, strict=True)):
            is_last = number == len(self.stages) - 1
            wanted = torch.tensor(logit_rows) if is_last else None
            given = hidden

            def work(
                shard: Shards,
                stages: list[Stage] = stages,
                caches: list[KvCache] = caches,
                given: torch.Tensor | None = given,
                wanted: torch.Tensor | None = wanted,
            ) -> torch.Tensor:
                return stages[shard.shard](layout.bind(caches[shard.shard]), given, wanted)

            outputs = run_shards(shards, work)
            assert all(torch.equal(output, outputs[0]) for output in outputs)
            hidden = outputs[0]
        assert hidden is not None
        return hidden


def library_stage(catalogue: Catalogue, stage_slice: StageSlice, weights: Mapping[str, torch.Tensor], shards: Shards) -> Stage:
    """The library's own modules."""
    return LibraryStage(catalogue, build_module(catalogue, stage_slice, weights), stage_slice, shards)


def make_pipeline(
    catalogue: Catalogue,
    whole: Mapping[str, torch.Tensor],
    pipeline: int,
    tensor: int,
    *,
    num_blocks: int = 33,
    make_stage: MakeStage = library_stage,
) -> Pipeline:
    """Every rank with its own part of the weights and of the cache."""
    made = Pipeline([], [], [])
    for stage_slices in slices(pipeline, tensor, catalogue.spec.num_layers):
        shards = thread_shards(tensor)
        made.stages.append(
            [
                make_stage(catalogue, part, cut_weights(catalogue, whole, part), shard)
                for part, shard in zip(stage_slices, shards, strict=True)
            ]
        )
        made.shards.append(shards)
        made.caches.append(
            [
                KvCache(
                    part.layers,
                    num_kv_heads=max(1, catalogue.spec.num_kv_heads // tensor),
                    head_size=catalogue.spec.head_size,
                    num_blocks=num_blocks,
                    block_tokens=BLOCK_TOKENS,
                    dtype=catalogue.dtype,
                    device=torch.device("cpu"),
                )
                for part in stage_slices
            ]
        )
    return made


@dataclass
class Greedy:
    """What came out of a greedy run: per sequence its tokens, and the logits behind each of its output tokens."""

    token_ids: list[list[int]] = field(default_factory=list)
    logits: list[list[torch.Tensor]] = field(default_factory=list)


def generate(pipeline: Pipeline, prompts: Sequence[Sequence[int]], *, num_tokens: int, chunk: int) -> Greedy:
    """Prompts in chunks of `chunk` tokens beside each other, then greedy tokens until each sequence has `num_tokens`."""
    blocks_each = -(-(max(map(len, prompts)) + num_tokens) // BLOCK_TOKENS)
    sequences: list[Progress] = []
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=num_tokens)
        request = Request(request_id=str(number), prompt_token_ids=tuple(prompt), sampling=sampling)
        sequence = new_sequence(request, seniority=(0, 0.0, number), end_token_ids=(), emitted_token_ids=())
        sequence.block_ids.extend(range(1 + number * blocks_each, 1 + (number + 1) * blocks_each))
        sequences.append(sequence)
    result = Greedy([[] for _ in prompts], [[] for _ in prompts])
    while running := [sequence for sequence in sequences if sequence.output_tokens < num_tokens]:
        entries = [ScheduledSequence(sequence, min(chunk, sequence.pending_tokens)) for sequence in running]
        rows = RowLayout(entries, block_tokens=BLOCK_TOKENS)
        layout = rows.build()
        sampled = [(entry.sequence, found[0]) for entry, found in zip(entries, rows.sampled_rows, strict=True) if found]
        logits = pipeline.step(layout, [row for _, row in sampled])
        for entry in entries:
            entry.sequence.advance(entry.num_tokens)
        for (sequence, _), one in zip(sampled, logits, strict=True):
            number = sequences.index(sequence)
            sequence.token_ids.append(int(one.argmax()))
            result.token_ids[number].append(sequence.token_ids[-1])
            result.logits[number].append(one.clone())
    return result
