"""What a cloud's notice means for the replicas on a machine, and what it means that it does not come true."""

from collections.abc import Sequence

from spotserve.controller.fleet import Fleet
from spotserve.controller.leaving import leave_for_notice, leave_replaced
from spotserve.controller.records import Instance, Replica
from spotserve.core.cluster import InstanceState, Notice, ReplicaState
from spotserve.core.messages import Deactivate, Undrain
from spotserve.planner.planner import number_of

REVERT_AFTER_S = 1.0
"""A notice whose deadline has passed by this much, with the instance still there, did not come true."""


def announce(fleet: Fleet, instance: Instance, notice: Notice, now_s: float) -> list[Deactivate]:
    """The machine will be taken: its replicas take nothing new from here on, and what was being brought up on it is dropped."""
    instance.notice = notice
    if instance.state is not InstanceState.DRAINING:
        instance.move_to(InstanceState.DRAINING)
    commands: list[Deactivate] = []
    for replica in fleet.replicas_on(instance.instance_id):
        if replica.state is ReplicaState.LOADING:
            commands += fleet.drop(replica)
            continue
        if replica.state is ReplicaState.SERVING:
            replica.move_to(ReplicaState.DRAINING)
        replica.leaving = leave_for_notice(min(_deadlines(fleet, replica)), now_s)
    return commands


def revert(fleet: Fleet, instance: Instance, now_s: float) -> list[Undrain]:
    """The machine stays: its replicas serve again, unless another of their machines goes or others serve in their place."""
    instance.notice = None
    instance.move_to(InstanceState.READY)
    commands: list[Undrain] = []
    for replica in sorted(fleet.replicas_on(instance.instance_id), key=lambda each: number_of(each.replica_id), reverse=True):
        if replica.state is not ReplicaState.DRAINING or replica.leaving is None or replica.leaving.is_replaced:
            continue
        if deadlines := _deadlines(fleet, replica):
            replica.leaving = leave_for_notice(min(deadlines), now_s)
        elif _is_displaced(fleet, replica):
            replica.leaving = leave_replaced(now_s)
        else:
            replica.move_to(ReplicaState.SERVING)
            if replica.leaving.is_told and replica.leader_id is not None:
                commands.append(Undrain(instance_id=replica.leader_id, replica_id=replica.replica_id))
            replica.leaving = None
    return commands


def _deadlines(fleet: Fleet, replica: Replica) -> Sequence[float]:
    instances = (fleet.instances[instance_id] for instance_id in replica.instance_ids)
    return [instance.notice.deadline_s for instance in instances if instance.notice is not None]


def _is_displaced(fleet: Fleet, replica: Replica) -> bool:
    """Whether another replica serves on one of its devices."""
    return any(other.state is ReplicaState.SERVING for other in fleet.on_devices(replica.devices.values()))
