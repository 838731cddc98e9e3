"""How a model is cut: into stages along its layers, into shards along its units. One rule for all who plan, move or compute.

A *unit* is what shards cannot share: an attention head, a column of a matrix. Of `num_units` equal units shard m of M holds
[m * U / M, (m + 1) * U / M) when M divides U; when U divides M (key-value heads fewer than shards) M / U shards hold each unit.
"""

from functools import lru_cache
from itertools import accumulate

from spotserve.core.model import ModelSpec, Portion
from spotserve.core.plan import Parallel

EMBEDDING = -1
"""Stands for the layer before the first: what turns token ids into the first hidden state."""


def head_of(model: ModelSpec) -> int:
    """Stands for the layer after the last: final norm and head."""
    return model.num_layers


def units_held(num_units: int, tensor: int, shard: int) -> range:
    """Units on `shard` of `tensor` shards; `divides` must have said yes."""
    assert 0 <= shard < tensor and divides(num_units, tensor)
    if num_units % tensor == 0:
        each = num_units // tensor
        return range(shard * each, (shard + 1) * each)
    unit = shard * num_units // tensor
    return range(unit, unit + 1)


def divides(num_units: int, tensor: int) -> bool:
    """Whether `num_units` can be cut into `tensor` shards that are alike."""
    return num_units % tensor == 0 or tensor % num_units == 0


def held_bytes(portions: tuple[Portion, ...], tensor: int, shard: int) -> int:
    """Bytes of one layer on one shard."""
    return sum(len(units_held(part.units, tensor, shard)) * part.num_bytes // part.units for part in portions)


@lru_cache(maxsize=1024)
def stage_cuts(model: ModelSpec, pipeline: int) -> tuple[range, ...]:
    """Decoder layers of each stage, so that the slowest stage is as fast as can be; every stage has one at least.

    A decode step reads every weight once, so a stage's time goes with its bytes; the head counts for the last stage, the
    embedding for nobody, since a step reads a row of it per token. Of equally good cuts the one with more layers in front wins.
    Exact: with n layers alike, stages but the last take the smallest number that leaves the last no slower than they are, or
    one less.
    """
    assert 1 <= pipeline <= model.num_layers, "checked by `misfit`"
    layers, others = model.num_layers, pipeline - 1
    if others == 0:
        return (range(layers),)

    def slowest(last: int) -> int:
        return max(-(-(layers - last) // others) * model.layer_bytes, last * model.layer_bytes + model.head_bytes)

    last = min(range(1, layers - others + 1), key=slowest)
    each, remainder = divmod(layers - last, others)
    sizes = [each + (stage < remainder) for stage in range(others)] + [last]
    starts = [sum(sizes[:stage]) for stage in range(pipeline)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def layers_of(model: ModelSpec, parallel: Parallel) -> tuple[range, ...]:
    """Decoder layers of each stage of a replica: as its shape says, or else as `stage_cuts` divides them."""
    if not parallel.stage_layers:
        return stage_cuts(model, parallel.pipeline)
    ends = list(accumulate(parallel.stage_layers))
    assert ends[-1] == model.num_layers, "a shape for another model"
    return tuple(range(end - size, end) for end, size in zip(ends, parallel.stage_layers, strict=True))


def misfit(model: ModelSpec, pipeline: int, tensor: int) -> str | None:
    """Why `model` cannot be cut into so many stages and shards; None when it can."""
    if pipeline > model.num_layers:
        return f"{model.name} has {model.num_layers} layers: it cannot be cut into {pipeline} stages"
    parts = (*model.layer, *model.head, Portion(model.num_kv_heads, 0))
    stubborn = next((part.units for part in parts if not divides(part.units, tensor)), None)
    if stubborn is not None:
        return f"{model.name} has parts of {stubborn} units: they cannot be cut into {tensor} equal shards"
    return None
