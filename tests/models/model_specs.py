"""Models for tests that need no weights: a small shape, and whatever a test wants different about it."""

from typing import Any

from spotserve.core.model import ModelSpec, Portion


def small_spec(**different: Any) -> ModelSpec:
    """Four layers of four units, and the `different` fields."""
    shape: dict[str, Any] = {
        "name": "small",
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_size": 8,
        "vocabulary_size": 100,
        "context_tokens": 512,
        "layer": (Portion(4, 800),),
        "embedding": (Portion(1, 400),),
        "head": (Portion(1, 400),),
        "value_bytes": 4,
        "layer_flops_per_token": 400,
        "head_flops_per_token": 200,
    }
    return ModelSpec(**{**shape, **different})
