"""Policy `spotserve-2024`: what is sent from device to device, and how long the artifact believes that takes. A baseline.

As `global_server/Switch.py` of the artifact (github.com/Hsword/SpotServe, branch artifact, 832b29f) does it, the paper (ASPLOS'24,
section 3.4) being silent: every device fetches weights from the devices of its own old replica alone, fresh devices from old
replicas in turn. Of each part of a layer the receivers take its holders round robin: no balance over machines or copies.

The same moves are measured in three ways:

- COUNTED, as the artifact's estimate counts: KV of keys only, but whole for every part of a layer.
- SENT, as its daemons send: keys and values, whole buffers, empty layers, the embedding to every device.
- PLAIN, what the model needs: layers that exist, the embedding where the first stage is, KV that is filled.

Pure: same arguments, same moves.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from spotserve.core.cluster import DeviceId
from spotserve.migration.spotserve_2024 import Batch, Grid, Layout, Position, PublishedShape, grows

SWITCH_S = 0.5
"""What the artifact adds to every estimate for starting engines anew."""

_FLOAT32 = 4
_BYTES_PER_S = 50e9 / 8
"""Of a machine's network and of its inside, as the artifact has it."""


class What(Enum):
    """Kinds of tensors."""

    SLICE = "slice"
    """Part of a decoder layer that shards divide."""
    WHOLE = "whole"
    """Part of a decoder layer that every shard has whole: norms, some biases."""
    EMBEDDING = "embedding"
    """On the first stage, which uses it."""
    SPARE_EMBEDDING = "spare embedding"
    """On any other stage, which has it all the same."""
    HEAD = "head"
    KV = "kv"
    """Of a slice, of the batch of one replica."""
    STATE = "state"
    """Token ids and decoder state of the batch of one replica."""


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor, or part of one, from device to device."""

    source: DeviceId
    destination: DeviceId
    what: What
    layer: int
    """Decoder layer, empty ones included; -1: none."""
    parts: int
    """In how many parts shards divide a layer; the move is of one."""
    batch: Batch | None
    """That KV and state are of."""


class Measure(Enum):
    """How bytes are counted; see the module."""

    COUNTED = "counted"
    SENT = "sent"
    PLAIN = "plain"


def moves(
    shape: PublishedShape, old: Layout, new: Layout, *, batches: Sequence[Batch | None], inherits: Sequence[int]
) -> tuple[Move, ...]:
    """Everything that is sent for the new layout; `batches` and `inherits` as for `spotserve_2024.remap`."""
    parts = max(old.grid.tensor, new.grid.tensor)
    holders = _by_replica(shape, old, _own(old), parts, old.grid.data)
    receivers = _by_replica(shape, new, _sources(old, new), parts, old.grid.data)
    found = list(_weights(new, holders, receivers, parts))
    if not grows(old, list(new.positions), new.grid):
        found += _cache(shape, new, holders, batches=batches, inherits=inherits, parts=parts)
    return tuple(found)


def num_bytes(shape: PublishedShape, move: Move, measure: Measure) -> float:
    """Bytes of a move."""
    if move.batch is not None:
        return _cache_bytes(shape, move, move.batch, measure)
    width = shape.hidden_size
    if measure is Measure.PLAIN and (move.layer >= shape.num_layers or move.what is What.SPARE_EMBEDDING):
        return 0.0
    elements = {
        What.SLICE: (12 * width + 7) * width / move.parts,
        What.WHOLE: 6 * width,
        What.EMBEDDING: (shape.vocabulary_size + shape.positions) * width,
        What.SPARE_EMBEDDING: (shape.vocabulary_size + shape.positions) * width,
        What.HEAD: (shape.vocabulary_size + 2) * width,
    }
    return _FLOAT32 * elements[move.what]


Traffic: TypeAlias = Mapping[tuple[DeviceId, DeviceId], float]
"""Bytes by source and destination."""


def traffic(shape: PublishedShape, found: Iterable[Move], measure: Measure) -> Traffic:
    """What goes from device to device, in bytes; pairs between which nothing goes are left out."""
    sums: defaultdict[tuple[DeviceId, DeviceId], float] = defaultdict(float)
    for move in found:
        if (size := num_bytes(shape, move, measure)) > 0:
            sums[move.source, move.destination] += size
    return dict(sums)


def estimate_s(counted: Traffic) -> float:
    """T_mig as the artifact estimates it from `Measure.COUNTED`, without `SWITCH_S`: the machine with most bytes sent and received
    together, then the one with most bytes inside."""
    outside: defaultdict[str, float] = defaultdict(float)
    inside: defaultdict[str, float] = defaultdict(float)
    for (source, destination), size in counted.items():
        if source.instance_id == destination.instance_id:
            inside[source.instance_id] += size
        else:
            outside[source.instance_id] += size
            outside[destination.instance_id] += size
    return (max(outside.values(), default=0.0) + max(inside.values(), default=0.0)) / _BYTES_PER_S


_Item: TypeAlias = tuple[What, int, int]
"""Kind, decoder layer, part."""
_Places: TypeAlias = Mapping[_Item, Sequence[DeviceId]]
"""Devices that have, or need, each item; in order."""


def _weights(new: Layout, holders: Sequence[_Places], receivers: Sequence[_Places], parts: int) -> Iterator[Move]:
    for replica, has in enumerate(holders):
        for item, source, destination in _round_robin(has, receivers[replica]):
            what, layer, _ = item
            if what is What.EMBEDDING and new.positions[destination].stage > 0:
                what = What.SPARE_EMBEDDING
            yield Move(source, destination, what, layer, parts, batch=None)


def _cache(
    shape: PublishedShape,
    new: Layout,
    holders: Sequence[_Places],
    *,
    batches: Sequence[Batch | None],
    inherits: Sequence[int],
    parts: int,
) -> Iterator[Move]:
    """KV where the slice of its layer is, state everywhere, for replicas that go on with the batch of an old one."""
    needed = _by_replica(shape, new, _own(new), parts, new.grid.data)
    for replica, origin in enumerate(inherits):
        batch = batches[origin] if origin < len(batches) else None
        if batch is None:
            continue
        for item, source, destination in _round_robin(holders[origin], needed[replica]):
            what, layer, _ = item
            if what is What.SLICE:
                yield Move(source, destination, What.KV, layer, parts, batch)
            elif what is What.EMBEDDING:  # the state is wherever an embedding is
                yield Move(source, destination, What.STATE, -1, parts, batch)


def _round_robin(has: _Places, needs: _Places) -> Iterator[tuple[_Item, DeviceId, DeviceId]]:
    """(item, source, destination) for each device that needs an item and does not have it."""
    for item, sources in has.items():
        lacking = [device for device in needs.get(item, ()) if device not in sources]
        for turn, destination in enumerate(lacking):
            yield item, sources[turn % len(sources)], destination


def _sources(old: Layout, new: Layout) -> dict[DeviceId, int]:
    """The old replica whose devices each device of the new layout fetches weights from."""
    fresh = [device for device in new.positions if device not in old.positions]
    fresh.sort(key=lambda device: (new.positions[device].stage, new.positions[device].shard, new.positions[device].replica))
    turns = {device: turn % old.grid.data for turn, device in enumerate(fresh)}
    return {device: turns[device] if device in turns else old.positions[device].replica for device in new.positions}


def _own(layout: Layout) -> dict[DeviceId, int]:
    """The replica that each device is of."""
    return {device: position.replica for device, position in layout.positions.items()}


def _by_replica(
    shape: PublishedShape, layout: Layout, replicas: Mapping[DeviceId, int], parts: int, num_replicas: int
) -> list[_Places]:
    """For each replica, which of the devices that `replicas` gives it have which weights in `layout`."""
    places: list[dict[_Item, list[DeviceId]]] = [{} for _ in range(num_replicas)]
    for device in sorted(layout.positions):
        for item in _items(shape, layout.positions[device], layout.grid, parts):
            places[replicas[device]].setdefault(item, []).append(device)
    return list(places)


def _items(shape: PublishedShape, position: Position, grid: Grid, parts: int) -> Iterator[_Item]:
    """Weights of one position."""
    each, share = shape.padded_layers // grid.pipeline, parts // grid.tensor
    yield What.EMBEDDING, -1, 0
    for layer in range(position.stage * each, (position.stage + 1) * each):
        for part in range(position.shard * share, (position.shard + 1) * share):
            yield What.SLICE, layer, part
        yield What.WHOLE, layer, 0
    if position.stage == grid.pipeline - 1:
        yield What.HEAD, -1, 0


def _cache_bytes(shape: PublishedShape, move: Move, batch: Batch, measure: Measure) -> float:
    width = shape.hidden_size
    if move.what is What.STATE:
        elements = 0 if measure is Measure.PLAIN else (batch.buffer_tokens + 3 * width + 4) * batch.sequences
        return float(_FLOAT32 * elements)
    if measure is Measure.PLAIN:
        tokens = batch.filled_tokens if move.layer < shape.num_layers else 0
        return _FLOAT32 * 2 * batch.sequences * tokens * width / move.parts
    keys = _FLOAT32 * batch.sequences * batch.buffer_tokens * width
    return float(keys) if measure is Measure.COUNTED else 2 * keys / move.parts
