"""Emptying replicas: when the worker of a draining one is told, and what becomes of its sequences."""

from collections.abc import Sequence
from dataclasses import replace

from spotserve.controller.fleet import Fleet
from spotserve.controller.records import Instance, Leaving, Replica
from spotserve.core.cluster import ReplicaState
from spotserve.core.messages import Drain, SequenceAction, SequenceOrder
from spotserve.migration.verdicts import Destination, fallback, margin_s, spread

REPLACED_DRAIN_S = 30.0
"""How long a replica may take to be emptied when no machine goes."""

OVERDUE_S = 2.0
"""A replaced replica that has not said by so much after its deadline that it is empty is given up."""


def leave_for_notice(deadline_s: float, now_s: float) -> Leaving:
    """A machine of the replica will be taken."""
    return Leaving(deadline_s, tell_by_s=deadline_s - margin_s(deadline_s - now_s), is_replaced=False)


def leave_replaced(now_s: float) -> Leaving:
    """Others serve in its place from now on."""
    return Leaving(now_s + REPLACED_DRAIN_S, tell_by_s=now_s, is_replaced=True)


def deadline_of(leaving: Leaving) -> float | None:
    """When time alone changes something for a replica that leaves; None: never."""
    if not leaving.is_told:
        return leaving.tell_by_s
    return leaving.deadline_s + OVERDUE_S if leaving.is_replaced else None


def tell(fleet: Fleet, now_s: float) -> tuple[list[Drain], list[str]]:
    """Orders for the replicas whose time has come, and the verdicts in a sentence each.

    A replica that was replaced is told at once, and its sequences are spread. One on a machine that will be taken is told at
    once when others have room for its sequences, or when nobody else is coming; otherwise it goes on with what it has until
    others are ready, or until there is just time to let its sequences go.
    """
    waiting = [
        replica
        for replica in fleet.in_state(ReplicaState.DRAINING)
        if replica.leaving is not None and not replica.leaving.is_told and fleet.leader_of(replica) is not None
    ]
    if not waiting:
        return [], []
    replaced = [replica for replica in waiting if replica.leaving is not None and replica.leaving.is_replaced]
    dying = [replica for replica in waiting if replica not in replaced]
    destinations = fleet.destinations()
    if not _is_time(fleet, dying, destinations):
        dying = [replica for replica in dying if replica.leaving is not None and now_s >= replica.leaving.tell_by_s]
    orders = _spread(fleet, replaced, destinations) | _decide(fleet, dying, destinations, now_s)
    drains = []
    for replica in (*replaced, *dying):
        leader = fleet.leader_of(replica)
        assert leader is not None and replica.leaving is not None
        replica.leaving = replace(replica.leaving, is_told=True)
        drains.append(
            Drain(
                instance_id=leader.instance_id,
                replica_id=replica.replica_id,
                deadline_s=replica.leaving.deadline_s,
                orders=orders[leader.instance_id],
                fallback=fallback(destinations, SequenceAction.MOVE if replica.leaving.is_replaced else SequenceAction.RESUME),
            )
        )
    verdicts = [f"{order.request_id}: {order.reason}" for each in orders.values() for order in each]
    return drains, verdicts


def _is_time(fleet: Fleet, dying: Sequence[Replica], destinations: Sequence[Destination]) -> bool:
    """Whether what runs on dying replicas should leave before it must."""
    if not destinations:
        return False
    num_sequences = sum(load.num_sequences for load in fleet.loads(dying))
    room = sum(destination.free_sequences for destination in destinations)
    return num_sequences <= room or not fleet.in_state(ReplicaState.LOADING)


def _leaders(fleet: Fleet, replicas: Sequence[Replica]) -> list[Instance]:
    """Each once: its heartbeat tells of the sequences of all replicas that it leads."""
    found = {leader.instance_id: leader for replica in replicas if (leader := fleet.leader_of(replica)) is not None}
    return list(found.values())


def _spread(fleet: Fleet, replicas: Sequence[Replica], destinations: Sequence[Destination]) -> dict[str, tuple[SequenceOrder, ...]]:
    """Orders by leading instance. What several lead is spread in one go, so that no destination gets all of the longest."""
    leaders = _leaders(fleet, replicas)
    reports = {leader.instance_id: leader.heartbeat.sequences if leader.heartbeat is not None else () for leader in leaders}
    orders = {order.request_id: order for order in spread([each for some in reports.values() for each in some], destinations)}
    # in the order of `spread`: the longest first
    return {
        instance_id: tuple(order for order in orders.values() if order.request_id in {each.request_id for each in some})
        for instance_id, some in reports.items()
    }


def _decide(
    fleet: Fleet, replicas: Sequence[Replica], destinations: Sequence[Destination], now_s: float
) -> dict[str, tuple[SequenceOrder, ...]]:
    """Orders by leading instance, against the nearest deadline of its replicas."""
    orders: dict[str, tuple[SequenceOrder, ...]] = {}
    for leader in _leaders(fleet, replicas):
        deadline_s = min(
            replica.leaving.deadline_s for replica in replicas if replica.leaving and replica.leader_id == leader.instance_id
        )
        sequences = leader.heartbeat.sequences if leader.heartbeat is not None else ()
        orders[leader.instance_id] = ()
        if fleet.model is not None:
            orders[leader.instance_id] = fleet.methods.decide(
                sequences,
                now_s=now_s,
                deadline_s=deadline_s,
                source=fleet.speed_of(leader),
                destinations=destinations,
                model=fleet.model,
            )
    return orders
