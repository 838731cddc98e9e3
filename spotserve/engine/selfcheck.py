"""Chooses how to compute a model, by trying.

A model is served only if its logits through the paged cache are those of the library's own attention, and by the fused pass only if
that agrees too. A few tokens at start-up replace a list of supported architectures, and a family that the engine would get
wrong is refused instead of served.
"""

from collections.abc import Mapping

import torch

from spotserve.core.errors import ModelError
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.attention import ATTENTION_NAME, KvCache
from spotserve.engine.batch import RowLayout
from spotserve.engine.forward import Forward, LibraryForward
from spotserve.engine.fused import FusedForward
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.sequence import new_sequence
from spotserve.engine.weights import LoadedModel

_TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,  # parts of the library's definitions compute in float32 whatever the dtype
    torch.float32: 1e-3,
    torch.float16: 0.03,
    torch.bfloat16: 0.15,
}
"""Largest difference, as a share of the largest logit."""
_PROBE_TOKENS = 8


def choose_forward(model: LoadedModel, *, block_tokens: int) -> Forward:
    """The fastest way to compute `model` that agrees with the library.

    Raises:
        ModelError: none does.
    """
    probe = [(7919 * (place + 1)) % model.spec.vocabulary_size for place in range(_PROBE_TOKENS)]
    try:
        expected = _library_logits(model, probe)
        library = LibraryForward(model)
        served = _paged_logits(model, library, probe, block_tokens)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise ModelError(f"{model.spec.name}: {type(model.module).__name__} cannot run on a paged cache: {error}") from error
    if not _agree(served, expected):
        raise ModelError(f"{model.spec.name}: {type(model.module).__name__} gives other logits on a paged cache than by itself")
    if FusedForward.fits(model):
        fused = FusedForward(model)
        if _agree(_paged_logits(model, fused, probe, block_tokens), expected):
            return fused
    return library


def _library_logits(model: LoadedModel, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] by the library's plainest attention."""
    model.module.set_attn_implementation("eager")
    try:
        output = model.module(input_ids=torch.tensor([token_ids]), use_cache=False)
    finally:
        model.module.set_attn_implementation(ATTENTION_NAME)
    logits: torch.Tensor = output.logits[0]
    return logits


def _paged_logits(model: LoadedModel, forward: Forward, token_ids: list[int], block_tokens: int) -> torch.Tensor:
    """[tokens, vocabulary] through a small cache of its own."""
    num_blocks = 1 + -(-len(token_ids) // block_tokens)
    device = next(model.module.parameters()).device
    cache = KvCache(model.spec, num_blocks=num_blocks, block_tokens=block_tokens, dtype=model.dtype, device=device)
    request = Request(request_id="probe", prompt_token_ids=tuple(token_ids), sampling=SamplingParams(max_tokens=1))
    sequence = new_sequence(request, seniority=(0.0, 0), end_token_ids=(), emitted_token_ids=())
    sequence.block_ids.extend(range(1, num_blocks))
    rows = RowLayout((ScheduledSequence(sequence, len(token_ids)),), cache).build()
    return forward(rows, torch.arange(len(token_ids), device=device))


def _agree(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = _TOLERANCE[expected.dtype] * max(1.0, float(expected.abs().max()))
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= tolerance)
