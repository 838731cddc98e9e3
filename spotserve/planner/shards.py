"""What one shard of a layer computes and reads: a model's shape and a machine's rates become the pieces of `StepCost`.

Shards share work as `core.cut` shares weights: what has fewer units than shards is computed on several of them. Mixtures of
experts are taken to read the weights of all experts in every step, which is true of all but small batches. The embedding takes no
time: a step reads a row of it per token.
"""

from functools import lru_cache

from spotserve.core.cut import divides, held_bytes, units_held
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec, Portion
from spotserve.planner.collectives import all_reduce_s, gather_s
from spotserve.planner.roofline import StepCost

_SUMS_PER_LAYER = 2
"""After attention and after the feed-forward (Megatron-LM, arXiv 1909.08053)."""


def share_held(num_units: int, tensor: int) -> float:
    """Share of what is made of `num_units` units that one of `tensor` shards has; all of it where they cannot be divided."""
    return len(units_held(num_units, tensor, 0)) / num_units if divides(num_units, tensor) else 1.0


def _weights_share(portions: tuple[Portion, ...], tensor: int) -> float:
    total = sum(portion.num_bytes for portion in portions)
    return held_bytes(portions, tensor, 0) / total if total else 1.0


@lru_cache(maxsize=4096)
def layer_cost(model: ModelSpec, tensor: int, hardware: InstanceType) -> StepCost:
    """One decoder layer on one of `tensor` shards, with the two sums over all of them; `core.cut.misfit` must have agreed."""
    device = hardware.device
    pair_flops = 4 * model.num_heads * share_held(model.num_heads, tensor) * model.head_size
    kv_bytes = 2 * model.num_kv_heads * share_held(model.num_kv_heads, tensor) * model.head_size * model.value_bytes
    state_bytes = model.hidden_size * model.value_bytes
    latency_s = all_reduce_s(0, tensor, hardware)
    return StepCost(
        constant_s=device.layer_overhead_s + _SUMS_PER_LAYER * latency_s,
        weights_s=held_bytes(model.layer, tensor, 0) / device.memory_bytes_per_s,
        token_s=model.layer_flops_per_token * _weights_share(model.layer, tensor) / device.flops_per_s,
        pair_s=pair_flops / device.flops_per_s,
        kv_token_s=kv_bytes / device.memory_bytes_per_s,
        token_link_s=_SUMS_PER_LAYER * (all_reduce_s(state_bytes, tensor, hardware) - latency_s),
    )


@lru_cache(maxsize=4096)
def head_cost(model: ModelSpec, tensor: int, hardware: InstanceType) -> StepCost:
    """Final norm and head on one of `tensor` shards, and the gathering of the logits where shards divide them."""
    device = hardware.device
    share = _weights_share(model.head, tensor)
    is_divided = tensor > 1 and any(portion.units > 1 for portion in model.head)
    latency_s = gather_s(0, tensor, hardware) if is_divided else 0.0
    logits_bytes = model.vocabulary_size * model.value_bytes
    return StepCost(
        constant_s=device.layer_overhead_s + latency_s,
        weights_s=held_bytes(model.head, tensor, 0) / device.memory_bytes_per_s,
        token_s=model.head_flops_per_token * share / device.flops_per_s,
        pair_s=0.0,
        kv_token_s=0.0,
        token_link_s=gather_s(logits_bytes, tensor, hardware) - latency_s if is_divided else 0.0,
    )


def layer_step_s(
    model: ModelSpec, tensor: int, hardware: InstanceType, *, tokens: float, pairs: float = 0.0, kv_tokens: float = 0.0
) -> float:
    """One decoder layer in a step, see `StepCost.seconds`."""
    return layer_cost(model, tensor, hardware).seconds(tokens, pairs, kv_tokens)


def head_step_s(model: ModelSpec, tensor: int, hardware: InstanceType, *, outputs: float) -> float:
    """Final norm and head in a step that wants the logits of `outputs` tokens."""
    return head_cost(model, tensor, hardware).seconds(outputs)
