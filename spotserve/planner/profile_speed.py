"""How fast a replica is by a published profile, and what fits its devices: other plans judged by the numbers of `spotserve-2024`.

What a profile leaves open is settled so that one sequence alone takes exactly the published time (`spotserve_2024.latency_ms`):

- Every stage has f layers, the most that any has: ceil(layers / P) unless the shape says otherwise. Empty layers take no time.
- With n sequences on P stages there are P groups in flight, of max(1, n / P) sequences each: a token comes after P * f layers and
  P - 1 hops. Between measured batches times are linear, beyond the last two they go on as between those, and never fall.
- A profile has one context length (512 to 640 tokens); longer contexts cost nothing more. Prompts cost in proportion to 512.

Weights and KV are bytes of a `ModelSpec`; `published_model` makes that of the artifact, where all is float32.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import ceil

from spotserve.core.cut import held_bytes, layers_of, misfit, units_held
from spotserve.core.model import ModelSpec, Portion
from spotserve.core.plan import Parallel
from spotserve.planner.profiles import PROMPT_TOKENS, Profile

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class ProfileSpeed:
    """A `planner.speed.ReplicaSpeed`."""

    max_batch: int
    """Sequences that it runs at once: B of its shape, or as many of the longest as its memory holds."""
    kv_tokens: int
    """Tokens that its KV cache holds in all, in the memory of its fullest device."""
    pipeline: int
    stage_layers: int
    """Of the slowest stage."""
    init_ms: float
    """One layer, one prompt of 512 tokens."""
    incr_ms: tuple[tuple[int, float], ...]
    """One layer, one token of a batch: (batch, milliseconds), by batch."""
    init_hop_ms: float
    incr_hop_ms: float
    embed_ms: float
    fix_factor: float

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """Between two tokens of one sequence when so many run; the context does not matter (see the module)."""
        del context_tokens
        layers_ms = self.pipeline * self.stage_layers * _between(self.incr_ms, sequences / self.pipeline)
        return self.fix_factor * (layers_ms + (self.pipeline - 1) * self.incr_hop_ms) / 1000

    def prompt_s(self, tokens: float) -> float:
        """A prompt on the slowest stage."""
        return self.fix_factor * self.stage_layers * self.init_ms * tokens / PROMPT_TOKENS / 1000

    def first_token_s(self, tokens: float) -> float:
        """Until a prompt is through all stages; the embedding of the whole request is counted here, as the formula does."""
        hops_ms = (self.pipeline - 1) * self.init_hop_ms * tokens / PROMPT_TOKENS
        return self.pipeline * self.prompt_s(tokens) + self.fix_factor * (hops_ms + 2 * self.embed_ms) / 1000


def profile_speed(
    profile: Profile, parallel: Parallel, *, model: ModelSpec, device_memory_bytes: int, min_devices: int = 1
) -> ProfileSpeed | str:
    """How fast a replica of this shape is, or why there is none.

    Args:
        profile: of the model on the machines in question.
        parallel: the shape; a tensor degree over several machines is as fast as the profile has it.
        model: bytes of weights and KV, and the tokens that a sequence may have (`published_model` makes one).
        device_memory_bytes: what weights and KV of one device may take.
        min_devices: P * M of the smallest replica that is allowed, whatever the memory (the artifact's `min_world_size`).
    """
    pipeline, tensor = parallel.pipeline, parallel.tensor
    if (problem := misfit(model, pipeline, tensor)) is not None:
        return problem
    if tensor not in profile.tensors:
        return f"profile {profile.name} has no times for {tensor} shards"
    if parallel.num_slots < min_devices:
        return f"a replica takes {min_devices} devices at least"
    kv_tokens = _kv_tokens(model, parallel, device_memory_bytes)
    if kv_tokens < model.context_tokens:
        told = "weights do not fit" if kv_tokens < 0 else f"{kv_tokens} tokens of KV fit, a request may have {model.context_tokens}"
        return f"{told} on {parallel.num_slots} devices of {device_memory_bytes / 1e9:.1f} GB"
    return ProfileSpeed(
        max_batch=min(parallel.max_batch, kv_tokens // model.context_tokens),
        kv_tokens=kv_tokens,
        pipeline=pipeline,
        stage_layers=max(parallel.stage_layers, default=ceil(profile.num_layers / pipeline)),
        init_ms=profile.layer_ms[tensor, 1].init,
        incr_ms=tuple((batch, profile.layer_ms[tensor, batch].incr) for batch in profile.batches),
        init_hop_ms=profile.init_hop_ms,
        incr_hop_ms=profile.incr_hop_ms,
        embed_ms=profile.embed_ms[0],
        fix_factor=profile.fix_factor,
    )


def published_model(
    profile: Profile, *, vocabulary_size: int, context_tokens: int, head_size: int = 128, padded: bool = False
) -> ModelSpec:
    """The model behind a profile as the artifact keeps it: float32, a GPT layer of 12 h^2 + 13 h weights.

    Args:
        profile: says layers and width h.
        vocabulary_size: entries of the embedding, which the last stage has once more.
        context_tokens: learnt positions: the longest prompt and output together.
        head_size: of every attention head; divides h.
        padded: whether the empty layers count, which the artifact stores and moves like the others.
    """
    width = profile.hidden_size
    assert width % head_size == 0
    heads = width // head_size
    return ModelSpec(
        name=profile.name,
        num_layers=profile.padded_layers if padded else profile.num_layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size,
        vocabulary_size=vocabulary_size,
        context_tokens=context_tokens,
        layer=(Portion(heads, _FLOAT32 * (12 * width + 7) * width), Portion(1, _FLOAT32 * 6 * width)),
        embedding=(Portion(1, _FLOAT32 * (vocabulary_size + context_tokens) * width),),
        head=(Portion(1, _FLOAT32 * (vocabulary_size + 2) * width),),
        value_bytes=_FLOAT32,
        layer_flops_per_token=2 * 12 * width * width,
        head_flops_per_token=2 * vocabulary_size * width,
    )


def _between(points: tuple[tuple[int, float], ...], at: float) -> float:
    """The value at `at`, by lines through the points; before the first its value, after the last no less than it."""
    if at <= points[0][0] or len(points) == 1:
        return points[0][1]
    after = min(bisect_left(points, (at, 0.0)), len(points) - 1)
    (left, low), (right, high) = points[after - 1], points[after]
    slope = (high - low) / (right - left)
    return high + max(0.0, slope) * (at - right) if at > right else low + slope * (at - left)


def _kv_tokens(model: ModelSpec, parallel: Parallel, device_memory_bytes: int) -> int:
    """Tokens of KV beside the weights on the fullest device; negative: not even the weights fit."""
    tokens = []
    for stage, layers in enumerate(layers_of(model, parallel)):
        for shard in range(parallel.tensor):
            weights = len(layers) * held_bytes(model.layer, parallel.tensor, shard)
            weights += held_bytes(model.embedding, parallel.tensor, shard) if stage == 0 else 0
            weights += held_bytes(model.head, parallel.tensor, shard) if stage == parallel.pipeline - 1 else 0
            heads = len(units_held(model.num_kv_heads, parallel.tensor, shard))
            per_token = len(layers) * heads * 2 * model.head_size * model.value_bytes
            tokens.append((device_memory_bytes - weights) // per_token)
    return min(tokens)
