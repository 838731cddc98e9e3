"""What every device has of what every slot needs, in bytes: the edges of the graph that placement is a matching of.

Slots of a plan fall into few kinds (a shape, a stage, a shard), and so does what devices hold. Bytes are counted once for each
pair of kinds; the rest is indexing. What crosses the network is counted against all that an instance holds, since bytes from a
neighbour on the same instance do not.

Knows shapes and bytes. Does not know which assignment is best.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import layers_of, units_held
from spotserve.core.messages import HeldSlot
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.migration.slices import Pieces, common, count, layers_held, minus, portions_of, unit_bytes

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_Part: TypeAlias = tuple[Parallel, int, int]
"""Shape, and which stage and shard: all that says what a slot holds."""

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a device has in memory."""

    weights: tuple[HeldSlot, ...] = ()
    """Nothing, one slot, or two while it is re-cut; what both have counts once."""
    kv: tuple[tuple[HeldSlot, int], ...] = ()
    """Slots whose sequences go on elsewhere, and how many tokens of their KV would go on here."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Slots and devices, both in order, and a row of bytes for each kind of slot."""

    slots: tuple[Slot, ...]
    devices: tuple[DeviceId, ...]
    kinds: Ints
    """(slots,): the row of each slot in the matrices below."""
    found_bytes: Ints
    """(kinds, devices): weights and KV that need not be fetched."""
    fetch_s: Floats
    """(kinds, devices): how long the network port of the device's instance is busy with the weights that it lacks."""
    allowed: Bools
    """(kinds, devices): whether the slot is planned for this type of machine."""

    def __post_init__(self) -> None:
        shape = (self.found_bytes.shape[0], len(self.devices))
        assert self.found_bytes.shape == self.fetch_s.shape == self.allowed.shape == shape and len(self.kinds) == len(self.slots)
        assert list(self.slots) == sorted(self.slots) and list(self.devices) == sorted(self.devices)


def scores_of(
    model: ModelSpec | None,
    replicas: Sequence[ReplicaPlan],
    devices: Sequence[DeviceId],
    contents: Mapping[DeviceId, Contents],
    *,
    instance_types: Mapping[str, str] | None = None,
    network_bytes_per_s: Mapping[str, float] | None = None,
) -> Scores:
    """What the slots of `replicas` find on `devices`.

    Args:
        model: None while nobody has told what is served: nothing is found then.
        replicas: what is to be placed.
        devices: where it may go.
        contents: by device, neighbours that are not free included; a device without an entry is empty.
        instance_types: by instance. A replica that is planned for a type goes to no other; an instance without an entry is of none.
        network_bytes_per_s: by instance; without an entry, 1: `fetch_s` is in bytes then.
    """
    wanted = {slot: (replica.parallel, slot.stage, slot.shard) for replica in replicas for slot in replica.slots}
    type_of = {slot: replica.instance_type for replica in replicas for slot in replica.slots}
    slots, columns = tuple(sorted(wanted)), tuple(sorted(devices))
    rows, kinds = _kinds([(wanted[slot], type_of[slot]) for slot in slots])
    parts = [part for part, _ in rows]
    speeds, types = network_bytes_per_s or {}, instance_types or {}
    there = [types.get(device.instance_id, "") for device in columns]
    allowed = np.array([[planned in ("", its) for its in there] for _, planned in rows], dtype=np.bool_)
    shape = (len(rows), len(columns))
    if model is None:
        return Scores(slots, columns, kinds, np.zeros(shape, np.int64), np.zeros(shape), allowed.reshape(shape))
    speed = np.array([speeds.get(device.instance_id, 1.0) for device in columns])
    needed = np.array([_found_bytes(model, (part,), part) for part in parts], dtype=np.int64)
    nearby = _by_kind(model, parts, [frozenset(each) for each in _on_instances(columns, contents)])
    return Scores(
        slots,
        columns,
        kinds,
        _found(model, parts, [contents.get(device, Contents()) for device in columns]).reshape(shape),
        ((needed[:, None] - nearby) / speed).reshape(shape),
        allowed.reshape(shape),
    )


