"""Whether a way to compute a model is right, by trying.

A family is served only if its logits, through the paged cache and over stages and shards, are those of the library's own plain
attention; a faster stage is used only if that agrees too. This replaces a list of supported architectures, and what the engine
would get wrong is refused instead of served. With stages the whole weights are on nobody, so a small copy of the model with random
weights is tried; the verdict is kept for the life of the process.
"""

import threading
from collections.abc import Callable, Mapping

import torch

from spotserve.core.errors import ModelError
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.attention import KvCache
from spotserve.engine.batch import RowLayout, StepLayout
from spotserve.engine.catalogue import Catalogue, make_catalogue
from spotserve.engine.cuts import StageSlice
from spotserve.engine.device import PROCESSOR
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.sequence import new_sequence
from spotserve.engine.shards import Shards
from spotserve.engine.shrunken import random_weights, shrunken
from spotserve.engine.skeleton import BUILD_ERRORS, build_skeleton
from spotserve.engine.stage import Stage
from spotserve.engine.thread_shards import run_shards, thread_shards

MakeStage = Callable[[Catalogue, StageSlice, Mapping[str, torch.Tensor], Shards], Stage]
"""Makes the stage of one rank from its part of the weights; raises ModelError for a model that it cannot compute."""

TOLERANCE: Mapping[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}
"""Largest difference, as a share of the range of the logits; parts of the library compute in float32 whatever the dtype."""
_CHUNKS = (6, 1, 5)
"""Tokens of the probe, step by step: longer than the windows of a small copy, and the last ones see keys from the cache."""
_BLOCK_TOKENS = 16
_SEEDS = (1, 2)
"""With random weights an expert may win over another by a rounding error; it will not do so twice."""

_MOST_BYTES = 1 << 30
"""Weights of a copy that is tried; beyond it the check would cost more than the model."""

_verdicts: dict[tuple[object, ...], str | None] = {}
_lock = threading.Lock()


def check(
    catalogue: Catalogue, tensor: int, make_stage: MakeStage, *, dtype: torch.dtype, kind: str, device: torch.device = PROCESSOR
) -> str | None:
    """Why stages that `make_stage` makes cannot compute a model on `tensor` shards in `dtype`; None when they can.

    Args:
        catalogue: of the real model.
        tensor: number of shards (M). Stages are tried at once: every layer is one.
        make_stage: what is to be checked.
        dtype: what to compute in.
        kind: names `make_stage`, for the memory of verdicts.
        device: where these stages compute; the library's own attention is computed on the processor.
    """
    key = (catalogue.config.to_json_string(use_diff=False), tensor, dtype, kind, device.type)
    with _lock:
        if key not in _verdicts:
            _verdicts[key] = _try(catalogue, tensor, make_stage, dtype, device)
        return _verdicts[key]


def _try(catalogue: Catalogue, tensor: int, make_stage: MakeStage, dtype: torch.dtype, device: torch.device) -> str | None:
    reason: str | None = f"no copy of it is below {_MOST_BYTES >> 20} MiB"
    for config in shrunken(catalogue, tensor):
        for seed in _SEEDS:
            try:
                if _num_bytes(build_skeleton(config, dtype)) > _MOST_BYTES:
                    return reason
                reference = build_skeleton(config, dtype, device="cpu", attention="eager")
                random_weights(reference, seed)
                token_ids = [(7919 * (place + 1)) % config.get_text_config().vocab_size for place in range(sum(_CHUNKS))]
                with torch.inference_mode():
                    expected = reference(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
            except (ModelError, *BUILD_ERRORS) as error:
                reason = f"the library cannot compute a small copy of it: {error}"
                break  # too small for the library: the next copy is larger
            small = make_catalogue(config, name=catalogue.spec.name, dtype=dtype)
            reason = _differs(small, reference, token_ids, expected, make_stage, tensor, device)
            if reason is None:
                return None
        else:
            return reason
    return reason


def _num_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _differs(
    small: Catalogue,
    reference: torch.nn.Module,
    token_ids: list[int],
    expected: torch.Tensor,
    make_stage: MakeStage,
    tensor: int,
    device: torch.device,
) -> str | None:
    weights = dict(reference.named_parameters(remove_duplicate=False)) | dict(reference.named_buffers())
    name = type(reference).__name__
    try:
        with torch.inference_mode():
            logits = _served_logits(small, weights, token_ids, make_stage, tensor, device).cpu()
    except (ModelError, *BUILD_ERRORS) as error:
        return f"{name} cannot run on a paged cache: {error}"
    tolerance = TOLERANCE[expected.dtype] * max(1.0, float(expected.max() - expected.min()))
    if logits.shape != expected.shape or not float((logits - expected).abs().max()) <= tolerance:
        return f"{name} gives other logits on a paged cache and {tensor} shards than by itself"
    return None


def _served_logits(
    small: Catalogue,
    weights: Mapping[str, torch.Tensor],
    token_ids: list[int],
    make_stage: MakeStage,
    tensor: int,
    device: torch.device,
) -> torch.Tensor:
    """[tokens, vocabulary], the prompt in chunks, every layer a stage of its own."""
    layouts = _layouts(token_ids)
    hidden: list[torch.Tensor | None] = [None] * len(layouts)
    num_layers = small.spec.num_layers
    for layer in range(num_layers):

        def work(shards: Shards, layer: int = layer, hidden: list[torch.Tensor | None] = hidden) -> list[torch.Tensor]:
            stage_slice = StageSlice(range(layer, layer + 1), num_layers, shards.shard, tensor)
            needed = small.needed(stage_slice).items()
            cuts = {name: small.entries[name].cut for name, _ in needed}
            local = {name: cuts[name].cut_out(weights[name].detach(), cuts[name].whole, held) for name, held in needed}
            stage, cache = make_stage(small, stage_slice, local, shards), _cache(small, stage_slice, device)
            outputs = []
            for layout, incoming in zip(layouts, hidden, strict=True):
                rows = layout.bind(cache, range(_real_rows(layout)))
                outputs.append(stage(rows, incoming, rows.logit_rows if stage_slice.is_last else None))
            return outputs

        hidden = [*run_shards(thread_shards(tensor), work)[0]]
    return torch.cat([logits for logits in hidden if logits is not None])


def _layouts(token_ids: list[int]) -> list[StepLayout]:
    """The probe's steps."""
    request = Request(request_id="probe", prompt_token_ids=tuple(token_ids), sampling=SamplingParams(max_tokens=1))
    sequence = new_sequence(request, seniority=(0, 0.0, 0), end_token_ids=(), emitted_token_ids=())
    sequence.block_ids.append(1)
    layouts = []
    for num_tokens in _CHUNKS:
        layouts.append(RowLayout((ScheduledSequence(sequence, num_tokens),), block_tokens=_BLOCK_TOKENS).build())
        sequence.advance(num_tokens)
    return layouts


def _real_rows(layout: StepLayout) -> int:
    """Rows that are no padding."""
    return int((layout.slots >= _BLOCK_TOKENS).sum())


def _cache(small: Catalogue, stage_slice: StageSlice, device: torch.device) -> KvCache:
    return KvCache(
        stage_slice.layers,
        num_kv_heads=max(1, small.spec.num_kv_heads // stage_slice.tensor),
        head_size=small.spec.head_size,
        num_blocks=2,
        block_tokens=_BLOCK_TOKENS,
        dtype=small.dtype,
        device=device,
    )
