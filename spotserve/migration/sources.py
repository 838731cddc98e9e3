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

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import units_held
from spotserve.core.messages import Address, HeldSlot, WeightTransfer
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Slot
from spotserve.migration.slices import Pieces, count, layers_held, minus, portions_of, unit_bytes

_ROUNDS = 4
"""Of choosing again; nothing has been seen to change after the third."""

_Units: TypeAlias = dict[int, Pieces]
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
    ports = _Ports(network_bytes_per_s or {}, frozenset(dying))
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
    kinds = dict(stock.layers[lack.layer])
    while any(missing.values()):
        gains = {kind: stock.gain(lack.layer, missing, kind) for kind in kinds}
        offers = [
            (ports.when(device, lack.device, gains[kind]), device, kind)
            for kind, devices in kinds.items()
            if gains[kind] > 0
            for device in devices
            if device != lack.device
        ]
        if not offers:
            break
        _, source, kind = min(offers)
        taken.append(_Taken(source, gains[kind]))
        missing = stock.without(missing, kind)
        del kinds[kind]
    return tuple(taken)


def _improves(stock: "_Stock", lack: _Lack, index: int, taken: dict[int, tuple[_Taken, ...]], ports: "_Ports") -> bool:
    """Chooses the sources of one layer again, beside all others; keeps them when the ports that it uses are free sooner."""
    before = taken[index]
    ports.add(lack.device, before, sign=-1)
    after = _choose(stock, lack, ports)
    sources = {each.source for each in (*before, *after)}
    is_better = ports.busy_with(lack.device, after, sources) < ports.busy_with(lack.device, before, sources)
    taken[index] = after if is_better else before
    ports.add(lack.device, taken[index])
    return is_better


class _Ports:
    """How long ports are busy with what has been chosen so far: what instances send, and devices to their neighbours."""

    def __init__(self, network_bytes_per_s: Mapping[str, float], dying: frozenset[str]) -> None:
        self._dying = dying
        self._speeds = network_bytes_per_s
        self._usual = min(network_bytes_per_s.values(), default=1.0)
        self._sending: dict[str | DeviceId, float] = {}
        """By instance over the network, by device inside its instance; the latter in bytes."""
        self._given: dict[DeviceId, int] = {}

    def when(self, source: DeviceId, device: DeviceId, num_bytes: int) -> tuple[bool, bool, float, int]:
        """How good a source is, the smallest first: whether it goes, whether it crosses the network, when it would have sent all,
        what it gives."""
        port = _port(source, device)
        busy = self._sending.get(port, 0.0) + self._cost(source, device, num_bytes)
        return source.instance_id in self._dying, port == source.instance_id, busy, self._given.get(source, 0)

    def add(self, device: DeviceId, taken: Sequence[_Taken], *, sign: int = 1) -> None:
        """Notes transfers to `device`, or with `sign` -1 that they are not made."""
        for each in taken:
            port = _port(each.source, device)
            self._sending[port] = self._sending.get(port, 0.0) + sign * self._cost(each.source, device, each.num_bytes)
            self._given[each.source] = self._given.get(each.source, 0) + sign * each.num_bytes

    def busy_with(self, device: DeviceId, taken: Sequence[_Taken], sources: Collection[DeviceId]) -> list[tuple[bool, float]]:
        """How long the ports of `sources` are busy once `taken` is added, the network's first, the longest first."""
        self.add(device, taken)
        busy = {port: self._sending.get(port, 0.0) for port in (_port(source, device) for source in sources)}
        self.add(device, taken, sign=-1)
        return sorted(((isinstance(port, str), round(seconds, 9)) for port, seconds in busy.items()), reverse=True)

    def _cost(self, source: DeviceId, device: DeviceId, num_bytes: int) -> float:
        """Seconds over the network, at the speed of the slower end; bytes inside an instance."""
        if source.instance_id == device.instance_id:
            return float(num_bytes)
        ends = (self._speeds.get(end.instance_id, self._usual) for end in (source, device))
        return num_bytes / min(ends)


def _port(source: DeviceId, device: DeviceId) -> str | DeviceId:
    return source if source.instance_id == device.instance_id else source.instance_id


class _Stock:
    """Who has what of each layer. Devices that have the same of a layer are of one kind, and are counted once."""

    def __init__(self, model: ModelSpec, sources: Mapping[DeviceId, Sequence[HeldSlot]]) -> None:
        self.model = model
        self.layers: dict[int, dict[_Kind, list[DeviceId]]] = {}
        for device in sorted(sources):
            slots = sources[device]
            for layer in sorted({layer for each in slots for layer in layers_held(model, each.parallel, each.slot.stage)}):
                self.layers.setdefault(layer, {}).setdefault(_kind(model, slots, layer), []).append(device)

    def missing(self, layer: int, tensor: int, shard: int, kind: _Kind) -> _Units:
        """Of a layer, what one of `tensor` shards lacks where there is `kind`."""
        classes = unit_bytes(portions_of(self.model, layer))
        return self.without({num_units: (units_held(num_units, tensor, shard),) for num_units in classes}, kind)

    def without(self, missing: _Units, kind: _Kind) -> _Units:
        """What is missing beside `kind`."""
        rest = dict(missing)
        for num_units in missing:
            for tensor, shard in kind:
                rest[num_units] = minus(rest[num_units], units_held(num_units, tensor, shard))
        return rest

    def gain(self, layer: int, missing: _Units, kind: _Kind) -> int:
        """Bytes of what is missing that `kind` has."""
        each = unit_bytes(portions_of(self.model, layer))
        rest = self.without(missing, kind)
        return sum((count(missing[num_units]) - count(rest[num_units])) * each[num_units] for num_units in each)

    def available(self, layer: int, missing: _Units) -> int:
        """Bytes of what is missing that somebody has."""
        rest = missing
        for kind in self.layers.get(layer, {}):
            rest = self.without(rest, kind)
        each = unit_bytes(portions_of(self.model, layer))
        return sum((count(missing[num_units]) - count(rest[num_units])) * each[num_units] for num_units in each)


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
