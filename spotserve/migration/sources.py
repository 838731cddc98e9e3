"""Where the weights that a device lacks come from: for every layer, which devices give what, to the byte.

A device takes from one source everything of a layer that it still lacks and the source has, then from the next, until the layer
is complete or nobody has the rest, which is then read from files. Sources are chosen for the whole change at once, so that the
busiest port is done earliest: the largest layers first, each from where it ends first, then again in the light of all other
choices while that helps. Sources of the same instance come before all others, because their bytes cross no network. Ports are
full duplex: what an instance sends and what it receives do not wait for each other.

What an instance that will be taken has is fetched from it only if nobody who stays has it: those last copies, and KV, are what its
port is for while it is there, and what is not sent in time is then missing nowhere else.

Pure: same arguments, same transfers.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import units_held
from spotserve.core.messages import Address, HeldSlot, WeightTransfer
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Slot
from spotserve.migration.scores import Floats, Ints
from spotserve.migration.slices import Pieces, count, layers_held, minus, portions_of, unit_bytes

_ROUNDS = 4
"""Of choosing again, at most: a bound on the time that it takes."""

_Units: TypeAlias = tuple[tuple[int, Pieces], ...]
"""Units of one layer, by class."""
_Kind: TypeAlias = tuple[tuple[int, int], ...]
"""All that says what a device has of a layer: shards and which shard, of each of its slots that have the layer."""


@dataclass(frozen=True, slots=True)
class Sourced:
    """One transfer of weights, and what scheduling needs to know of it."""

    device: DeviceId
    slot: Slot
    layer: int
    source: DeviceId
    num_bytes: int
    is_last_copy: bool
    """Whether only instances that will be taken have these bytes."""


@dataclass(frozen=True, slots=True)
class _Lack:
    """What one device lacks of one layer."""

    device: DeviceId
    slot: Slot
    layer: int
    missing: _Units
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Taken:
    source: DeviceId
    num_bytes: int


def weight_transfers(
    model: ModelSpec,
    wanted: Mapping[DeviceId, tuple[Slot, Parallel]],
    held: Mapping[DeviceId, Sequence[HeldSlot]],
    ranks: Mapping[DeviceId, Address],
    *,
    dying: Collection[str] = (),
    network_bytes_per_s: Mapping[str, float] | None = None,
) -> dict[DeviceId, tuple[WeightTransfer, ...]]:
    """What each device of `wanted` takes from whom, in the order in which it is to do so: layers that have bytes which only `dying`
    instances have, then the rest, each from the front.

    Args:
        model: what is served.
        wanted: by device, the slot that it is to have.
        held: what every device has in memory, those of `wanted` included.
        ranks: where sources listen; a device without an entry gives nothing.
        dying: instances that will be taken.
        network_bytes_per_s: by instance, of each direction; without an entry, all alike.

    Returns:
        A layer that the device has already, and one that nobody has, is not listed.
    """
    made: dict[DeviceId, list[WeightTransfer]] = {device: [] for device in sorted(wanted)}
    there = {device: slots for device, slots in held.items() if device in ranks}
    for each in choose_sources(model, wanted, there, held, dying=dying, network_bytes_per_s=network_bytes_per_s):
        made[each.device].append(WeightTransfer(each.layer, each.source, ranks[each.source], each.num_bytes))
    return {device: tuple(transfers) for device, transfers in made.items()}


def choose_sources(
    model: ModelSpec,
    wanted: Mapping[DeviceId, tuple[Slot, Parallel]],
    sources: Mapping[DeviceId, Sequence[HeldSlot]],
    held: Mapping[DeviceId, Sequence[HeldSlot]],
    *,
    dying: Collection[str] = (),
    network_bytes_per_s: Mapping[str, float] | None = None,
) -> list[Sourced]:
    """The same, as scheduling wants to know it; `sources` are what can be reached of `held`."""
    stock = _Stock(model, sources)
    lacks = [lack for device in sorted(wanted) for lack in _lacks(stock, device, wanted[device], held)]
    most_taken = sum(len(stock.kinds(lack.layer)) for lack in lacks)
    ports = _Ports(stock.devices, network_bytes_per_s or {}, dying, most_taken)
    taken: dict[int, tuple[_Taken, ...]] = {}
    largest_first = sorted(range(len(lacks)), key=lambda index: (-lacks[index].num_bytes, index))
    for index in largest_first:
        taken[index] = _choose(stock, lacks[index], ports)
        ports.add(lacks[index].device, taken[index])
    for _ in range(_ROUNDS):
        improved = [_improves(stock, lacks[index], index, taken, ports) for index in largest_first]
        if not any(improved):
            break
    last_copies = {index: any(each.source.instance_id in dying for each in taken[index]) for index in taken}
    ordered = sorted(range(len(lacks)), key=lambda index: (lacks[index].device, not last_copies[index], index))
    return [
        Sourced(
            lacks[index].device,
            lacks[index].slot,
            lacks[index].layer,
            each.source,
            each.num_bytes,
            is_last_copy=each.source.instance_id in dying,
        )
        for index in ordered
        for each in taken[index]
    ]


def _lacks(
    stock: "_Stock",
    device: DeviceId,
    wanted: tuple[Slot, Parallel],
    held: Mapping[DeviceId, Sequence[HeldSlot]],
) -> Iterator[_Lack]:
    """What a device lacks of each layer of its slot and somebody else has."""
    slot, parallel = wanted
    for layer in layers_held(stock.model, parallel, slot.stage):
        missing = stock.missing(layer, parallel.tensor, slot.shard, _kind(stock.model, held.get(device, ()), layer))
        available = stock.available(layer, missing)
        if available > 0:
            yield _Lack(device, slot, layer, missing, available)


def _choose(stock: "_Stock", lack: _Lack, ports: "_Ports") -> tuple[_Taken, ...]:
    """Source after source for one layer of one device: from who stays before who goes, from the same instance before others,
    then from whose port is free first."""
    missing, taken = lack.missing, []
    kinds = dict(stock.kinds(lack.layer))
    while any(pieces for _, pieces in missing):
        gains = {kind: stock.gain(lack.layer, missing, kind) for kind in kinds}
        offers = [(*ports.best(kinds[kind], lack.device, gains[kind]), kind) for kind in kinds if gains[kind] > 0]
        if not offers:
            break
        _, source, kind = min(offers)
        taken.append(_Taken(stock.devices[source], gains[kind]))
        missing = stock.without(missing, kind)
        del kinds[kind]
    return tuple(taken)


def _improves(stock: "_Stock", lack: _Lack, index: int, taken: dict[int, tuple[_Taken, ...]], ports: "_Ports") -> bool:
    """Chooses the sources of one layer again, beside all others; keeps them when the ports that it uses are free sooner."""
    before = taken[index]
    ports.add(lack.device, before, sign=-1)
    after = _choose(stock, lack, ports)
    if after == before:
        ports.add(lack.device, before)
        return False
    sources = {each.source for each in (*before, *after)}
    is_better = ports.busy_with(lack.device, after, sources) < ports.busy_with(lack.device, before, sources)
    taken[index] = after if is_better else before
    ports.add(lack.device, taken[index])
    return is_better


class _Ports:
    """How long ports are busy with what has been chosen so far: what instances send, and devices to their neighbours."""

    def __init__(
        self, devices: Sequence[DeviceId], network_bytes_per_s: Mapping[str, float], dying: Collection[str], most_taken: int
    ) -> None:
        self._usual = min(network_bytes_per_s.values(), default=1.0)
        self._speeds = network_bytes_per_s
        instances = {instance_id: place for place, instance_id in enumerate(sorted({each.instance_id for each in devices}))}
        self._place = {device: place for place, device in enumerate(devices)}
        self._instances = instances
        self._instance = np.array([instances[each.instance_id] for each in devices], dtype=np.int64)
        self._speed = np.array([network_bytes_per_s.get(each, self._usual) for each in instances])
        self._dying = np.array([each in dying for each in instances], dtype=np.bool_)
        self._most_taken = most_taken
        self._sending = np.zeros(len(instances))
        """Seconds over the network, by instance."""
        self._inside = np.zeros(len(devices))
        """Bytes inside its instance, by device."""
        self._given = np.zeros(len(devices))
        self._offers: dict[_Alike, _Offer] = {}

    def best(self, alike: "_Alike", device: DeviceId, num_bytes: int) -> tuple[tuple[bool, bool, float, float], int]:
        """Of devices that have the same, the one to take `num_bytes` from and how good it is, the smallest first: whether it goes,
        whether bytes cross the network, when all would have been sent, what the source has given."""
        offer = self._offers.get(alike) or self._offer(alike)
        near = offer.near.get(self._instances.get(device.instance_id, -1))
        if near is not None:
            busy, some = self._inside[near] + num_bytes, near
        else:
            key = self._speeds.get(device.instance_id, self._usual), num_bytes
            if key not in offer.seconds:
                offer.seconds[key] = num_bytes / np.minimum(self._speed[offer.instances], key[0])
            busy, some = self._sending[offer.instances] + offer.seconds[key], offer.sources
        soonest_s = busy.min()
        some = some[busy == soonest_s]
        source = int(some[self._given[some].argmin()])
        return (offer.is_dying, near is None, float(soonest_s), float(self._given[source])), source

    def _offer(self, alike: "_Alike") -> "_Offer":
        staying = alike.places[~self._dying[self._instance[alike.places]]]
        sources = staying if len(staying) else alike.places
        instances = self._instance[sources]
        order = np.argsort(instances, kind="stable")
        starts = np.flatnonzero(np.diff(instances[order], prepend=-1))
        near = dict(zip(instances[order][starts].tolist(), np.split(sources[order], starts[1:]), strict=True))
        few = self._few(sources)
        self._offers[alike] = _Offer(not len(staying), near, few, self._instance[few], {})
        return self._offers[alike]

    def _few(self, sources: Ints) -> Ints:
        """Those that can be the best over the network. Instances that have sent nothing yet are equally good if they are equally
        fast, and the first of them is taken; so of each speed no more can matter than there are transfers, and one."""
        instances = np.unique(self._instance[sources])
        if len(instances) <= self._most_taken:
            return sources
        chosen = [instances[self._speed[instances] == speed][: self._most_taken + 1] for speed in np.unique(self._speed[instances])]
        few: Ints = sources[np.isin(self._instance[sources], np.concatenate(chosen))]
        return few

    def add(self, device: DeviceId, taken: Sequence[_Taken], *, sign: int = 1) -> None:
        """Notes transfers to `device`, or with `sign` -1 that they are not made."""
        for each in taken:
            source = self._place[each.source]
            self._given[source] += sign * each.num_bytes
            if each.source.instance_id == device.instance_id:
                self._inside[source] += sign * each.num_bytes
            else:
                instance = self._instance[source]
                speed = min(self._speed[instance], self._speeds.get(device.instance_id, self._usual))
                self._sending[instance] += sign * each.num_bytes / speed

    def busy_with(self, device: DeviceId, taken: Sequence[_Taken], sources: Collection[DeviceId]) -> list[tuple[bool, float]]:
        """How long the ports of `sources` are busy once `taken` is added, the network's first, the longest first."""
        self.add(device, taken)
        near = {self._place[each] for each in sources if each.instance_id == device.instance_id}
        far = {int(self._instance[self._place[each]]) for each in sources if each.instance_id != device.instance_id}
        busy = [(False, float(self._inside[each])) for each in near] + [
            (True, round(float(self._sending[each]), 9)) for each in far
        ]
        self.add(device, taken, sign=-1)
        return sorted(busy, reverse=True)


