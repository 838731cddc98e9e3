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
from spotserve.core.errors import PeerLost, WireError
from spotserve.core.messages import (
    Address,
    Drain,
    HandOver,
    HandOverAnswered,
    SequenceAction,
    SequenceMoved,
    SequenceOrder,
)
from spotserve.worker.transfer import PeerLinks
from spotserve.worker.worker import Worker

LEAVE_BEFORE_DEADLINE_S = 0.25
"""What is still here this long before the deadline leaves, so that it goes on elsewhere before its machine dies."""

LET_GO_BEFORE_DEADLINE_S = 0.1
"""Nothing is moved from here on: what is left is let go."""

MOVE_TIMEOUT_S = 2.0
"""A peer that has not taken a sequence by then will not."""

log = logging.getLogger(__name__)


async def carry_out(worker: Worker, drain: Drain, *, secret: str, clock: Clock, on_moved: Callable[[SequenceMoved], None]) -> None:
    """Empties a replica as `drain` says; returns when nothing runs on it any more."""
    orders = {order.request_id: order for order in drain.orders}
    by_action = _group(worker, drain, orders)
    for order in by_action[SequenceAction.RESUME]:
        worker.release(order.request_id, order.reason, order.destination_replica_id)
    links = PeerLinks(secret)
    try:
        for order in by_action[SequenceAction.MOVE]:
            await _move(worker, order, links, deadline_s=drain.deadline_s, clock=clock, on_moved=on_moved)
        await _wait_for_the_rest(worker, drain, clock)
        move_until_s = drain.deadline_s - LET_GO_BEFORE_DEADLINE_S
        for order in _late(worker, drain):
            if order.action is SequenceAction.MOVE and clock.now_s() < move_until_s:
                await _move(worker, order, links, deadline_s=move_until_s, clock=clock, on_moved=on_moved)
            else:
                worker.release(order.request_id, order.reason, order.destination_replica_id)
    finally:
        links.close()


def _group(worker: Worker, drain: Drain, orders: Mapping[str, SequenceOrder]) -> dict[SequenceAction, list[SequenceOrder]]:
    """Orders of what runs here now, by action; in the controller's order, then what it had not heard of."""
    fallback = drain.fallback
    running = {request.request_id for request in worker.running_requests(drain.replica_id)}
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
    stays = worker.led(order.destination_replica_id) is not None
    if not stays:
        try:
            await links.open(order.destination, within_s=_time_left_s(deadline_s, clock))
        except WireError as error:
            worker.release(order.request_id, f"not moved: {error}", None)
            return
    hand_over = None
    answer = HandOverAnswered(request_id=order.request_id, accepted=False, reason="the drain was called off")
    started_s = time.perf_counter()
    try:
        hand_over = await worker.pack(order.request_id)
        if hand_over is None:
            answer = HandOverAnswered(request_id=order.request_id, accepted=False, reason="it has ended, or has no KV to move")
        elif stays:
            answer = await worker.pass_on(hand_over, order.destination_replica_id)
        else:
            answer = await _offer(hand_over, order.destination, links, _time_left_s(deadline_s, clock))
    except PeerLost as error:
        answer = HandOverAnswered(request_id=order.request_id, accepted=False, reason=f"its replica has broken: {error}")
    finally:
        if not answer.accepted:  # the sequence has left the engine: whatever went wrong, it must not be stranded here
            log.info("%s was not moved: %s", order.request_id, answer.reason)
            worker.release(order.request_id, f"not moved: {answer.reason}", None)
            if hand_over is not None:
                worker.unfreeze(hand_over)
    if hand_over is not None and answer.accepted:
        if not stays:
            worker.ship(hand_over, order.destination_replica_id)
        on_moved(
            SequenceMoved(
                instance_id=worker.instance_id,
                request_id=order.request_id,
                destination_replica_id=order.destination_replica_id,
                kv_bytes=answer.kv_bytes,
                seconds=time.perf_counter() - started_s,
            )
        )


def _time_left_s(deadline_s: float, clock: Clock) -> float:
    return max(0.0, min(MOVE_TIMEOUT_S, deadline_s - clock.now_s()))


async def _offer(hand_over: HandOver, destination: Address, links: PeerLinks, within_s: float) -> HandOverAnswered:
    try:
        return await links.deliver(hand_over, destination, within_s=within_s)
    except WireError as error:
        return HandOverAnswered(request_id=hand_over.request.request_id, accepted=False, reason=str(error))


async def _wait_for_the_rest(worker: Worker, drain: Drain, clock: Clock) -> None:
    """Until everything has finished, or the deadline is near."""
    while worker.running_requests(drain.replica_id) and clock.now_s() < drain.deadline_s - LEAVE_BEFORE_DEADLINE_S:
        await asyncio.sleep(min(0.05, max(0.0, drain.deadline_s - LEAVE_BEFORE_DEADLINE_S - clock.now_s())))


def _late(worker: Worker, drain: Drain) -> list[SequenceOrder]:
    """Orders for what did not finish: its KV is worth taking along wherever the fallback names an address."""
    action = SequenceAction.RESUME if drain.fallback.destination is None else SequenceAction.MOVE
    return [
        msgspec.structs.replace(drain.fallback, request_id=request.request_id, action=action, reason="did not finish in time")
        for request in worker.running_requests(drain.replica_id)
    ]
