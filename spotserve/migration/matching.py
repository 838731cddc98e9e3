"""Which device takes which slot: the assignment under which the most bytes stay where they are.

After SpotServe (Miao et al., ASPLOS'24, section 3.3): a complete bipartite graph of devices and slots, an edge weighs the
bytes that the device has and the slot needs, and Kuhn-Munkres finds the heaviest matching. Between equally heavy matchings
the one wins in which more slots stay on their device: a replica that need not move goes on serving.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from scipy.optimize import linear_sum_assignment

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import layers_of, units_held
from spotserve.core.messages import HeldSlot
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Placement, Slot
from spotserve.migration.slices import Pieces, common, count, layers_held, minus, portions_of, unit_bytes

_EXACT = 2**53
"""Integers below it are exact in the floating point of the solver."""

_Part: TypeAlias = tuple[Parallel, int, int]
"""Shape, and which stage and shard: all that says what a slot holds."""


def reusable_bytes(model: ModelSpec, held: Sequence[HeldSlot], slot: Slot, parallel: Parallel) -> int:
    """Weights on a device that `slot` of a replica of shape `parallel` would not have to fetch, in bytes.

    `held` is what the device has in memory: nothing, one slot, or two while it is re-cut; what both have counts once.
    """
    there = tuple((each.parallel, each.slot.stage, each.slot.shard) for each in held)
    return _reusable_bytes(model, there, (parallel, slot.stage, slot.shard))


@lru_cache(maxsize=65_536)
def _reusable_bytes(model: ModelSpec, held: tuple[_Part, ...], wanted: _Part) -> int:
    """Slots of many replicas are alike: a fleet has few different pairs of them."""
    parallel, stage, shard = wanted
    num_bytes = 0
    for layer in layers_held(model, parallel, stage):
        sharing = [(its.tensor, its_shard) for its, on, its_shard in held if layer in layers_held(model, its, on)]
        if not sharing:
            continue
        for num_units, each in unit_bytes(portions_of(model, layer)).items():
            needed = units_held(num_units, parallel.tensor, shard)
            missing: Pieces = (needed,)
            for its_tensor, its_shard in sharing:
                missing = minus(missing, units_held(num_units, its_tensor, its_shard))
            num_bytes += (len(needed) - count(missing)) * each
    return num_bytes


def inheritable_kv_bytes(model: ModelSpec, live: HeldSlot, slot: Slot, parallel: Parallel, tokens: int) -> int:
    """KV of `tokens` tokens beside the slot `live` that `slot` of a replica of shape `parallel` would go on with, in bytes.

    It counts as far as both have the same layers and the same heads.
    """
    layers = common(layers_of(model, live.parallel)[live.slot.stage], layers_of(model, parallel)[slot.stage])
    heads = common(
        units_held(model.num_kv_heads, live.parallel.tensor, live.slot.shard),
        units_held(model.num_kv_heads, parallel.tensor, slot.shard),
    )
    return layers * heads * 2 * model.head_size * model.value_bytes * tokens


def place(
    slots: Sequence[Slot],
    devices: Sequence[DeviceId],
    weight: Callable[[Slot, DeviceId], int],
    *,
    current: Mapping[Slot, DeviceId] | None = None,
) -> Placement:
    """The heaviest assignment of `slots` to `devices`; as many as the fewer of the two can have.

    `weight` gives the bytes that a slot finds on a device; `current` says where slots are now. The order of slots and devices
    does not matter. Exact to the byte up to 2**53 / (n + 1)**2 bytes for n pairs, beyond that to some kilobytes.
    """
    rows, columns = sorted(slots), sorted(devices)
    if not rows or not columns:
        return Placement(devices={})
    stays = current or {}
    scale = min(len(rows), len(columns)) + 1  # one byte outweighs every preference together
    weights = [[weight(slot, device) for device in columns] for slot in rows]
    unit_bytes = max(map(max, weights)) * scale**2 // _EXACT + 1
    scores = [
        [num_bytes // unit_bytes * scale + (stays.get(slot) == device) for device, num_bytes in zip(columns, row, strict=True)]
        for slot, row in zip(rows, weights, strict=True)
    ]
    chosen_rows, chosen_columns = linear_sum_assignment(np.array(scores, dtype=np.float64), maximize=True)
    return Placement(devices={rows[row]: columns[column] for row, column in zip(chosen_rows, chosen_columns, strict=True)})
