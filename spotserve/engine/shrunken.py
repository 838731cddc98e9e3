"""Small copies of a configuration: the same classes, the same heads, the same kinds of layers, and little of everything else.

What is right for the copy is right for the model, as the code that runs is the same; its weights are random and few, so that
trying costs less than reading the first layer of the real ones.
"""

import copy
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

from spotserve.engine.catalogue import Catalogue

VOCABULARY = 64
WINDOW = 5
_HEAD_SIZE = 16
_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_WINDOWS = ("sliding_window", "attention_chunk_size")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrunken(catalogue: Catalogue, tensor: int) -> Iterator[PreTrainedConfig]:
    """Copies, the smallest first; the library may not like one (some widths depend on others), and then takes the next.

    Args:
        catalogue: of the real model.
        tensor: number of shards by which what is divided must stay divisible.
    """
    for narrowed in (("inside", "hidden", "heads"), ("inside", "hidden"), ("inside",), ()):
        config = copy.deepcopy(catalogue.config)
        text = config.get_text_config()
        _take_layers(text, _layers_that_matter(catalogue))
        text.vocab_size = VOCABULARY * tensor
        for name in _TOKENS:
            if getattr(text, name, None) is not None:
                setattr(text, name, 0)
        for name in _WINDOWS:
            if getattr(text, name, None):
                setattr(text, name, WINDOW)
        if "inside" in narrowed:
            for name in _WIDTHS:
                if isinstance(getattr(text, name, None), int):
                    setattr(text, name, 16 * tensor)
        if "hidden" in narrowed:
            if getattr(text, "word_embed_proj_dim", None) == text.hidden_size:
                text.word_embed_proj_dim = text.num_attention_heads * _HEAD_SIZE
            text.hidden_size = text.num_attention_heads * _HEAD_SIZE
        if "heads" in narrowed and getattr(text, "head_dim", None) is not None:
            text.head_dim = _HEAD_SIZE
        yield config


def random_weights(module: torch.nn.Module, seed: int) -> None:
    """Gives every parameter values that matter: none is 0 or 1 everywhere, and activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        if parameter.dim() >= 2:
            parameter.data = noise * (0.5 if "emb" in name else parameter.shape[-1] ** -0.5)
        else:
            parameter.data = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)


def _layers_that_matter(catalogue: Catalogue) -> int:
    """As many layers from the first on as have one of each kind."""
    kinds: dict[object, int] = {}
    types = getattr(catalogue.config.get_text_config(), "layer_types", None)
    prefix = f"{catalogue.homes.layers_path}."
    shapes: dict[int, list[object]] = {}
    for entry in catalogue.entries.values():
        if entry.name.startswith(prefix):
            shapes.setdefault(entry.home, []).append((entry.name.removeprefix(f"{prefix}{entry.home}."), entry.shape))
    for layer, inside in shapes.items():
        kinds.setdefault((tuple(inside), types[layer] if types else None), layer)
    return min(max(2, *(first + 1 for first in kinds.values())), catalogue.spec.num_layers)


def _take_layers(text: PreTrainedConfig, num_layers: int) -> None:
    """The first layers, also where the configuration says something of each."""
    everything = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == everything and not name.startswith("_"):
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
