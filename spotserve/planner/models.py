"""Shapes of well-known models, so that a plan can be asked for without their files.

Invariant: portions are divided as the engine divides the real thing: queries and output by heads, keys and values by kept heads,
the feed-forward by columns, the head by rows of the vocabulary, norms not at all. Shapes are those of the published
configurations, from memory; weights are counted, biases and norms included. Knows no file formats.
"""

from collections.abc import Callable
from math import gcd, lcm

from spotserve.core.errors import ConfigError
from spotserve.core.model import ModelSpec, Portion


def named_model(name: str) -> ModelSpec:
    """The shape of a model that is known by name.

    Raises:
        ConfigError: nobody knows it; the message lists what is known.
    """
    make = MODELS.get(name)
    if make is None:
        raise ConfigError(f"model {name!r} is not known; known are {', '.join(MODELS)}")
    return make(name)


def _gated(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    inner: int,
    vocabulary: int,
    context: int,
    qkv_bias: bool = False,
) -> Callable[[str], ModelSpec]:
    """LLaMA's layer: rotary attention, gated feed-forward, RMS norms; 16-bit numbers."""
    size = hidden // heads
    bias = int(qkv_bias)
    parts = {heads: heads * size * (2 * hidden + bias), inner: 3 * hidden * inner, 1: 2 * hidden}
    parts[kv_heads] = parts.get(kv_heads, 0) + 2 * kv_heads * size * (hidden + bias)
    matrices = 2 * hidden * heads * size + 2 * hidden * kv_heads * size + 3 * hidden * inner

    def make(name: str) -> ModelSpec:
        return ModelSpec(
            name=name,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=size,
            vocabulary_size=vocabulary,
            context_tokens=context,
            layer=_portions(parts, value_bytes=2),
            embedding=(Portion(1, 2 * hidden * vocabulary),),
            head=_portions({_head_units(heads, inner, vocabulary): hidden * vocabulary, 1: hidden}, value_bytes=2),
            value_bytes=2,
            layer_flops_per_token=2 * matrices,
            head_flops_per_token=2 * hidden * vocabulary,
        )

    return make


def _plain(*, layers: int, hidden: int, heads: int, vocabulary: int, context: int = 2048) -> Callable[[str], ModelSpec]:
    """GPT's layer: learned positions, feed-forward of four times the width, biases, tied embedding; 32-bit numbers."""
    inner = 4 * hidden
    parts = {heads: 4 * hidden * hidden + 3 * hidden, inner: 2 * hidden * inner + inner, 1: 2 * hidden + 4 * hidden}

    def make(name: str) -> ModelSpec:
        return ModelSpec(
            name=name,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_size=hidden // heads,
            vocabulary_size=vocabulary,
            context_tokens=context,
            layer=_portions(parts, value_bytes=4),
            embedding=(Portion(1, 4 * hidden * (vocabulary + context)),),
            head=_portions({_head_units(heads, inner, vocabulary): hidden * vocabulary, 1: 2 * hidden}, value_bytes=4),
            value_bytes=4,
            layer_flops_per_token=2 * (4 * hidden * hidden + 2 * hidden * inner),
            head_flops_per_token=2 * hidden * vocabulary,
        )

    return make


def _portions(parts: dict[int, int], *, value_bytes: int) -> tuple[Portion, ...]:
    """Numbers by units, as portions in rising order of units."""
    return tuple(Portion(units, value_bytes * parts[units]) for units in sorted(parts))


def _head_units(heads: int, inner: int, vocabulary: int) -> int:
    """Into how many equal parts the head is divided: as many as go with all numbers of shards that the layers allow."""
    possible = [tensor for tensor in range(1, heads + 1) if heads % tensor == 0 and inner % tensor == 0]
    return gcd(vocabulary, lcm(*possible))


MODELS: dict[str, Callable[[str], ModelSpec]] = {
    "llama-2-7b": _gated(layers=32, hidden=4096, heads=32, kv_heads=32, inner=11_008, vocabulary=32_000, context=4096),
    "llama-2-13b": _gated(layers=40, hidden=5120, heads=40, kv_heads=40, inner=13_824, vocabulary=32_000, context=4096),
    "llama-2-70b": _gated(layers=80, hidden=8192, heads=64, kv_heads=8, inner=28_672, vocabulary=32_000, context=4096),
    "llama-3-8b": _gated(layers=32, hidden=4096, heads=32, kv_heads=8, inner=14_336, vocabulary=128_256, context=8192),
    "llama-3-70b": _gated(layers=80, hidden=8192, heads=64, kv_heads=8, inner=28_672, vocabulary=128_256, context=8192),
    "mistral-7b": _gated(layers=32, hidden=4096, heads=32, kv_heads=8, inner=14_336, vocabulary=32_000, context=32_768),
    "qwen2.5-0.5b": _gated(
        layers=24, hidden=896, heads=14, kv_heads=2, inner=4864, vocabulary=151_936, context=32_768, qkv_bias=True
    ),
    "qwen2.5-7b": _gated(
        layers=28, hidden=3584, heads=28, kv_heads=4, inner=18_944, vocabulary=152_064, context=32_768, qkv_bias=True
    ),
    # As SpotServe's artifact serves them (ASPLOS'24, Table 1): all three by GPT's code, 32-bit, random weights. Its "LLaMA-30B"
    # has the shape of OPT-30B.
    "opt-6.7b": _plain(layers=32, hidden=4096, heads=32, vocabulary=50_272),
    "gpt-20b": _plain(layers=44, hidden=6144, heads=48, vocabulary=50_304),
    "llama-30b": _plain(layers=48, hidden=7168, heads=56, vocabulary=50_304),
}