def reusable_bytes(model: ModelSpec, held: Sequence[HeldSlot], slot: Slot, parallel: Parallel) -> int:
    """Weights on a device that `slot` of a replica of shape `parallel` would not have to fetch, in bytes."""
    return _found_bytes(model, tuple(map(_part, held)), (parallel, slot.stage, slot.shard))


def inheritable_kv_bytes(model: ModelSpec, live: HeldSlot, slot: Slot, parallel: Parallel, tokens: int) -> int:
    """KV of `tokens` tokens beside the slot `live` that `slot` of a replica of shape `parallel` would go on with, in bytes.

    It counts as far as both have the same layers and the same heads.
    """
    return tokens * _kv_bytes_per_token(model, _part(live), (parallel, slot.stage, slot.shard))


def _found(model: ModelSpec, parts: Sequence[_Part], contents: Sequence[Contents]) -> Ints:
    """(kinds, devices): bytes of weights and KV that a slot of each kind finds on each device."""
    found = _by_kind(model, parts, [tuple(map(_part, each.weights)) for each in contents])
    live = [(column, _part(held), tokens) for column, each in enumerate(contents) for held, tokens in each.kv]
    kinds, index = _kinds([part for _, part, _ in live])
    table = [[_kv_bytes_per_token(model, kind, part) for kind in kinds] for part in parts]
    per_token = np.array(table, dtype=np.int64).reshape(len(parts), len(kinds))
    for (column, _, tokens), kind in zip(live, index.tolist(), strict=True):
        found[:, column] += per_token[:, kind] * tokens
    return found


def _by_kind(model: ModelSpec, parts: Sequence[_Part], held: Sequence[tuple[_Part, ...] | frozenset[_Part]]) -> Ints:
    """(kinds, devices): bytes of weights that a slot of each kind finds among what each device holds."""
    kinds, index = _kinds(held)
    table = [[_found_bytes(model, tuple(sorted(kind, key=repr)), part) for kind in kinds] for part in parts]
    return np.array(table, dtype=np.int64).reshape(len(parts), len(kinds))[:, index]


def _on_instances(devices: Sequence[DeviceId], contents: Mapping[DeviceId, Contents]) -> list[set[_Part]]:
    """For each device, all that its instance holds."""
    parts: dict[str, set[_Part]] = {device.instance_id: set() for device in devices}
    for device, each in contents.items():
        if device.instance_id in parts:
            parts[device.instance_id].update(map(_part, each.weights))
    return [parts[device.instance_id] for device in devices]


def _kinds(keys: Sequence[_Key]) -> tuple[list[_Key], Ints]:
    """The different keys, and the place of each key among them."""
    places: dict[_Key, int] = {}
    index = [places.setdefault(key, len(places)) for key in keys]
    return list(places), np.array(index, dtype=np.int64)


def _part(held: HeldSlot) -> _Part:
    return held.parallel, held.slot.stage, held.slot.shard


@lru_cache(maxsize=65_536)
def _found_bytes(model: ModelSpec, held: tuple[_Part, ...], wanted: _Part) -> int:
    """Weights of `wanted` among those of `held`, in bytes."""
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


@lru_cache(maxsize=65_536)
def _kv_bytes_per_token(model: ModelSpec, live: _Part, wanted: _Part) -> int:
    """KV of one token that both slots have, in bytes."""
    (old, old_stage, old_shard), (new, new_stage, new_shard) = live, wanted
    layers = common(layers_of(model, old)[old_stage], layers_of(model, new)[new_stage])
    heads = common(units_held(model.num_kv_heads, old.tensor, old_shard), units_held(model.num_kv_heads, new.tensor, new_shard))
    return layers * heads * 2 * model.head_size * model.value_bytes
