"""What a migration consists of: flows of bytes from device to device, each through two ports, in an order of importance.

A flow between instances takes the sending side of one network port and the receiving side of another; a flow inside an instance
takes the same of its two devices' links. Every side carries one flow at a time: bandwidth is not shared, so ends are predictable.

Knows weights, KV and ports. Does not know when anything is sent (`schedule`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import EMBEDDING, head_of, layers_of, units_held
from spotserve.core.hardware import Link
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.migration.slices import Pieces, common, count, minus
from spotserve.migration.sources import Sourced

Port: TypeAlias = tuple[str, str, int]
"""One side of a way for bytes: which side, instance, and index of the device (-1: the network port of the instance)."""

_NETWORK = -1


@dataclass(frozen=True, slots=True)
class InstanceLinks:
    """How fast bytes get out of, into and about one instance; bytes per second of each direction."""

    network: Link
    inside: Link
    """Between two of its devices."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes of one thing from one device to another, sent in one go."""

    what: str
    source: DeviceId
    destination: DeviceId
    num_bytes: int
    is_last_copy: bool = False
    """Whether only instances that will be taken have these bytes."""
    rank: tuple[int, int] = (0, 0)
    """Importance among flows that are alike in this; the smallest first."""
    request_id: str = ""
    """Whose KV it is; empty: weights, which files have too."""

    def __post_init__(self) -> None:
        assert self.source != self.destination and self.num_bytes > 0

    @property
    def is_inside(self) -> bool:
        """Whether both ends are on one instance."""
        return self.source.instance_id == self.destination.instance_id

    @property
    def ports(self) -> tuple[Port, Port]:
        """The side that sends and the side that receives."""
        return ports_between(self.source, self.destination)

    def seconds(self, links: Mapping[str, InstanceLinks]) -> float:
        """Time that it takes its ports, at the speed of the slower one."""
        ends = [links[end.instance_id] for end in (self.source, self.destination)]
        return max((each.inside if self.is_inside else each.network).seconds(self.num_bytes) for each in ends)


def ports_between(source: DeviceId, destination: DeviceId) -> tuple[Port, Port]:
    """The side that sends and the side that receives: of devices within an instance, of the instances' networks otherwise."""
    is_inside = source.instance_id == destination.instance_id
    out, into = ((end.instance_id, end.index if is_inside else _NETWORK) for end in (source, destination))
    return ("out", *out), ("in", *into)


KV, WEIGHTS = 0, 1
"""First part of a rank: KV comes before weights, since a sequence stands still for it."""


def weight_flows(model: ModelSpec, transfers: Iterable[Sourced]) -> list[Flow]:
    """Flows of weights. Front stages come first: a prompt enters there, so a replica can begin while its back stages load."""
    return [
        Flow(
            what=f"{_layer(model, each.layer)} of {each.slot.replica_id}/{each.slot.stage}/{each.slot.shard}",
            source=each.source,
            destination=each.device,
            num_bytes=each.num_bytes,
            is_last_copy=each.is_last_copy,
            rank=(WEIGHTS, each.slot.stage),
        )
        for each in transfers
    ]


@dataclass(frozen=True, slots=True)
class Placed:
    """A replica and the devices of its slots."""

    plan: ReplicaPlan
    devices: Mapping[Slot, DeviceId]


def kv_flows(
    model: ModelSpec, sequences: Sequence[tuple[str, int]], old: Placed, new: Placed, *, dying: Collection[str] = ()
) -> list[Flow]:
    """Flows of the KV of `sequences` (identity, tokens computed) from one replica to another; the most advanced first.

    What is on its device already is not listed; heads that several old shards have come from one of them, a neighbour if any.
    """
    flows = []
    for slot in new.plan.slots:
        device = new.devices[slot]
        for source, per_token in _kv_sources(model, slot, device, old, new.plan.parallel):
            flows += [
                Flow(
                    what=f"KV of {request_id} for {slot.replica_id}/{slot.stage}/{slot.shard}",
                    source=source,
                    destination=device,
                    num_bytes=per_token * tokens,
                    is_last_copy=source.instance_id in dying,
                    rank=(KV, -tokens),
                    request_id=request_id,
                )
                for request_id, tokens in sequences
                if tokens > 0
            ]
    return flows


def _kv_sources(model: ModelSpec, slot: Slot, device: DeviceId, old: Placed, parallel: Parallel) -> list[tuple[DeviceId, int]]:
    """Who gives a new slot how many bytes of KV per token."""
    wanted = layers_of(model, parallel)[slot.stage]
    heads: Pieces = (units_held(model.num_kv_heads, parallel.tensor, slot.shard),)
    missing = dict.fromkeys(range(old.plan.parallel.pipeline), heads)
    nearest = sorted(
        old.plan.slots,
        key=lambda each: (old.devices[each] != device, old.devices[each].instance_id != device.instance_id, each),
    )
    found = []
    for each in nearest:
        layers = common(layers_of(model, old.plan.parallel)[each.stage], wanted)
        rest = minus(missing[each.stage], units_held(model.num_kv_heads, old.plan.parallel.tensor, each.shard))
        num_heads = count(missing[each.stage]) - count(rest)
        missing[each.stage] = rest
        if layers * num_heads > 0 and old.devices[each] != device:
            found.append((old.devices[each], layers * num_heads * 2 * model.head_size * model.value_bytes))
    return found


def _layer(model: ModelSpec, layer: int) -> str:
    return {EMBEDDING: "embedding", head_of(model): "head"}.get(layer, f"layer {layer}")
