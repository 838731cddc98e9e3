"""New replicas: which device takes which slot, and where the weights that it lacks come from."""

from collections.abc import Sequence

from spotserve.controller.fleet import Fleet
from spotserve.controller.records import Replica
from spotserve.core.cluster import DeviceId, ReplicaState
from spotserve.core.messages import Activate, HeldSlot, Member
from spotserve.core.plan import ReplicaPlan
from spotserve.migration.matching import place
from spotserve.migration.scores import Contents, scores_of
from spotserve.migration.sources import weight_transfers


def bring_up(fleet: Fleet, planned: Sequence[ReplicaPlan], devices: Sequence[DeviceId], plan_epoch: int) -> list[Activate]:
    """Places replicas on `devices`, of which there must be enough, and adds them to the fleet; what their devices are told."""
    parallel = {slot: replica.parallel for replica in planned for slot in replica.slots}
    placement = place(scores_of(fleet.model, planned, devices, contents_of(fleet, len(planned)))).devices
    ranks = fleet.ranks()
    transfers = {}
    if fleet.model is not None:
        wanted = {device: (slot, parallel[slot]) for slot, device in placement.items()}
        transfers = weight_transfers(fleet.model, wanted, fleet.held(), ranks)
    commands = []
    for replica in planned:
        placed = {slot: placement[slot] for slot in replica.slots}
        fleet.replicas[replica.replica_id] = Replica(replica, placed)
        members = tuple(Member(slot, device, ranks[device]) for slot, device in placed.items())
        commands += [
            Activate(
                instance_id=device.instance_id,
                device_index=device.index,
                replica=replica,
                slot=slot,
                plan_epoch=plan_epoch,
                members=members,
                transfers=transfers.get(device, ()),
            )
            for slot, device in placed.items()
        ]
    return commands


def contents_of(fleet: Fleet, num_heirs: int) -> dict[DeviceId, Contents]:
    """What is on every device that can be reached (SpotServe, section 3.3).

    KV counts when the replica that has it goes, and then in parts, as its sequences are spread over `num_heirs` replicas.
    """
    live: dict[DeviceId, list[tuple[HeldSlot, int]]] = {}
    for replica in fleet.replicas.values():
        if replica.state is ReplicaState.LOADING:
            continue
        _, _, kv_tokens = fleet.load_of(replica)
        for slot, device in replica.devices.items():
            live.setdefault(device, []).append((HeldSlot(device.index, slot, replica.plan.parallel), kv_tokens // num_heirs))
    return {device: Contents(tuple(held), tuple(live.get(device, ()))) for device, held in fleet.held().items()}
