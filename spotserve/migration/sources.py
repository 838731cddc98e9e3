"""Where the weights that a device lacks come from: for every layer, which devices give what, to the byte.

A device takes from one source everything that it still lacks and the source has, then from the next, until the layer is
complete or nobody has the rest, which is then read from files. The sources of a layer are chosen one after another: those of
the same instance first, because their bytes cross no network, then the one that has given the least in this change, because
a change is over when its busiest port is. A machine that will be taken is a source like any other: nothing is lost with it that
files do not have, and its port is busy enough with the KV of its sequences to be spared from more than its share.

Pure: same arguments, same transfers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import units_held
from spotserve.core.messages import Address, HeldSlot, WeightTransfer
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Slot
from spotserve.migration.slices import Pieces, count, layers_held, minus, portions_of, unit_bytes

_Units: TypeAlias = dict[int, Pieces]
"""Units of one layer, by class."""


def weight_transfers(
    model: ModelSpec,
    wanted: Mapping[DeviceId, tuple[Slot, Parallel]],
    held: Mapping[DeviceId, Sequence[HeldSlot]],
    ranks: Mapping[DeviceId, Address],
) -> dict[DeviceId, tuple[WeightTransfer, ...]]:
    """What each device of `wanted` takes from whom, in the order in which it is to do so: layer by layer, from the front.

    `held` is what every device has in memory, those of `wanted` included; sources are the devices that have an address in
    `ranks`. A layer that the device has already, and one that nobody has, is not listed.
    """
    given: Counter[DeviceId] = Counter()
    return {
        device: tuple(_transfers(model, device, wanted[device], held=held, ranks=ranks, given=given)) for device in sorted(wanted)
    }


def _transfers(
    model: ModelSpec,
    device: DeviceId,
    wanted: tuple[Slot, Parallel],
    *,
    held: Mapping[DeviceId, Sequence[HeldSlot]],
    ranks: Mapping[DeviceId, Address],
    given: Counter[DeviceId],
) -> Iterator[WeightTransfer]:
    """Transfers to one device; adds what they take to `given`."""
    slot, parallel = wanted
    others = sorted(source for source in held if source != device and source in ranks)
    for layer in layers_held(model, parallel, slot.stage):
        each = unit_bytes(portions_of(model, layer))
        missing: _Units = {num_units: (units_held(num_units, parallel.tensor, slot.shard),) for num_units in each}
        missing = _without(missing, _with_layer(model, held.get(device, ()), layer))
        candidates = {source: slots for source in others if (slots := _with_layer(model, held[source], layer))}
        while candidates and any(missing.values()):
            source = min(candidates, key=lambda other: (other.instance_id != device.instance_id, given[other], other))
            rest = _without(missing, candidates.pop(source))
            num_bytes = sum((count(missing[num_units]) - count(rest[num_units])) * each[num_units] for num_units in each)
            if num_bytes > 0:
                given[source] += num_bytes
                yield WeightTransfer(layer, source, ranks[source], num_bytes)
            missing = rest


def _with_layer(model: ModelSpec, slots: Sequence[HeldSlot], layer: int) -> list[HeldSlot]:
    return [each for each in slots if layer in layers_held(model, each.parallel, each.slot.stage)]


def _without(missing: _Units, slots: Sequence[HeldSlot]) -> _Units:
    """What is missing of a layer beside the parts of it that `slots` have."""
    rest = dict(missing)
    for num_units in missing:
        for each in slots:
            rest[num_units] = minus(rest[num_units], units_held(num_units, each.parallel.tensor, each.slot.shard))
    return rest
