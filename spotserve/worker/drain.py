"""Carries out a drain: every running sequence finishes here, moves with its KV, or is resumed from its tokens elsewhere.

The controller has decided which; this is the order of doing it. First everything that must be computed again is let go, so
that its next owner starts at once; then KV moves, one sequence at a time, each running until its turn comes; what was to
finish here and has not done so shortly before the deadline moves too, as long as there is time, and else is let go.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from spotserve.core.clock import Clock
from spotserve.core.errors import WireError
from spotserve.core.messages import Drain, SequenceAction, SequenceMoved, SequenceOrder
from spotserve.worker.transfer import Parcel, PeerLinks
from spotserve.worker.worker import Worker

LEAVE_BEFORE_DEADLINE_S = 0.25
"""What is still here this long before the deadline leaves, so that it goes on elsewhere before its machine dies."""

LET_GO_BEFORE_DEADLINE_S = 0.1
"""Nothing is moved from here on: what is left is let go."""

MOVE_TIMEOUT_S = 2.0
"""A peer that has not taken a sequence by then will not."""

log = logging.getLogger(__name__)


async def carry_out(worker: Worker, drain: Drain, *, secret: str, clock: Clock, on_moved: Callable[[SequenceMoved], None]) -> None:
    """Empties the worker as `drain` says; returns when nothing runs any more."""
    orders = {order.request_id: order for order in drain.orders}
    by_action = _group(worker, orders, drain.fallback)
    for order in by_action[SequenceAction.RESUME]:
        worker.release(order.request_id, order.reason, order.destination_replica_id)
    links = PeerLinks(secret)
    try:
        for order in by_action[SequenceAction.MOVE]:
            await _move(worker, order, links, deadline_s=drain.deadline_s, clock=clock, on_moved=on_moved)
        await _wait_for_the_rest(worker, drain, clock)
        move_until_s = drain.deadline_s - LET_GO_BEFORE_DEADLINE_S
        for order in _late(worker, drain.fallback):
            if order.action is SequenceAction.MOVE and clock.now_s() < move_until_s:
                await _move(worker, order, links, deadline_s=move_until_s, clock=clock, on_moved=on_moved)
            else:
                worker.release(order.request_id, order.reason, order.destination_replica_id)
    finally:
        links.close()


def _group(
    worker: Worker, orders: Mapping[str, SequenceOrder], fallback: SequenceOrder
) -> dict[SequenceAction, list[SequenceOrder]]:
    """Orders of what runs here now, by action; in the controller's order, then what it had not heard of."""
    running = {request.request_id for request in worker.running_requests()}
    grouped: dict[SequenceAction, list[SequenceOrder]] = {action: [] for action in SequenceAction}
    for order in orders.values():
        if order.request_id in running:
            grouped[order.action].append(order)
    for request_id in sorted(running - orders.keys()):
        order = SequenceOrder(
            request_id=request_id,
            action=fallback.action,
            destination_replica_id=fallback.destination_replica_id,
            destination=fallback.destination,
            reason=fallback.reason,
        )
        grouped[order.action].append(order)
    return grouped


async def _move(
    worker: Worker,
    order: SequenceOrder,
    links: PeerLinks,
    *,
    deadline_s: float,
    clock: Clock,
    on_moved: Callable[[SequenceMoved], None],
) -> None:
    assert order.destination is not None, "an order to move names where to"
    assert order.destination_replica_id is not None, "an order to move names the replica"
    try:
        await links.open(order.destination, within_s=_time_left_s(deadline_s, clock))
    except WireError as error:
        worker.release(order.request_id, f"not moved: {error}", None)
        return
    parcel = None
    refusal: str | None = "the drain was called off"
    started_s = time.perf_counter()
    try:
        parcel = await worker.pack(order.request_id)
        refusal = "it has ended" if parcel is None else await _deliver(parcel, order, links, _time_left_s(deadline_s, clock))
    finally:
        if refusal is not None:  # the sequence has left the engine: whatever went wrong, it must not be stranded here
            log.info("%s was not moved: %s", order.request_id, refusal)
            worker.release(order.request_id, f"not moved: {refusal}", None)
    if parcel is not None and refusal is None:
        worker.ship(parcel, order.destination_replica_id)
        on_moved(
            SequenceMoved(
                instance_id=worker.instance_id,
                request_id=order.request_id,
                destination_replica_id=order.destination_replica_id,
                kv_bytes=parcel.kv_bytes,
                seconds=time.perf_counter() - started_s,
            )
        )


def _time_left_s(deadline_s: float, clock: Clock) -> float:
    return max(0.0, min(MOVE_TIMEOUT_S, deadline_s - clock.now_s()))


async def _deliver(parcel: Parcel, order: SequenceOrder, links: PeerLinks, within_s: float) -> str | None:
    """Why the parcel was not taken; None when it was."""
    assert order.destination is not None
    try:
        answer = await links.deliver(parcel, order.destination, within_s=within_s)
    except WireError as error:
        return str(error)
    return None if answer.accepted else answer.reason


async def _wait_for_the_rest(worker: Worker, drain: Drain, clock: Clock) -> None:
    """Until everything has finished, or the deadline is near."""
    while worker.running_requests() and clock.now_s() < drain.deadline_s - LEAVE_BEFORE_DEADLINE_S:
        await asyncio.sleep(min(0.05, max(0.0, drain.deadline_s - LEAVE_BEFORE_DEADLINE_S - clock.now_s())))


def _late(worker: Worker, fallback: SequenceOrder) -> list[SequenceOrder]:
    """Orders for what did not finish: its KV is worth taking along wherever `fallback` names an address."""
    action = SequenceAction.RESUME if fallback.destination is None else SequenceAction.MOVE
    return [
        msgspec.structs.replace(fallback, request_id=request.request_id, action=action, reason="did not finish in time")
        for request in worker.running_requests()
    ]
