"""New replicas: which device takes which slot, where the weights that it lacks come from, and when they are sent."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import inf

from spotserve.controller.fleet import Fleet
from spotserve.controller.records import Replica
from spotserve.core.cluster import DeviceId, ReplicaState
from spotserve.core.messages import Activate, HeldSlot, Member, WeightTransfer
from spotserve.core.plan import Placement, ReplicaPlan
from spotserve.migration.flows import Flow, weight_flows
from spotserve.migration.schedule import Schedule
from spotserve.migration.scores import Contents, Scores, scores_of
from spotserve.migration.sources import Sourced, choose_sources


@dataclass(frozen=True, slots=True)
class Arrangement:
    """New replicas on devices, and the weights that have to move for them."""

    scores: Scores
    """What was there to be kept."""
    placement: Placement
    schedule: Schedule
    transfers: Mapping[DeviceId, tuple[WeightTransfer, ...]]
    """What each device takes from others, in the order in which it is to do so; what it lacks besides it reads from files."""

    @property
    def num_bytes(self) -> int:
        """Weights that go from device to device."""
        return sum(transfer.num_bytes for transfers in self.transfers.values() for transfer in transfers)


def arrange(fleet: Fleet, planned: Sequence[ReplicaPlan], devices: Sequence[DeviceId], *, now_s: float) -> Arrangement:
    """Places replicas on `devices`, of which there must be enough. Changes nothing."""
    scores, placement = _placed(fleet, planned, devices)
    links = fleet.links()
    network_bytes_per_s = {instance_id: each.network.bytes_per_s for instance_id, each in links.items()}
    sourced = []
    if fleet.model is not None and planned:
        parallel = {replica.replica_id: replica.parallel for replica in planned}
        held = fleet.held()
        sourced = choose_sources(
            fleet.model,
            {device: (slot, parallel[slot.replica_id]) for slot, device in placement.devices.items()},
            held,
            held,
            dying=fleet.deadlines_s(),
            network_bytes_per_s=network_bytes_per_s,
        )
    flows = weight_flows(fleet.model, sourced) if fleet.model is not None else []
    timed = fleet.methods.schedule(flows, links=links, now_s=now_s, deadlines_s=fleet.deadlines_s())
    return Arrangement(scores, placement, timed, _in_order(dict(zip(flows, sourced, strict=True)), timed, fleet))


def reckon(fleet: Fleet, planned: Sequence[ReplicaPlan], devices: Sequence[DeviceId]) -> tuple[float, int]:
    """What `arrange` would come to, without choosing who sends what and when: for how long the busiest port receives, and bytes to
    fetch. No schedule takes less time; it is a tenth of the work where fleets are large."""
    scores, placement = _placed(fleet, planned, devices)
    rows = dict(zip(scores.slots, scores.kinds, strict=True))
    columns = {device: index for index, device in enumerate(scores.devices)}
    busy_s: dict[str, float] = {}
    fetched_bytes = 0.0
    links = fleet.links()
    for slot, device in placement.devices.items():
        fetch_s = float(scores.fetch_s[rows[slot], columns[device]])
        busy_s[device.instance_id] = busy_s.get(device.instance_id, 0.0) + fetch_s
        fetched_bytes += fetch_s * links[device.instance_id].network.bytes_per_s
    return max(busy_s.values(), default=0.0), round(fetched_bytes)


def _placed(fleet: Fleet, planned: Sequence[ReplicaPlan], devices: Sequence[DeviceId]) -> tuple[Scores, Placement]:
    """What there is to be kept, and which device takes which slot."""
    devices = devices if planned else ()
    machines = {device.instance_id for device in devices}
    scores = scores_of(
        fleet.model,
        planned,
        devices,
        contents_of(fleet, machines, max(1, len(planned))),
        instance_types={instance_id: fleet.instances[instance_id].instance_type for instance_id in machines},
        network_bytes_per_s={instance_id: each.network.bytes_per_s for instance_id, each in fleet.links().items()},
    )
    return scores, fleet.methods.place(scores)


def _in_order(sourced: Mapping[Flow, Sourced], timed: Schedule, fleet: Fleet) -> dict[DeviceId, tuple[WeightTransfer, ...]]:
    """What each device takes, layer by layer as they are scheduled. The parts of one layer keep the order in which their sources
    were chosen: a device takes from each what it still lacks, and that is what was counted. So where a part comes too late those
    after it, which are last copies as well, are read from files with it."""
    first_s: dict[tuple[DeviceId, int], float] = {}
    for each in timed.timed:
        layer = each.flow.destination, sourced[each.flow].layer
        first_s[layer] = min(each.start_s, first_s.get(layer, each.start_s))
    sent = {each.flow for each in timed.timed}
    transfers: dict[DeviceId, list[WeightTransfer]] = {}
    late: set[tuple[DeviceId, int]] = set()
    for flow, taken in sorted(sourced.items(), key=lambda item: first_s.get((item[1].device, item[1].layer), inf)):
        if flow not in sent:
            late.add((taken.device, taken.layer))
        elif (taken.device, taken.layer) not in late:
            transfer = WeightTransfer(taken.layer, taken.source, fleet.rank_of(taken.source), taken.num_bytes)
            transfers.setdefault(taken.device, []).append(transfer)
    return {device: tuple(listed) for device, listed in transfers.items()}


def bring_up(
    fleet: Fleet, planned: Sequence[ReplicaPlan], arrangement: Arrangement, plan_epoch: int, now_s: float
) -> list[Activate]:
    """Adds replicas to the fleet where `arrangement` has them; what their devices are told."""
    commands = []
    for replica in planned:
        placed = {slot: arrangement.placement.devices[slot] for slot in replica.slots}
        fleet.replicas[replica.replica_id] = Replica(replica, placed, begun_s=now_s)
        members = tuple(Member(slot, device, fleet.rank_of(device)) for slot, device in placed.items())
        commands += [
            Activate(
                instance_id=device.instance_id,
                device_index=device.index,
                replica=replica,
                slot=slot,
                plan_epoch=plan_epoch,
                members=members,
                transfers=arrangement.transfers.get(device, ()),
            )
            for slot, device in placed.items()
        ]
    return commands


def contents_of(fleet: Fleet, instance_ids: Set[str], num_heirs: int) -> dict[DeviceId, Contents]:
    """What is on every device of these instances, which can be reached (SpotServe, section 3.3).

    KV counts when the replica that has it goes, and then in parts, as its sequences are spread over `num_heirs` replicas.
    """
    live: dict[DeviceId, list[tuple[HeldSlot, int]]] = {}
    there = [
        replica
        for replica in fleet.replicas.values()
        if replica.state is not ReplicaState.LOADING and not instance_ids.isdisjoint(replica.instance_ids)
    ]
    for replica, load in zip(there, fleet.loads(there), strict=True):
        for slot, device in replica.devices.items():
            shared = load.kv_tokens // num_heirs
            live.setdefault(device, []).append((HeldSlot(device.index, slot, replica.plan.parallel), shared))
    machines = [fleet.instances[instance_id] for instance_id in instance_ids]
    return {
        device: Contents(tuple(machine.held.get(device.index, ())), tuple(live.get(device, ())))
        for machine in machines
        for device in machine.devices
    }
