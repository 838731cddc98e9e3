"""New replicas: which device takes which slot, and where the weights that it lacks come from."""

from collections.abc import Sequence

from spotserve.controller.fleet import Fleet
from spotserve.controller.records import Replica
from spotserve.core.cluster import DeviceId, ReplicaState
from spotserve.core.messages import Activate, HeldSlot, Member
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.migration.matching import inheritable_kv_bytes, place, reusable_bytes
from spotserve.migration.sources import weight_transfers


def bring_up(fleet: Fleet, planned: Sequence[ReplicaPlan], devices: Sequence[DeviceId], plan_epoch: int) -> list[Activate]:
    """Places replicas on `devices`, of which there must be enough, and adds them to the fleet; what their devices are told."""
    parallel = {slot: replica.parallel for replica in planned for slot in replica.slots}
    placement = place(
        list(parallel), devices, lambda slot, device: bytes_there(fleet, slot, parallel[slot], device, len(planned))
    ).devices
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


def bytes_there(fleet: Fleet, slot: Slot, parallel: Parallel, device: DeviceId, num_heirs: int) -> int:
    """Weight of the edge slot-device: bytes of weights and KV that need not be fetched (SpotServe, section 3.3).

    KV counts when the replica on the device goes, and then in parts, as its sequences are spread over `num_heirs` replicas.
    """
    if fleet.model is None:
        return 0
    weights = reusable_bytes(fleet.model, fleet.instances[device.instance_id].held.get(device.index, ()), slot, parallel)
    kv = 0
    for replica in fleet.on_devices([device]):
        if replica.state is ReplicaState.LOADING:
            continue
        live = next(each for each, where in replica.devices.items() if where == device)
        held = HeldSlot(device.index, live, replica.plan.parallel)
        _, _, kv_tokens = fleet.load_of(replica)
        kv += inheritable_kv_bytes(fleet.model, held, slot, parallel, kv_tokens)
    return weights + kv // num_heirs
