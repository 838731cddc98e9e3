"""What fits: weights, activations and KV on every device of a replica.

Invariant: a stage's shards are alike (`core.cut.misfit` said that the model can be cut so), so one shard speaks for its stage.
Knows bytes; no times. Weights that wait in the machine's memory (offload) are not counted here.
"""

from spotserve.core.cut import held_bytes, layers_of
from spotserve.core.hardware import DeviceType
from spotserve.core.model import ModelSpec, Portion
from spotserve.core.plan import Parallel
from spotserve.planner.shards import share_held

USABLE_SHARE = 0.9
"""Of a device's memory; the rest is for the driver, the libraries and fragments (vLLM's `gpu_memory_utilization`)."""

STEP_TOKENS = 2048
"""Tokens of the largest step whose activations must fit (the usual bound of a chunked prefill: Sarathi-Serve, OSDI'24)."""

STATES_PER_TOKEN = 12
"""Vectors of the hidden size that a layer holds per token at its widest: residual and normed state, queries, keys, values, and
gate and up of a feed-forward of 3.5 times the width."""


def stage_weight_bytes(model: ModelSpec, parallel: Parallel, stage: int) -> int:
    """Weights on one device of a stage."""
    layers = len(layers_of(model, parallel)[stage])
    ends: tuple[Portion, ...] = ()
    if stage == 0:
        ends += model.embedding
    if stage == parallel.pipeline - 1:
        ends += model.head
    return layers * held_bytes(model.layer, parallel.tensor, 0) + held_bytes(ends, parallel.tensor, 0)


def activation_bytes(model: ModelSpec, parallel: Parallel, step_tokens: int = STEP_TOKENS) -> int:
    """What a step holds besides weights and KV: the states of its tokens, and the logits of a whole batch as 32-bit numbers."""
    states = step_tokens * STATES_PER_TOKEN * model.hidden_size * model.value_bytes
    return states + parallel.max_batch * model.vocabulary_size * 4


def kv_tokens(model: ModelSpec, parallel: Parallel, device: DeviceType, step_tokens: int = STEP_TOKENS) -> int | str:
    """Tokens that the KV cache of a replica holds, as many as its fullest device; or why it cannot hold any.

    `misfit` must have said that the model can be cut so.
    """
    usable = int(USABLE_SHARE * device.memory_bytes)
    held = share_held(model.num_kv_heads, parallel.tensor)
    each = 2 * model.num_kv_heads * held * model.head_size * model.value_bytes
    room: int | None = None
    for stage, layers in enumerate(layers_of(model, parallel)):
        needed = stage_weight_bytes(model, parallel, stage) + activation_bytes(model, parallel, step_tokens)
        tokens = int((usable - needed) // (len(layers) * each))
        if tokens < 1:
            return _too_large(model, parallel, device, stage, needed + round(len(layers) * each), usable)
        room = tokens if room is None else min(room, tokens)
    assert room is not None
    return room


def _too_large(model: ModelSpec, parallel: Parallel, device: DeviceType, stage: int, needed: int, usable: int) -> str:
    shape = f"(P={parallel.pipeline}, M={parallel.tensor})"
    return (
        f"{model.name} as {shape}: stage {stage} needs {_size(needed)} of weights, activations and KV on each {device.name}, "
        f"{_size(needed - usable)} more than the {_size(usable)} that may be used"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
