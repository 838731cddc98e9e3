"""A model without weights: the library's own module tree, and the modules that stand in where a stage has nothing to compute.

The tree is built on torch's meta device, so it costs no memory whatever the model; tables that follow from the configuration
(rotary frequencies, scales) are computed for real, by the library's own initialisation. Knows modules; does not know files,
shards or attention.
"""

import copy
import re
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as library_logging

from spotserve.core.errors import ModelError
from spotserve.engine.attention import ATTENTION_NAME

LibraryModule: TypeAlias = Any
"""A torch module of transformers, whose parts have no static types."""
_BUILDING = Lock()
"""The library sets torch's default dtype while it builds, for all threads, and back: two at once could leave the wrong one."""
BUILD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    AttributeError,
    TypeError,
    IndexError,
    AssertionError,
    StrictDataclassError,
)
"""What the library raises for a configuration that it cannot build or run."""


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, *, device: str = "meta", attention: str = ATTENTION_NAME
) -> LibraryModule:
    """The module of a configuration, its parameters on `device` and without values.

    Raises:
        ModelError: the library has no causal language model for it, or does not let its attention be replaced.
    """
    library_logging.disable_progress_bar()
    try:
        with _BUILDING, torch.device(device):
            module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    except KeyError as error:
        if ATTENTION_NAME not in error.args:
            raise ModelError(f"{config.model_type}: the library cannot build it: {error}") from error
        raise ModelError(f"{config.model_type}: its attention cannot be replaced") from error
    except BUILD_ERRORS as error:
        raise ModelError(f"{config.model_type}: the library cannot build it: {error}") from error
    _keep_precise(module, dtype)
    _compute_tables(module)
    return module.eval().requires_grad_(False)


def _keep_precise(module: LibraryModule, dtype: torch.dtype) -> None:
    """Gives parameters that the library loads in float32, whatever it computes in, that dtype."""
    patterns = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else set()
    if dtype == torch.float16:
        patterns |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if not patterns:
        return
    precise = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for path, owner in module.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and precise.search(f"{path}.{leaf}"):
                owner._parameters[leaf] = torch.nn.Parameter(parameter.float())
        for leaf in persistent_buffers(owner):
            if owner._buffers[leaf] is not None and precise.search(f"{path}.{leaf}"):
                owner._buffers[leaf] = owner._buffers[leaf].float()


def _compute_tables(module: LibraryModule) -> None:
    """Gives the buffers that are in no file their values, the way the library does after loading."""
    for name, owner in module.named_modules():
        tables = owner._non_persistent_buffers_set & owner._buffers.keys()
        meta = [leaf for leaf in tables if owner._buffers[leaf] is not None and owner._buffers[leaf].is_meta]
        for leaf in meta:
            owner._buffers[leaf] = torch.full_like(owner._buffers[leaf], 0, device="cpu")
        if meta:
            _library_model_of(module, name)._init_weights(owner)


def _library_model_of(module: LibraryModule, path: str) -> LibraryModule:
    """The innermost module on the way to `path` that initialises its parts."""
    found, at = module, module
    for part in path.split(".") if path else ():
        at = getattr(at, part)
        if hasattr(at, "_init_weights"):
            found = at
    return found


def decoder_layers(module: LibraryModule, num_layers: int) -> tuple[str, torch.nn.ModuleList]:
    """Path and list of the decoder layers, wherever the family keeps them.

    Raises:
        ModelError: there is none of this length.
    """
    text = module.get_decoder() if hasattr(module, "get_decoder") else module  # beside it may stand an encoder of images
    lists = {name: child for name, child in module.named_modules() if isinstance(child, torch.nn.ModuleList)}
    for inside in (text, module):
        below = set(inside.modules())
        for name, child in lists.items():
            if len(child) == num_layers and child in below:
                return name, child
    raise ModelError(f"{type(module).__name__}: no list of {num_layers} decoder layers")


def owners_outside(module: LibraryModule, layers_path: str) -> Iterator[tuple[str, LibraryModule]]:
    """Modules with parameters of their own that are in no decoder layer, by path."""
    for name, child in module.named_modules():
        inside = name == layers_path or name.startswith(layers_path + ".")
        if not inside and (child._parameters.keys() or persistent_buffers(child)):
            yield name, child


def move(module: LibraryModule, device: torch.device) -> LibraryModule:
    """Gives a module its values on `device`, as far as it has any: what stands in for others has none. Returns the module."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.device.type != device.type:
                owner._parameters[leaf] = torch.nn.Parameter(parameter.to(device), requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[leaf] = buffer.to(device)
    return module


def persistent_buffers(module: torch.nn.Module) -> list[str]:
    """Buffers of a module itself that are in its files, like parameters."""
    return [leaf for leaf in module._buffers if leaf not in module._non_persistent_buffers_set]


class PassThrough(torch.nn.Module):
    """Stands in for a decoder layer that another stage computes: hands the hidden state on."""

    def __init__(self, layer: torch.nn.Module, *, in_tuple: bool, seen: Callable[..., None] | None = None) -> None:
        """`in_tuple`: whether the family's layers return a tuple; `seen` is told what the layer was called with."""
        super().__init__()
        for name, value in vars(layer).items():  # the model may ask a layer for its kind of attention
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self._in_tuple = in_tuple
        self._seen = seen

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        """The hidden state, as it came."""
        if self._seen is not None:
            self._seen(hidden_states, *args, **kwargs)
        return (hidden_states,) if self._in_tuple else hidden_states


def stand_in(module: LibraryModule, fill: float = 0.0) -> Callable[..., torch.Tensor]:
    """A forward for a module outside the decoder layers that another stage computes: the right shape, no weights.

    An embedding gives `fill` for every id, a linear layer for every output; anything else (norms) gives back its input.
    """

    def embed(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.full((*ids.shape, width), fill, dtype=dtype, device=ids.device)

    def project(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_full((*hidden.shape[:-1], width), fill)

    def keep(hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden

    if isinstance(module, torch.nn.Embedding):
        width, dtype = module.embedding_dim, module.weight.dtype
        return embed
    if isinstance(module, torch.nn.Linear):
        width = module.out_features
        return project
    return keep