class _Alike:
    """Devices that have the same of a layer. Equal only to itself."""

    def __init__(self, places: Ints) -> None:
        self.places = places


@dataclass(frozen=True, slots=True)
class _Offer:
    """Of devices that have the same, those that are asked."""

    is_dying: bool
    """Whether all of them will be taken."""
    near: Mapping[int, Ints]
    """By instance."""
    sources: Ints
    """For who is on another instance."""
    instances: Ints
    """Theirs."""
    seconds: dict[tuple[float, int], Floats]
    """By the receiver's speed and the bytes, how long each would send."""


class _Stock:
    """Who has what of each layer. Devices that have the same of a layer are of one kind, and bytes are counted once for a kind."""

    def __init__(self, model: ModelSpec, sources: Mapping[DeviceId, Sequence[HeldSlot]]) -> None:
        self.model = model
        self.devices = sorted(sources)
        shapes: dict[Parallel, int] = {}
        groups: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
        for place, device in enumerate(self.devices):
            parts = [(shapes.setdefault(each.parallel, len(shapes)), each.slot.stage, each.slot.shard) for each in sources[device]]
            groups.setdefault(tuple(parts), []).append(place)
        self._groups = [(sources[self.devices[places[0]]], places) for places in groups.values()]
        self._layers: dict[int, dict[_Kind, _Alike]] = {}
        self._alike: dict[tuple[int, ...], _Alike] = {}
        self._classes: dict[int, Mapping[int, int]] = {}
        self._known: dict[tuple[_Units, _Kind], _Units] = {}
        self._gains: dict[tuple[int, _Units, _Kind], int] = {}

    def kinds(self, layer: int) -> Mapping[_Kind, _Alike]:
        """Who has something of a layer."""
        if layer not in self._layers:
            found: dict[_Kind, list[int]] = {}
            for number, (slots, _) in enumerate(self._groups):
                if kind := _kind(self.model, slots, layer):
                    found.setdefault(kind, []).append(number)
            self._layers[layer] = {kind: self._of_groups(tuple(numbers)) for kind, numbers in found.items()}
        return self._layers[layer]

    def _of_groups(self, numbers: tuple[int, ...]) -> _Alike:
        if numbers not in self._alike:
            places = sorted(place for number in numbers for place in self._groups[number][1])
            self._alike[numbers] = _Alike(np.array(places, dtype=np.int64))
        return self._alike[numbers]

    def _classes_of(self, layer: int) -> Mapping[int, int]:
        """See `slices.unit_bytes`."""
        its = self._like(layer)
        if its not in self._classes:
            self._classes[its] = unit_bytes(portions_of(self.model, its))
        return self._classes[its]

    def _like(self, layer: int) -> int:
        """The first layer that has the same weights."""
        return min(layer, 0) if layer < self.model.num_layers else layer

    def missing(self, layer: int, tensor: int, shard: int, kind: _Kind) -> _Units:
        """Of a layer, what one of `tensor` shards lacks where there is `kind`."""
        return self.without(tuple((each, (units_held(each, tensor, shard),)) for each in self._classes_of(layer)), kind)

    def without(self, missing: _Units, kind: _Kind) -> _Units:
        """What is missing beside `kind`."""
        key = missing, kind
        if key not in self._known:
            rest = dict(missing)
            for num_units in rest:
                for tensor, shard in kind:
                    rest[num_units] = minus(rest[num_units], units_held(num_units, tensor, shard))
            self._known[key] = tuple(rest.items())
        return self._known[key]

    def gain(self, layer: int, missing: _Units, kind: _Kind) -> int:
        """Bytes of what is missing that `kind` has."""
        key = self._like(layer), missing, kind
        if key not in self._gains:
            self._gains[key] = self._bytes_between(layer, missing, self.without(missing, kind))
        return self._gains[key]

    def available(self, layer: int, missing: _Units) -> int:
        """Bytes of what is missing that somebody has."""
        rest = missing
        for kind in self.kinds(layer):
            rest = self.without(rest, kind)
        return self._bytes_between(layer, missing, rest)

    def _bytes_between(self, layer: int, missing: _Units, rest: _Units) -> int:
        each = self._classes_of(layer)
        pairs = zip(missing, rest, strict=True)
        return sum((count(before) - count(after)) * each[num_units] for (num_units, before), (_, after) in pairs)


def _kind(model: ModelSpec, slots: Sequence[HeldSlot], layer: int) -> _Kind:
    return tuple(
        sorted(
            {
                (each.parallel.tensor, each.slot.shard)
                for each in slots
                if layer in layers_held(model, each.parallel, each.slot.stage)
            }
        )
    )
