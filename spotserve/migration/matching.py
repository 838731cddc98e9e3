"""Which device takes which slot: the assignment under which the most bytes stay where they are.

After SpotServe (Miao et al., ASPLOS'24, section 3.3): a complete bipartite graph of devices and slots, an edge weighs the
bytes that the device has and the slot needs, and Kuhn-Munkres finds the heaviest matching. Between equally heavy matchings
the one wins in which more slots stay on their device: a replica that need not move goes on serving.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from spotserve.core.cluster import DeviceId
from spotserve.core.messages import HeldSlot
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Placement, Slot
from spotserve.migration.slices import common, shard_bytes, stage_layers

_EXACT = 2**53
"""Integers below it are exact in the floating point of the solver."""


def reusable_bytes(model: ModelSpec, held: HeldSlot | None, slot: Slot, parallel: Parallel, *, kv_bytes: int = 0) -> int:
    """Bytes on a device that `slot` of a replica of shape `parallel` would not have to fetch.

    `held` is what the device has in memory (None: nothing); `kv_bytes` is the live KV beside it, which counts as far as the
    slot covers its layers and heads, and only for a slot of the same replica, which inherits the requests.
    """
    if held is None:
        return 0
    old, new = held.slot, slot

    def in_both(layer_bytes: int) -> int:
        return common(shard_bytes(layer_bytes, held.tensor, old.shard), shard_bytes(layer_bytes, parallel.tensor, new.shard))

    old_layers = stage_layers(model.num_layers, held.pipeline, old.stage)
    common_layers = common(old_layers, stage_layers(model.num_layers, parallel.pipeline, new.stage))
    weights = common_layers * in_both(model.layer_bytes)
    if old.stage == new.stage == 0:
        weights += in_both(model.embedding_bytes)
    if old.stage == held.pipeline - 1 and new.stage == parallel.pipeline - 1:
        weights += in_both(model.head_bytes)
    if kv_bytes == 0 or old.replica_id != new.replica_id:
        return weights
    # Exact shares over a common denominator of the two ways to cut: parts of 1 / (M_old * M_new) of each layer.
    parts = held.tensor * parallel.tensor
    both = common_layers * common(shard_bytes(parts, held.tensor, old.shard), shard_bytes(parts, parallel.tensor, new.shard))
    return weights + kv_bytes * both // (len(old_layers) * parallel.tensor or 1)


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
