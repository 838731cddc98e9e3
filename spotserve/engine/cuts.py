"""Which part of a model's tensors a rank holds, and how parts are taken out of tensors and put into them.

A parameter is cut along one dimension, segment by segment: a fused query-key-value matrix has three segments, each of so many
heads; a plain column-sharded matrix one. Shards hold ranges of units of every segment (`core.cut.units_held`), one after the
other along that dimension. What is not cut is held whole by every shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spotserve.core.cut import units_held


@dataclass(frozen=True, slots=True)
class StageSlice:
    """The part of a model that one rank computes."""

    layers: range
    """Decoder layers, by their index in the model."""
    num_layers: int
    """Of the whole model."""
    shard: int = 0
    tensor: int = 1
    """Shards of each layer (M)."""

    @property
    def is_first(self) -> bool:
        """Whether it turns token ids into hidden states."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it turns hidden states into logits."""
        return self.layers.stop == self.num_layers


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_units` units of `unit_size` rows (or columns) each, that follow each other."""

    num_units: int
    unit_size: int


@dataclass(frozen=True, slots=True)
class TensorCut:
    """How one parameter is divided among shards."""

    dim: int
    segments: tuple[Segment, ...]
    """Cover the dimension; none: every shard holds the whole tensor."""

    def held(self, tensor: int, shard: int) -> tuple[range, ...]:
        """Units of each segment on a shard."""
        return tuple(units_held(segment.num_units, tensor, shard) for segment in self.segments)

    @property
    def whole(self) -> tuple[range, ...]:
        """All units of each segment."""
        return tuple(range(segment.num_units) for segment in self.segments)

    def size(self, held: Sequence[range]) -> int:
        """Length along `dim` of a tensor that holds these units."""
        return sum(len(units) * segment.unit_size for segment, units in zip(self.segments, held, strict=True))

    def take(self, tensor: torch.Tensor, held: Sequence[range], wanted: Sequence[range]) -> list[torch.Tensor]:
        """Views of the `wanted` units, segment by segment, of a tensor that holds the units `held`."""
        views, start = [], 0
        for segment, has, wants in zip(self.segments, held, wanted, strict=True):
            if len(wants):
                assert has.start <= wants.start and wants.stop <= has.stop, "wanted units are not there"
                offset = start + (wants.start - has.start) * segment.unit_size
                views.append(tensor.narrow(self.dim, offset, len(wants) * segment.unit_size))
            start += len(has) * segment.unit_size
        return views

    def cut_out(self, tensor: torch.Tensor, held: Sequence[range], wanted: Sequence[range]) -> torch.Tensor:
        """The tensor that holds the units `wanted`, out of one that holds more; a view where they are side by side."""
        if not self.segments:
            return tensor
        views = self.take(tensor, held, wanted)
        return views[0] if len(views) == 1 else torch.cat(views, dim=self.dim)

    def spans(self, held: Sequence[range], wanted: Sequence[range]) -> list[range]:
        """Index ranges along `dim`, in order and joined where they touch, of `wanted` in a tensor that holds `held`."""
        spans: list[range] = []
        start = 0
        for segment, has, wants in zip(self.segments, held, wanted, strict=True):
            first = start + (wants.start - has.start) * segment.unit_size
            last = first + len(wants) * segment.unit_size
            if spans and spans[-1].stop == first:
                spans[-1] = range(spans[-1].start, last)
            elif len(wants):
                spans.append(range(first, last))
            start += len(has) * segment.unit_size
        return spans


def overlap(first: range, second: range) -> range:
    """What two ranges of step 1 share."""
    start, stop = max(first.start, second.start), min(first.stop, second.stop)
    return range(start, max(start, stop))


WHOLE = TensorCut(0, ())
"""Held whole by every shard."""
