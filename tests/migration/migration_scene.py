"""A model whose weights can be counted one by one, and slots of every shape that it can be cut into."""

from hypothesis import strategies as st
from model_specs import small_spec

from spotserve.core.cut import EMBEDDING, head_of, stage_cuts, units_held
from spotserve.core.model import Portion

MODEL = small_spec(
    name="m",
    num_layers=5,
    num_kv_heads=2,
    head_size=3,
    vocabulary_size=1,
    context_tokens=1,
    layer=(Portion(8, 80), Portion(2, 14), Portion(8, 24), Portion(1, 5)),
    embedding=(Portion(1, 40),),
    head=(Portion(1, 3), Portion(4, 44)),
    value_bytes=4,
)
"""Parts with more units than shards, with fewer, and with none to divide; two portions are of one class."""

Unit = tuple[int, int, int]
"""Layer, index of the portion, unit."""

fitting_shapes = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4])).flatmap(
    lambda shape: st.tuples(st.just(shape[0]), st.just(shape[1]), st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
)
"""Stages, shards, and which stage and shard."""


def portion_of(unit: Unit) -> Portion:
    """The portion that a unit is of."""
    layer, index, _ = unit
    return {EMBEDDING: MODEL.embedding, head_of(MODEL): MODEL.head}.get(layer, MODEL.layer)[index]


def has(pipeline: int, tensor: int, stage: int, shard: int) -> set[Unit]:
    """Everything that a slot holds, unit by unit."""
    layers = list(stage_cuts(MODEL, pipeline)[stage])
    layers += [EMBEDDING] if stage == 0 else []
    layers += [head_of(MODEL)] if stage == pipeline - 1 else []
    kinds = {EMBEDDING: MODEL.embedding, head_of(MODEL): MODEL.head}
    return {
        (layer, index, unit)
        for layer in layers
        for index, portion in enumerate(kinds.get(layer, MODEL.layer))
        for unit in units_held(portion.units, tensor, shard)
    }


def size_of(units: set[Unit]) -> int:
    """Bytes of these units."""
    return sum(portion_of(unit).num_bytes // portion_of(unit).units for unit in units)
