"""From a folder in Hugging Face format (or a hub id) to a torch module and what the rest of the system knows of it.

The library's own model definitions are used as they are; only their attention is replaced. Files in another dtype are converted
on the way in. What cannot be loaded or served is a `ModelError` that names model and reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as library_logging

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.model import ModelSpec
from spotserve.engine.attention import ATTENTION_NAME

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

LibraryModule: TypeAlias = Any
"""A torch module of transformers, whose parts have no static types."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in memory."""

    module: LibraryModule
    """A transformers model; its attention calls `paged_attention`."""
    spec: ModelSpec
    dtype: torch.dtype
    end_token_ids: tuple[int, ...]
    """What ends text by itself, as the model's configuration says."""


def load_model(settings: EngineSettings) -> LoadedModel:
    """Loads `settings.model`.

    Raises:
        ModelError: it cannot be read, is no causal language model, or does not let its attention be replaced.
    """
    dtype = DTYPES[settings.dtype]
    library_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(settings.model)
        module = AutoModelForCausalLM.from_pretrained(
            settings.model, config=config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{settings.model}: cannot be loaded: {error}") from error
    module.eval().requires_grad_(False)
    return LoadedModel(module, _spec_of(module, settings.model_name), dtype, _end_token_ids(module))


def decoder_layers(module: LibraryModule, num_layers: int) -> torch.nn.ModuleList:
    """The list of decoder layers, wherever the family keeps it.

    Raises:
        ModelError: there is none of this length.
    """
    for child in module.modules():
        if isinstance(child, torch.nn.ModuleList) and len(child) == num_layers:
            return child
    raise ModelError(f"{type(module).__name__}: no list of {num_layers} decoder layers")


def _num_bytes(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.nbytes for parameter in module.parameters())


def _spec_of(module: LibraryModule, name: str) -> ModelSpec:
    config = module.config.get_text_config()
    heads = config.num_attention_heads
    layers = decoder_layers(module, config.num_hidden_layers)
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    rest = _num_bytes(module) - _num_bytes(layers) - _num_bytes(embedding)  # norm, positions, and the head unless tied
    return ModelSpec(
        name=name,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary_size=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        layer_bytes=_num_bytes(layers[0]),
        embedding_bytes=_num_bytes(embedding),
        head_bytes=rest + (_num_bytes(head) if tied else 0),
        value_bytes=embedding.weight.element_size(),
    )


def _end_token_ids(module: LibraryModule) -> tuple[int, ...]:
    """The generation configuration's word, else the model configuration's; either may name one id or several."""
    generation = getattr(module, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    ids = module.config.get_text_config().eos_token_id if ids is None else ids
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
