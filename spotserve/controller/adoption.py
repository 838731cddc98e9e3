"""Replicas that a new controller finds: each worker brings its part, and what is complete goes on serving."""

from collections.abc import Mapping

from spotserve.controller.fleet import Fleet
from spotserve.controller.leaving import leave_replaced
from spotserve.controller.records import Replica
from spotserve.core.cluster import DeviceId, ReplicaState
from spotserve.core.messages import Deactivate, Registered, SlotReady
from spotserve.core.plan import Slot
from spotserve.planner.planner import number_of

COMPLETE_WITHIN_S = 3.0
"""Workers reconnect within tenths of a second; what has not been reported by then is not there."""


def adopt(fleet: Fleet, event: Registered, now_s: float) -> list[Deactivate]:
    """Learns what a worker serves already, for an earlier controller or from before its connection broke."""
    told: list[Deactivate] = []
    for planned in dict.fromkeys(event.replicas):  # named once for each slot
        held = {
            each.slot: DeviceId(event.instance_id, each.device_index)
            for each in event.held
            if each.slot.replica_id == planned.replica_id
        }
        known = fleet.replicas.get(planned.replica_id)
        has_ended = planned.replica_id in fleet.dropped and planned.parallel.num_slots > 1
        if has_ended or (known is not None and _is_namesake(known, held)):
            told += [
                Deactivate(instance_id=event.instance_id, device_index=device.index, slot=slot) for slot, device in held.items()
            ]
            continue
        if known is None:
            known = Replica(planned, {}, begun_s=now_s, complete_by_s=now_s + COMPLETE_WITHIN_S)
            fleet.replicas[planned.replica_id] = known
        known.learn(held)
        for slot in held:
            fleet.note_ready(known, slot)
        _serve_when_whole(fleet, known, now_s)
    return told


def adopt_slot(fleet: Fleet, event: SlotReady, now_s: float) -> list[Deactivate]:
    """A slot that an earlier controller had asked for is ready: it is a part of a replica that is being learned, or of no use."""
    device = DeviceId(event.instance_id, event.device_index)
    replica = fleet.replicas.get(event.slot.replica_id)
    if replica is None:
        return [Deactivate(instance_id=event.instance_id, device_index=event.device_index, slot=event.slot)]
    if replica.complete_by_s is not None:
        replica.learn({event.slot: device})
        fleet.note_ready(replica, event.slot)
        _serve_when_whole(fleet, replica, now_s)
    return []


def _is_namesake(known: Replica, held: Mapping[Slot, DeviceId]) -> bool:
    """Whether what a worker has is not a part of our replica, but of another that an earlier controller had called the same: it
    had numbered further than anybody had told us when we began to number."""
    return known.complete_by_s is None and any(known.devices.get(slot) != device for slot, device in held.items())


def _serve_when_whole(fleet: Fleet, replica: Replica, now_s: float) -> None:
    """A replica that is complete serves. When another serves on one of its devices, the earlier controller left in the middle of
    a re-cut: the older of the two has been replaced."""
    if replica.complete_by_s is None or not replica.is_complete:
        return
    replica.complete_by_s = None
    rivals = [other for other in fleet.on_devices(replica.devices.values()) if other.state is ReplicaState.SERVING]
    if any(number_of(rival.replica_id) > number_of(replica.replica_id) for rival in rivals):
        replaced = [replica]
    else:
        replaced = rivals
        replica.move_to(ReplicaState.SERVING)
        replica.serving_since_s = now_s
    for each in replaced:
        each.move_to(ReplicaState.DRAINING)
        each.leaving = leave_replaced(now_s)


def incomplete(fleet: Fleet) -> list[Replica]:
    """Replicas that have been heard of in part."""
    return [replica for replica in fleet.replicas.values() if replica.complete_by_s is not None]
