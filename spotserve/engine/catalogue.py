"""What a model consists of, from its configuration alone: where each parameter is needed, and how it is cut.

Made once per process from a skeleton; nothing of the weights is read. Everybody who loads, moves or counts weights asks here,
so that plans, readers and ranks agree to the byte.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod

import torch
from transformers import PreTrainedConfig

from spotserve.core.cut import EMBEDDING, misfit
from spotserve.core.errors import ModelError
from spotserve.core.model import ModelSpec, Portion
from spotserve.engine.cuts import WHOLE, Segment, StageSlice, TensorCut
from spotserve.engine.homes import Homes, find_homes
from spotserve.engine.sharding import Division, cut_of, heads_of, is_attention
from spotserve.engine.sharding_rules import divide_layer
from spotserve.engine.skeleton import LibraryModule, build_skeleton, owners_outside, persistent_buffers

Held = tuple[range, ...]
"""Units of each segment of a parameter's cut; empty for one that is held whole."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of the library's module (or a buffer that is in its files)."""

    name: str
    home: int
    """A decoder layer, `core.cut.EMBEDDING`, or the number of layers for the head."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: TensorCut
    tied_to: str | None = None
    """The parameter that it shares its values with."""

    def num_bytes(self, held: Held) -> int:
        """Bytes of the part that has these units."""
        length = self.cut.size(held) if self.cut.segments else self.shape[self.cut.dim] if self.shape else 1
        return prod(self.shape) // max(1, self.shape[self.cut.dim] if self.shape else 1) * length * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Catalogue:
    """A model, without its weights."""

    config: PreTrainedConfig
    dtype: torch.dtype
    spec: ModelSpec
    homes: Homes
    entries: Mapping[str, Entry]
    divisions: tuple[Division, ...]
    """Of each decoder layer, with names below it; empty ones where shards are out of the question."""
    head_path: str | None
    """The linear layer that gives the logits, if it is one; shards divide it if its weight is cut."""
    unshardable: str | None = None
    """Why the model cannot be cut into shards; None when it can."""

    def check(self, stage_slice: StageSlice) -> None:
        """Whether a rank can compute such a part.

        Raises:
            ModelError: the message names the model and what stands in the way.
        """
        tensor = stage_slice.tensor
        reason = self.unshardable if tensor > 1 else None
        reason = reason or misfit(self.spec, 1, tensor)
        stubborn = next((segment for segment in self._segments() if not self._divides(segment, tensor)), None)
        if reason is None and stubborn is not None:
            reason = f"it has parts of {stubborn.num_units} units, which cannot be cut into {tensor} equal shards"
        if reason is not None:
            raise ModelError(f"{self.spec.name}: {reason}")

    def needed(self, stage_slice: StageSlice) -> dict[str, Held]:
        """Parameters of a rank, and which of their units.

        Raises:
            ModelError: see `check`.
        """
        self.check(stage_slice)
        return {
            entry.name: entry.cut.held(stage_slice.tensor, stage_slice.shard)
            for entry in self.entries.values()
            if is_at_home(entry.home, stage_slice)
        }

    def needed_bytes(self, stage_slice: StageSlice) -> int:
        """Weights of a rank; a tied embedding counts at both ends."""
        return sum(self.entries[name].num_bytes(held) for name, held in self.needed(stage_slice).items())

    def _segments(self) -> Iterator[Segment]:
        for entry in self.entries.values():
            yield from entry.cut.segments

    def _divides(self, segment: Segment, tensor: int) -> bool:
        """Keys and values may be held twice; partial results that are held twice would be added twice."""
        return segment.num_units % tensor == 0 or (
            segment.num_units == self.spec.num_kv_heads and tensor % segment.num_units == 0 and tensor <= self._num_heads
        )

    @property
    def _num_heads(self) -> int:
        return int(self.config.get_text_config().num_attention_heads)


def is_at_home(home: int, stage_slice: StageSlice) -> bool:
    """Whether a slice computes what lives at `home`."""
    if home == EMBEDDING:
        return stage_slice.is_first
    return home in stage_slice.layers or (home == stage_slice.num_layers and stage_slice.is_last)


def make_catalogue(config: PreTrainedConfig, *, name: str, dtype: torch.dtype) -> Catalogue:
    """Everything about a model that follows from its configuration.

    Args:
        config: as the library reads it.
        name: what clients call the model.
        dtype: of the weights and the KV cache.

    Raises:
        ModelError: the engine cannot serve it; the message names the model and the reason.
    """
    try:
        return _Maker(config, name, dtype).make()
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{name}: its configuration ({config.model_type}) is not that of a decoder: {error}") from error


