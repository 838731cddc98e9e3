"""Which part of the weights a slot holds, so that it can be compared between any two shapes.

The rule itself is `core.cut`. Portions of one layer that are divided into the same number of units are divided alike, so they
count as one *class*: a slot that holds some units of a class holds them of every portion in it. Sets of units are kept as
ranges, since a layer may have as many units as a matrix has columns.
"""

from collections import Counter
from collections.abc import Mapping

from spotserve.core.cut import EMBEDDING, head_of, layers_of
from spotserve.core.model import ModelSpec, Portion
from spotserve.core.plan import Parallel

Pieces = tuple[range, ...]
"""A set of numbers as ranges of step 1 that have none in common."""


def layers_held(model: ModelSpec, parallel: Parallel, stage: int) -> range:
    """Layers on one stage of a replica, pseudo-layers included: the first stage begins with the embedding, the last one ends
    with the head."""
    decoder = layers_of(model, parallel)[stage]
    start = EMBEDDING if stage == 0 else decoder.start
    return range(start, head_of(model) + 1 if stage == parallel.pipeline - 1 else decoder.stop)


def portions_of(model: ModelSpec, layer: int) -> tuple[Portion, ...]:
    """Weights of one layer; `layer` may be a pseudo-layer."""
    if layer == EMBEDDING:
        return model.embedding
    return model.head if layer == head_of(model) else model.layer


def unit_bytes(portions: tuple[Portion, ...]) -> Mapping[int, int]:
    """For each class of portions, by its number of units, the bytes of one unit of all its portions together."""
    classes: Counter[int] = Counter()
    for portion in portions:
        classes[portion.units] += portion.num_bytes // portion.units
    return classes


def minus(pieces: Pieces, other: range) -> Pieces:
    """What is in `pieces` and not in `other`."""
    left = (range(piece.start, min(piece.stop, other.start)) for piece in pieces)
    right = (range(max(piece.start, other.stop), piece.stop) for piece in pieces)
    return tuple(piece for piece in (*left, *right) if piece) if other else pieces


def count(pieces: Pieces) -> int:
    """How many numbers are in `pieces`."""
    return sum(map(len, pieces))


def common(first: range, second: range) -> int:
    """How many numbers are in both ranges of step 1."""
    return max(0, min(first.stop, second.stop) - max(first.start, second.start))
