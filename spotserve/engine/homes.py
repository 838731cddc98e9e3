"""Which modules turn token ids into the first hidden state, and which the last one into logits.

Found by watching, not by name: one forward pass in which the decoder layers only hand on what they get, and everything outside
them gives values of the right shape without weights. What runs before the first layer belongs to the embedding, what runs after
the last to the head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spotserve.core.cut import EMBEDDING
from spotserve.core.errors import ModelError
from spotserve.engine.skeleton import BUILD_ERRORS, LibraryModule, PassThrough, decoder_layers, owners_outside, stand_in

_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Homes:
    """What a stage needs to know to leave out what is not its own."""

    layers_path: str
    """Where the list of decoder layers is in the module tree."""
    layers_in_tuple: bool
    """Whether a decoder layer returns a tuple that begins with the hidden state."""
    outside: dict[str, int]
    """Paths of modules with parameters of their own -> `EMBEDDING`, or the number of layers for the head."""


class _OtherForm(Exception):
    """A layer was not given [1, rows, hidden]: layers of this family return something else."""


def find_homes(module: LibraryModule, num_layers: int) -> Homes:
    """Watches a skeleton run; the skeleton is spent afterwards.

    Raises:
        ModelError: it cannot be cut into stages: more than the hidden state goes from layer to layer, a part outside the
            layers runs between them, or keywords do not reach the layers.
    """
    name = type(module).__name__
    path, layers = decoder_layers(module, num_layers)
    originals = list(layers)
    reason: Exception | None = None
    for in_tuple in (False, True):
        watch = _Watch(name, num_layers)
        for index, layer in enumerate(originals):
            layers[index] = PassThrough(layer, in_tuple=in_tuple, seen=watch.layer_ran)
        for owner_path, owner in owners_outside(module, path):
            owner.forward = watch.watched(owner_path, stand_in(owner, fill=torch.nan))
        ids = torch.arange(_TOKENS)[None]
        try:
            module(input_ids=ids, position_ids=ids, logits_to_keep=torch.arange(_TOKENS), use_cache=False, paged=watch)
        except _OtherForm:
            continue
        except BUILD_ERRORS as error:
            reason = reason or error
            continue
        if watch.layers_run != num_layers:
            raise ModelError(f"{name}: cannot be cut into stages: it runs {watch.layers_run} of {num_layers} decoder layers")
        return Homes(path, in_tuple, watch.outside)
    why = reason or "its decoder layers do not hand on one hidden state"
    raise ModelError(f"{name}: cannot be cut into stages: {why}") from reason


class _Watch:
    """Notes what runs when."""

    def __init__(self, name: str, num_layers: int) -> None:
        self._name = name
        self._num_layers = num_layers
        self.layers_run = 0
        self.outside: dict[str, int] = {}

    def layer_ran(self, hidden: object, *args: object, **kwargs: object) -> None:
        """A decoder layer was called."""
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (1, _TOKENS):
            raise _OtherForm
        if kwargs.get("paged") is not self:
            raise ModelError(f"{self._name}: keywords do not reach its decoder layers, so its attention cannot be replaced")
        for value in (*args, *kwargs.values()):
            for part in value if isinstance(value, tuple | list) else (value,):
                # Embeddings gave NaN: what is NaN here was made from token ids, and only the first stage has it.
                if isinstance(part, torch.Tensor) and part.is_floating_point() and bool(part.isnan().any()):
                    raise ModelError(f"{self._name}: more than the hidden state goes from the embedding to its decoder layers")
        self.layers_run += 1

    def watched(self, path: str, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`forward`, with a note of when it ran."""

        def run(*args: object, **kwargs: object) -> torch.Tensor:
            home = EMBEDDING if self.layers_run == 0 else self._num_layers
            if home == self._num_layers and self.layers_run < self._num_layers:
                raise ModelError(f"{self._name}: {path} runs between decoder layers")
            if self.outside.setdefault(path, home) != home:
                raise ModelError(f"{self._name}: {path} runs before and after the decoder layers")
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if home == self._num_layers and first is not None and first.dim() != 3:
                raise _OtherForm
            return forward(*args, **kwargs)

        return run
