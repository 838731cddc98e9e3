"""Every pair of states, allowed and not; notices collapse; fencing numbers grow as they should."""

from enum import Enum
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.cluster import (
    INSTANCE_TRANSITIONS,
    REPLICA_TRANSITIONS,
    REQUEST_TRANSITIONS,
    DeviceId,
    InstanceState,
    Notice,
    ReplicaState,
    RequestState,
    advance,
)
from spotserve.core.epoch import after_dispatch, after_hand_over, first_epoch
from spotserve.core.errors import IllegalTransition
from spotserve.core.plan import Parallel, Placement, ReplicaPlan, Slot

ALLOWED = {
    (InstanceState.PENDING, InstanceState.READY),
    (InstanceState.PENDING, InstanceState.DRAINING),
    (InstanceState.PENDING, InstanceState.GONE),
    (InstanceState.READY, InstanceState.DRAINING),
    (InstanceState.READY, InstanceState.GONE),
    (InstanceState.DRAINING, InstanceState.READY),
    (InstanceState.DRAINING, InstanceState.GONE),
    (ReplicaState.LOADING, ReplicaState.SERVING),
    (ReplicaState.LOADING, ReplicaState.DRAINING),
    (ReplicaState.LOADING, ReplicaState.STOPPED),
    (ReplicaState.SERVING, ReplicaState.DRAINING),
    (ReplicaState.SERVING, ReplicaState.STOPPED),
    (ReplicaState.DRAINING, ReplicaState.SERVING),
    (ReplicaState.DRAINING, ReplicaState.STOPPED),
    (RequestState.QUEUED, RequestState.RUNNING),
    (RequestState.QUEUED, RequestState.FINISHED),
    (RequestState.RUNNING, RequestState.SUSPENDED),
    (RequestState.RUNNING, RequestState.FINISHED),
    (RequestState.SUSPENDED, RequestState.RUNNING),
    (RequestState.SUSPENDED, RequestState.FINISHED),
}

PAIRS = [
    (table, current, target)
    for table, states in (
        (INSTANCE_TRANSITIONS, InstanceState),
        (REPLICA_TRANSITIONS, ReplicaState),
        (REQUEST_TRANSITIONS, RequestState),
    )
    for current, target in product(states, states)
]


@pytest.mark.parametrize(("table", "current", "target"), PAIRS)
def test_every_pair_of_states_is_allowed_or_refused_as_the_table_says(table: dict, current: Enum, target: Enum) -> None:
    if (current, target) in ALLOWED:
        assert advance(table, current, target) is target
    else:
        with pytest.raises(IllegalTransition, match=f"{current.name} to {target.name}"):
            advance(table, current, target)


def test_two_sources_of_one_notice_collapse_to_one() -> None:
    by_metadata = Notice(instance_id="i-1", deadline_s=1700000120.2, source="metadata")
    by_queue = Notice(instance_id="i-1", deadline_s=1700000119.9, source="queue")
    assert by_metadata.notice_id == by_queue.notice_id
    assert by_metadata.notice_id != Notice(instance_id="i-2", deadline_s=1700000120.2).notice_id
    assert by_metadata.notice_id != Notice(instance_id="i-1", deadline_s=1700000125.0).notice_id


@given(st.integers(0, 40), st.integers(0, 1000))
def test_a_dispatch_is_ahead_of_every_hand_over_before_it(dispatches: int, hand_overs: int) -> None:
    epoch = first_epoch()
    for _ in range(dispatches):
        epoch = after_dispatch(epoch)
    moved = epoch
    for _ in range(hand_overs):
        moved = after_hand_over(moved)
    assert epoch <= moved < after_dispatch(epoch) == after_dispatch(moved)


def test_slots_of_a_replica_are_stage_by_stage() -> None:
    replica = ReplicaPlan(replica_id="r-1", parallel=Parallel(pipeline=2, tensor=2))
    assert [(slot.stage, slot.shard) for slot in replica.slots] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_device_takes_one_slot_at_most() -> None:
    device = DeviceId("i-1", 0)
    with pytest.raises(AssertionError, match="two slots"):
        Placement(devices={Slot("r-1", 0, 0): device, Slot("r-2", 0, 0): device})