class _Maker:
    """Makes one catalogue."""

    def __init__(self, config: PreTrainedConfig, name: str, dtype: torch.dtype) -> None:
        self._config = config
        self._name = name
        self._dtype = dtype
        self._text = config.get_text_config()
        self._num_layers: int = self._text.num_hidden_layers
        self._num_kv_heads: int = getattr(self._text, "num_key_value_heads", None) or self._text.num_attention_heads

    def make(self) -> Catalogue:
        self._module = build_skeleton(self._config, self._dtype)
        self._homes = find_homes(build_skeleton(self._config, self._dtype), self._num_layers)
        unshardable, divisions = None, (Division(),) * self._num_layers
        try:
            divisions = tuple(self._division(index) for index in range(self._num_layers))
        except ModelError as error:
            unshardable = str(error)
        layer_entries = [self._layer_entries(index, division) for index, division in enumerate(divisions)]
        portions_of_layers = [_portions(entries) for entries in layer_entries]
        typical = Counter(portions_of_layers).most_common(1)[0][0]
        tied = dict(getattr(self._module, "all_tied_weights_keys", {}))
        head_path, head_units = self._head(typical)
        head_units = 1 if unshardable else head_units
        outside = list(self._outside_entries(head_path, head_units, tied))
        ends = {home: _portions([entry for entry in outside if entry.home == home]) for home in (EMBEDDING, self._num_layers)}
        spec = ModelSpec(
            name=self._name,
            num_layers=self._num_layers,
            hidden_size=self._text.hidden_size,
            num_heads=self._text.num_attention_heads,
            num_kv_heads=self._num_kv_heads,
            head_size=self._head_size(),
            vocabulary_size=self._text.vocab_size,
            context_tokens=self._text.max_position_embeddings,
            layer=typical,
            embedding=ends[EMBEDDING],
            head=ends[self._num_layers],
            value_bytes=self._dtype.itemsize,
            layer_flops_per_token=self._flops_per_token(layer_entries[portions_of_layers.index(typical)]),
            head_flops_per_token=self._flops_per_token([entry for entry in outside if entry.home == self._num_layers]),
        )
        entries = {entry.name: entry for part in (*layer_entries, outside) for entry in part}
        return Catalogue(self._config, self._dtype, spec, self._homes, entries, divisions, head_path, unshardable)

    def _flops_per_token(self, entries: Sequence[Entry]) -> int:
        """Operations for one token: two for each weight of the matrices that it meets. Of experts it meets those it is sent to."""
        num_experts = getattr(self._text, "num_local_experts", None) or getattr(self._text, "num_experts", None) or 1
        met = getattr(self._text, "num_experts_per_tok", None) or 1
        flops = 0
        for entry in entries:
            if len(entry.shape) >= 2:
                is_expert = num_experts > 1 and (".experts." in entry.name or entry.shape[0] == num_experts)
                flops += 2 * prod(entry.shape) * (met if is_expert else 1) // (num_experts if is_expert else 1)
        return flops

    def _head_size(self) -> int:
        """Of the first attention module, which the others are like."""
        for module in self._module.modules():
            if is_attention(module):
                return heads_of(module).head_size
        return int(getattr(self._text, "head_dim", None) or self._text.hidden_size // self._text.num_attention_heads)

    def _layer(self, index: int) -> LibraryModule:
        return self._module.get_submodule(f"{self._homes.layers_path}.{index}")

    def _division(self, index: int) -> Division:
        plan = getattr(self._module, "tp_plan", None) or {}
        return divide_layer(self._layer(index), f"{self._homes.layers_path}.{index}", plan)

    def _layer_entries(self, index: int, division: Division) -> list[Entry]:
        path = f"{self._homes.layers_path}.{index}"
        return [
            Entry(f"{path}.{name}", index, tuple(tensor.shape), tensor.dtype, cut_of(division, name))
            for name, tensor in _stored(self._layer(index))
        ]

    def _outside_entries(self, head_path: str | None, head_units: int, tied: Mapping[str, str]) -> Iterator[Entry]:
        for path, owner in owners_outside(self._module, self._homes.layers_path):
            home = self._homes.outside.get(path)
            if home is None:
                continue  # it takes no part in predicting the next token
            for leaf, tensor in _stored(owner, recurse=False):
                cut = WHOLE
                if path == head_path and head_units > 1:
                    cut = TensorCut(0, (Segment(head_units, tensor.shape[0] // head_units),))
                name = f"{path}.{leaf}"
                source = tied.get(name)
                yield Entry(name, home, tuple(tensor.shape), tensor.dtype, cut, source if source != name else None)

    def _head(self, layer: Sequence[Portion]) -> tuple[str | None, int]:
        """The linear layer that gives the logits, and in how many units shards divide its outputs.

        As many as go with every number of shards that the layers allow; 1 when the vocabulary does not divide by all of them:
        then every shard computes all logits, and the head never forbids a cut that the layers allow.
        """
        head = self._module.get_output_embeddings()
        if type(head) is not torch.nn.Linear:
            return None, 1
        path = next(name for name, module in self._module.named_modules() if module is head)
        units = [portion.units for portion in layer if portion.units not in (1, self._num_kv_heads)]
        num_heads: int = self._text.num_attention_heads
        possible = [tensor for tensor in range(1, num_heads + 1) if all(number % tensor == 0 for number in (*units, num_heads))]
        common = lcm(*possible)
        return path, common if head.out_features % common == 0 else 1


def _stored(module: LibraryModule, *, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """What a module keeps in files: parameters, and buffers that are stored."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    for path, owner in module.named_modules() if recurse else (("", module),):
        for leaf in persistent_buffers(owner):
            if owner._buffers[leaf] is not None:
                yield f"{path}.{leaf}" if path else leaf, owner._buffers[leaf]


def _portions(entries: Sequence[Entry]) -> tuple[Portion, ...]:
    """Bytes of a group of parameters by the number of units that shards divide them in, in rising order."""
    num_bytes: Counter[int] = Counter()
    for entry in entries:
        if not entry.cut.segments:
            num_bytes[1] += entry.num_bytes(())
            continue
        rows = sum(segment.num_units * segment.unit_size for segment in entry.cut.segments)
        for segment in entry.cut.segments:
            num_bytes[segment.num_units] += entry.num_bytes(entry.cut.whole) * segment.num_units * segment.unit_size // rows
    return tuple(Portion(units, num_bytes[units]) for units in sorted(num_bytes))
